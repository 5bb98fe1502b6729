"""The engine's step on a model whose answer changes when any earlier token is read from a wrong page."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.messages import Cancel, Done, Failed, Inbound, PromptLogprobs, Submit, Token
from tests.engine.worlds import (
    EOS,
    VOCAB,
    continuation,
    endings,
    hash_logits,
    make_core,
    run,
    submit,
    tokens_of,
)


def test_greedy_tokens_are_the_models() -> None:
    events = run(make_core(), [submit("a", [1, 2, 3], max_tokens=20)])
    assert tokens_of(events, "a") == continuation([1, 2, 3], 20)
    assert [type(e) for e in events[-1:]] == [Done]


@pytest.mark.parametrize("max_batch_tokens", [8, 13, 64])
def test_chunks_change_nothing(max_batch_tokens: int) -> None:
    """Bug: a chunk that starts at a wrong position, or samples before the prompt is complete."""
    prompt = [i % 40 + 1 for i in range(50)]
    events = run(make_core(max_batch_tokens=max_batch_tokens), [submit("a", prompt)])
    assert tokens_of(events, "a") == continuation(prompt, 8)


def test_second_request_hits_the_cache_and_says_so() -> None:
    core = make_core()
    prompt = list(range(1, 40))
    run(core, [submit("a", prompt)])
    events = run(core, [submit("b", [*prompt, 7])])
    assert tokens_of(events, "b") == continuation([*prompt, 7], 8)
    (done,) = endings(events, "b")
    assert isinstance(done, Done)
    assert done.num_cached_tokens == 32


def test_preempted_requests_give_the_same_tokens() -> None:
    """Bug: recompute after preemption that drops, repeats or re-samples generated tokens."""
    core = make_core(num_pages=6)
    events = run(core, [submit(str(i), [i + 1] * 20, max_tokens=30) for i in range(3)])
    assert core.stats().preemptions_total > 0
    for i in range(3):
        assert tokens_of(events, str(i)) == continuation([i + 1] * 20, 30)
        assert len(endings(events, str(i))) == 1


def test_seeded_sampling_ignores_the_batch_and_preemption() -> None:
    """Bug: one random stream for the batch makes a seeded answer depend on who else is running."""
    request = submit("a", [3, 1, 4, 1, 5], max_tokens=24, temperature=1.0, seed=11)
    alone = tokens_of(run(make_core(), [request]), "a")
    crowd: list[Inbound] = [submit(str(i), [9] * (i + 9), max_tokens=30, temperature=1.0) for i in range(4)]
    crowded = tokens_of(run(make_core(num_pages=5, max_batch_tokens=9), [*crowd, request]), "a")
    assert crowded == alone
    other_seed = submit("a", [3, 1, 4, 1, 5], max_tokens=24, temperature=1.0, seed=12)
    assert tokens_of(run(make_core(), [other_seed]), "a") != alone


def test_choices_share_pages_and_differ() -> None:
    """Bug: forks that copy the whole prompt, or that all draw the same numbers."""
    core = make_core(num_pages=8)
    request = submit("a", [5] * 60, n=4, max_tokens=5, temperature=1.0, seed=1)
    peak = 0
    events = core.step([request])
    while core.has_work:
        events += core.step([])
        core.check_integrity()
        peak = max(peak, core.stats().pages_used)
    answers = [tuple(tokens_of(events, "a", i)) for i in range(4)]
    assert len(set(answers)) > 1
    assert {e.index for e in endings(events, "a") if isinstance(e, Done)} == {0, 1, 2, 3}
    assert peak <= 8  # 3 shared pages and four private tails; copies of the prompt would need 16


@pytest.mark.parametrize(("num_pages", "max_num_seqs"), [(5, 8), (32, 2)])
def test_choices_without_room_wait_and_still_come(num_pages: int, max_num_seqs: int) -> None:
    """Bug: a fork that finds no page or no seat is lost, and the request never ends."""
    core = make_core(num_pages=num_pages, max_num_seqs=max_num_seqs)
    request = submit("a", [5] * 40, n=4, max_tokens=20, temperature=1.0, seed=1)
    roomy = run(make_core(), [request])
    tight = run(core, [request])
    for index in range(4):
        assert tokens_of(tight, "a", index) == tokens_of(roomy, "a", index)
    assert len(endings(tight, "a")) == 4


def test_cancel_frees_pages_within_one_step() -> None:
    """Bug: pages of a request nobody waits for stay taken until it would have ended."""
    core = make_core()
    core.step([submit("a", [1] * 40, max_tokens=400, n=2), submit("b", [2] * 100, max_tokens=50)])
    core.step([])
    events = core.step([Cancel("a"), Cancel("b"), Cancel("nobody")])
    assert core.stats().pages_used == 0
    assert sorted((e.id, e.index) for e in events if isinstance(e, Done)) == [("a", 0), ("a", 1), ("b", 0)]
    assert not core.has_work


def test_one_choice_can_be_cancelled_alone() -> None:
    """Bug: a choice ended by a stop string keeps generating until its siblings end, or takes them with it."""
    core = make_core()
    request = submit("a", [5] * 20, n=3, max_tokens=6, temperature=1.0, seed=1)
    whole = run(make_core(), [request])
    events = core.step([request, Cancel("a", 0)])  # no token yet: ignored
    events += core.step([])
    events += core.step([Cancel("a", 0), Cancel("a", 7)])
    events += run(core, [])
    reasons = {e.index: e.reason for e in events if isinstance(e, Done)}
    assert reasons == {0: "cancelled", 1: "length", 2: "length"}
    assert [tokens_of(events, "a", i) for i in (1, 2)] == [tokens_of(whole, "a", i) for i in (1, 2)]


def test_cancel_before_the_first_step_ends_every_choice_once() -> None:
    core = make_core()
    events = core.step([submit("a", [1], n=3), Cancel("a")])
    assert sorted(e.index for e in events if isinstance(e, Done) and e.reason == "cancelled") == [0, 1, 2]


def test_stop_tokens_end_and_min_tokens_delays_them() -> None:
    greedy = continuation([1, 2], 8)
    events = run(make_core(), [submit("a", [1, 2], stop_token_ids=(greedy[2],))])
    (done,) = endings(events, "a")
    assert isinstance(done, Done)
    assert (done.reason, done.stop_token, tokens_of(events, "a")) == ("stop", greedy[2], greedy[:3])
    later = run(make_core(), [submit("a", [1, 2], stop_token_ids=(greedy[2],), min_tokens=5)])
    assert greedy[2] not in tokens_of(later, "a")[:5]


def test_eos_ends_unless_ignored() -> None:
    to_eos = {EOS: 100.0}
    assert tokens_of(run(make_core(), [submit("a", [1], logit_bias=to_eos)]), "a") == [EOS]
    assert len(tokens_of(run(make_core(), [submit("a", [1], logit_bias=to_eos, ignore_eos=True)]), "a")) == 8


def test_prompt_logprobs_cover_every_prompt_token_in_any_chunking() -> None:
    """Bug: scores lost at chunk borders, or taken from rows one position off."""
    prompt = [i % 40 + 1 for i in range(45)]
    core = make_core(max_batch_tokens=8)
    run(core, [submit("warm", prompt)])  # a cached prefix must not swallow rows
    events = run(core, [submit("a", prompt, max_tokens=0, num_prompt_logprobs=2)])
    (message,) = [e for e in events if isinstance(e, PromptLogprobs)]
    assert [entry.token for entry in message.entries] == prompt[1:]
    for i, entry in enumerate(message.entries):
        scores = torch.log_softmax(hash_logits(prompt[: i + 1]), -1)
        assert entry.logprob == pytest.approx(float(scores[prompt[i + 1]]), abs=1e-5)
        assert [token for token, _ in entry.top] == scores.topk(2).indices.tolist()
    assert tokens_of(events, "a") == []


def test_prompt_logprobs_of_requests_that_share_a_step() -> None:
    """Bug: counting one row of logits for each sequence reads the neighbour's rows."""
    prompts = {"a": [1, 2, 3], "b": [4, 5, 6, 7], "c": [8, 9]}
    events = run(make_core(), [submit(key, prompt, num_prompt_logprobs=0) for key, prompt in prompts.items()])
    for message in [e for e in events if isinstance(e, PromptLogprobs)]:
        prompt = prompts[message.id]
        scores = [torch.log_softmax(hash_logits(prompt[:i]), -1)[prompt[i]] for i in range(1, len(prompt))]
        assert [entry.logprob for entry in message.entries] == pytest.approx(torch.stack(scores).tolist(), abs=1e-5)
    for key, prompt in prompts.items():
        assert tokens_of(events, key) == continuation(prompt, 8)


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    events = run(make_core(), [submit("a", [1, 2], temperature=0.7, seed=3, num_logprobs=3, presence_penalty=1.5)])
    tokens = [e for e in events if isinstance(e, Token)]
    context = [1, 2]
    for event in tokens:
        scores = torch.log_softmax(hash_logits(context), -1)
        assert event.logprobs is not None
        assert event.logprobs.logprob == pytest.approx(float(scores[event.token]), abs=1e-5)
        assert len(event.logprobs.top) == 3
        context.append(event.token)


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (submit("a", []), "invalid", "no tokens"),
        (submit("a", [1, VOCAB]), "invalid", f"token id {VOCAB}"),
        (submit("a", [1], logit_bias={VOCAB: 1.0}), "invalid", f"token id {VOCAB}"),
        (submit("a", [1], n=0), "invalid", "n must"),
        (submit("a", [1] * 500, max_tokens=13), "capacity", "500 prompt tokens and 13"),
    ],
)
def test_admission_refuses_what_never_fits(request_: Submit, kind: str, words: str) -> None:
    """Bug: a request that can never fit waits for ever at the head of the queue."""
    core = make_core()
    (failed,) = core.step([request_])
    assert isinstance(failed, Failed)
    assert failed.kind == kind
    assert words in failed.message
    assert not core.has_work


