"""The client of an engine in a process of its own, which it spawns, watches and restarts.

start -> starting -> ready -> (process dies) -> restarting -> ready ...
              \\-> failed  (the first start found the model unusable: restarting would not help)
"""

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
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

# Packages are taken from where ours are. What is imported stays: looking through it for garbage, again and again while
# it grows, took 0.4 of the 2.9 s from here to a configuration that is read.
CODE = f"""
import gc, sys
gc.disable()
sys.path.insert(0, {str(ROOT)!r})
from engine.process import main
gc.freeze()
gc.enable()
main()
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Child:
    """An engine process, which loads its model from when it is spawned, and the socket it reports to.

    The socket is there before the process: what that says last is kept, should this process be busy with its imports.
    """

    process: subprocess.Popen[bytes]
    context: zmq.asyncio.Context
    socket: zmq.asyncio.Socket
    folder: Path  # of the socket

    def end(self) -> None:
        """Kill it, unless it has ended by itself, and wait, or it stays a zombie as long as this process lives."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_GRACE_S)
        self.context.destroy(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)


class RemoteClient(StreamingClient):
    """An EngineClient over ZeroMQ. Its process is there from `spawn`, or else from `start` on, to `stop` or `kill`."""

    def __init__(self, config: EngineConfig, on_loading: Callable[[Loading], None] | None = None) -> None:
        super().__init__(None, Stats())
        self._config = config
        self._on_loading = on_loading
        self._changed = asyncio.Condition()
        self._reason = "the engine is still loading its model"
        self._last_words: str | None = None  # why the process of now says it cannot start
        self._socket: zmq.asyncio.Socket | None = None
        self._child: _Child | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def process_id(self) -> int | None:
        """Of the engine, while it runs."""
        return self._child.process.pid if self._child else None

    def spawn(self) -> None:
        """Let the engine load while there is no event loop yet; what it reports waits for `start`. Raises OSError."""
        self._child = _spawn(self._config)

    def kill(self) -> None:
        """End the process, if there still is one, when no event loop will."""
        if self._child is not None:
            self._child.end()
            self._child = None

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
        was_ready = self._state == "ready"
        await self._become("stopped", "the engine was stopped")
        if self._supervisor is not None:
            if was_ready:  # one that loads its model reads no messages, and has nothing to lose
                self._send(Shutdown())
                await asyncio.wait([self._supervisor], timeout=STOP_GRACE_S)
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self.kill()
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
        """Serve one process until it ends; open requests then get a clear error.

        Returns whether it had become ready. Nothing here waits for the process without watching that it lives.
        """
        tasks: list[asyncio.Task[Any]] = []
        try:
            self._last_words = None
            if self._child is None:
                self.spawn()
            assert self._child is not None
            self._socket = self._child.socket
            receiver = asyncio.create_task(self._receive(self._socket))
            exited = asyncio.create_task(asyncio.to_thread(self._child.process.wait))
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
            self._socket = None
            self.kill()

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


def _spawn(config: EngineConfig) -> _Child:
    """A Python that takes nothing from the folder the user stands in.

    It gets a session of its own, so that Ctrl-C in a terminal reaches the server alone. Raises OSError.
    """
    folder = Path(tempfile.mkdtemp(prefix="nibble-"))
    address, context = f"ipc://{folder}/engine.sock", zmq.asyncio.Context()
    settings = msgspec.json.encode(config).decode()
    try:
        socket = context.socket(zmq.PAIR)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.bind(address)
        command = (sys.executable, "-P", "-c", CODE, address, str(os.getpid()), settings)
        return _Child(subprocess.Popen(command, start_new_session=True), context, socket, folder)
    except (OSError, zmq.ZMQError) as error:
        context.destroy(linger=0)
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(str(error)) from error


def _describe_exit(code: int) -> str:
    return (
        f"the engine process was ended by signal {-code}" if code < 0 else f"the engine process ended with code {code}"
    )
