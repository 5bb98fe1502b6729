"""Server-sent events: pieces of an answer to bytes on the wire.

The generation is entered when the response begins and left when it ends, however it ends: a client that closes the
connection, a cancelled task, an error. So refusals still get their own status, and nothing runs on for nobody.
"""

import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.errors import from_exception
from server.generation import Delta, Generation

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may hold tokens back
log = logging.getLogger(__name__)


def frame(payload: str) -> bytes:
    """One event. `payload` is JSON, which has no line breaks outside strings, and escapes those inside."""
    return b"data: " + payload.encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A generation as it happens. `first`, `each` and `last` write the JSON of the chunks."""

    def __init__(
        self,
        generation: Generation,
        first: Callable[[], Iterable[str]],
        each: Callable[[Delta], Iterable[str]],
        last: Callable[[], Iterable[str]],
    ) -> None:
        self._body = self._events()
        super().__init__(self._body, media_type="text/event-stream", headers=HEADERS)
        self._generation = generation
        self._first = first
        self._each = each
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation, aclosing(self._body):
            with suppress(ClientDisconnect):  # an end like others
                await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            for payload in self._first():
                yield frame(payload)
            async for deltas in self._generation:
                yield b"".join(frame(payload) for delta in deltas for payload in self._each(delta))
            for payload in self._last():
                yield frame(payload)
        except Exception as error:  # the status is out: say it in the stream, and end it without [DONE]
            api_error = from_exception(error)
            if api_error.code == "internal_error":
                log.exception("failed while streaming")
            yield frame(json.dumps(api_error.body))
            return
        yield DONE
