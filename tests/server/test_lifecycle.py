"""Signals, on a real port."""

import asyncio
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.client import EngineUnavailable
from engine.messages import Ready
from server.app import create_app, create_ops_app
from server.config import ServerConfig
from server.lifecycle import DrainingServer, Interrupted, OpsServer, Ports, serve
from server.ports import bind, listen
from tests.fakes import ByteTokenizer, FakeEngine, Script

pytestmark = pytest.mark.anyio

BODY = {"model": "demo", "prompt": "x", "max_tokens": 400, "stream": True}


class Running:
    """A server on a free port, and signals that reach only it."""

    def __init__(self, engine: FakeEngine, drain_seconds: float, **settings: Any) -> None:
        self.engine = engine
        self.sock = bind("127.0.0.1", 0)
        listen(self.sock)
        app = create_app(engine, ByteTokenizer(), ServerConfig(drain_seconds=drain_seconds, **settings))
        self.server = DrainingServer(app)
        self.ops = (OpsServer(create_ops_app(app.state.service)), bind("127.0.0.1", 0))
        self.facts: list[Ready] = []
        ports = Ports(self.server, self.sock, self.ops)
        self.task = asyncio.ensure_future(serve(ports, engine, self.facts.append))
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.sock.getsockname()[1]}")

    def signal(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[AsyncIterator[str]]:
        """A stream whose first event has been read."""
        async with self.http.stream("POST", "/v1/completions", json=BODY) as response:
            lines = response.aiter_lines()
            await anext(lines)
            yield lines

    async def ended(self) -> None:
        await asyncio.wait_for(self.task, 10)
        await self.http.aclose()


def slow(num_tokens: int, **options: Any) -> FakeEngine:
    return FakeEngine(lambda submit: Script([97] * num_tokens, delay_s=0.01, **options), state="starting")


async def test_first_signal_lets_answers_finish_and_takes_no_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a deploy cuts answers in the middle, never ends because new ones keep coming, or says nothing meanwhile."""
    running = Running(slow(50), drain_seconds=30)
    await asyncio.sleep(0.1)
    async with running.stream() as lines:
        running.signal()
        assert "finishing 1 answers, at most 30 s; press Ctrl-C again" in caplog.text
        refused = await running.http.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert (await running.http.get("/ready")).status_code == 503
        assert (await running.http.get("/health")).status_code == 200
        assert [line async for line in lines][-2:] == ["data: [DONE]", ""]
    await running.ended()
    assert running.engine.stopped
    assert running.facts == [Ready(running.engine.plan)]


async def test_answers_that_take_too_long_end_with_an_error() -> None:
    """Bug: a drain that waits for ever, or a cut that looks like a complete answer."""
    running = Running(slow(1, hang=True), drain_seconds=0.2)
    await asyncio.sleep(0.1)
    async with running.stream() as lines:
        running.signal()
        rest = "\n".join([line async for line in lines])
    assert '"error"' in rest
    assert "[DONE]" not in rest
    await running.ended()


async def test_cut_answers_end_before_the_engine_does() -> None:
    """Bug: a client whose answer was cut off hears of it seconds later, when the engine's process has ended."""
    told = asyncio.Event()

    class SlowToStop(FakeEngine):
        async def stop(self) -> None:
            await told.wait()
            await super().stop()

    engine = SlowToStop(lambda submit: Script([97], hang=True), state="starting")
    running = Running(engine, drain_seconds=0.1)
    await asyncio.sleep(0.1)
    async with asyncio.timeout(10), running.stream() as lines:
        whole = asyncio.ensure_future(running.http.post("/v1/completions", json={**BODY, "stream": False}))
        while len(engine.submitted) < 2:
            await asyncio.sleep(0.01)
        running.signal()
        rest = "\n".join([line async for line in lines])
        answer = await whole
    assert "The server is shutting down and cut this answer off" in rest
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert len(engine.cancelled) == 2
    told.set()
    await running.ended()


async def test_second_signal_ends_at_once() -> None:
    """Bug: an operator who presses Ctrl-C twice still waits for the drain."""
    running = Running(slow(1, hang=True), drain_seconds=60)
    await asyncio.sleep(0.1)
    async with running.stream() as lines:
        running.signal()
        running.signal()
        rest = "\n".join([line async for line in lines])
    assert '"error"' in rest
    await running.ended()
    assert running.engine.stopped


async def test_port_answers_while_the_model_loads_and_idle_server_ends_at_once() -> None:
    class Loading(FakeEngine):
        async def start(self) -> None:
            await asyncio.sleep(3600)

    running = Running(Loading(state="starting"), drain_seconds=60)
    assert (await running.http.get("/health")).json() == {"status": "ok", "engine": "starting"}
    response = await running.http.get("/ready")
    assert response.status_code == 503
    running.signal()
    with pytest.raises(Interrupted) as ended:  # bug: exit code 0, as after a service
        await running.ended()
    assert ended.value.signal == signal.SIGTERM
    await running.http.aclose()


async def test_model_that_cannot_be_loaded_ends_the_server_with_the_reason() -> None:
    class Broken(FakeEngine):
        async def start(self) -> None:
            self.state = "failed"

    running = Running(Broken(state="starting"), drain_seconds=60)
    with pytest.raises(EngineUnavailable, match="checkpoint is broken"):
        await running.ended()
    await running.http.aclose()
    assert running.engine.stopped


async def test_closed_socket_cancels_the_request() -> None:
    """Bug: a browser tab that is closed keeps its pages until max_tokens."""
    running = Running(slow(400), drain_seconds=0)
    await asyncio.sleep(0.1)
    async with running.stream():
        pass
    for _ in range(100):
        if running.engine.cancelled:
            break
        await asyncio.sleep(0.01)
    assert running.engine.cancelled == [running.engine.submitted[0].id]
    running.signal()
    await running.ended()


def certificate(folder: Path) -> tuple[Path, Path]:
    """One for this machine that nobody vouches for, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*words, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True, timeout=60)
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_tls_serves_those_who_know_the_certificate_and_nobody_without_tls(tmp_path: Path) -> None:
    """Bug: a certificate that is taken and not used, and keys that travel in the clear."""
    cert, key = certificate(tmp_path)
    running = Running(slow(1), drain_seconds=0, tls_cert=cert, tls_key=key)
    await asyncio.sleep(0.1)
    url = str(running.http.base_url).replace("http:", "https:")
    async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=cert)) as knowing:
        assert (await knowing.post(f"{url}/v1/completions", json=BODY)).status_code == 200
    async with httpx.AsyncClient() as strange:
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await strange.get(f"{url}/health")
    with pytest.raises(httpx.RemoteProtocolError):
        await running.http.get("/health")
    running.signal()
    await running.ended()


def test_taken_port_is_an_os_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_a_port_is_taken_before_it_is_opened() -> None:
    """Bug: clients of a server that still fetches its model wait for minutes instead of being refused; a port that two
    servers bound in the same moment is found out by neither."""
    with bind("127.0.0.1", 0) as first:
        address = first.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        with bind(*address) as second:
            listen(first)
            socket.create_connection(address).close()
            with pytest.raises(OSError, match="in use"):
                listen(second)


async def test_operators_have_a_port_of_their_own() -> None:
    """Bug: metrics on the port that is open to the world; a second port that outlives the server."""
    running = Running(slow(1), drain_seconds=0, ops_port=0)
    await asyncio.sleep(0.1)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.ops[1].getsockname()[1]}") as ops:
        assert "nibble_engine_up 1.0" in (await ops.get("/metrics")).text
        assert (await ops.get("/ready")).status_code == 200
        assert (await ops.get("/v1/models")).status_code == 404
        assert (await running.http.get("/metrics")).status_code == 404
        assert (await running.http.get("/v1/models")).status_code == 200
        running.signal()
        await running.ended()
        with pytest.raises(httpx.ConnectError):
            await ops.get("/ready")
