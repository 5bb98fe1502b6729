"""`nibble bench serve URL` and `nibble bench sweep URL`."""

import asyncio
import math
import sys
from dataclasses import asdict
from typing import Any, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from server.bench import report, view
from server.bench.arrivals import Arrivals
from server.bench.datasets import Prompt
from server.bench.errors import BenchError
from server.bench.load import Run, new_client, run
from server.bench.options import Asked, Output, Pace, Steps, with_options
from server.bench.results import Slo, Summary, summarize
from server.bench.sweep import Search, Step, best_rate, sweep

MIN_REQUESTS = 10  # of a step of a sweep

bench = typer.Typer(no_args_is_help=True, help="Measure a running OpenAI-compatible server under load.")


def serve(asked: Asked, pace: Pace, output: Output) -> None:
    """Send requests at a rate, or from a number of clients, and report latencies and throughput."""
    try:
        limits, arrivals = None if pace.slo is None else Slo.read(pace.slo), pace.arrivals
        report.check_report(output.report)
        done = asyncio.run(_serve(asked, asked.prompts(pace.requests, asked.seed), arrivals))
        summary = summarize(done.outcomes, limits, done.prefix_hit_rate)
    except BenchError as error:
        _fail(str(error))
    if output.report is not None:
        report.write_run(output.report, f"{asked.url}: {arrivals.describe()}", summary, done.outcomes)
    view.print_summary(_console(output.as_json), summary, arrivals.describe())
    if output.as_json:
        _print_json({"asked": _shown(asked), "pace": asdict(pace), **asdict(summary)})
    if summary.completed == 0:
        raise typer.Exit(1)


def find_rate(asked: Asked, wanted: Steps, output: Output) -> None:
    """Find the highest rate of requests that keeps an SLO."""
    try:
        limits, search = Slo.read(wanted.slo), Search(wanted.rate, wanted.share, wanted.precision)
        report.check_report(output.report)
        asked.prompts(1, asked.seed)
        steps = asyncio.run(_sweep(asked, wanted, search, limits))
    except BenchError as error:
        _fail(str(error))
    if output.report is not None:
        report.write_sweep(output.report, f"{asked.url}: rates under {limits}", steps, limits.limits)
    best, console = best_rate(steps), _console(output.as_json)
    view.print_sweep(console, steps)
    console.print("no rate kept the limits" if best is None else f"{best:.3g} requests a second keep {limits}")
    if output.as_json:
        found = {"best_rate": best, "steps": [asdict(step) for step in steps]}
        _print_json({"asked": _shown(asked), "wanted": asdict(wanted), **found})
    if best is None:
        raise typer.Exit(1)


async def _serve(asked: Asked, prompts: list[Prompt], arrivals: Arrivals) -> Run:
    async with new_client(asked.api_key, asked.timeout) as client:
        target = await asked.target(client)
        with view.LiveView(_console(True)) as live:
            return await run(client, target, prompts, arrivals, asked.seed, live.update)


async def _sweep(asked: Asked, wanted: Steps, search: Search, limits: Slo) -> list[Step]:
    async with new_client(asked.api_key, asked.timeout) as client:
        target = await asked.target(client)

        async def measure(rate: float, number: int) -> Summary:
            count = max(MIN_REQUESTS, math.ceil(rate * wanted.duration))
            seed = asked.seed + number
            with view.LiveView(_console(True)) as live:
                arrivals = Arrivals(rate, wanted.burstiness)
                done = await run(client, target, asked.prompts(count, seed), arrivals, seed, live.update)
            return summarize(done.outcomes, limits, done.prefix_hit_rate)

        def tell(step: Step) -> None:
            state = "holds" if step.holds else "breaks"
            _console(True).print(f"{step.rate:.3g} requests a second: {state} ({step.summary.slo_share:.1%} kept)")

        return await sweep(search, measure, tell)


def _shown(asked: Asked) -> dict[str, Any]:
    """What was asked, so that it can be asked again; never the key."""
    return {name: value for name, value in asdict(asked).items() if name != "api_key"}


def _print_json(result: dict[str, Any]) -> None:
    """Figures that are not there (NaN) are null."""
    print(msgspec.json.encode(result, enc_hook=str).decode())  # paths as text


def _console(apart: bool) -> Console:
    """What is not the result goes to standard error."""
    return Console(file=sys.stderr if apart else sys.stdout, highlight=False)


def _fail(message: str) -> NoReturn:
    _console(True).print(f"[bold red]nibble:[/bold red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(2)


bench.command("serve")(with_options(serve, Asked, Pace, Output))
bench.command("sweep")(with_options(find_rate, Asked, Steps, Output))
