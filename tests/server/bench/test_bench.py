"""The load test: what is measured of the answers, and which rate holds an SLO."""

import asyncio
import html
import io
import json
import statistics
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from server.bench import report, view
from server.bench.arrivals import Arrivals
from server.bench.client import Outcome, Target, ask, find_model
from server.bench.datasets import Prompt
from server.bench.errors import BenchError
from server.bench.load import Run, run
from server.bench.options import Asked
from server.bench.results import DEFINITIONS, Slo, Summary, percentile, summarize
from server.bench.sweep import Search, Step, best_rate, sweep
from server.cli import cli

TARGET = Target("http://server", "m", "completions")


# ---- one request -----------------------------------------------------------------------------------------------------


class Stream(httpx.AsyncByteStream):
    """Events sent with a pause before each, and perhaps an end without [DONE]."""

    def __init__(self, events: list[object], pause: float = 0.0, done: bool = True) -> None:
        self._lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"] * done
        self._pause = pause

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for line in self._lines:
            await asyncio.sleep(self._pause)
            yield line.encode()


def piece(text: str) -> dict[str, object]:
    return {"choices": [{"text": text}]}


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
}


def asked(*responses: httpx.Response | Exception) -> Outcome:
    """What becomes of a request; the last response is that of any further one."""
    left = list(responses)

    def answer(request: httpx.Request) -> httpx.Response:
        response = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(response, Exception):
            raise response
        return response

    async def go() -> Outcome:
        outcome = Outcome(0.0, 0.0)
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            await ask(client, TARGET, Prompt("x", 3), outcome)
        return outcome

    return asyncio.run(go())


def test_a_stream_is_timed_piece_by_piece() -> None:
    """Bug: a first event without text (a role, an empty piece) that counts as the first token."""
    outcome = asked(httpx.Response(200, stream=Stream([piece(""), piece("a"), piece("b"), USAGE], pause=0.02)))
    assert outcome.error is None
    assert outcome.ttft is not None
    assert outcome.ttft >= 0.04
    assert len(outcome.gaps) == 1
    assert outcome.latency >= outcome.ttft + outcome.gaps[0]
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (7, 3, 4)


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (httpx.Response(503, json={"error": {}}), "http 503"),
        (httpx.Response(200, stream=Stream([piece("a")], done=False)), "cut off"),
        (httpx.Response(200, stream=Stream([USAGE])), "no text: the answer ended at once (--ignore-eos goes on)"),
        (httpx.Response(200, stream=Stream([piece("a"), {"error": {"code": "lost"}}])), "stream error (lost)"),
        (httpx.Response(200, stream=Stream([{"error": "busy"}])), "stream error (busy)"),
        (httpx.Response(200, stream=Stream([7])), "not OpenAI's events"),
        (httpx.Response(200, stream=Stream([{"choices": ["a"]}])), "not OpenAI's events"),
        (httpx.Response(200, content=b"data: {oops\n\n"), "not JSON"),
        (httpx.ConnectError("no"), "connection refused"),
        (httpx.ReadTimeout("slow"), "timeout (ReadTimeout)"),
        (httpx.RemoteProtocolError("gone"), "connection lost (RemoteProtocolError)"),
    ],
)  # fmt: skip
def test_failures_are_told_by_kind(response: httpx.Response | Exception, kind: str) -> None:
    """Bug: a stream that breaks off half-way and counts as a quick answer."""
    assert asked(response).error == kind


def test_a_connection_that_was_closed_meanwhile_is_no_failure() -> None:
    """Bug: requests that count as lost because the server ended a kept connection; or that are sent for ever."""
    outcome = asked(httpx.RemoteProtocolError("gone"), httpx.Response(200, stream=Stream([piece("a"), USAGE])))
    assert (outcome.error, outcome.is_resent) == (None, True)
    assert outcome.ttft is not None


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_closed_loop_keeps_to_its_clients_and_reports_prefix_hits() -> None:
    """Bug: more requests in flight than clients; hits since the server's start in place of the run's own."""
    in_flight = most = scrapes = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight, most, scrapes
        if request.url.path == "/metrics":
            scrapes += 1
            text = (
                "# TYPE nibble_prefix_cache_queries_total counter\n"
                f"nibble_prefix_cache_queries_total {100 * scrapes}\n"
                "# TYPE nibble_prefix_cache_hits_total counter\n"
                f"nibble_prefix_cache_hits_total {60 + 25 * scrapes}\n"
            )
            return httpx.Response(200, text=text)
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.005)
        in_flight -= 1
        return httpx.Response(200, stream=Stream([piece("a"), USAGE]))

    async def go() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            done = await run(client, TARGET, [Prompt("x", 1)] * 9, Arrivals(clients=3))
        assert [outcome.error for outcome in done.outcomes] == [None] * 9
        assert done.prefix_hit_rate == pytest.approx(0.25)

    asyncio.run(go())
    assert most == 3


