"""A real server, and a collector that speaks OTLP over HTTP."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.process import ServerProcess

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """Its address, and the path and content of everything it was sent."""
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", received
        finally:
            http.shutdown()


def test_spans_reach_a_collector_before_the_server_ends(checkpoint: Path, tmp_path: Path) -> None:
    """Bug: spans of the last seconds are lost with the process; another path or encoding than collectors take; stages
    that the engine did not measure."""
    with collector() as (endpoint, received):
        flags = ["--served-name", "tiny", "--otlp-endpoint", endpoint]
        with ServerProcess(checkpoint, tmp_path / "log", flags) as server:
            server.wait_ready()
            body = {"model": "tiny", "prompt": "one" * 50, "max_tokens": 20, "ignore_eos": True, "stream": True}
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "mine"}
            httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).raise_for_status()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0, server.output()
    assert {path for path, _ in received} == {"/v1/traces"}
    groups = [group for _, request in received for group in request.resource_spans]
    assert {a.value.string_value for group in groups for a in group.resource.attributes if a.key == "service.name"} == {
        "nibble"
    }
    spans = {span.name: span for group in groups for scope in group.scope_spans for span in scope.spans}
    assert set(spans) == {"POST /v1/completions", "queue", "prefill", "decode", "stream"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    root = spans["POST /v1/completions"]
    assert root.parent_span_id.hex() == SPAN
    assert "mine" in {attribute.value.string_value for attribute in root.attributes}
    assert all(length(spans[name]) > 0 for name in ("prefill", "decode", "stream"))
    inside = [span for span in spans.values() if span is not root]
    assert all(root.start_time_unix_nano <= span.start_time_unix_nano for span in inside)
    assert all(span.end_time_unix_nano <= root.end_time_unix_nano for span in inside)


def length(span: Span) -> int:
    """Nanoseconds."""
    return span.end_time_unix_nano - span.start_time_unix_nano
