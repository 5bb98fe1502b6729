"""From outcomes to figures. DEFINITIONS are those of `vllm bench serve`, so that figures can be compared."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from server.bench.client import Outcome
from server.bench.errors import BenchError

PERCENTILES = (50, 90, 95, 99)
METRICS = ("ttft", "tpot", "itl", "e2el")
LIMITED = ("ttft", "tpot", "e2el")  # of one request; gaps between pieces of text are pooled over all
DEFINITIONS = {
    "time to first token": "from sending a request to its first text",
    "time per output token": "(end - first text) / (output tokens - 1), one figure a request",
    "between pieces of text": "gaps between two pieces of text, pooled over all requests",
    "end to end": "from sending a request to the end of its stream",
    "goodput": "requests a second that keep every limit; the share that kept them is of all that were sent",
    "throughput": "over the time from the first sending to the last end",
    "failed": "not answered whole; in no latency",
}
UNITS = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Slo:
    """Limits in seconds on what one request feels."""

    limits: tuple[tuple[str, float], ...] = ()

    @staticmethod
    def read(text: str) -> "Slo":
        """ "ttft=500ms,tpot=50ms". Raises BenchError naming the part that is not understood."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", part)
            if match is None:
                raise BenchError(f"--slo: {part!r} is not of the form ttft=500ms, tpot=50ms or e2el=10s")
            if match[1] not in LIMITED:
                raise BenchError(f"--slo: {match[1]!r} is not known: limits are {', '.join(LIMITED)}")
            limits[match[1]] = float(match[2]) * UNITS[match[3]]
        return Slo(tuple(limits.items()))

    def __str__(self) -> str:
        return ",".join(f"{name}={limit * 1e3:g}ms" for name, limit in self.limits)

    def holds(self, outcome: Outcome) -> bool:
        """Whether an answered request kept every limit. Answers of one token have no TPOT to break."""
        values = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2el": outcome.latency}
        return outcome.error is None and all((values[name] or 0.0) <= limit for name, limit in self.limits)


@dataclass(frozen=True)
class Spread:
    """Seconds: how one figure is distributed. NaN where there was nothing to measure."""

    mean: float
    percentiles: dict[str, float]  # "p50" ...


@dataclass(frozen=True)
class Summary:
    """One run."""

    duration_s: float
    completed: int
    failed: int
    errors: dict[str, int]  # by kind
    resent: int  # requests that were sent twice, because the server had closed the connection
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float | None  # None: no SLO
    slo_share: float | None  # of all requests sent, failed ones too
    spreads: dict[str, Spread]  # of METRICS
    latest_start_s: float  # how much later than planned a request was sent at worst
    prefix_hit_rate: float | None = None  # of prompt tokens, by the server's /metrics during the run


def summarize(outcomes: Sequence[Outcome], slo: Slo | None, prefix_hit_rate: float | None = None) -> Summary:
    """Figures of a run. Raises BenchError when nothing was sent."""
    if not outcomes:
        raise BenchError("no request was sent")
    answered = [outcome for outcome in outcomes if outcome.error is None]
    duration = max(o.sent + o.latency for o in outcomes) - min(o.sent for o in outcomes)
    good = None if slo is None else sum(slo.holds(outcome) for outcome in outcomes)
    prompt_tokens, output_tokens = sum(o.prompt_tokens for o in answered), sum(o.output_tokens for o in answered)
    per_s = 1 / duration if duration > 0 else math.nan
    return Summary(
        duration_s=duration,
        completed=len(answered),
        failed=len(outcomes) - len(answered),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        resent=sum(outcome.is_resent for outcome in outcomes),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_s=len(answered) * per_s,
        output_tokens_per_s=output_tokens * per_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) * per_s,
        goodput_per_s=None if good is None else good * per_s,
        slo_share=None if good is None else good / len(outcomes),
        spreads={name: spread(samples(answered, name)) for name in METRICS},
        latest_start_s=max(outcome.sent - outcome.scheduled for outcome in outcomes),
        prefix_hit_rate=prefix_hit_rate,
    )


def samples(answered: Sequence[Outcome], metric: str) -> list[float]:
    """Every measurement of one metric, in seconds."""
    if metric == "itl":
        return [gap for outcome in answered for gap in outcome.gaps]
    values = {"ttft": lambda o: o.ttft, "tpot": lambda o: o.tpot, "e2el": lambda o: o.latency}[metric]
    return [value for value in map(values, answered) if value is not None]


def spread(values: Sequence[float]) -> Spread:
    mean = sum(values) / len(values) if values else math.nan
    ordered = sorted(values)
    return Spread(mean, {f"p{p}": percentile(ordered, p) for p in PERCENTILES})


def percentile(ordered: Sequence[float], p: float) -> float:
    """Between the two nearest ranks in proportion, as numpy does; NaN of nothing."""
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * p / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