# ---- results ---------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_definitions() -> None:
    """Worked by hand: two answers and a failure over 4 seconds."""
    quick = Outcome(0, 0, ttft=0.5, gaps=[0.1, 0.3], latency=1.5, prompt_tokens=10, output_tokens=5)
    slow = Outcome(1, 1, ttft=2.0, gaps=[0.2], latency=3.0, prompt_tokens=20, output_tokens=2)
    lost = Outcome(1, 1.5, latency=0.5, error="http 503")
    summary = summarize([quick, slow, lost], Slo.read("ttft=600ms,tpot=0.3s"))
    assert summary.duration_s == 4
    assert (summary.completed, summary.failed, summary.errors) == (2, 1, {"http 503": 1})
    assert summary.output_tokens_per_s == 7 / 4
    assert summary.total_tokens_per_s == 37 / 4
    assert summary.spreads["ttft"].mean == 1.25
    assert summary.spreads["tpot"].mean == pytest.approx((0.25 + 1.0) / 2)
    assert summary.spreads["itl"].percentiles["p50"] == pytest.approx(0.2)
    assert summary.goodput_per_s == 1 / 4
    assert summary.slo_share == pytest.approx(1 / 3)
    assert summary.latest_start_s == 0.5


def test_percentiles_are_those_of_the_standard_library() -> None:
    values = sorted([3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.3])
    expected = statistics.quantiles(values, n=100, method="inclusive")
    assert [percentile(values, p) for p in range(1, 100)] == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=5", "itl=5ms", "ttft=500ms;tpot=1s"])
def test_limits_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(BenchError, match="--slo"):
        Slo.read(text)


def test_a_limit_that_does_not_exist_is_named() -> None:
    """Bug: --slo foo=2s is called a mistake of form, and nobody learns which names there are."""
    with pytest.raises(BenchError, match="'foo' is not known: limits are ttft, tpot, e2el"):
        Slo.read("ttft=1s,foo=2s")


def test_what_a_server_calls_its_error_is_no_markup() -> None:
    """Bug: a code like [/x] ends the report in a MarkupError of the terminal's library."""
    console = Console(file=io.StringIO())
    view.print_summary(console, summarize([Outcome(0, 0, error="stream error ([/x])")], None), "")
    assert "1 x stream error ([/x])" in console.file.getvalue()  # type: ignore[attr-defined]


# ---- sweep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.5, 100.0])
def test_a_sweep_closes_in_on_the_rate_that_holds(first: float) -> None:
    """Bug: a search that ends at a rate which breaks the SLO, or far below the one that holds."""

    async def measure(rate: float, number: int) -> Summary:
        outcome = Outcome(0, 0, ttft=0.1 if rate <= 7.3 else 9.0, latency=9.0, output_tokens=1)
        return summarize([outcome], Slo.read("ttft=1s"))

    steps: list[Step] = []
    found = asyncio.run(sweep(Search(first), measure, steps.append))
    assert found == steps
    best = best_rate(found)
    assert best is not None
    assert 0.9 * 7.3 - 0.01 <= best <= 7.3


# ---- command ---------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_named() -> None:
    result = CliRunner().invoke(cli, ["bench", "serve", "http://127.0.0.1:9", "--requests", "1"])
    assert result.exit_code == 2
    assert "no answer from http://127.0.0.1:9/v1/models" in result.output


def test_metrics_may_be_elsewhere_and_must_be_there() -> None:
    """Bugs: the rate of hits silently left out with /metrics on a port for operators; a key sent to another server."""
    asked_urls = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert "authorization" not in request.headers
        asked_urls.append(str(request.url))
        return httpx.Response(404)

    async def go() -> None:
        key = {"Authorization": "Bearer secret"}
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), headers=key) as client:
            await Asked("http://test", model="m", metrics_url="http://ops:8001/metrics").target(client)

    with pytest.raises(BenchError, match="--metrics-url http://ops:8001/metrics has no counters"):
        asyncio.run(go())
    assert asked_urls == ["http://ops:8001/metrics"]


