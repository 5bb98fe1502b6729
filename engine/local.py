"""The same client interface around a core in this process: for tests, and for programs that embed the engine."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from engine.client import EngineUnavailable, EventStream
from engine.core import EngineCore
from engine.messages import Cancel, Inbound, PlanSummary, Ready, Submit
from engine.streams import StreamingClient


class LocalClient(StreamingClient):
    """An EngineClient whose core steps on a thread of its own."""

    def __init__(self, core: EngineCore, summary: PlanSummary) -> None:
        super().__init__(Ready(summary), core.stats())
        self._core = core
        self._inbox: list[Inbound] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._state = "ready"
        self._task = asyncio.create_task(self._run())

    async def wait_ready(self) -> Ready:
        if self._state != "ready" or self._ready is None:
            raise EngineUnavailable(f"the engine is {self._state}", retry_after_s=5.0)
        return self._ready

    def submit(self, request: Submit) -> EventStream:
        if self._state != "ready":
            raise EngineUnavailable(f"the engine is {self._state}", retry_after_s=5.0)
        stream = self._streams.open(request)
        self._post(request)
        return stream

    def cancel(self, request_id: str) -> None:
        if self._streams.discard(request_id):
            self._post(Cancel(request_id))

    def cancel_choice(self, request_id: str, index: int) -> None:
        self._post(Cancel(request_id, index))

    async def stop(self) -> None:
        self._state = "stopped"
        self._wake.set()
        if self._task is not None:
            await self._task
        self._streams.fail_all("the engine was stopped")

    def _post(self, message: Inbound) -> None:
        self._inbox.append(message)
        self._wake.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
            while self._state == "ready":
                if not self._core.has_work and not self._inbox:
                    self._wake.clear()
                    await self._wake.wait()
                inbox, self._inbox = self._inbox, []
                try:
                    events = await loop.run_in_executor(thread, self._core.step, inbox)
                except Exception as error:  # a broken step: those who wait must hear of it
                    self._state = "failed"
                    self._streams.fail_all(f"the engine failed: {error}")
                    raise
                self._stats = self._core.stats()
                self._streams.deliver(events)
