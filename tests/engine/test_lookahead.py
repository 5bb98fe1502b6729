"""Steps launched before the ids of the step before them are read, on a device that computes nothing until it must."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.messages import Cancel, Done, Event, Inbound, Submit, Token
from engine.sampling import Sampler
from kernels.sampling.reference import SamplingReference
from tests.engine.queued import Device, queued
from tests.engine.test_gpu_sampling import OnGpu
from tests.engine.worlds import EOS, continuation, make_core, run, submit, tokens_of

PLAIN: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 12}


def world(left: int = 1 << 30, swap_bytes: int = 0, **sizes: int) -> tuple[EngineCore, Device]:
    parts = make_core(**sizes).parts
    return queued(replace(parts, plan=msgspec.structs.replace(parts.plan, swap_bytes=swap_bytes)), OnGpu(left))


def told(events: Sequence[Event], request_id: str) -> list[Event]:
    """What the caller of a request is told, but for times and what the rest of the schedule decides."""
    changing = ("queued_s", "prefill_s", "decode_s", "num_cached_tokens", "num_preemptions")
    return [
        msgspec.structs.replace(event, **{name: 0 for name in changing if hasattr(event, name)})
        for event in events
        if event.id == request_id
    ]


def alone(request: Submit) -> list[Event]:
    """What it is told by an engine on a CPU that serves nobody else."""
    core = EngineCore(replace(make_core().parts, sampler=Sampler(SamplingReference())))
    return told(run(core, [request]), request.id)


def by_choice(events: Sequence[Event]) -> list[Event]:
    """Choices may stand in another order where one of them had to wait."""
    return sorted(events, key=lambda event: event.index if isinstance(event, Token | Done) else -1)


@pytest.mark.parametrize("num_requests", [1, 3])
def test_steps_are_launched_before_ids_are_read(num_requests: int) -> None:
    """Every step but the first is: twelve tokens and no word from outside. Bug: a host that waits where it need not."""
    requests = [submit(f"{i}", [i + 1, 2, 3], **PLAIN) for i in range(num_requests)]
    core, device = world()
    events = run(core, requests)
    assert device.num_overlapped == 11
    assert core.stats().steps_total == 12
    for request in requests:
        assert told(events, request.id) == alone(request)


@pytest.mark.parametrize(
    ("rules", "num_overlapped"),
    [
        ({"num_logprobs": 2}, 11),
        ({"logit_bias": {7: 1.0}, "min_tokens": 6}, 11),
        ({"top_p": 0.9, "top_k": 9, "min_p": 0.01}, 11),
        ({"num_prompt_logprobs": 1}, 10),  # the prompt's own step is read first
        ({"n": 2}, 10),
        ({"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}, 11),
        ({"max_tokens": 1}, 0),
        ({"max_tokens": 0}, 0),
    ],
    ids=str,
)
def test_which_rules_may_run_ahead(rules: dict[str, Any], num_overlapped: int) -> None:
    """Bugs: a rule applied to tokens that lack the last one; one that keeps others from running ahead for nothing."""
    request = submit("r", [1, 2, 3], **PLAIN | rules)
    core, device = world()
    assert by_choice(told(run(core, [request]), "r")) == by_choice(alone(request))
    assert device.num_overlapped == num_overlapped


@pytest.mark.parametrize("has_neighbour", [False, True])
def test_chunks_of_prompts_are_launched_ahead(has_neighbour: bool) -> None:
    """Alone and beside one that decodes: a step for each 16 rows. Bugs: a token of the prompt read from the device, one
    of the device from the prompt; a chunk that takes the rows of those that decode; a GPU idle between chunks."""
    core, device = world()
    neighbour, request = submit("beside", [9], max_tokens=20), submit("r", [*range(1, 41)] * 2, max_tokens=6)
    events = core.step([neighbour]) + core.step([]) if has_neighbour else []
    before, num_steps = device.num_overlapped, core.stats().steps_total
    events += core.step([request])
    while len(tokens_of(events, "r")) < 5:
        events += core.step([])
    waits = core.stats().steps_total - num_steps - 1
    assert device.num_overlapped - before == waits == (6 if has_neighbour else 5) + 4
    events += run(core, [])
    assert device.most_rows == 16
    assert told(events, "r") == alone(request)
    assert not has_neighbour or told(events, "beside") == alone(neighbour)


def test_a_prompt_does_not_end_with_its_chunk() -> None:
    """Bug: one that wants a single token taken for one that draws it in this step."""
    core, device = world()
    run(core, [submit("r", [*range(1, 41)] * 2, max_tokens=1)])
    assert device.num_overlapped == 4


def test_a_sequence_that_ended_is_left_out() -> None:
    """One ends with a stop token in the middle: its row in flight is dropped, others go on and none of them waits.
    Bugs: a token sent after Done, or counted for a sequence beside it."""
    stops = submit("stops", [1, 2], max_tokens=30, stop_token_ids=(continuation([1, 2], 5)[4],))
    goes_on = submit("goes on", [3], max_tokens=12)
    core, device = world()
    events = run(core, [stops, goes_on])
    assert len(tokens_of(events, "stops")) == 5
    for request in (stops, goes_on):
        assert told(events, request.id) == alone(request)
    assert device.num_overlapped == 11


def test_pages_of_a_sequence_that_ended_go_to_the_next_one_at_once() -> None:
    """The row in flight writes in a page that is given away before that. Bug: it writes after the new owner."""
    first = submit("first", [1] * 16, max_tokens=30, stop_token_ids=(continuation([1] * 16, 3)[2],))
    others = [submit(f"{i}", [i + 2] * 30, max_tokens=9) for i in range(3)]
    core, _ = world(num_pages=4)
    events = run(core, [first, *others])
    for request in (first, *others):
        assert told(events, request.id) == alone(request)


@pytest.mark.parametrize(("left", "num_overlapped", "num_steps"), [(1, 1, 13), (2, 5, 16), (5, 9, 14)])
def test_a_token_that_the_device_could_not_draw_is_drawn_again(left: int, num_overlapped: int, num_steps: int) -> None:
    """Every `left`-th draw. The step after it is in flight by then and computed for nothing; then one is read at once,
    and where its token was drawn, steps run ahead again. Bugs: the token that follows a made-up one sent; keys of the
    made-up one read later; logits of another step."""
    request = submit("r", [1] * 14, **PLAIN)
    core, device = world(left)
    assert told(run(core, [request]), "r") == alone(request)
    assert device.num_overlapped == num_overlapped
    assert core.stats().steps_total == num_steps


def test_the_others_go_on() -> None:
    """Bugs: a step whose rows all are thrown away because of one; that one left waiting for them to end."""
    requests = [submit(f"{i}", [i + 1] * 4, num_logprobs=1, **PLAIN) for i in range(3)]
    core, _ = world(left=8)
    events = run(core, requests)
    for request in requests:
        assert told(events, request.id) == alone(request)
    assert core.stats().steps_total == 14


def test_a_page_is_not_published_before_it_is_right() -> None:
    """The row after a made-up id ends a page. Bug: the page is found by the next request that begins so."""
    core, _ = world(left=17)
    first = submit("first", [1] * 15, max_tokens=40, temperature=1.0, seed=5)
    events = run(core, [first])
    assert told(events, "first") == alone(first)
    second = submit("second", [*first.prompt, *tokens_of(events, "first")[:36]], max_tokens=4)
    assert told(run(core, [second]), "second") == alone(second)
    assert core.stats().prefix_hits_total == 48


def test_cancel_frees_pages_in_its_step() -> None:
    core, _ = world()
    core.step([submit("a", [1] * 40, max_tokens=400), submit("b", [2] * 20, max_tokens=400)])
    for _ in range(6):
        core.step([])
    events = core.step([Cancel("a"), Cancel("b")])
    assert core.stats().pages_used == 0
    assert [event.id for event in events if isinstance(event, Done)] == ["a", "b"]
    assert not core.has_work


def test_others_do_not_wait_for_one_that_is_cancelled() -> None:
    """Bugs: a GPU idle at every stop string; a token of the step in flight sent after Done."""
    core, device = world()
    stays, goes = submit("stays", [1], max_tokens=12), submit("goes", [2], max_tokens=12)
    events = core.step([stays, goes])
    for i in range(1, 12):
        events += core.step([Cancel("goes")] if i == 5 else [])
        core.check_integrity()
        assert device.num_overlapped == i
    events += run(core, [])
    assert told(events, "stays") == alone(stays)
    assert [type(event) for event in told(events, "goes")] == [Token] * 5 + [Done]


def test_a_newcomer_is_in_the_next_step() -> None:
    core, _ = world()
    core.step([submit("runs", [1], max_tokens=12)])
    core.step([])
    core.step([submit("comes", [2], max_tokens=12)])
    assert core.stats().num_running == 2


def test_who_finds_no_seat_keeps_nobody_waiting() -> None:
    """A request comes in every step while the only seat is taken. Bug: a busy server whose GPU waits for the host."""
    core, device = world(max_num_seqs=1)
    core.step([submit("r", [1, 2], max_tokens=10)])
    for i in range(8):
        core.step([submit(f"{i}", [3], max_tokens=1)])
    assert device.num_overlapped == 8


def test_a_step_ahead_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, say. Bug: the call that cancels what ran launches it once more, and nothing can be cancelled."""
    core, _ = world()
    core.step([submit("r", [1, 2], max_tokens=10)])

    def launch(*_: object) -> None:
        raise RuntimeError("full")

    monkeypatch.setattr(type(core._launcher), "launch", launch)
    with pytest.raises(RuntimeError, match="full"):
        core.step([])
    core.step([Cancel("r")])
    assert not core.has_work
    assert core.stats().pages_used == 0


