"""One OpenTelemetry trace for each request that asks the engine, where --otlp-endpoint says so.

    POST /v1/completions    from arrival to the last byte; a child of the caller's span, if it sent a traceparent
    ├─ queue                waiting in the engine's queue
    ├─ prefill              computing the prompt
    ├─ decode               making the answer
    └─ stream               from the first token to the last byte

The engine measures the first three, once for each choice. They are missing where the answer ended before the engine
said so: at a stop string, or when the caller left. Spans are made when the request has ended, at the times they had.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.messages import Done, Submit

if TYPE_CHECKING:  # optional: pip install -e '.[tracing]'
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

TRACES = "/v1/traces"  # where OTLP over HTTP takes spans
SENDING_S = 5.0  # for one batch of spans, all tries included
MISSING = "--otlp-endpoint needs OpenTelemetry, which is missing: pip install -e '.[tracing]' where Nibble was cloned"


class TracingUnavailable(ValueError):
    """The optional packages are not there."""


@dataclass(frozen=True)
class Caller:
    """Who asked, as far as a trace tells it."""

    route: str
    model: str
    request_id: str
    headers: Mapping[str, str]  # traceparent and tracestate among them


@dataclass(frozen=True)
class Fault:
    """Why a request ended without its answer."""

    kind: str  # the code of the error that the caller saw, or "disconnected"
    message: str


@dataclass(frozen=True)
class Trace:
    """What is known of one request when it ends."""

    caller: Caller
    submits: Sequence[Submit]
    dones: Sequence[Done]
    first_token_at: float | None  # time.monotonic()
    num_completion_tokens: int
    fault: Fault | None


class Tracing:
    """Turns ended requests into spans."""

    def __init__(self, provider: "TracerProvider", exporter: "SpanExporter") -> None:
        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("nibble")

    @staticmethod
    def to(endpoint: str) -> "Tracing":
        """Sends spans to a collector, in batches, from a thread of its own. Raises TracingUnavailable."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise TracingUnavailable(MISSING) from None
        base = endpoint.rstrip("/").removesuffix(TRACES)
        return Tracing.through(OTLPSpanExporter(f"{base}{TRACES}", timeout=SENDING_S))

    @staticmethod
    def through(exporter: "SpanExporter") -> "Tracing":
        """Sends spans through `exporter`."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider(resource=Resource.create({"service.name": "nibble"}), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return Tracing(provider, exporter)

    def ended(self, trace: Trace) -> None:
        """Record a request that ends now."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        now, clock = time.monotonic(), time.time()
        caller, arrival = trace.caller, min(submit.arrival for submit in trace.submits)

        def wall(at: float) -> int:
            return int((clock - (now - at)) * 1e9)

        parent = TraceContextTextMapPropagator().extract(dict(caller.headers))
        root = self._tracer.start_span(f"POST {caller.route}", parent, SpanKind.SERVER, start_time=wall(arrival))
        root.set_attributes(_attributes(trace))
        if trace.fault is not None:
            root.set_status(StatusCode.ERROR, trace.fault.message)
        inside = set_span_in_context(root)
        arrivals = {submit.id: submit.arrival for submit in trace.submits}
        for done in trace.dones:
            end = arrivals[done.id]
            for name, seconds in (("queue", done.queued_s), ("prefill", done.prefill_s), ("decode", done.decode_s)):
                begin, end = end, end + seconds
                self._span(name, inside, (wall(begin), wall(end)), {"nibble.choice": done.index})
        if trace.first_token_at is not None:
            self._span("stream", inside, (wall(trace.first_token_at), wall(now)), {})
        root.end(wall(now))

    def close(self) -> None:
        """Send what is left. A collector that cannot be reached holds the process up for 2 * SENDING_S at most."""
        patience = threading.Timer(SENDING_S, self._exporter.shutdown)  # no more tries after that
        patience.start()
        self._provider.shutdown()
        patience.cancel()

    def _span(self, name: str, inside: "Context", times: tuple[int, int], attributes: Mapping[str, int]) -> None:
        """times: begin and end, in nanoseconds since the epoch."""
        self._tracer.start_span(name, inside, attributes=attributes, start_time=times[0]).end(times[1])


def _attributes(trace: Trace) -> dict[str, str | int | list[str]]:
    """OpenTelemetry's names for generative models where it has one. Never a prompt."""
    attributes: dict[str, str | int | list[str]] = {
        "gen_ai.request.model": trace.caller.model,
        "gen_ai.usage.input_tokens": sum(len(submit.prompt) for submit in trace.submits),
        "gen_ai.usage.output_tokens": trace.num_completion_tokens,
        "nibble.request_id": trace.caller.request_id,
    }
    if trace.fault is not None:
        attributes["error.type"] = trace.fault.kind
    if trace.dones:
        attributes["gen_ai.response.finish_reasons"] = [done.reason for done in trace.dones]
        attributes["nibble.cached_tokens"] = sum(done.num_cached_tokens for done in trace.dones if done.index == 0)
        attributes["nibble.preemptions"] = sum(done.num_preemptions for done in trace.dones)
    return attributes
