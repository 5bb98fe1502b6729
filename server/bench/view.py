"""What a terminal shows: a run while it goes on, and tables of results."""

import math
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server.bench.load import Progress
from server.bench.results import METRICS, Spread, Summary, samples, spread
from server.bench.sweep import Step

TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between pieces of text",
    "e2el": "end to end",
}


class LiveView:
    """The state of a run, redrawn a few times a second where there is a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress: Progress | None = None
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def update(self, progress: Progress) -> None:
        self._progress = progress

    def _render(self) -> RenderableType:
        if self._progress is None:
            return Text("starting")
        progress = self._progress
        answered = [outcome for outcome in progress.outcomes if outcome.error is None]
        failed = len(progress.outcomes) - len(answered)
        tokens = sum(outcome.output_tokens for outcome in answered)
        rate = tokens / progress.seconds if progress.seconds else 0.0
        line = Text(f"{len(progress.outcomes)} of {progress.total} ended, {progress.in_flight} in flight, ")
        line.append(f"{failed} failed", "bold red" if failed else "")
        line.append(f", {progress.seconds:.0f} s, {rate:.1f} output tokens a second")
        table = spread_table({name: spread(samples(answered, name)) for name in METRICS})
        return Group(ProgressBar(progress.total, len(progress.outcomes), width=60), line, table)


def print_summary(console: Console, summary: Summary, arrivals: str) -> None:
    """The figures of one run."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("arrivals", arrivals)
    facts.add_row("requests", f"{summary.completed} answered, {summary.failed} failed in {summary.duration_s:.1f} s")
    for kind, count in sorted(summary.errors.items()):
        facts.add_row("", Text(f"{count} x {kind}", "red"))
    if summary.resent:
        facts.add_row("", f"{summary.resent} sent again: the server had closed the connection")
    facts.add_row("tokens", f"{summary.prompt_tokens} of prompts, {summary.output_tokens} of answers")
    facts.add_row(
        "throughput",
        f"{summary.requests_per_s:.2f} requests, {summary.output_tokens_per_s:.1f} output tokens, "
        f"{summary.total_tokens_per_s:.1f} tokens in all a second",
    )
    if summary.goodput_per_s is not None and summary.slo_share is not None:
        facts.add_row(
            "goodput", f"{summary.goodput_per_s:.2f} requests a second; {summary.slo_share:.1%} of all kept the limits"
        )
    if summary.prefix_hit_rate is not None:
        facts.add_row("prefix cache", f"{summary.prefix_hit_rate:.1%} of prompt tokens found")
    if summary.latest_start_s > 0.1:
        facts.add_row("", f"requests went out up to {summary.latest_start_s:.1f} s late: this side was the bottleneck")
    console.print(facts)
    console.print(spread_table(summary.spreads))


def spread_table(spreads: dict[str, Spread]) -> Table:
    table = Table("", "mean", *next(iter(spreads.values())).percentiles, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in spreads.items():
        figures = (values.mean, *values.percentiles.values())
        table.add_row(f"{TITLES[name]}, ms", *("-" if math.isnan(v) else f"{v * 1e3:.1f}" for v in figures))
    return table


def print_sweep(console: Console, steps: Sequence[Step]) -> None:
    """Every rate that was tried, slowest first."""
    table = Table("rate", "answered", "failed", "TTFT p99, ms", "TPOT p99, ms", "kept the limits", "", box=None)
    for column in table.columns:
        column.justify = "right"
    for step in sorted(steps, key=lambda step: step.rate):
        summary = step.summary
        table.add_row(
            f"{step.rate:.3g}",
            str(summary.completed),
            str(summary.failed),
            *(f"{summary.spreads[name].percentiles['p99'] * 1e3:.0f}" for name in ("ttft", "tpot")),
            "-" if summary.slo_share is None else f"{summary.slo_share:.1%}",
            "[green]holds[/green]" if step.holds else "[red]breaks[/red]",
        )
    console.print(table)
