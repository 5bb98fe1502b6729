"""One trace for each request: its spans, whose child it is, what it says of failures, and never a prompt."""

import asyncio
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from engine.messages import Failed, Submit
from server.tracing import MISSING, Tracing, TracingUnavailable
from tests.fakes import FakeEngine, Script, say
from tests.server.conftest import World

pytestmark = pytest.mark.anyio
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    """A world whose spans stay in memory."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing.through(self.exporter)
        self.world = World(engine, tracing=self.tracing, **settings)

    def spans(self) -> list[ReadableSpan]:
        """Of all requests that ended. No more come after."""
        self.tracing.close()
        return list(self.exporter.get_finished_spans())

    def root(self) -> ReadableSpan:
        (span,) = [span for span in self.spans() if span.name.startswith("POST ")]
        return span


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_is_one_trace_of_five_spans(stream: bool) -> None:
    """Bug: spans without a parent, or a stage that begins before the one before it has ended."""
    traced = Traced(FakeEngine(lambda submit: say("hello", delay_s=0.01)))
    await traced.world.text(stream=stream)
    spans = {span.name: span for span in traced.spans()}
    assert set(spans) == {"POST /v1/completions", "queue", "prefill", "decode", "stream"}
    root = spans.pop("POST /v1/completions")
    assert root.kind is SpanKind.SERVER
    assert root.parent is None
    assert root.status.status_code is StatusCode.UNSET
    assert root.context is not None
    for span in spans.values():
        assert span.parent is not None
        assert (span.parent.trace_id, span.parent.span_id) == (root.context.trace_id, root.context.span_id)
    begin, queued = times(spans["queue"])
    assert begin == times(root)[0]
    assert queued - begin == pytest.approx(10_000_000, abs=1000)  # the scripted engine's queued_s, through floats
    assert times(spans["prefill"])[0] == queued
    assert times(spans["decode"])[0] == times(spans["prefill"])[1]
    assert times(root)[0] < times(spans["stream"])[0] < times(spans["stream"])[1] == times(root)[1]


async def test_attributes_are_counts_and_names_and_never_the_prompt() -> None:
    """Bug: what callers ask ends up with whoever reads traces."""
    traced = Traced(FakeEngine(lambda submit: say("hidden answer")))
    response = await traced.world.text(prompt="secret question", max_tokens=4)
    found = attributes(traced.root())
    assert found == {
        "gen_ai.request.model": "demo",
        "gen_ai.usage.input_tokens": len("secret question") + 1,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("length",),
        "nibble.cached_tokens": 1,
        "nibble.preemptions": 0,
        "nibble.request_id": response.headers["x-request-id"],
    }


async def test_the_trace_of_the_caller_goes_on_here() -> None:
    """Bug: a service that calls this one cannot see where its time went."""
    traced = Traced(FakeEngine())
    traced.world.http.headers["traceparent"] = f"00-{TRACE}-{SPAN}-01"
    await traced.world.chat()
    root = traced.root()
    assert root.name == "POST /v1/chat/completions"
    assert root.context is not None
    assert root.parent is not None
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == SPAN


async def test_what_the_caller_does_not_sample_is_not_sent() -> None:
    """Bug: spans of traces whose other parts nobody keeps."""
    traced = Traced(FakeEngine())
    traced.world.http.headers["traceparent"] = f"00-{TRACE}-{SPAN}-00"
    await traced.world.chat()
    assert not traced.spans()


async def test_a_traceparent_that_cannot_be_read_begins_a_new_trace() -> None:
    """Bug: a malformed header of the caller ends in 500."""
    traced = Traced(FakeEngine())
    traced.world.http.headers["traceparent"] = "00-nonsense"
    assert (await traced.world.chat()).status_code == 200
    assert traced.root().parent is None


async def test_every_choice_and_prompt_has_its_stages() -> None:
    """Bug: with n or several prompts only the first is seen."""
    traced = Traced(FakeEngine())
    await traced.world.text(prompt=["a", "b"], n=2)
    decoded = sorted(attributes(span)["nibble.choice"] for span in traced.spans() if span.name == "decode")
    assert decoded == [0, 0, 1, 1]


async def test_a_stop_string_ends_the_trace_without_the_engines_stages() -> None:
    """Bug: no trace of an answer that this side ended, or one that says the caller left."""
    traced = Traced(FakeEngine(lambda submit: say("one two", delay_s=0.001)))
    await traced.world.text(stop="two")
    spans = traced.spans()
    assert {span.name for span in spans} == {"POST /v1/completions", "stream"}
    assert all(span.status.status_code is StatusCode.UNSET for span in spans)


def fails(submit: Submit) -> Script:
    return Script([97], failure=Failed(submit.id, "engine", "the numbers are not finite"))


@pytest.mark.parametrize("stream", [True, False])
async def test_failures_of_the_engine_are_errors(stream: bool) -> None:
    """Bug: a stream, whose error is an event and no exception, is traced as if all had gone well."""
    traced = Traced(FakeEngine(fails))
    await traced.world.text(stream=stream)
    root = traced.root()
    assert root.status.status_code is StatusCode.ERROR
    assert root.status.description == "the numbers are not finite"
    assert attributes(root)["error.type"] == "engine_error"


async def test_refusals_are_errors() -> None:
    """Bug: an overloaded server whose traces show only what it took."""
    traced = Traced(FakeEngine(lambda submit: Script(hang=True)), max_queued_requests=0)
    others = [asyncio.ensure_future(traced.world.text()) for _ in range(traced.world.engine.plan.max_num_seqs)]
    while len(traced.world.engine.submitted) < len(others):
        await asyncio.sleep(0)
    assert (await traced.world.text()).status_code == 503
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    kinds = sorted(attributes(span)["error.type"] for span in traced.spans())
    assert kinds == ["disconnected"] * len(others) + ["queue_full"]


async def test_no_tracing_no_spans() -> None:
    """Bug: requests that need OpenTelemetry although nobody asked for traces."""
    assert (await World(FakeEngine()).text()).status_code == 200


def test_missing_packages_are_called_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a traceback about a module, or a server that runs and silently traces nothing."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingUnavailable, match=r"pip install -e '\.\[tracing\]'"):
        Tracing.to("http://localhost:4318")
    assert "--otlp-endpoint" in MISSING
