"""What every route works with: the engine, the tokenizer, the settings, the metrics, and who is inside."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from engine.client import EngineClient, EngineUnavailable
from engine.messages import PlanSummary
from server.config import ServerConfig
from server.errors import InvalidRequest, ModelNotFound, Unavailable
from server.metrics import Metrics
from server.tokenizer import Tokenizer
from server.tracing import Tracing

RETRY_AFTER_S = 1.0  # when the queue is full
RETRY_WHILE_DRAINING_S = 5.0  # time for another server to take over


class Service:
    """The one object behind the routes. Belongs to one asyncio loop."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        config: ServerConfig,
        served_name: str,
        tracing: Tracing | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.served_name = served_name
        self.metrics = Metrics(engine)
        self.tracing = tracing
        self.started = int(time.time())
        self.draining = False
        self.cut_off = asyncio.Event()  # set: answers that still run end now, with `shutting_down`
        self.in_flight = 0  # prompts between admission and the last byte of their answers

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound unless `name` is served here."""
        if name is not None and name != self.served_name:
            raise ModelNotFound(f"The model '{name}' is not served here; '{self.served_name}' is", param="model")

    def plan(self) -> PlanSummary:
        """The engine's plan. Raises Unavailable while the engine takes no requests or the server is draining."""
        if self.draining:
            raise shutting_down("The server is shutting down")
        if self.engine.state != "ready" or self.engine.ready is None:
            raise EngineUnavailable(f"The engine is not ready: {self.engine.state}", RETRY_WHILE_DRAINING_S)
        return self.engine.ready.plan

    @contextmanager
    def admitted(self, num_prompts: int) -> Iterator[None]:
        """Hold a place for each prompt. Raises Unavailable when that many are not free, InvalidRequest when never."""
        limit = self.plan().max_num_seqs + self.config.max_queued_requests
        if num_prompts > limit:
            raise InvalidRequest(
                f"The request has {num_prompts} prompts, but this server takes {limit} at once "
                "(--max-num-seqs + --max-queued-requests): send fewer at a time",
                param="prompt",
            )
        if self.in_flight + num_prompts > limit:
            self.metrics.refused("queue_full")
            raise Unavailable(
                f"{self.in_flight} prompts are in flight and {num_prompts} more exceed the {limit} this server allows",
                RETRY_AFTER_S,
                "queue_full",
            )
        self.in_flight += num_prompts
        try:
            yield
        finally:
            self.in_flight -= num_prompts


def shutting_down(message: str) -> Unavailable:
    """What is said to those whom this server answers no more."""
    return Unavailable(message, RETRY_WHILE_DRAINING_S)