def test_who_waits_is_seated_as_soon_as_there_is_room() -> None:
    """Bugs: steps run ahead while someone could start; none does while someone waits who cannot."""
    requests = [submit(f"{i}", [i + 1, 2], max_tokens=8 + 4 * i) for i in range(4)]
    (core, device), on_cpu = world(max_num_seqs=2), make_core(max_num_seqs=2)
    events = run(core, requests)
    run(on_cpu, requests)
    for request in requests:
        assert told(events, request.id) == alone(request)
    assert core.stats().steps_total == on_cpu.stats().steps_total == 32
    assert device.num_overlapped == 29  # all but the last, and those before someone is seated


REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.5, "logit_bias": {EOS: 4.0}},
    {"temperature": 1.5, "logit_bias": {EOS: 6.0}, "min_tokens": 3},
    {"temperature": 1.0, "stop_token_ids": tuple(range(1, 50, 5)), "num_logprobs": 1},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "n": 3, "logit_bias": {EOS: 4.0}},
    {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.2},
    {"num_prompt_logprobs": 1},
]


@dataclass
class Heard:
    """What a random schedule caused."""

    events: list[Event] = field(default_factory=list)
    requests: dict[str, Submit] = field(default_factory=dict)
    num_overlapped: int = 0


def drive(core: EngineCore, device: Device, data: st.DataObject) -> Heard:
    heard = Heard()
    for i in range(data.draw(st.integers(1, 7))):
        prompt = [1, 2, 3, 1] * 5 + data.draw(st.lists(st.integers(1, 3), max_size=20))
        rules = data.draw(st.sampled_from(REQUESTS)) | {"max_tokens": data.draw(st.integers(1, 25)), "seed": i}
        rules["min_tokens"] = min(rules.get("min_tokens", 0), rules["max_tokens"])
        request = submit(f"{i}", prompt[data.draw(st.integers(0, 19)) :], priority=i % 2, **rules)
        heard.requests[request.id] = request
        inbox: list[Inbound] = [request]
        if data.draw(st.integers(0, 3)) == 0:
            inbox.append(Cancel(data.draw(st.sampled_from(sorted(heard.requests)))))
        heard.events += core.step(inbox)
        for _ in range(data.draw(st.integers(0, 12))):
            core.check_integrity()
            heard.events += core.step([])
    heard.events += run(core, [])
    heard.num_overlapped = device.num_overlapped
    return heard


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_schedule_gives_every_request_its_own_answer(data: st.DataObject) -> None:
    """Endings nobody foresaw, stops, cancels, arrivals, preemption, swapping, forks, prefixes that are found, tokens
    that the device could not draw: what each request is told is what it is told alone, and no page is lost."""
    core, device = world(
        left=data.draw(st.sampled_from([1 << 30, 3, 10])),
        swap_bytes=data.draw(st.sampled_from([0, 1 << 20])),
        num_pages=data.draw(st.integers(4, 12)),
        max_num_seqs=data.draw(st.integers(1, 5)),
        max_batch_tokens=data.draw(st.integers(8, 40)),
    )
    heard = drive(core, device, data)
    assert device.most_rows <= core.parts.plan.max_batch_tokens
    for request in heard.requests.values():
        found, expected = told(heard.events, request.id), alone(request)
        cancelled = {e.index for e in found if isinstance(e, Done) and e.reason == "cancelled"}
        for index in range(request.n):
            mine, theirs = ([e for e in es if getattr(e, "index", index) == index] for es in (found, expected))
            if index in cancelled:
                tokens = [e for e in mine if isinstance(e, Token)]
                assert tokens == [e for e in theirs if isinstance(e, Token)][: len(tokens)]
                assert isinstance(mine[-1], Done)
            else:
                assert mine == theirs
