"""The soak says so when something leaked or was lost."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import httpx
import pytest

from benchmarks.soak import CROWD, Held, Tally, leaks, read, report, thirds, whole, wrong
from server.bench.client import Outcome, Target
from server.bench.datasets import Prompt
from server.config import ServerConfig

BEFORE = Held(
    pages=0, requests=0, tasks=3, server_files=9, engine_files=7, server_bytes=1e8, engine_bytes=2e8, answers=10
)
TARGET = Target("http://test", "demo", "completions")
EVENTS = [
    *['data: {"choices": [{"text": "a"}]}\n\n'] * 3,
    'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n',
    "data: [DONE]\n\n",
]


def test_a_server_that_stayed_as_it_was_passes() -> None:
    """Bug: a cache that was emptied, or an allocator's last page, called a leak."""
    after = replace(BEFORE, tasks=2, server_bytes=1.04e8, engine_bytes=1.9e8, answers=15)
    assert leaks(BEFORE, after) == []
    assert report(1.0, 1.0, Tally(num_read=5), BEFORE, after) == 0


@pytest.mark.parametrize(
    ("after", "named"),
    [
        (replace(BEFORE, pages=1), "pages: 1 held by nobody"),
        (replace(BEFORE, requests=2), "requests: 2 held by nobody"),
        (replace(BEFORE, tasks=4), "tasks: 3 before, 4 after"),
        (replace(BEFORE, server_files=10), "server_files: 9 before, 10 after"),
        (replace(BEFORE, engine_files=8), "engine_files: 7 before, 8 after"),
        (replace(BEFORE, server_bytes=1.06e8), "server_bytes: 100.0 MB before, 106.0 after"),
        (replace(BEFORE, engine_bytes=2.2e8), "engine_bytes: 200.0 MB before, 220.0 after"),
    ],
)
def test_every_leak_is_called_by_name(after: Held, named: str) -> None:
    """Bug: a figure that is collected and looked at by nobody."""
    assert leaks(BEFORE, after) == [named]
    assert report(1.0, 1.0, Tally(), BEFORE, after) == 1


def test_answers_that_nobody_counted_and_requests_that_were_lost_fail() -> None:
    assert report(1.0, 1.0, Tally(num_read=6), BEFORE, replace(BEFORE, answers=15)) == 1
    assert report(1.0, 1.0, Tally(lost=["slow: cut off"]), BEFORE, BEFORE) == 1


def asked(send: Callable[[httpx.AsyncClient, Tally], Awaitable[None]], response: httpx.Response) -> Tally:
    async def go() -> Tally:
        tally = Tally()
        async with httpx.AsyncClient(transport=httpx.MockTransport(lambda request: response)) as client:
            await send(client, tally)
        return tally

    return asyncio.run(go())


def stream(events: list[str]) -> httpx.Response:
    return httpx.Response(200, content="".join(events).encode())


@pytest.mark.parametrize(
    ("response", "lost"),
    [
        (stream(EVENTS), []),
        (stream(EVENTS[:-1]), ["whole: cut off"]),
        (stream([*EVENTS[:3], EVENTS[3].replace("3", "2"), EVENTS[4]]), ["whole: 2 of 3 tokens"]),
        (httpx.Response(500), ["whole: http 500"]),
    ],
)
def test_answers_must_be_whole(response: httpx.Response, lost: list[str]) -> None:
    """Bug: an answer that ends early and well counts as one."""
    tally = asked(lambda client, tally: whole(client, TARGET, Prompt("a", 3), Outcome(0, 0), tally), response)
    assert tally.lost == lost
    assert tally.num_read == (not lost)


@pytest.mark.parametrize(("events", "lost"), [(EVENTS, []), (EVENTS[:2], ["slow: cut off"])])
def test_slow_readers_get_all_of_it(events: list[str], lost: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a server that drops those who are slow."""
    monkeypatch.setattr("benchmarks.soak.SLOW_S", 0)
    tally = asked(lambda client, tally: read(client, TARGET, Prompt("a", 3), None, tally), stream(events))
    assert tally.lost == lost


@pytest.mark.parametrize(("events", "lost"), [(EVENTS, []), (EVENTS[:1], ["cancelled: cut off"])])
def test_a_caller_that_leaves_loses_nothing(events: list[str], lost: list[str]) -> None:
    """Bug: a stream that broke before the caller left passes for one that was left."""
    tally = asked(lambda client, tally: read(client, TARGET, Prompt("a", 3), 1, tally), stream(events))
    assert (tally.ended["cancelled"], tally.num_read, tally.lost) == (1, 0, lost)


@pytest.mark.parametrize("cut", [None, 1])
def test_a_full_queue_refuses_and_loses_nothing(cut: int | None) -> None:
    """Bug: a machine that is too slow for the rate looks like a server that forgets."""
    prompt, full = Prompt("a", 3), httpx.Response(503)
    tally = asked(lambda client, tally: read(client, TARGET, prompt, cut, tally), full)
    assert (tally.refused, tally.lost, tally.num_read) == (1, [], 0)
    tally = asked(lambda client, tally: whole(client, TARGET, prompt, Outcome(0, 0), tally), full)
    assert (tally.refused, tally.lost, tally.whole) == (1, [], [])


@pytest.mark.parametrize(("status", "lost"), [(400, []), (200, ["wrong: 200 in place of 400"])])
def test_wrong_requests_must_be_refused(status: int, lost: list[str]) -> None:
    """Bug: a request with a misspelt field is taken."""
    tally = asked(lambda client, tally: wrong(client, "http://test", 0, tally), httpx.Response(status))
    assert tally.lost == lost


def test_the_crowd_is_as_large_as_the_server_takes() -> None:
    """Bug: memory that a fuller queue takes for the first time, called a leak."""
    settings = ServerConfig()
    assert settings.max_num_seqs + settings.max_queued_requests == CROWD


def test_a_run_is_looked_at_in_thirds() -> None:
    """Bug: the slow end of a run vanishes in the p99 of all of it."""
    rows = thirds([Outcome(at, at, ttft=at / 100) for at in range(9)])
    assert [row["requests"] for row in rows] == [3, 3, 3]
    assert [round(row["ttft_p99_ms"]) for row in rows] == [20, 50, 80]
