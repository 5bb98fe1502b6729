"""A page, or a picture, of a run or a sweep: distributions, the course of time, rate against latency."""

import base64
import html
import io
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from server.bench.client import Outcome
from server.bench.errors import BenchError
from server.bench.results import DEFINITIONS, METRICS, Summary, percentile, samples
from server.bench.sweep import Step
from server.bench.view import TITLES

MISSING = "a report needs matplotlib: pip install -e '.[report]' where Nibble was cloned"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}}
td:first-child,th:first-child{{text-align:left}}img{{max-width:100%}}
.words td{{text-align:left}}</style>
<h1>{title}</h1><table>{facts}</table><h2>Latencies, ms</h2><table>{rows}</table>{pictures}
<h2>Definitions</h2><table class="words">{definitions}</table></html>
"""


def check_report(path: Path | None) -> None:
    """Raises BenchError, before anything is measured, for a report that could not be written."""
    if path is None:
        return
    if path.suffix not in (".html", ".png"):
        raise BenchError(f"--report {path}: name a file that ends in .html or .png")
    if not path.parent.is_dir():
        raise BenchError(f"--report {path}: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError(MISSING) from None


def write_run(path: Path, title: str, summary: Summary, outcomes: Sequence[Outcome]) -> None:
    """Distributions of one run, and its course."""
    figure, axes = _figure(2, 2)
    answered = [outcome for outcome in outcomes if outcome.error is None]
    for axis, name in zip((axes[0][0], axes[0][1], axes[1][0]), ("ttft", "itl", "e2el"), strict=True):
        _histogram(axis, name, samples(answered, name))
    _in_flight(axes[1][1], outcomes)
    figure.suptitle(title)
    _write(path, figure, title, summary)


def write_sweep(path: Path, title: str, steps: Sequence[Step], limits: Sequence[tuple[str, float]]) -> None:
    """Latency against rate; the summary is the one of the highest rate that held, or of the slowest tried."""
    ordered = sorted(steps, key=lambda step: step.rate)
    figure, axes = _figure(1, 2)
    for axis, name in zip(axes[0], ("ttft", "tpot"), strict=True):
        for p in ("p50", "p99"):
            values = [step.summary.spreads[name].percentiles[p] * 1e3 for step in ordered]
            axis.plot([step.rate for step in ordered], values, "o-", label=p)
        for _, limit in (pair for pair in limits if pair[0] == name):
            axis.axhline(limit * 1e3, linestyle="--", color="tab:red", label="limit")
        axis.set(xlabel="requests a second", ylabel="ms", title=TITLES[name], yscale="log")
        axis.legend()
    figure.suptitle(title)
    _write(path, figure, title, ([step for step in ordered if step.holds] or ordered[:1])[-1].summary)


def _figure(num_rows: int, num_columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4 * num_rows), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _histogram(axis: Any, name: str, values: list[float]) -> None:
    milliseconds = sorted(value * 1e3 for value in values)
    axis.set(xlabel="ms", ylabel="count", title=TITLES[name])
    if not milliseconds:
        return
    axis.hist(milliseconds, bins=40, color="tab:blue", alpha=0.7)
    for p, color in ((50, "tab:green"), (99, "tab:red")):
        at = percentile(milliseconds, p)
        axis.axvline(at, color=color, linestyle="--", label=f"p{p} {at:.1f}")
    axis.legend()


def _in_flight(axis: Any, outcomes: Sequence[Outcome]) -> None:
    """How many requests waited for their first text, and how many were being answered; failures are marked."""
    first = [outcome.latency if outcome.ttft is None else outcome.ttft for outcome in outcomes]
    changes = [(o.sent, 1, 0) for o in outcomes]
    changes += [(o.sent + at, -1, 1) for o, at in zip(outcomes, first, strict=True)]
    changes += [(o.sent + o.latency, 0, -1) for o in outcomes]
    changes.sort()
    times = [at for at, _, _ in changes]
    waiting, answering = (list(accumulate(change[part] for change in changes)) for part in (1, 2))
    both = [sum(pair) for pair in zip(waiting, answering, strict=True)]
    style = {"step": "post", "linewidth": 0, "alpha": 0.7}
    axis.fill_between(times, answering, color="tab:blue", label="answering", **style)
    axis.fill_between(times, answering, both, color="tab:orange", label="waiting for first text", **style)
    if failed := [outcome.sent + outcome.latency for outcome in outcomes if outcome.error is not None]:
        axis.plot(failed, [0] * len(failed), "|", color="tab:red", markersize=12, label="failed")
    axis.set(xlabel="s", ylabel="requests", ylim=(0, None), title="in flight")
    axis.legend()


def _write(path: Path, figure: Any, title: str, summary: Summary) -> None:
    if path.suffix == ".png":
        figure.savefig(path, dpi=110)
        return
    picture = io.BytesIO()
    figure.savefig(picture, format="svg")
    source = base64.b64encode(picture.getvalue()).decode()
    path.write_text(
        PAGE.format(
            title=html.escape(title),
            facts="".join(_row(name, value) for name, value in _facts(summary)),
            rows=_latency_rows(summary),
            definitions="".join(_row(name, meaning) for name, meaning in DEFINITIONS.items()),
            pictures=f'<img alt="latencies" src="data:image/svg+xml;base64,{source}">',
        ),
        encoding="utf-8",
    )


def _facts(summary: Summary) -> list[tuple[str, str]]:
    facts = [
        ("requests answered", str(summary.completed)),
        ("requests failed", str(summary.failed)),
        *((f"failed: {kind}", str(count)) for kind, count in summary.errors.items()),
        *([("sent again on another connection", str(summary.resent))] if summary.resent else []),
        ("seconds", f"{summary.duration_s:.1f}"),
        ("output tokens a second", f"{summary.output_tokens_per_s:.1f}"),
        ("tokens a second", f"{summary.total_tokens_per_s:.1f}"),
    ]
    if summary.slo_share is not None:
        facts.append(("kept the limits", f"{summary.slo_share:.1%}"))
    if summary.prefix_hit_rate is not None:
        facts.append(("prompt tokens found in the prefix cache", f"{summary.prefix_hit_rate:.1%}"))
    return facts


def _latency_rows(summary: Summary) -> str:
    names = ("mean", *next(iter(summary.spreads.values())).percentiles)
    rows = ["<tr><th></th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for name in METRICS:
        held = summary.spreads[name]
        figures = (held.mean, *held.percentiles.values())
        rows.append(_row(TITLES[name], *("-" if math.isnan(v) else f"{v * 1e3:.1f}" for v in figures)))
    return "".join(rows)


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
