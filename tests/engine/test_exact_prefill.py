"""Prompts that attend in high precision throughout: the bits of a cache whose window is longer than the prompt, for
answers that read the policy's window, whatever happens beside them."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from engine.assembly import StartError, build
from engine.batch import Batch, BatchRow, build_batch
from engine.config import EngineConfig
from engine.core import Parts
from engine.graphs import size_for, sizes
from engine.messages import Event, Logprobs, Submit, Token
from tests.engine.cached import MAX_LEN, World, poison, prompt_of, seeded
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import SIZES
from tests.engine.test_precision import scores_of
from tests.engine.test_schedules import steps
from tests.engine.worlds import run

PAGE_SIZE = 16
POLICIES = ["k4v2:w16:s4", "k2v2:w40:s4/0=f16", "k4v4:w0:s0"]


@dataclass(frozen=True)
class Exact:
    """An engine with exact prompts; one with windows alone to score answers; one whose window is as long as any
    prompt."""

    world: World
    longest: Parts

    def scores(self, tokens: list[int], num_prompt: int) -> list[Logprobs]:
        """The log-probabilities of tokens[num_prompt:], in two steps of the model itself: the prompt with a window
        that holds it all, then the answer with the policy's. No book-keeping is asked."""
        parts = self.world.scorer
        poison(parts)
        pages = list(range(MAX_LEN // PAGE_SIZE))
        recent = dict(enumerate(range(MAX_LEN // 16)))
        prompt = BatchRow(tokens[:num_prompt], 0, pages, PAGE_SIZE, 1, recent, MAX_LEN)
        answer = BatchRow(tokens[num_prompt:], num_prompt, pages, PAGE_SIZE, len(tokens) - num_prompt, recent)
        logits = torch.cat([parts.runner.run(build_batch([row])) for row in (prompt, answer)])
        return [parts.sampler.logprobs_of(logits[i], token, 3) for i, token in enumerate(tokens[num_prompt:])]

    def check(self, request: Submit, events: list[Event]) -> None:
        """Every choice of a request, to the last bit."""
        for index in range(request.n):
            found = [e for e in events if isinstance(e, Token) and (e.id, e.index) == (request.id, index)]
            tokens = [*request.prompt, *(e.token for e in found)]
            assert len(found) == request.sampling.max_tokens
            assert [e.logprobs for e in found] == self.scores(tokens, len(request.prompt))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    sizes = SIZES | {"max_position_embeddings": MAX_LEN, "vocab_size": 61}
    write_checkpoint(made, Qwen3Config(**sizes, head_dim=32))
    return made


@pytest.fixture(scope="module", params=POLICIES)
def exact(folder: Path, request: pytest.FixtureRequest) -> Exact:
    policy = str(request.param)
    config = EngineConfig(str(folder), kv_policy=policy, page_size=PAGE_SIZE, max_num_seqs=8, head_bits=16)
    windowed = msgspec.structs.replace(config, kv_request_window=MAX_LEN)  # for recent pages of whole sequences
    longest = msgspec.structs.replace(config, kv_policy=re.sub(r":w\d+", f":w{MAX_LEN}", policy))
    world = World(
        build(msgspec.structs.replace(config, kv_prefill="exact"))[0].parts,
        build(windowed)[0].parts,
    )
    return Exact(world, build(longest)[0].parts)


def test_chunks_and_neighbours(exact: Exact) -> None:
    """Bugs: a prompt row that reads its window alone, or tokens of an earlier chunk that are gone; an answer that reads
    more than its window."""
    request = seeded("it", prompt_of(0, 130, 3), 20)
    crowd = [seeded(f"{i}", prompt_of(i, 3 + 17 * i, 1), n=1 + i % 2) for i in range(1, 8)]
    for chunk, others in ((16, []), (64, crowd), (512, crowd), (512, [])):
        events = run(exact.world.core(chunk, spare_recent=None if others else 0), [*others, request])
        for one in (*others, request):
            exact.check(one, events)


def test_a_prompt_scores_as_with_a_window_longer_than_it(exact: Exact) -> None:
    """Bug: prompt logits that are anything but those of high precision; and they must not be those of the window."""
    tokens = prompt_of(0, 150, 9)
    for chunk in (16, 512):
        assert scores_of(exact.longest, tokens) == scores_of_chunked(exact.world, chunk, tokens)
    assert scores_of(exact.world.scorer, tokens) != scores_of(exact.longest, tokens)


def scores_of_chunked(world: World, chunk: int, tokens: list[int]) -> list[object]:
    parts = world.parts
    return scores_of(replace(parts, plan=msgspec.structs.replace(parts.plan, max_batch_tokens=chunk)), tokens)


def test_answers_read_a_window(exact: Exact) -> None:
    """Bug: a sequence that never narrows; then all but the first token would be those of the longest window."""
    request = seeded("it", prompt_of(0, 100, 9), 20)
    events = run(exact.world.core(), [request])
    found = [e for e in events if isinstance(e, Token)]
    longest = scores_of(exact.longest, [*request.prompt, *(e.token for e in found)])[len(request.prompt) - 1 :]
    assert found[0].logprobs == longest[0]
    assert [e.logprobs for e in found] != longest


def test_answers_take_recorded_steps(exact: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a window spelled out that is the policy's own, for which no step is recorded on a GPU (engine/graphs.py)."""
    runner, batches = exact.world.parts.runner, list[Batch]()
    run_step = runner.run

    def watched(batch: Batch) -> torch.Tensor:
        batches.append(batch)
        return run_step(batch)

    monkeypatch.setattr(runner, "run", watched)
    run(exact.world.core(), [seeded("it", prompt_of(0, 50, 9), 5)])
    assert [size_for(batch, sizes(8, MAX_LEN)) is not None for batch in batches] == [False, True, True, True, True]


def test_prompts_are_found_again(exact: Exact) -> None:
    """Bugs: a hit whose first tokens are no longer there in high precision; pages of an answer, which read a window,
    taken for those of a prompt that continues it."""
    core = exact.world.core()
    first = seeded("first", prompt_of(0, 100, 3), 40)
    events = run(core, [first])
    exact.check(first, events)
    answer = [e.token for e in events if isinstance(e, Token)]
    following = seeded("following", [*first.prompt, *answer, 1, 2, 3], n=2)
    exact.check(following, run(core, [following]))
    assert core.stats().prefix_hits_total == 96


@pytest.mark.parametrize("swap_sequences", [0, 8])
def test_preemption(exact: Exact, swap_sequences: int) -> None:
    """Bugs: a resumed answer that reads its own tokens as a prompt's; a step that crosses the end of the prompt; a
    prompt that is swapped out without its beginning."""
    requests = [seeded("0", prompt_of(0, 70, 9), 12), seeded("1", prompt_of(0, 90, 5), 12, n=2, priority=1)]
    core = exact.world.core(16, spare_recent=4, swap_sequences=swap_sequences)
    events = core.step(requests)
    while core.has_work:
        if core.stats().steps_total % 3 == 0 and core.stats().num_running:
            core._scheduler._preempt(core._scheduler.sequences()[0])
        events += core.step([])
        core.check_integrity()
    assert core.stats().preemptions_total > 3
    assert (core.stats().swaps_in_total > 0) == bool(swap_sequences)
    for request in requests:
        exact.check(request, events)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_schedule(exact: Exact, data: st.DataObject) -> None:
    """Requests that begin alike come and are preempted, in a cache with little room."""
    integers = st.integers
    core = exact.world.core(
        max_batch_tokens=data.draw(st.sampled_from([16, 64, 512]), "chunk"),
        num_sequences=data.draw(integers(1, 4), "pages for"),
        spare_recent=data.draw(integers(0, 20), "spare recent pages"),
        max_num_seqs=data.draw(st.sampled_from([1, 8]), "seats"),
        swap_sequences=data.draw(integers(0, 2), "swap space for"),
    )
    events: list[Event] = []
    requests = []
    for i in range(data.draw(integers(1, 5), "requests")):
        prompt = prompt_of(data.draw(integers(0, 1)), data.draw(integers(0, 130)), data.draw(integers(1, 9)))
        choices, priority = data.draw(integers(1, 3)), data.draw(integers(-1, 1))
        requests.append(seeded(f"{i}", prompt, data.draw(integers(1, 20)), choices, priority))
        events += steps(core, requests[-1], data.draw(st.lists(integers(-8, 7), max_size=8), "preempted"))
    events += run(core, [])
    for request in requests:
        exact.check(request, events)


def test_the_longest_prompt_always_fits(folder: Path) -> None:
    """Bug: a cache of which one request can never get the recent pages that its prompt takes."""
    config = EngineConfig(str(folder), kv_policy="k4v2:w16:s4", page_size=PAGE_SIZE, max_num_seqs=8, kv_prefill="exact")
    _, whole = build(config)
    least = whole.bytes_per_page * 6 + whole.bytes_per_recent_page * (3 + 512 // 16)
    core, plan = build(msgspec.structs.replace(config, kv_memory=least))
    assert plan.max_model_len == 96
    assert any("context limited to 96" in note for note in plan.notes)
    assert any("--kv-prefill exact" in note for note in plan.notes)
    run(core, [seeded("longest", prompt_of(0, 0, 96), max_tokens=0)])
    with pytest.raises(StartError, match=r"--max-model-len 192 needs .* or use --kv-prefill windowed"):
        build(msgspec.structs.replace(config, kv_memory=least, max_model_len=192))


def test_a_cache_without_quantized_layers_refuses_the_setting(folder: Path) -> None:
    with pytest.raises(StartError, match="--kv-prefill exact is for quantized caches"):
        build(EngineConfig(str(folder), kv_policy="f16", kv_prefill="exact"))
