"""Quantized cache policies on a real model: no schedule changes a bit of what a request alone in a cold engine gets."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from engine.assembly import StartError, build
from engine.config import EngineConfig
from engine.messages import Cancel, Event, Inbound
from tests.engine.artifacts import write_random
from tests.engine.cached import MAX_LEN, World, check, prompt_of, seeded
from tests.engine.models.oracle import write_checkpoint
from tests.engine.models.variants import SIZES
from tests.engine.worlds import run

POLICIES = {  # name -> tokens of a page
    "k4v4:w16:s4": 16,
    "skvq:k2v2:w32": 32,  # skvq: with an artifact
    "skvq:k4v2:w24:s1": 16,  # and with one that turns heads
    "k8v8": 16,
    "k4v4:w40:s20/0=f16": 16,
    "k3v1.5:w1:s0": 16,
    "k4v2:w0:s3": 32,
    "k2v4:w24:s1": 64,  # most of a page lies outside the window of its end
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    sizes = SIZES | {"max_position_embeddings": MAX_LEN, "vocab_size": 61}
    write_checkpoint(made, Qwen3Config(**sizes, head_dim=32))
    return made


@pytest.fixture(scope="module", params=POLICIES)
def world(folder: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    policy = str(request.param)
    config = EngineConfig(str(folder), kv_policy=policy, page_size=POLICIES[policy], max_num_seqs=8, head_bits=16)
    if policy.startswith("skvq:"):
        artifact = write_random(folder, policy, tmp_path_factory.mktemp("artifact") / "cal", rotated="k4" in policy)
        config = msgspec.structs.replace(config, kv_calibration=str(artifact))
    return World(build(config)[0].parts, build(config)[0].parts)


def test_a_crowd_and_chunks(world: World) -> None:
    """Bug: a window that depends on where a prompt was cut, or on who else ran."""
    request = seeded("it", prompt_of(0, 70, 9))
    crowd: list[Inbound] = [seeded(f"{i}", prompt_of(i, 3 + 17 * i, 1)) for i in range(1, 8)]
    for chunk, others in ((9, []), (16, crowd), (64, [])):
        check(world, request, run(world.core(chunk), [*others, request]))


def test_prefix_hits(world: World) -> None:
    """Bug: a hit whose window was not computed from the window before it in every layer; a window that others wrote
    over while it was kept."""
    core = world.core()
    request, others = seeded("it", prompt_of(0, 100, 9)), [seeded(f"{i}", prompt_of(i, 20, i)) for i in range(1, 8)]
    run(core, [seeded("before", prompt_of(0, 100, 3)), *others])
    check(world, request, run(core, [request]))
    assert core.stats().prefix_hits_total >= 64
    again = core.stats().prefix_hits_total
    check(world, request, run(core, [request]))
    assert core.stats().prefix_hits_total >= again + 64


def test_a_window_that_was_given_away_shortens_the_hit(world: World) -> None:
    """Bug: full pages taken up without the window that belongs to them."""
    core = world.core(spare_recent=0)
    request = seeded("it", prompt_of(0, 100, 9))
    run(core, [seeded("before", prompt_of(0, 100, 3), 1)])
    run(core, [seeded("other", prompt_of(1, 64, 9), 1)])
    check(world, request, run(core, [request]))


def test_preemption(world: World) -> None:
    """Bug: a resumed sequence that reads a window which someone else has filled meanwhile."""
    core = world.core(num_sequences=2, spare_recent=12)
    requests = [seeded(f"{i}", prompt_of(i % 2, 60, i), 12, n=1 + i % 2, priority=-i) for i in range(1, 5)]
    events = [event for request in requests for event in core.step([request])]
    while core.has_work:
        events += core.step([])
        core.check_integrity()
        if core.stats().steps_total % 4 == 0 and core.stats().num_running:
            core._scheduler._preempt(core._scheduler.sequences()[0])
    assert core.stats().preemptions_total > 1
    for request in requests:
        check(world, request, events)


def test_forks(world: World) -> None:
    """Bug: two choices that write one recent page, or one that reads the other's."""
    for num_prompt in (1, 16, 37):
        request = seeded("it", prompt_of(0, num_prompt, 0), n=4)
        check(world, request, run(world.core(), [request]))


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_schedule(world: World, data: st.DataObject) -> None:
    """Random requests that begin alike come, go and are cancelled, in a cache with little room."""
    integers = st.integers
    core = world.core(
        max_batch_tokens=data.draw(st.sampled_from([8, 9, 16, 64]), "budget"),
        num_sequences=data.draw(integers(1, 4), "pages for"),
        spare_recent=data.draw(integers(0, 30), "spare recent pages"),
        max_num_seqs=data.draw(st.sampled_from([1, 8]), "seats"),
        swap_sequences=data.draw(integers(0, 2), "swap space for"),
    )
    events: list[Event] = []
    requests = []
    for i in range(data.draw(integers(1, 6), "requests")):
        prompt = prompt_of(data.draw(integers(0, 1)), data.draw(integers(0, 110)), data.draw(integers(1, 9)))
        choices, priority = data.draw(integers(1, 3)), data.draw(integers(-1, 1))
        requests.append(seeded(f"{i}", prompt, data.draw(integers(1, 20)), choices, priority))
        events += core.step([requests[-1]])
        for _ in range(data.draw(integers(0, 12), "steps")):
            core.check_integrity()
            events += core.step([])
    if data.draw(st.booleans(), "cancel"):
        events += core.step([Cancel(requests.pop().id)])
    events += run(core, [])
    for request in requests:
        check(world, request, events)


def test_a_policy_that_cannot_serve_the_model_says_what_can(folder: Path) -> None:
    with pytest.raises(StartError, match=r"k4v4:g48 cannot serve this model: .*groups such as 16"):
        build(EngineConfig(str(folder), kv_policy="k4v4:g48"))
