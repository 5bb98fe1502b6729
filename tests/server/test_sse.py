"""Streams that end badly, and streams nobody reads."""

import asyncio
from typing import Any

import pytest

from engine.messages import Failed, Submit
from tests.fakes import FakeEngine, Script, say
from tests.server.conftest import CHAT, TEXT, World, events

pytestmark = pytest.mark.anyio


async def test_error_in_the_stream_is_an_event_and_the_end() -> None:
    """Bug: a stream that stops without a word looks like a complete answer."""

    def script(submit: Submit) -> Script:
        return Script(list(b"ab"), failure=Failed(submit.id, "engine", "the engine died"))

    world = World(FakeEngine(script))
    *_, last = events(await world.text(stream=True))
    assert last["error"]["message"] == "the engine died"
    assert last["error"]["code"] == "engine_error"
    assert world.service.in_flight == 0


async def test_unexpected_error_in_the_stream_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(FakeEngine())
    monkeypatch.setattr(world.service.metrics, "finished", lambda *_: 1 / 0)
    *_, last = events(await world.text(stream=True))
    assert last["error"]["code"] == "internal_error"
    assert "division" not in str(last)


async def test_line_breaks_in_text_stay_in_one_event() -> None:
    """Bug: a newline the model writes ends the event."""
    world = World(FakeEngine(lambda submit: say("a\n\ndata: b\r\n")))
    chunks = events(await world.text(stream=True))[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a\n\ndata: b\r\n"


async def test_headers_keep_proxies_from_buffering() -> None:
    response = await World(FakeEngine()).text(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"


class Caller:
    """A hand-written ASGI client that can hang up."""

    def __init__(self, body: bytes) -> None:
        self._messages = [{"type": "http.request", "body": body, "more_body": False}]
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self.got_body = asyncio.Event()

    async def receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.got_body.set()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("version", ["2.0", "2.4"])
async def test_hanging_up_cancels_the_request(path: str, stream: bool, version: str) -> None:
    """Bug: the engine works to the last token for a client that has gone."""
    engine = FakeEngine(lambda submit: Script(list(b"ab") * 10_000, delay_s=0.001))
    world = World(engine)
    request = world.http.build_request(
        "POST", path, json={**(CHAT if "chat" in path else TEXT), "stream": stream, "max_tokens": None}
    )
    caller = Caller(request.content)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": version},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    if version == "2.4" and stream:  # then it is send() that tells that the client has gone
        send = caller.send

        async def failing_send(message: Any) -> None:
            if caller.gone.is_set():
                raise OSError("gone")
            await send(message)

        caller.send = failing_send  # type: ignore[method-assign]
    call = asyncio.ensure_future(world.app(scope, caller.receive, caller.send))
    if stream:
        await caller.got_body.wait()
    while not engine.submitted:
        await asyncio.sleep(0.001)
    caller.gone.set()
    await asyncio.wait({call}, timeout=5)
    assert call.done()
    assert engine.cancelled == [engine.submitted[0].id]
    assert world.service.in_flight == 0
    assert call.exception() is None