def test_texts_that_are_too_long_do_not_end_the_warm_up(tmp_path: Path) -> None:
    """Bug: of a folder with one text beyond the context nothing could be measured, depending on which came first."""
    for name, num_words in (("a", 900), ("b", 5), ("c", 900)):
        (tmp_path / name).write_text("word " * num_words)

    def answer(request: httpx.Request) -> httpx.Response:
        is_short = len(json.loads(request.content)["prompt"]) < 100
        return httpx.Response(200, stream=Stream([piece("x"), USAGE])) if is_short else httpx.Response(400)

    async def go() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            await Asked("http://test", model="m", dataset="folder", data=tmp_path, warm_up=2).target(client)

    asyncio.run(go())


def test_a_report_of_another_kind_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"\.html or \.png"):
        report.check_report(tmp_path / "r.pdf")
    with pytest.raises(BenchError, match="there is no folder"):
        report.check_report(tmp_path / "none" / "r.png")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prefixes": 2}, "--prefixes says nothing about prompts of --dataset random"),
        ({"dataset": "folder", "data": Path("x"), "spread": 0.5}, "--spread says nothing"),
        ({"dataset": "sharegpt", "data": Path("x"), "input_len": 9}, "--input-len says nothing"),
        ({"data": Path("x")}, "--data belongs to"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], complaint: str) -> None:
    """Bug: a run that is not the one that was asked for."""
    with pytest.raises(BenchError, match=complaint):
        Asked("http://test", **options).prompts(1, 0)


def test_a_certificate_that_is_not_trusted_is_not_taken_for_silence() -> None:
    """Bug: "is it running?" of a server that answers, over a certificate of its owner's making."""

    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate")

    async def go() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            await find_model(client, "https://test")

    with pytest.raises(BenchError, match=r"self-signed certificate\); name its certificate: SSL_CERT_FILE=cert\.pem"):
        asyncio.run(go())


@pytest.mark.parametrize("option", ["--warm-up=-1", "--timeout=0", "--duration=-5"])
def test_numbers_that_mean_nothing_are_refused(option: str) -> None:
    """Bug: a warm-up of less than none, and rates that hold because hardly anything is sent."""
    command = ["sweep", "--slo", "ttft=1s"] if "duration" in option else ["serve"]
    result = CliRunner().invoke(cli, ["bench", *command, "http://test", option])
    assert result.exit_code == 2
    assert option.split("=", maxsplit=1)[0] in result.output


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("localhost:8000", "URL must begin with http:// or https://: did you mean http://localhost:8000?"),
        ("http://", "names no host"),
        ("http://localhost:port", "Invalid port"),
    ],
)
def test_what_is_no_url_is_said(url: str, complaint: str) -> None:
    """Bug: "is it running?" of a server that is, or a traceback."""
    result = CliRunner().invoke(cli, ["bench", "serve", url, "--model", "m"])
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.split())


def test_a_page_holds_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra 'report'")
    outcomes = [
        Outcome(0, 0, ttft=0.123, gaps=[0.01], latency=0.5, output_tokens=3),
        Outcome(0, 0, latency=0.1, error="http 503"),
    ]
    report.write_run(tmp_path / "r.html", "A <run>", summarize(outcomes, None), outcomes)
    page = (tmp_path / "r.html").read_text()
    assert "123.0" in page
    assert "failed: http 503" in page
    assert all(html.escape(meaning) in page for meaning in DEFINITIONS.values())
    assert "A &lt;run&gt;" in page
    report.write_run(tmp_path / "r.png", "A run", summarize(outcomes, None), outcomes)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_results_say_what_was_asked_and_not_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bug: figures that nobody can measure again, or a key in a file of results."""
    (tmp_path / "a.txt").write_text("a prompt")

    async def answered(*arguments: object) -> Run:
        return Run([Outcome(0, 0, ttft=0.1, latency=0.2, output_tokens=2)], None)

    monkeypatch.setattr("server.bench.cli._serve", answered)
    words = ["bench", "serve", "http://test", "--api-key", "secret", "--dataset", "folder", "--data", str(tmp_path)]
    result = CliRunner().invoke(cli, [*words, "--rate", "2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["asked"]["url"], found["asked"]["data"]) == ("http://test", str(tmp_path))
    assert (found["asked"]["seed"], found["pace"]["rate"], found["completed"]) == (0, 2, 1)
    assert found["spreads"]["itl"]["mean"] is None
    assert "secret" not in result.output
