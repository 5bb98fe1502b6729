"""The client of an engine in a process of its own, which it spawns, watches and restarts.

start -> starting -> ready -> (process dies) -> restarting -> ready ...
              \\-> failed  (the first start found the model unusable: restarting would not help)
"""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from engine.client import EngineState, EngineUnavailable, EventStream
from engine.config import EngineConfig
from engine.messages import (
    Cancel,
    Event,
    Inbound,
    Loading,
    Outbound,
    Ready,
    Shutdown,
    StartFailed,
    Stats,
    Submit,
)
from engine.streams import StreamingClient

RESTART_DELAYS_S = (0.5, 1, 2, 4, 8, 15, 30)  # after the 1st, 2nd, ... death without a Ready between them
STOP_GRACE_S = 5.0
ROOT = Path(__file__).resolve().parent.parent  # where the packages lie
LAST_WORDS_S = 0.2  # for what a process sent just before it ended
ENCODER = msgspec.msgpack.Encoder()
DECODER = msgspec.msgpack.Decoder(list[Outbound])

logger = logging.getLogger(__name__)


class RemoteClient(StreamingClient):
    """An EngineClient over ZeroMQ."""

    def __init__(self, config: EngineConfig, on_loading: Callable[[Loading], None] | None = None) -> None:
        super().__init__(None, Stats())
        self._config = config
        self._on_loading = on_loading
        self._changed = asyncio.Condition()
        self._reason = "the engine is still loading its model"
        self._last_words: str | None = None  # why the process of now says it cannot start
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def process_id(self) -> int | None:
        """Of the engine, while it runs."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        if self._supervisor is not None:
            raise RuntimeError("the engine was started already")
        self._supervisor = asyncio.create_task(self._supervise())

    async def wait_ready(self) -> Ready:
        async with self._changed:
            await self._changed.wait_for(lambda: self._state in ("ready", "failed", "stopped"))
        if self._state != "ready" or self._ready is None:
            raise self._unavailable()
        return self._ready

    def submit(self, request: Submit) -> EventStream:
        if self._state != "ready":
            raise self._unavailable()
        stream = self._streams.open(request)
        self._send(request)
        return stream

    def cancel(self, request_id: str) -> None:
        if self._streams.discard(request_id) and self._state == "ready":
            self._send(Cancel(request_id))

    def cancel_choice(self, request_id: str, index: int) -> None:
        if self._state == "ready":
            self._send(Cancel(request_id, index))

    async def stop(self) -> None:
        if self._state == "stopped":
            return
        await self._become("stopped", "the engine was stopped")
        if self._socket is not None and self._process is not None:
            self._send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._process.wait()), STOP_GRACE_S)
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
                await self._process.wait()  # or what was killed stays a zombie until this process ends
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._streams.fail_all(self._reason)

    def _unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(self._reason, retry_after_s=5.0)

    def _send(self, message: Inbound) -> None:
        """Queue a message: without a high-water mark this never waits, so the future is done when it is returned."""
        if self._socket is None:
            raise self._unavailable()
        self._socket.send(ENCODER.encode(message))

    async def _become(self, state: EngineState, reason: str = "") -> None:
        async with self._changed:
            self._state, self._reason = state, reason
            self._changed.notify_all()

    async def _supervise(self) -> None:
        """Run engine processes, one after the other, until stopped or until the first cannot start."""
        num_failures = 0
        while True:
            was_ready = False
            try:
                was_ready = await self._run_once()
            except Exception as error:  # no socket, no process, a message nobody understands: those who wait must hear
                await self._mourn(f"the engine process cannot be run: {error}")
            if self._state == "stopped":
                return
            if self._ready is None:
                await self._become("failed", self._reason)
                return
            num_failures = 0 if was_ready else num_failures + 1
            delay = RESTART_DELAYS_S[min(num_failures, len(RESTART_DELAYS_S) - 1)]
            logger.error("%s; starting it again in %.1f s", self._reason, delay)
            await asyncio.sleep(delay)

    async def _run_once(self) -> bool:
        """Spawn one process and serve it until it ends; open requests then get a clear error.

        Returns whether it had become ready. Nothing here waits for the process without watching that it lives.
        """
        folder = Path(tempfile.mkdtemp(prefix="nibble-"))
        context = zmq.asyncio.Context()
        tasks: list[asyncio.Task[Any]] = []
        try:
            self._last_words = None
            self._socket = self._bind(context, f"ipc://{folder}/engine.sock")
            self._process = await self._spawn(f"ipc://{folder}/engine.sock")
            self._socket.send(ENCODER.encode(self._config))  # leaves when the process has connected
            receiver = asyncio.create_task(self._receive(self._socket))
            exited = asyncio.create_task(self._process.wait())
            tasks += [receiver, exited]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                await asyncio.wait([receiver], timeout=LAST_WORDS_S)
            if receiver.done():
                receiver.result()  # raises what went wrong: it never ends by itself
            was_ready = self._state == "ready"
            if self._state != "stopped":
                await self._mourn(self._last_words or _describe_exit(exited.result()))
            return was_ready
        finally:
            for task in tasks:
                task.cancel()
            self._kill()
            self._socket = None
            context.destroy(linger=0)
            shutil.rmtree(folder, ignore_errors=True)

    async def _spawn(self, address: str) -> asyncio.subprocess.Process:
        """A Python that takes our packages from where they are, and nothing from the folder the user stands in.

        It gets a session of its own, so that Ctrl-C in a terminal reaches the server alone.
        """
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from engine.process import main; main()"
        command = (sys.executable, "-P", "-c", code, address, str(os.getpid()))
        return await asyncio.create_subprocess_exec(*command, start_new_session=True)

    def _bind(self, context: zmq.asyncio.Context, address: str) -> zmq.asyncio.Socket:
        socket = context.socket(zmq.PAIR)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.bind(address)
        return socket

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            for message in DECODER.decode(await socket.recv()):
                await self._handle(message)

    async def _handle(self, message: Outbound) -> None:
        if isinstance(message, Stats):
            self._stats = message
        elif isinstance(message, Loading):
            if self._on_loading is not None:
                self._on_loading(message)
        elif isinstance(message, Ready):
            self._ready = message
            if self._state == "restarting":  # as loud as its death, so that a log that told of one tells of both
                logger.warning("the engine is back and takes requests")
            await self._become("ready")
        elif isinstance(message, StartFailed):
            self._last_words = message.message
        else:
            event: Event = message
            self._streams.deliver([event])

    async def _mourn(self, reason: str) -> None:
        """The process ended unasked: say why to everyone who waits for it."""
        self._stats = Stats(pages_total=self._stats.pages_total)
        self._reason = reason
        if self._ready is not None and self._state != "stopped":
            await self._become("restarting", reason)
        self._streams.fail_all(f"{reason}; the request was lost, send it again")

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _describe_exit(code: int) -> str:
    return (
        f"the engine process was ended by signal {-code}" if code < 0 else f"the engine process ended with code {code}"
    )
