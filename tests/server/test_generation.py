"""One request through the engine: text, ends, and the one way out."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from engine.messages import Done, Event, Failed, Logprobs, Sampling, Submit, Token
from server.admission import Job
from server.config import ServerConfig
from server.errors import ApiError, EngineFailure
from server.generation import Choice, Delta, Generation
from server.service import Service
from tests.fakes import BOS, END_TURN, EOS, ByteTokenizer, FakeEngine, Script, say

pytestmark = pytest.mark.anyio


def job(prompt: Sequence[int] = (BOS,), id: str = "a", n: int = 1, **options: Any) -> Job:
    sampling = Sampling(max_tokens=options.pop("max_tokens", 99), min_tokens=options.pop("min_tokens", 0))
    submit = Submit(id, list(prompt), sampling, arrival=0.0, n=n)
    return Job(submit, end_tokens=frozenset({EOS, END_TURN}), **options)


def service(engine: FakeEngine, **settings: Any) -> Service:
    return Service(engine, ByteTokenizer(), ServerConfig(**settings), "demo")


async def run(generation: Generation) -> list[Delta]:
    async with generation:
        return [delta async for deltas in generation for delta in deltas]


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def feed(choice: Choice, events: list[Event]) -> list[Delta]:
    """What a choice shows after each event."""
    deltas = []
    for event in events:
        if isinstance(event, Token):
            choice.token(event)
        elif isinstance(event, Done):
            choice.done(event)
        if (delta := choice.take()) is not None:
            deltas.append(delta)
    return deltas


def tokens(data: bytes | Sequence[int]) -> list[Event]:
    return [Token("a", 0, token, Logprobs(token, -1.0)) for token in data]


def done(reason: Any = "length", stop_token: int | None = None) -> Done:
    return Done("a", 0, reason, stop_token)


async def test_text_streams_without_the_end_token() -> None:
    """Bug: "</s>" at the end of answers."""
    deltas = await run(Generation(service(FakeEngine(lambda submit: say("hé"))), [job()]))
    assert (text_of(deltas), deltas[-1].finish_reason) == ("hé", "stop")


async def test_end_token_that_does_not_end_is_text() -> None:
    """Bug: with ignore_eos the end token's text vanishes although the answer goes on."""
    choice = Choice(job(skip_special_tokens=False), 0, ByteTokenizer())
    deltas = feed(choice, [*tokens([97, EOS]), *tokens([98]), done()])
    assert text_of(deltas) == "a</s>b"
    assert choice.num_tokens == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
async def test_stop_strings_over_token_borders(size: int) -> None:
    """Bug: a stop string split over tokens, here inside characters, is missed or half shown."""
    choice = Choice(job(stop=("日本", "END")), 0, ByteTokenizer())
    shown = ""
    data = tokens("今日は。日本語".encode())
    for start in range(0, len(data), size):
        for event in data[start : start + size]:
            assert isinstance(event, Token)
            choice.token(event)
        delta = choice.take()
        shown += delta.text if delta else ""
        assert "今日は。".startswith(shown)
    assert (shown, choice.finish_reason) == ("今日は。", "stop")


async def test_held_back_text_comes_out_at_the_end() -> None:
    """Bug: an answer that ends like the beginning of a stop string loses its last letters."""
    choice = Choice(job(stop=("END",)), 0, ByteTokenizer())
    deltas = feed(choice, [*tokens(b"the EN"), done()])
    assert text_of(deltas) == "the EN"
    assert deltas[-1].finish_reason == "length"


async def test_incomplete_character_at_the_end_is_one_replacement() -> None:
    choice = Choice(job(), 0, ByteTokenizer())
    deltas = feed(choice, [*tokens("é".encode()[:1]), done()])
    assert text_of(deltas) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, ""), (2, "x"), (3, "x."), (4, "x.x")])
async def test_stop_strings_wait_for_min_tokens(min_tokens: int, text: str) -> None:
    """Bug: an answer shorter than min_tokens."""
    choice = Choice(job(stop=(".", "x"), min_tokens=min_tokens), 0, ByteTokenizer())
    assert text_of(feed(choice, [*tokens(b"x.x.x"), done()])) == text
    assert choice.num_tokens == max(min_tokens, 1)


