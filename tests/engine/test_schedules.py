"""Whatever the engine does beside a request, it answers what it answers alone in a cold engine, to the last bit."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from engine.assembly import build
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Cancel, Event, Logprobs, PromptLogprobs, Submit, Token
from tests.engine.artifacts import write_random
from tests.engine.cached import MAX_LEN, World, prompt_of, seeded
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import SIZES
from tests.engine.queued import queued
from tests.engine.test_gpu_sampling import OnGpu
from tests.engine.worlds import run, submit

POLICIES = {"k4v4:w16:s4": 16, "skvq:k2v2:w40:s4": 32, "f16": 16}  # name -> tokens of a page
REQUESTS = [
    seeded("0", prompt_of(0, 100, 9), 20),
    seeded("1", prompt_of(0, 100, 3), 30, n=3),  # begins like the first, which leaves pages and their window behind
    seeded("2", prompt_of(1, 130, 1), 9),
    seeded("3", prompt_of(0, 64, 1), 40, priority=1),
    seeded("4", prompt_of(0, 33, 30), 12, n=2, priority=-1),
    submit("5", prompt_of(1, 70, 5), max_tokens=6, num_prompt_logprobs=2, num_logprobs=2, ignore_eos=True),
    *(seeded(f"{i}", prompt_of(i, 5 * i, 2), 10 + i) for i in range(6, 11)),
]
Answer = list[tuple[int, int, Logprobs | None] | PromptLogprobs]


@dataclass(frozen=True)
class Alone:
    """A world, and what each request gets in an engine that serves nothing else."""

    world: World
    answers: dict[str, Answer]


@pytest.fixture(scope="module", params=POLICIES)
def alone(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Alone:
    policy, folder = str(request.param), tmp_path_factory.mktemp("model")
    sizes = SIZES | {"max_position_embeddings": MAX_LEN, "vocab_size": 61}
    write_checkpoint(folder, Qwen3Config(**sizes, head_dim=32))
    artifact = str(write_random(folder, policy, folder / "cal", rotated=True)) if "skvq" in policy else None
    config = EngineConfig(
        str(folder), kv_policy=policy, kv_calibration=artifact, page_size=POLICIES[policy], max_num_seqs=8, head_bits=16
    )
    parts = build(config)[0].parts
    world = World(parts, parts)
    return Alone(world, {r.id: answer(run(world.core(512), [r]), r.id) for r in REQUESTS})


def answer(events: Sequence[Event], request_id: str) -> Answer:
    """All that the caller of one request is told of its tokens, choice by choice."""
    mine = [e for e in events if e.id == request_id]
    tokens = [(e.index, e.token, e.logprobs) for e in mine if isinstance(e, Token)]
    return [*(e for e in mine if isinstance(e, PromptLogprobs)), *sorted(tokens, key=lambda token: token[0])]


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_schedule(alone: Alone, data: st.DataObject) -> None:
    """Bug: an answer that depends on chunks, neighbours, seats, prefix hits, forks, preemption or swapping."""
    integers = st.integers
    core = alone.world.core(
        max_batch_tokens=data.draw(st.sampled_from([16, 64, 512]), "chunk"),
        num_sequences=data.draw(integers(1, 6), "pages for"),
        spare_recent=data.draw(integers(0, 40), "spare recent pages"),
        max_num_seqs=data.draw(st.sampled_from([1, 8]), "seats"),
        swap_sequences=data.draw(integers(0, 3), "swap space for"),
    )
    chosen = data.draw(
        st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=8, unique_by=lambda r: r.id), "requests"
    )
    cancelled = data.draw(st.sets(st.sampled_from(chosen).map(lambda r: r.id), max_size=2), "cancelled")
    preempted = [data.draw(st.lists(integers(-8, 7), max_size=8), "preempted") for _ in chosen]
    events: list[Event] = []
    for request, whom in zip(chosen, preempted, strict=True):
        events += steps(core, request, whom)
    events += core.step([Cancel(request_id) for request_id in cancelled])
    events += run(core, [])
    for request in chosen:
        if request.id not in cancelled:
            assert answer(events, request.id) == alone.answers[request.id]


def steps(core: EngineCore, request: Submit, preempted: Sequence[int]) -> list[Event]:
    """A step for each number, after the running sequence of that rank has lost its pages; negative: nobody has."""
    events = core.step([request])
    for which in preempted:
        core.check_integrity()
        if 0 <= which < core.stats().num_running:
            core._scheduler._preempt(core._scheduler.sequences()[which])
            core.check_integrity()
        events += core.step([])
    core.check_integrity()
    return events


@pytest.mark.parametrize("swap_sequences", [0, 8])
def test_every_way_is_taken(alone: Alone, swap_sequences: int) -> None:
    """Bug: a test of schedules that never hits a prefix, never preempts or never swaps shows nothing."""
    core = alone.world.core(64, num_sequences=2, swap_sequences=swap_sequences)
    events = core.step(REQUESTS)
    while core.has_work:
        if core.stats().steps_total % 5 == 0 and core.stats().num_running:
            core._scheduler._preempt(core._scheduler.sequences()[0])
        events += core.step([])
    for request in REQUESTS:
        assert answer(events, request.id) == alone.answers[request.id]
    stats = core.stats()
    assert stats.prefix_hits_total > 0
    assert stats.preemptions_total > 0
    assert (stats.swaps_out_total, stats.swap_bytes_used) == (stats.preemptions_total if swap_sequences else 0, 0)
    assert stats.swaps_in_total == stats.swaps_out_total
    assert 0 <= stats.swap_bytes_in_total <= stats.swap_bytes_out_total
    assert (stats.swap_bytes_in_total > 0) == bool(swap_sequences)


@pytest.mark.parametrize(("swap_sequences", "left"), [(0, 1 << 30), (8, 90)])
def test_steps_that_are_launched_ahead_change_nothing(alone: Alone, swap_sequences: int, left: int) -> None:
    """A device that computes when it must (queued.py) and few pages, with windows where the policy has one. Bugs: a
    recent page let go of that the step in flight reads, or pages of a sequence that ended written after they were given
    away."""
    core, device = queued(
        alone.world.core(64, num_sequences=1, spare_recent=8, swap_sequences=swap_sequences).parts, OnGpu(left)
    )
    events: list[Event] = []
    for request in REQUESTS:
        events += core.step([request])
        for _ in range(3):
            events += core.step([])
            core.check_integrity()
    events += run(core, [])
    for request in REQUESTS:
        assert tokens(events, request.id) == [one[:2] for one in alone.answers[request.id] if isinstance(one, tuple)]
    stats = core.stats()
    assert stats.prefix_hits_total > 0
    assert stats.preemptions_total > 0
    assert (stats.swaps_in_total > 0) == bool(swap_sequences)
    assert device.num_overlapped > stats.steps_total / 3


def tokens(events: Sequence[Event], request_id: str) -> list[tuple[int, int]]:
    found = [(e.index, e.token) for e in events if isinstance(e, Token) and e.id == request_id]
    return sorted(found, key=lambda token: token[0])


def test_prompt_scores_survive_swapping(alone: Alone) -> None:
    """Bug: log-probabilities of the chunks before a swap forgotten, though nobody computes them again."""
    core = alone.world.core(16, swap_sequences=1)
    core.step([REQUESTS[5]])
    core._scheduler._preempt(core._scheduler.sequences()[0])
    assert answer(run(core, []), "5") == alone.answers["5"]
    assert core.stats().swaps_in_total == 1


def test_cancelled_while_swapped_out(alone: Alone) -> None:
    """Bug: swap space that nobody gets back, or a cancelled sequence that goes on from it."""
    core = alone.world.core(swap_sequences=2)
    core.step([REQUESTS[0], REQUESTS[1]])
    core.step([])
    for sequence in core._scheduler.sequences():
        core._scheduler._preempt(sequence)
    assert core.stats().swaps_out_total == 2
    used = core.stats().swap_bytes_used
    events = core.step([Cancel("0")])
    assert core.stats().swap_bytes_used < used
    events += run(core, [])
    assert core.stats().swap_bytes_used == 0
    assert answer(events, "0") == []
    assert answer(events, "1") == alone.answers["1"]
