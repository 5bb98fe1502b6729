"""Keys, limits, request ids, the access log and other origins, in front of the routes."""

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.config import ServerConfig
from server.gate import AccessLogHandler
from server.keys import KeyRing
from tests.fakes import ByteTokenizer, FakeEngine, Script
from tests.server.conftest import TEXT

pytestmark = pytest.mark.anyio

LIMITED = '[[key]]\nname = "alice"\nkey = "secret"\nrequests-per-minute = 3\nmax-concurrent = 1\n'
SECRET = {"authorization": "Bearer secret"}


class Guarded:
    """An app with keys, and a client."""

    def __init__(self, keys: KeyRing | None = None, engine: FakeEngine | None = None, **settings: Any) -> None:
        self.app = create_app(engine or FakeEngine(), ByteTokenizer(), ServerConfig(**settings), keys=keys)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def text(self, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json=TEXT | more, headers=headers)


def limited(tmp_path: Path) -> KeyRing:
    path = tmp_path / "keys.toml"
    path.write_text(LIMITED)
    return KeyRing(None, path, clock=lambda: 0.0)


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic secret", "secret"])
async def test_without_a_known_key_nothing_of_the_api_answers(header: str | None) -> None:
    """Bug: a route that was forgotten; a prompt that is read before the key is."""
    world = Guarded(KeyRing("secret"))
    headers = {} if header is None else {"authorization": header}
    for method, path in (
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
    ):
        response = await world.http.request(method, path, json=TEXT, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/ready", "/metrics", "/docs", "/"):
        assert (await world.http.get(path, headers=headers)).status_code == 200
    assert 'kind="unauthorized"} 4.0' in (await world.http.get("/metrics")).text


async def test_a_known_key_opens_the_api() -> None:
    world = Guarded(KeyRing("secret"))
    assert (await world.text(SECRET)).status_code == 200
    assert (await world.http.get("/v1/models", headers={"authorization": "bearer secret"})).status_code == 200


async def test_a_key_has_its_requests_a_minute(tmp_path: Path) -> None:
    """Bug: one client that takes the whole server; a 429 that does not say when to come back."""
    world = Guarded(limited(tmp_path))
    assert [(await world.text(SECRET)).status_code for _ in range(3)] == [200] * 3
    refused = await world.text(SECRET)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "alice" in refused.json()["error"]["message"]
    assert (await world.http.get("/v1/models", headers=SECRET)).status_code == 200


async def test_a_key_has_its_requests_at_once_and_gets_them_back(tmp_path: Path) -> None:
    """Bug: a place that a failed or cancelled request keeps for ever."""
    engine = FakeEngine(lambda submit: Script([97] * 20, delay_s=0.01))
    world = Guarded(limited(tmp_path), engine)
    first = asyncio.ensure_future(world.text(SECRET, stream=True))
    await asyncio.sleep(0.05)
    refused = await world.text(SECRET)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert (await first).status_code == 200
    assert (await world.text(SECRET, n=-1)).status_code == 400
    assert (await world.text(SECRET)).status_code == 200


async def test_request_ids_are_kept_or_made() -> None:
    """Bug: a line break in an id that forges a log line; an id that is lost on an error."""
    world = Guarded()
    assert (await world.text({"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    for given in ("a b", "x" * 200, ""):
        made = (await world.text({"x-request-id": given}, n=-1)).headers["x-request-id"]
        assert len(made) == 32
        assert made != given


async def test_unexpected_errors_carry_the_id_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Guarded()
    monkeypatch.setattr(world.app.state.service, "check_model", lambda name: 1 / 0)
    response = await world.text({"x-request-id": "abc"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "abc")


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.message) for record in caplog.records if record.name == "nibble.access"]


@pytest.fixture
def _access_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("nibble.access"), "propagate", True)
    caplog.set_level(logging.INFO, "nibble.access")


@pytest.mark.usefixtures("_access_logged")
async def test_one_line_for_each_request_without_its_prompt_or_its_key(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: prompts, or keys, in a log that is shipped to somebody else."""
    world = Guarded(KeyRing("secret"), access_log=True)
    await world.text(SECRET | {"x-request-id": "r1"}, prompt="private", stream=True)
    await world.text({})
    first, second = lines(caplog)
    assert (first["request_id"], first["path"], first["status"], first["key"]) == (
        "r1",
        "/v1/completions",
        200,
        "default",
    )
    assert 0 < first["first_byte_s"] <= first["seconds"]
    assert first["bytes"] > 0
    assert (second["status"], second["key"]) == (401, None)
    assert "private" not in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.usefixtures("_access_logged")
async def test_prompts_are_logged_when_asked_for_and_nothing_when_not(caplog: pytest.LogCaptureFixture) -> None:
    await Guarded().text()
    assert lines(caplog) == []
    await Guarded(access_log=True, log_prompts=True).text(prompt="private")
    assert "private" in lines(caplog)[0]["body"]


async def test_other_origins_are_refused_unless_named() -> None:
    """Bug: any web page can use a server on the reader's own machine; a preflight that is asked for a key."""
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed = await Guarded().http.options("/v1/completions", headers=ask)
    assert "access-control-allow-origin" not in closed.headers
    world = Guarded(KeyRing("secret"), cors_origins="https://a.example, https://b.example")
    preflight = await world.http.options("/v1/completions", headers=ask)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "https://a.example")
    refused = await world.text({"origin": "https://b.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://b.example")
    other = await world.text(SECRET | {"origin": "https://c.example"})
    assert "access-control-allow-origin" not in other.headers


async def test_answers_are_counted_by_status_and_probes_are_not() -> None:
    """Bug: health checks and scrapes drown the traffic; refusals that no route ever saw are missing."""
    world = Guarded(KeyRing("secret"))
    for path in ("/health", "/metrics", "/v1/models"):
        await world.http.get(path)
    await world.http.post("/v1/completions", json=TEXT, headers=SECRET)
    text = (await world.http.get("/metrics")).text
    assert 'nibble_http_responses_total{status="200"} 1.0' in text
    assert 'nibble_http_responses_total{status="401"} 1.0' in text


def test_an_access_log_that_nobody_reads_any_more_costs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: nibble serve --access-log | head -1 writes a traceback for every request from the second on."""
    reader, writer = os.pipe()
    os.close(reader)
    record = logging.LogRecord("nibble.access", logging.INFO, "", 0, "{}", None, None)
    with os.fdopen(writer, "w") as stream:
        handler = AccessLogHandler(stream)
        for _ in range(3):
            handler.emit(record)
    assert [line.getMessage() for line in caplog.records] == [
        "the reader of the access log is gone: its lines are dropped"
    ]
