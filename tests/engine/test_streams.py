"""Events of many requests, sorted to those who wait."""

import asyncio

import pytest

from engine.messages import Done, Failed, Token
from engine.streams import Streams
from tests.engine.worlds import submit


def test_a_stream_ends_with_the_last_choice() -> None:
    """Bug: dropping the stream at the first Done loses the other choices."""

    async def scenario() -> None:
        streams = Streams()
        stream = streams.open(submit("a", [1], n=2))
        streams.deliver([Token("a", 0, 5), Done("a", 0, "stop")])
        assert len(streams) == 1
        streams.deliver([Done("a", 1, "length")])
        assert len(streams) == 0
        assert await stream.next() == [Token("a", 0, 5), Done("a", 0, "stop"), Done("a", 1, "length")]

    asyncio.run(scenario())


def test_events_of_discarded_and_unknown_requests_are_dropped() -> None:
    async def scenario() -> None:
        streams = Streams()
        streams.open(submit("a", [1]))
        assert streams.discard("a")
        assert not streams.discard("a")
        streams.deliver([Token("a", 0, 5), Token("b", 0, 5)])
        assert len(streams) == 0

    asyncio.run(scenario())


def test_everyone_hears_of_the_end() -> None:
    """Bug: a client that waits for ever after its engine died."""

    async def scenario() -> None:
        streams = Streams()
        stream = streams.open(submit("a", [1], n=3))
        streams.fail_all("gone")
        assert await asyncio.wait_for(stream.next(), 1) == [Failed("a", "engine", "gone")]
        assert len(streams) == 0

    asyncio.run(scenario())


def test_an_id_is_used_once_at_a_time() -> None:
    async def scenario() -> None:
        streams = Streams()
        streams.open(submit("a", [1]))
        with pytest.raises(ValueError, match="in use"):
            streams.open(submit("a", [1]))

    asyncio.run(scenario())
