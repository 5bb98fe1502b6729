"""The highest rate of requests that keeps an SLO.

Rates double until one breaks the SLO, or halve until one holds it; the gap between the two is then halved until it is
small enough. Steps run one after the other against the same server, each with a seed of its own, so that a prefix cache
does not know its prompts.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from server.bench.errors import BenchError
from server.bench.results import Summary

MAX_DOUBLINGS = 12


@dataclass(frozen=True)
class Step:
    """One rate and what came of it."""

    rate: float  # requests a second
    summary: Summary
    holds: bool


Measure = Callable[[float, int], Awaitable[Summary]]  # (rate, number of the step)


@dataclass(frozen=True)
class Search:
    """Where a sweep begins and when it is precise enough."""

    first_rate: float
    share: float = 0.99  # of requests that must keep the SLO
    precision: float = 0.1  # of the rate

    def __post_init__(self) -> None:
        if not self.first_rate > 0:
            raise BenchError(f"--rate must be above 0, found {self.first_rate:g}")
        if not 0 < self.share <= 1 or not 0 < self.precision < 1:
            raise BenchError("--share must be in (0, 1] and --precision in (0, 1)")


async def sweep(search: Search, measure: Measure, on_step: Callable[[Step], None]) -> list[Step]:
    """All steps, in the order taken; the best rate is the largest of those that hold, if any does."""
    steps: list[Step] = []

    async def holds(rate: float) -> bool:
        summary = await measure(rate, len(steps))
        kept = summary.slo_share is not None and summary.slo_share >= search.share
        steps.append(Step(rate, summary, kept))
        on_step(steps[-1])
        return kept

    rate = search.first_rate
    grows = await holds(rate)
    for _ in range(MAX_DOUBLINGS):
        rate = rate * 2 if grows else rate / 2
        if await holds(rate) != grows:
            break
    else:
        return steps
    low, high = (rate / 2, rate) if grows else (rate, rate * 2)
    while high - low > search.precision * high:
        middle = (low + high) / 2
        low, high = (middle, high) if await holds(middle) else (low, middle)
    return steps


def best_rate(steps: list[Step]) -> float | None:
    """The highest rate that held; None when none did."""
    return max((step.rate for step in steps if step.holds), default=None)