async def test_stop_string_and_end_token_may_be_kept() -> None:
    choice = Choice(job(stop=(".",), keep_stop=True), 0, ByteTokenizer())
    assert text_of(feed(choice, tokens(b"a.b"))) == "a."
    choice = Choice(job(keep_stop=True, skip_special_tokens=False), 0, ByteTokenizer())
    assert text_of(feed(choice, [*tokens([97, EOS]), done("stop", EOS)])) == "a</s>"


async def test_tokens_come_with_their_text_and_not_after_the_cut() -> None:
    """Bug: log-probabilities of a stop string that is not in the answer, or ahead of their text."""
    choice = Choice(job(stop=("END",)), 0, ByteTokenizer())
    deltas = feed(choice, [*tokens("é EN".encode()), *tokens(b"D")])
    assert [(delta.text, len(delta.tokens)) for delta in deltas] == [("é", 2), (" ", 1), ("", 0)]
    assert [token.offset for delta in deltas for token in delta.tokens] == [0, 0, 1]


async def test_skipped_tokens_are_still_scored() -> None:
    choice = Choice(job(), 0, ByteTokenizer())
    deltas = feed(choice, [*tokens([97, BOS]), done()])
    assert [token.token for delta in deltas for token in delta.tokens] == [97, BOS]


async def test_choices_and_prompts_are_told_apart() -> None:
    """Bug: the answer to the second prompt arrives under the first one's index."""
    engine = FakeEngine(lambda submit: say(f"to {submit.id}", delay_s=0.001))
    generation = Generation(service(engine), [job(id="p", n=2), job(id="q", n=2)])
    deltas = await run(generation)
    assert [text_of(deltas, index) for index in range(4)] == ["to p", "to p", "to q", "to q"]
    assert (generation.num_prompt_tokens, generation.num_completion_tokens) == (2, 4 * 5)
    assert generation.num_cached_tokens == 2


async def test_stop_string_cancels_the_rest() -> None:
    """Bug: the engine goes on to max_tokens for an answer that is complete."""
    engine = FakeEngine(lambda submit: Script(list(b"a.b"), hang=True))
    deltas = await run(Generation(service(engine), [job(stop=(".",))]))
    assert (text_of(deltas), deltas[-1].finish_reason, engine.cancelled) == ("a", "stop", ["a"])


async def test_choice_that_met_a_stop_string_is_cancelled_alone() -> None:
    """Bug: a finished choice goes on to max_tokens because its siblings are not done; or they end with it."""
    script = Script(list(b"abc"), delay_s=0.001, vary=lambda index, token: ord(".") if index == 1 else token)
    engine = FakeEngine(lambda submit: script)
    deltas = await run(Generation(service(engine), [job(stop=(".",), n=3)]))
    assert [text_of(deltas, index) for index in range(3)] == ["abc", "", "abc"]
    assert engine.cancelled_choices == [("a", 1)]
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop", "length", "length"]


async def test_leaving_early_cancels_everything() -> None:
    engine = FakeEngine(lambda submit: Script([97], hang=True))
    hall = service(engine)
    async with Generation(hall, [job(id="p"), job(id="q")]) as generation:
        async for _ in generation:
            break
        assert hall.in_flight == 2
    assert sorted(engine.cancelled) == ["p", "q"]
    assert hall.in_flight == 0
    assert hall.metrics.registry.get_sample_value("nibble_request_failure_total", {"kind": "disconnected"}) == 1


async def test_cancelled_task_cancels_its_request() -> None:
    """Bug: the request of a killed handler runs on for nobody."""
    engine = FakeEngine(lambda submit: Script([], hang=True))
    task = asyncio.create_task(run(Generation(service(engine), [job()])))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.cancelled == ["a"]


async def test_failure_of_one_prompt_cancels_the_others() -> None:
    def script(submit: Submit) -> Script:
        return Script(failure=Failed(submit.id, "engine", "bad luck")) if submit.id == "p" else Script(hang=True)

    engine = FakeEngine(script)
    with pytest.raises(EngineFailure, match="bad luck"):
        await run(Generation(service(engine), [job(id="p"), job(id="q")]))
    assert engine.cancelled == ["q"]


async def test_end_that_nobody_asked_for_is_an_error() -> None:
    """Bug: an answer cut short by the engine looks complete."""
    with pytest.raises(ApiError):
        Choice(job(), 0, ByteTokenizer()).done(done("cancelled"))