def test_a_request_that_just_fits_is_served() -> None:
    events = run(make_core(num_pages=2), [submit("a", [1] * 20, max_tokens=12)])
    assert len(tokens_of(events, "a")) == 12


def test_id_in_use_is_refused_and_the_first_lives_on() -> None:
    events = run(make_core(), [submit("a", [1]), submit("a", [2])])
    assert tokens_of(events, "a") == continuation([1], 8)
    assert [type(e) for e in endings(events, "a")] == [Failed, Done]


def test_broken_logits_fail_the_request_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: NaN logits sampled as token 0 look like an answer."""
    core = make_core()
    original = hash_logits

    def broken(context: list[int]) -> torch.Tensor:
        return original(context) * (float("nan") if 13 in context else 1.0)

    monkeypatch.setattr("tests.engine.worlds.hash_logits", broken)
    events = core.step([submit("bad", [13], n=2), submit("good", [1], max_tokens=1)])
    assert [type(e) for e in endings(events, "bad")] == [Failed]
    assert [type(e) for e in endings(events, "good")] == [Done]
    assert core.stats().pages_used == 0


def test_broken_logits_in_mid_answer_end_all_choices_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the first choice's failure drops its sibling, whose slice of the same step then takes the engine down."""
    core = make_core()
    original = hash_logits

    def broken(context: list[int]) -> torch.Tensor:
        return original(context) * (float("nan") if 13 in context and len(context) > 3 else 1.0)

    monkeypatch.setattr("tests.engine.worlds.hash_logits", broken)
    events = run(core, [submit("bad", [13], n=3), submit("good", [1], max_tokens=6)])
    assert [type(e) for e in endings(events, "bad")] == [Failed]
    assert len(tokens_of(events, "good")) == 6


