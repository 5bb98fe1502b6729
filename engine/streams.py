"""Events of many requests, sorted to the streams that wait for them."""

import asyncio
from collections.abc import Iterable

from engine.client import EngineState
from engine.messages import Done, Event, Failed, Ready, Stats, Submit


class QueuedStream:
    """The EventStream of one request, fed by a client."""

    def __init__(self, submit: Submit) -> None:
        self._events: list[Event] = []
        self._arrived = asyncio.Event()
        self._num_open = submit.n  # choices without their Done

    async def next(self) -> list[Event]:
        """Wait for at least one event and return all that have arrived."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events

    def put(self, event: Event) -> bool:
        """Add an event; returns whether it was the request's last."""
        self._events.append(event)
        self._arrived.set()
        if isinstance(event, Done):
            self._num_open -= 1
        elif isinstance(event, Failed):
            self._num_open = 0
        return self._num_open == 0


class Streams:
    """Request id -> its stream."""

    def __init__(self) -> None:
        self._streams: dict[str, QueuedStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, submit: Submit) -> QueuedStream:
        """Raises ValueError when the id is in use."""
        if submit.id in self._streams:
            raise ValueError(f"request id {submit.id!r} is in use")
        stream = self._streams[submit.id] = QueuedStream(submit)
        return stream

    def discard(self, request_id: str) -> bool:
        """Drop a stream and whatever is still to come for it. Returns whether it was open."""
        return self._streams.pop(request_id, None) is not None

    def deliver(self, events: Iterable[Event]) -> None:
        """Hand events out; those of discarded requests are dropped."""
        for event in events:
            stream = self._streams.get(event.id)
            if stream is not None and stream.put(event):
                del self._streams[event.id]

    def fail_all(self, message: str) -> None:
        """End every open stream with Failed(kind="engine")."""
        self.deliver([Failed(request_id, "engine", message) for request_id in self._streams])


class StreamingClient:
    """What every EngineClient keeps: its state, the plan, the newest figures, and the open streams."""

    def __init__(self, ready: Ready | None, stats: Stats) -> None:
        self._state: EngineState = "starting"
        self._ready = ready
        self._stats = stats
        self._streams = Streams()

    @property
    def process_id(self) -> int | None:
        return None

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def ready(self) -> Ready | None:
        return self._ready

    @property
    def stats(self) -> Stats:
        return self._stats
