"""From open port to exit code.

    bind -> fetch -> listen -> load (503 + Retry-After) -> serve -> SIGTERM or SIGINT: drain -> exit 0
                                    a signal: exit 128 + its number                    a second signal: cut answers off

While draining, /ready and new work get 503 with Retry-After; running answers finish within --drain-seconds. The ones
that do not, and all of them after a second signal, end with an error event.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.client import EngineClient
from engine.messages import Ready
from server.service import Service

GRACE_S = 2  # for the last bytes of answers that were cut off
KEEP_ALIVE_S = 75  # longer than proxies keep idle connections, so that they close first and no request is lost
log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal came before the model was loaded."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


class DrainingServer(uvicorn.Server):
    """uvicorn, with a first signal that lets running answers finish and an exit code of 0 after it."""

    def __init__(self, app: FastAPI, access_log: bool = False) -> None:
        settings = app.state.service.config
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=access_log,
                server_header=False,
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=KEEP_ALIVE_S,
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
            )
        )
        self._service: Service = app.state.service
        self._deadline = 0.0  # time.monotonic(); of a drain that has begun
        self.signal: int | None = None  # the last

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal arrived. uvicorn would raise it again at the end, which would spoil the exit code."""
        now, service, self.signal = time.monotonic(), self._service, sig
        limit = service.config.drain_seconds
        if not service.draining and service.in_flight and limit > 0:
            message = "finishing %d answers, at most %g s; press Ctrl-C again to cut them off"
            log.warning(message, service.in_flight, limit)
        self._deadline = now if service.draining else now + limit
        service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the server."""
        return await super().on_tick(counter) or (self._service.draining and self._drained())

    def _drained(self) -> bool:
        if self._service.in_flight == 0:
            return True
        if time.monotonic() < self._deadline:
            return False
        log.warning("%d answers did not finish and are cut off", self._service.in_flight)
        self._service.cut_off.set()  # and not engine.stop() here: clients would hear of it when its process has ended
        return True


class OpsServer(uvicorn.Server):
    """uvicorn on a second port, which leaves signals to the first and lives as long."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, server_header=False))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Ports:
    """What listens, and where."""

    server: DrainingServer
    sock: socket.socket
    ops: tuple[OpsServer, socket.socket] | None = None


async def serve(ports: Ports, engine: EngineClient, on_ready: Callable[[Ready], None]) -> None:
    """Serve until a signal. Raises EngineUnavailable when the model cannot be loaded, and Interrupted when the signal
    comes before it is; the engine is stopped always."""
    server = ports.server
    serving = asyncio.ensure_future(server.serve([ports.sock]))
    loading = asyncio.ensure_future(_load(engine))
    ops = None if ports.ops is None else asyncio.ensure_future(ports.ops[0].serve([ports.ops[1]]))
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            on_ready(loading.result())
        await serving
        if not loading.done() and server.signal is not None:
            raise Interrupted(server.signal)
    finally:
        loading.cancel()
        server.should_exit = server.force_exit = True
        await asyncio.wait({serving, loading})
        if ports.ops is not None and ops is not None:
            ports.ops[0].should_exit = ports.ops[0].force_exit = True
            await asyncio.wait({ops})
        await engine.stop()


async def _load(engine: EngineClient) -> Ready:
    await engine.start()
    return await engine.wait_ready()
