"""What the GPU benchmarks share: cases that are made and timed one group at a time (benchmarks/workers.py says how they
outlive a failure). A case that cannot be made or called (out of memory, no such kernel, a compiler's error) is a line
with its error, and the others go on.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.workers import Limits, Write, chosen, run_groups, said, supervise, without_only, writer

FLUSH_BYTES = 512 << 20
COPY_BYTES = 512 << 20
ROUNDS = 9
AHEAD_CYCLES = 2_000_000  # about a millisecond, in which the host asks for all that is timed


@dataclass(frozen=True)
class Case:
    name: str
    num_bytes: int  # that a call must read and write
    call: Callable[[], object]


@dataclass(frozen=True)
class Maker:
    """A case that is made when its group's turn has come."""

    name: str
    make: Callable[[], Case]


@dataclass(frozen=True)
class Group:
    name: str
    makers: Sequence[Maker]


@dataclass(frozen=True)
class Result:
    group: str
    name: str
    microseconds: float  # median of the trials
    gigabytes_per_second: float
    share: float  # of the group's copy
    ratio: float | None  # the first case's time over this one's: median, lowest, highest; None where that one failed
    lowest: float | None
    highest: float | None


class Timer(Protocol):
    """What times cases."""

    def trial(self, cases: Sequence[Case]) -> list[float]:
        """Median milliseconds of each case."""
        ...

    def wait(self) -> None:
        """Until everything that was asked for is done; raises what went wrong with it."""
        ...


class Clock:
    """Times calls in turns by CUDA events, with a cold L2 cache and the host ahead: a call's Python is not timed."""

    def __init__(self, device: torch.device, num_rounds: int = ROUNDS) -> None:
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._num_rounds = num_rounds

    def trial(self, cases: Sequence[Case]) -> list[float]:
        """Median milliseconds of each case over the rounds."""
        event: Any = torch.cuda.Event
        events: list[list[tuple[Any, Any]]] = [[] for _ in cases]
        for _ in range(self._num_rounds):
            for case, pairs in zip(cases, events, strict=True):
                start, stop = (event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                torch.cuda._sleep(AHEAD_CYCLES)  # type: ignore[no-untyped-call]
                start.record()
                case.call()
                stop.record()
                pairs.append((start, stop))
        self.wait()
        return [statistics.median(start.elapsed_time(stop) for start, stop in pairs) for pairs in events]

    def wait(self) -> None:
        torch.cuda.synchronize()


def copy_case(device: torch.device, num_bytes: int = COPY_BYTES) -> Case:
    """The bandwidth that there is: 2 bytes of traffic for each byte."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    return Case("copy", 2 * num_bytes, partial(torch.empty_like(source).copy_, source))


def judged(group: Group, cases: Sequence[Case], trials: Sequence[Sequence[float]]) -> list[Result]:
    """trials: milliseconds by case, the last one the copy. A group's first case is what the others are held against:
    where it is not among them there are no ratios."""
    milliseconds = [statistics.median(times) for times in zip(*trials, strict=True)]
    rates = [case.num_bytes / spent / 1e6 for case, spent in zip(cases, milliseconds, strict=True)]
    results = []
    for i, case in enumerate(cases):
        spread: tuple[float | None, ...] = (None,) * 3
        if cases[0].name == group.makers[0].name:
            ratios = [times[0] / times[i] for times in trials]
            spread = tuple(round(x, 2) for x in (statistics.median(ratios), min(ratios), max(ratios)))
        figures = (round(1e3 * milliseconds[i], 1), round(rates[i], 1), round(rates[i] / rates[-1], 3))
        results.append(Result(group.name, case.name, *figures, *spread))
    return results


def release() -> None:
    """Give a group's memory back before the next one asks for its own."""
    gc.collect()
    torch.cuda.empty_cache()


def settle() -> None:
    """Between groups: raises where the device is broken."""
    torch.cuda.synchronize()
    release()


def made(group: Group, timer: Timer, write: Write) -> list[Case]:
    """The cases of a group that can be made and called; the others are written down."""
    cases: list[Case] = []
    for maker in group.makers:
        try:
            case = maker.make()
            case.call()  # compiles
            timer.wait()
            cases.append(case)
        except Exception as error:  # whatever a library or a compiler may raise
            write({"group": group.name, "name": maker.name, "error": said(error)})
            timer.wait()  # raises again where the device itself is broken
    return cases


@dataclass
class Timing:
    """Groups of cases, each beside a copy."""

    timer: Timer
    copy: Case
    num_trials: int
    results: list[Result] = field(default_factory=list)

    def run(self, group: Group, write: Write) -> None:
        cases = made(group, self.timer, write)
        if not cases:
            return
        cases.append(self.copy)
        self.timer.trial(cases)  # warms up
        found = judged(group, cases, [self.timer.trial(cases) for _ in range(self.num_trials)])
        self.results += found
        for result in found:
            write(asdict(result))


def arguments(description: str | None, seconds: float, group_seconds: float = 150) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None, help="groups whose names begin with one of these")
    parser.add_argument("--list", action="store_true", help="name the groups and do nothing")
    out = "results are added to this file, by line (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help=out)
    parser.add_argument("--json", action="store_true", help="print the lines of that file, not a table")
    parser.add_argument("--seconds", type=float, default=seconds, help="for all groups (default: %(default)s)")
    one = "for one group, compiling included (default: %(default)s)"
    parser.add_argument("--group-seconds", type=float, default=group_seconds, help=one)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def require_cuda(purpose: str = "time") -> None:
    """Raises SystemExit where there is no CUDA device; `purpose` is what a program has it for."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"torch finds no CUDA device, and there is nothing to {purpose} without one: see docs/benchmarks.md"
        )


def main_of(
    module: str,
    options: argparse.Namespace,
    names: Sequence[str],
    groups: Callable[[], Callable[[str], Callable[[Write], None]]],
    purpose: str = "time",
) -> None:
    """Name the groups, supervise them, or be the worker that runs them. groups: makes what a worker needs, on the GPU.

    Raises SystemExit for groups that there are not, and without a CUDA device.
    """
    wanted = chosen(names, options.only)
    if options.list:
        print("\n".join(wanted))
        return
    require_cuda(purpose)
    if options.worker:
        run_groups(options.only, groups(), writer(options.out, options.json), settle)
        return
    command = [sys.executable, "-m", module, *without_only(sys.argv[1:]), "--worker"]
    limits = Limits(options.seconds, options.group_seconds)
    supervise(command, wanted, options.out, limits)
