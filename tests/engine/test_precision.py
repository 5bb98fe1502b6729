"""Requests that read a longer window than the server's: the bits of a server whose own window is as long, whoever is
beside them."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from transformers import Qwen3Config

from engine.assembly import StartError, build, make_manager
from engine.config import EngineConfig
from engine.core import EngineCore, Parts
from engine.messages import Event, Failed, PromptLogprobs, Submit, Token
from tests.engine.cached import poison, prompt_of, seeded
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import SIZES
from tests.engine.worlds import run, submit

MAX_LEN = 192
OWN, LONGER = "k4v2:w16:s4", "k4v2:w48:s4"
WINDOWS = {None: OWN, LONGER: LONGER, "f16": f"k4v2:w{MAX_LEN}:s4"}  # what is asked for -> a server that has it


class World:
    """A server with a short window, and one for each that a request may ask for."""

    def __init__(self, folder: Path) -> None:
        config = EngineConfig(str(folder), kv_policy=OWN, page_size=16, max_num_seqs=8, head_bits=16)
        self.parts = build(msgspec.structs.replace(config, kv_request_window=MAX_LEN))[0].parts
        self.scorers = {
            asked: build(msgspec.structs.replace(config, kv_policy=policy))[0].parts
            for asked, policy in WINDOWS.items()
        }

    def core(self, max_batch_tokens: int = 64, num_recent_pages: int | None = None) -> EngineCore:
        """An engine over a cache full of NaN."""
        poison(self.parts)
        plan = msgspec.structs.replace(
            self.parts.plan,
            max_batch_tokens=max_batch_tokens,
            num_recent_pages=num_recent_pages or self.parts.plan.num_recent_pages,
        )
        manager = make_manager(plan, self.parts.storage.layout, "test")
        return EngineCore(replace(self.parts, plan=plan, manager=manager))

    def check(self, request: Submit, events: list[Event]) -> None:
        """Every choice of a request, to the last bit, against an engine that has done nothing else."""
        for index in range(request.n):
            found = [e for e in events if isinstance(e, Token) and (e.id, e.index) == (request.id, index)]
            tokens = [*request.prompt, *(e.token for e in found)]
            assert len(found) == request.sampling.max_tokens
            scores = scores_of(self.scorers[request.kv_policy], tokens)
            assert [e.logprobs for e in found] == scores[len(request.prompt) - 1 :]


def scores_of(parts: Parts, tokens: list[int]) -> list[object]:
    poison(parts)
    manager = make_manager(parts.plan, parts.storage.layout, "score")
    events = run(
        EngineCore(replace(parts, manager=manager)), [submit("score", tokens, max_tokens=0, num_prompt_logprobs=3)]
    )
    (event,) = (e for e in events if isinstance(e, PromptLogprobs))
    return [*event.entries]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    sizes = SIZES | {"max_position_embeddings": MAX_LEN, "vocab_size": 61}
    write_checkpoint(made, Qwen3Config(**sizes, head_dim=32))
    return made


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return World(folder)


def asking(asked: str | None, request: Submit) -> Submit:
    return msgspec.structs.replace(request, kv_policy=asked)


@pytest.mark.parametrize("asked", [LONGER, "f16"])
def test_a_longer_window_is_that_of_a_server_with_one(world: World, asked: str) -> None:
    """Bug: a request's window that decoding follows and its prompt does not, or that ends at a chunk's edge."""
    request = asking(asked, seeded("it", prompt_of(0, 100, 9), max_tokens=20))
    for chunk in (9, 64):
        world.check(request, run(world.core(chunk), [request]))
    own = run(world.core(), [asking(None, request)])
    found = [e.logprobs for e in own if isinstance(e, Token)]
    assert found != [e.logprobs for e in run(world.core(), [request]) if isinstance(e, Token)]  # it does matter


def test_windows_mix_in_one_batch(world: World) -> None:
    """Bugs: a step that reads one window for all; prompts alike that share pages computed under another window."""
    asked = [None, LONGER, "f16", None, "f16", LONGER]
    requests = [asking(a, seeded(f"{i}", prompt_of(i % 2, 60, i), 12, n=1 + i % 2)) for i, a in enumerate(asked)]
    events = run(world.core(24), requests)
    for request in requests:
        world.check(request, events)


def test_prefixes_are_shared_within_a_window_only(world: World) -> None:
    """Bug: keys of deeper layers, which depend on the window read below them, taken up under another window."""
    core, prompt = world.core(), prompt_of(0, 100, 9)
    for number, (asked, num_hit) in enumerate(
        [(None, 0), (LONGER, 0), ("f16", 0), (LONGER, 96), (None, 96), ("f16", 96), (OWN, 96)]
    ):
        before = core.stats().prefix_hits_total
        request = asking(asked, seeded(f"{number}", prompt))
        events = run(core, [request])
        assert core.stats().prefix_hits_total - before == num_hit, f"request {number}"
        world.check(request if asked != OWN else asking(None, request), events)


def test_preempted_sequences_keep_their_window(world: World) -> None:
    """Bug: a sequence that is resumed with the server's window."""
    core = world.core()
    asked = [LONGER, None, "f16", LONGER]
    requests = [asking(a, seeded(f"{i}", prompt_of(i % 2, 60, i), 12, priority=-i)) for i, a in enumerate(asked)]
    events = [event for request in requests for event in core.step([request])]
    while core.has_work:
        events += core.step([])
        core.check_integrity()
        if core.stats().steps_total % 5 == 0 and core.has_work:
            core._scheduler._preempt(core._scheduler.sequences()[0])
    assert core.stats().preemptions_total > 1
    for request in requests:
        world.check(request, events)


