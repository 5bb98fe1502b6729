"""The in-process client behaves as the remote one does."""

import asyncio

import pytest

from engine.client import EngineClient, EngineUnavailable
from engine.local import LocalClient
from engine.messages import Done, Event, Failed, Token
from tests.engine.worlds import continuation, make_core, make_summary, submit


def make_client() -> LocalClient:
    core = make_core()
    return LocalClient(core, make_summary(core))


async def follow(client: EngineClient, request_id: str, prompt: list[int]) -> list[Event]:
    stream = client.submit(submit(request_id, prompt))
    events: list[Event] = []
    while not any(isinstance(event, Done | Failed) for event in events):
        events += await stream.next()
    return events


def test_requests_stream_side_by_side() -> None:
    async def scenario() -> None:
        client = make_client()
        await client.start()
        answers = await asyncio.gather(*(follow(client, str(i), [i + 1] * 9) for i in range(4)))
        for i, events in enumerate(answers):
            assert [e.token for e in events if isinstance(e, Token)] == continuation([i + 1] * 9, 8)
        await client.stop()

    asyncio.run(scenario())


def test_cancel_frees_the_pages() -> None:
    async def scenario() -> None:
        client = make_client()
        await client.start()
        stream = client.submit(submit("a", [1] * 30, max_tokens=400))
        await stream.next()
        assert client.stats.pages_used > 0
        client.cancel("a")
        for _ in range(4000):
            if client.stats.pages_used == 0:
                break
            await asyncio.sleep(0.005)
        assert client.stats.pages_used == 0
        await client.stop()

    asyncio.run(scenario())


def test_stop_ends_those_who_wait_and_refuses_new_ones() -> None:
    async def scenario() -> None:
        client = make_client()
        with pytest.raises(EngineUnavailable):
            client.submit(submit("early", [1]))
        await client.start()
        stream = client.submit(submit("a", [1], max_tokens=500))
        await client.stop()
        events = await stream.next()
        assert isinstance(events[-1], Failed)
        with pytest.raises(EngineUnavailable):
            client.submit(submit("late", [1]))

    asyncio.run(scenario())