def test_integrity_is_checked_when_the_engine_goes_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a check that never runs, because an engine without work is not stepped."""
    core = make_core()
    checked = []
    monkeypatch.setattr(core.parts.manager, "check_integrity", lambda: checked.append(core.has_work))
    core.step([submit("a", [1], max_tokens=2)])
    assert checked == []
    core.step([])
    assert checked == [False]


def test_recomputation_is_no_prefix_hit() -> None:
    """Bug: a hit rate that rises the more requests are thrown out."""
    core = make_core(num_pages=6)
    run(core, [submit(str(i), [i + 1] * 20, max_tokens=30) for i in range(3)])
    stats = core.stats()
    assert stats.preemptions_total > 0
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (60, 0)


def random_schedule(data: st.DataObject, core: EngineCore) -> dict[str, Submit]:
    """Drive the core with random arrivals and cancellations; returns the requests that were not cancelled."""
    kept: dict[str, Submit] = {}
    events = []
    for i in range(data.draw(st.integers(1, 8))):
        inbox: list[Inbound] = []
        prompt = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=40))
        request = submit(
            str(i),
            prompt,
            n=data.draw(st.integers(1, 3)),
            max_tokens=data.draw(st.integers(1, 12)),
            priority=data.draw(st.integers(0, 2)),
            num_prompt_logprobs=data.draw(st.sampled_from([None, 0])),
        )
        kept[request.id] = request
        inbox.append(request)
        if data.draw(st.booleans()):
            victim = data.draw(st.sampled_from(sorted(kept)))
            inbox.append(Cancel(victim))
        events += core.step(inbox)
        core.check_integrity()
    events += run(core, [])
    cancelled = {e.id for e in events if isinstance(e, Done) and e.reason == "cancelled"}
    for request in kept.values():
        assert len(endings(events, request.id)) == request.n
        if request.id not in cancelled:
            expected = continuation(request.prompt, request.sampling.max_tokens)
            assert all(tokens_of(events, request.id, index) == expected for index in range(request.n))
            scored = [e.entries for e in events if isinstance(e, PromptLogprobs) and e.id == request.id]
            wanted = [] if request.sampling.num_prompt_logprobs is None else [request.prompt[1:]]
            assert [[entry.token for entry in entries] for entries in scored] == wanted
    return kept


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_schedule_gives_every_request_its_own_answer(data: st.DataObject) -> None:
    """Random arrivals, cancellations, priorities and memory pressure: tokens depend on the prompt alone."""
    core = make_core(
        num_pages=data.draw(st.integers(4, 10)),
        max_num_seqs=data.draw(st.integers(1, 5)),
        max_batch_tokens=data.draw(st.integers(5, 40)),
    )
    random_schedule(data, core)