def test_a_window_without_room_waits(world: World) -> None:
    """Bug: a long window admitted as if it took the server's own, which preempts what runs or stops the engine."""
    core = world.core(num_recent_pages=14)  # of which one request in float16 takes 13 at most
    requests = [asking("f16", seeded(f"{i}", prompt_of(i, 100, 9))) for i in range(2)]
    events = core.step(requests)
    while core.stats().num_waiting:
        assert core.stats().num_running <= 1
        events += core.step([])
        core.check_integrity()
    events += run(core, [])
    assert core.stats().preemptions_total == 0
    for request in requests:
        world.check(request, events)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("k4v2:w8:s4", r"a window of 8 is shorter than the KV cache's own 16"),
        ("k4v2:w65:s4", r"a window of 65 is longer than the 64 that one request may have \(--kv-request-window\)"),
        ("k8v8:w64:s4", r"k8v8:w64:s4 differs from the KV cache's own k4v2:w16:s4 .* ask for k4v2:w64:s4 or f16"),
        ("k4v2:w64", None),
        ("k4v2:w64:s5", r"differs .* groups and sinks"),
        ("k4v2:w64:g8:s4", r"differs"),
        ("k4v2:g7", r"cannot serve this model"),
        ("f32", r"f32 is kept nowhere here; the highest precision is f16"),
        ("fp16", r"'fp16' is not known"),
        ("f16", r"f16 for 70 tokens of prompt and answer is more than the 64 that one request may have"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(world: World, asked: str, why: str | None) -> None:
    """Bug: a wish that is ignored, or honoured beyond what the operator allows."""
    core = world.core()
    core.parts = replace(core.parts, plan=msgspec.structs.replace(core.parts.plan, kv_request_window=64))
    events = core.step([asking(asked, submit("it", [1] * 60, max_tokens=10))])
    if why is None:
        assert not any(isinstance(event, Failed) for event in events)
        return
    (event,) = events
    assert isinstance(event, Failed)
    assert (event.kind, event.param) == ("invalid", "kv_policy")
    assert re.search(why, event.message), event.message


def test_a_server_without_the_setting_gives_nothing_more(world: World) -> None:
    """Bug: a wish that takes memory which nobody set aside."""
    core = world.core()
    core.parts = replace(core.parts, plan=msgspec.structs.replace(core.parts.plan, kv_request_window=0))
    for asked in (LONGER, "f16"):
        (event,) = core.step([asking(asked, submit(asked, [1]))])
        assert isinstance(event, Failed)
        assert "is not on offer: the model was loaded without --kv-request-window" in event.message
    run(core, [asking(OWN, submit("own", [1]))])


def test_a_float16_server_takes_its_own_name_only(folder: Path) -> None:
    core, _ = build(EngineConfig(str(folder), kv_policy="f16", max_num_seqs=8))
    assert not any(isinstance(event, Failed) for event in run(core, [asking("f16", submit("it", [1]))]))
    for asked in ("k4v4", "f32"):
        (event,) = core.step([asking(asked, submit("it", [1]))])
        assert isinstance(event, Failed)
        assert "the KV cache holds f16 for every request" in event.message
    with pytest.raises(StartError, match="--kv-request-window 64 is for quantized caches"):
        build(EngineConfig(str(folder), kv_policy="f16", kv_request_window=64))


def test_a_cache_without_a_window_can_give_requests_one(folder: Path) -> None:
    """Bug: recent pages left out because the server's own policy needs none."""
    config = EngineConfig(str(folder), kv_policy="k4v2:w0:s0", page_size=16, max_num_seqs=8, kv_request_window=64)
    core, plan = build(config)
    assert plan.num_recent_pages > 0
    requests = [asking(a, seeded(f"{a}", prompt_of(0, 40, 3))) for a in (None, "k4v2:w32:s0")]
    events = run(core, requests)
    for request, policy in zip(requests, ("k4v2:w0:s0", "k4v2:w32:s0"), strict=True):
        own, _ = build(msgspec.structs.replace(config, kv_policy=policy, kv_request_window=0))
        alone = run(own, [asking(None, request)])
        found, expected = (
            [e.logprobs for e in x if isinstance(e, Token) and e.id == request.id] for x in (events, alone)
        )
        assert found == expected
