"""What stands before the routes, outermost first: request ids and the access log, then keys and their limits.

Both are plain ASGI, so that streams pass through event by event.
"""

import json
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, TooManyRequests, Unauthorized
from server.keys import Key, KeyRing

REQUEST_ID = "x-request-id"
SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")  # what a log line and a header can take
GUARDED = ("/v1/", "/tokenize", "/detokenize")
BUSY_S = 1.0  # Retry-After of a key that has all its requests running: any may end soon
PROMPT_CHARACTERS = 2000  # of a body, in a log that was asked for prompts
log = logging.getLogger("nibble.access")

Refused = Callable[[str], None]


class AccessLog:
    """Gives every request an id, sends it back, and counts it and writes one JSON line when the answer has ended.

    Never a prompt, unless `with_prompts`; never a key, only its name.
    """

    def __init__(self, app: ASGIApp, enabled: bool, with_prompts: bool, answered: Callable[[int], None]) -> None:
        self._app = app
        self._answered = answered
        self._enabled = enabled
        self._with_prompts = with_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, given = time.perf_counter(), Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        entry: dict[str, Any] = {"status": None, "first_byte_s": None, "bytes": 0}
        body = bytearray()

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            elif chunk := message.get("body"):
                entry["first_byte_s"] = entry["first_byte_s"] or round(time.perf_counter() - started, 6)
                entry["bytes"] += len(chunk)
            await send(message)

        async def receive_on() -> Message:
            message = await receive()
            if len(body) < PROMPT_CHARACTERS:
                body.extend(message.get("body", b""))
            return message

        try:
            await self._app(scope, receive_on if self._with_prompts else receive, send_on)
        except Exception:
            entry["status"] = 500  # what the caller is told, further out
            raise
        finally:
            if self._with_prompts:
                entry["body"] = body[:PROMPT_CHARACTERS].decode("utf-8", "replace")
            self._ended(scope, entry, request_id, time.perf_counter() - started)

    def _ended(self, scope: Scope, entry: dict[str, Any], request_id: str, seconds: float) -> None:
        if entry["status"] is not None and scope["path"].startswith(GUARDED):
            self._answered(entry["status"])
        if self._enabled:
            _write(scope, entry, request_id, seconds)


class AccessLogHandler(logging.StreamHandler[TextIO]):
    """Lines for whoever reads standard output, which may be a program that ends before the server does."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Where nobody reads any more, say so once and write to nobody: what is buffered would fail again at exit."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            nobody = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nobody, self.stream.fileno())
            os.close(nobody)
            logging.getLogger(__name__).warning("the reader of the access log is gone: its lines are dropped")
        else:
            super().handleError(record)


class Gate:
    """Lets requests to the API through that carry a key which has something left. Without keys, all of them."""

    def __init__(self, app: ASGIApp, keys: KeyRing, refused: Refused) -> None:
        self._app = app
        self._keys = keys
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._keys.is_open or not scope["path"].startswith(GUARDED):
            return await self._app(scope, receive, send)
        try:
            key = self._identify(Headers(scope=scope).get("authorization", ""))
            scope.setdefault("state", {})["key"] = key.name
            with self._admitted(key, counted=scope["method"] == "POST"):
                await self._app(scope, receive, send)
        except (Unauthorized, TooManyRequests) as error:
            self._refused("unauthorized" if isinstance(error, Unauthorized) else "rate_limited")
            await _respond(error)(scope, receive, send)

    def _identify(self, authorization: str) -> Key:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized("This server needs an API key: send it as 'Authorization: Bearer KEY'")
        key = self._keys.find(token.strip())
        if key is None:
            raise Unauthorized("The API key is not known to this server")
        return key

    @contextmanager
    def _admitted(self, key: Key, counted: bool) -> Iterator[None]:
        """Hold one of the key's places. Raises TooManyRequests. Looking at models costs nothing."""
        if not counted:
            yield
            return
        usage = self._keys.usage(key)
        if key.max_concurrent is not None and usage.num_running >= key.max_concurrent:
            raise TooManyRequests(
                f"The key '{key.name}' has {usage.num_running} requests running, the most it may", BUSY_S
            )
        if key.requests_per_minute is not None:
            wait_s = usage.take(key.requests_per_minute, self._keys.clock())
            if wait_s > 0:
                raise TooManyRequests(
                    f"The key '{key.name}' may send {key.requests_per_minute} requests a minute", wait_s
                )
        usage.num_running += 1
        try:
            yield
        finally:
            usage.num_running -= 1


def _respond(error: ApiError) -> ASGIApp:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _write(scope: Scope, entry: dict[str, Any], request_id: str, seconds: float) -> None:
    client = scope.get("client")
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request_id": request_id,
        "client": client[0] if client else None,
        "key": scope.get("state", {}).get("key"),
        "method": scope["method"],
        "path": scope["path"],
        **entry,
        "seconds": round(seconds, 6),
    }
    log.info(json.dumps(line))
