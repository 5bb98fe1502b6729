"""What the GPU benchmarks share: cases that are made and timed one group at a time, results written as they come, and a
process that survives its groups.

A program here has groups, each a few cases that are compared. They run in a *worker*, a process that adds a line of
JSON to a file for each result and each failure. A case that cannot be made or called (out of memory, no such kernel, a
compiler's error) is a line with its error, and the others go on. A worker that ends or hangs, as it does when a kernel
reads what it may not, is replaced by another that goes on with the next group.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

FLUSH_BYTES = 512 << 20
COPY_BYTES = 512 << 20
ROUNDS = 9
POLL_S = 0.05
START_S = 60.0  # for a worker to import what it needs
ERROR_CHARACTERS = 300

Line = dict[str, Any]
Write = Callable[[Line], None]


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
    ratio: float  # the first case's time over this one's: median, lowest, highest
    lowest: float
    highest: float


class Timer(Protocol):
    """What times cases."""

    def trial(self, cases: Sequence[Case]) -> list[float]:
        """Median milliseconds of each case."""
        ...

    def wait(self) -> None:
        """Until everything that was asked for is done; raises what went wrong with it."""
        ...


class Clock:
    """Times calls in turns by CUDA events, with a cold L2 cache."""

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


def judged(group: str, cases: Sequence[Case], trials: Sequence[Sequence[float]]) -> list[Result]:
    """trials: milliseconds by case. The first case is what the others are held against, the last one the copy."""
    milliseconds = [statistics.median(times) for times in zip(*trials, strict=True)]
    rates = [case.num_bytes / spent / 1e6 for case, spent in zip(cases, milliseconds, strict=True)]
    results = []
    for i, case in enumerate(cases):
        ratios = [times[0] / times[i] for times in trials]
        spread = (round(x, 2) for x in (statistics.median(ratios), min(ratios), max(ratios)))
        figures = (round(1e3 * milliseconds[i], 1), round(rates[i], 1), round(rates[i] / rates[-1], 3))
        results.append(Result(group, case.name, *figures, *spread))
    return results


def said(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_CHARACTERS]


def release() -> None:
    """Give a group's memory back before the next one asks for its own."""
    gc.collect()
    torch.cuda.empty_cache()


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
        found = judged(group.name, cases, [self.timer.trial(cases) for _ in range(self.num_trials)])
        self.results += found
        for result in found:
            write(asdict(result))


def writer(path: Path) -> Write:
    """Adds lines to a file, which has each of them at once."""

    def write(line: Line) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(shown(line), flush=True)

    return write


def lines_of(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shown(line: Line) -> str:
    """A line of results for people."""
    if "microseconds" in line:
        return (
            f"{line['group']:34} {line['name']:22} {line['microseconds']:9.1f} us {100 * line['share']:4.0f} % of copy "
            f"{line['ratio']:6.2f}x ({line['lowest']:.2f} to {line['highest']:.2f})"
        )
    if "error" in line:
        return f"{line['group']:34} {line.get('name', ''):22} LEFT OUT: {line['error']}"
    return json.dumps(line)


@dataclass(frozen=True)
class Limits:
    seconds: float  # of all groups; those that have not begun by then are left out
    group_seconds: float  # of one, compiling included


def supervise(command: Sequence[str], names: Sequence[str], path: Path, limits: Limits) -> None:
    """Run `command --only NAMES` until each group has had its turn; a group that ends its worker has had it."""
    write, left, started = writer(path), list(names), time.monotonic()
    while left:
        seconds = limits.seconds - (time.monotonic() - started)
        if seconds <= 0:
            for name in left:
                write({"group": name, "error": f"left out: {limits.seconds:.0f} s were over"})
            return
        before = len(lines_of(path))
        reason = _watched([*command, "--only", *left], path, before, (seconds, limits.group_seconds))
        lines = lines_of(path)[before:]
        ended = [line["end"] for line in lines if "end" in line]
        begun = [line["begin"] for line in lines if "begin" in line and line["begin"] not in ended]
        if reason is not None:
            write({"group": begun[0] if begun else left[0], "error": reason})
        had = {*ended, *begun} or {left[0]}
        left = [name for name in left if name not in had]


def _watched(command: Sequence[str], path: Path, before: int, limits: tuple[float, float]) -> str | None:
    """Run a worker; returns why it did not come to its end."""
    started = since = time.monotonic()
    seen = 0
    with subprocess.Popen(command) as worker:
        while worker.poll() is None:
            marks = sum("begin" in line or "end" in line for line in lines_of(path)[before:])
            now = time.monotonic()
            seen, since = (marks, now) if marks != seen else (seen, since)
            if now - started > limits[0] or now - since > limits[1] + (0 if marks else START_S):
                worker.kill()
                worker.wait()
                return f"stopped after {now - since:.0f} s"
            time.sleep(POLL_S)
        return None if worker.returncode == 0 else f"the worker ended with {worker.returncode}"


def run_groups(
    names: Sequence[str], group_of: Callable[[str], Callable[[Write], None]], path: Path, wait: Callable[[], None]
) -> None:
    """What a worker does: run each group, say when it begins and ends. A broken device ends the worker."""
    write = writer(path)
    for name in names:
        write({"begin": name})
        try:
            group_of(name)(write)
        except Exception as error:
            write({"group": name, "error": said(error)})
            wait()
        release()
        write({"end": name})


def arguments(description: str | None, seconds: float) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None, help="groups whose names begin with one of these")
    parser.add_argument("--list", action="store_true", help="name the groups and do nothing")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="results are added to this file, by line")
    parser.add_argument("--seconds", type=float, default=seconds, help="for all groups")
    parser.add_argument("--group-seconds", type=float, default=150, help="for one group, compiling included")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def chosen(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """Raises SystemExit for a beginning that no group has."""
    if only is None:
        return list(names)
    unknown = [beginning for beginning in only if not any(name.startswith(beginning) for name in names)]
    if unknown:
        raise SystemExit(f"no group begins with {unknown[0]!r}; there are: {', '.join(names)}")
    return [name for name in names if any(name.startswith(beginning) for beginning in only)]


def main_of(
    module: str,
    options: argparse.Namespace,
    names: Sequence[str],
    groups: Callable[[], Callable[[str], Callable[[Write], None]]],
) -> None:
    """Name the groups, supervise them, or be the worker that runs them. groups: makes what a worker needs, on the GPU.

    Raises SystemExit without a CUDA device.
    """
    if options.list:
        print("\n".join(chosen(names, options.only)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device, and there is nothing to time without one: see docs/gpu.md")
    if options.worker:
        run_groups(options.only, groups(), options.out, torch.cuda.synchronize)
        return
    command = [sys.executable, "-m", module, *_without_only(sys.argv[1:]), "--worker"]
    limits = Limits(options.seconds, options.group_seconds)
    supervise(command, chosen(names, options.only), options.out, limits)


def _without_only(given: Sequence[str]) -> Iterator[str]:
    """The command line without --only and what it names."""
    skipping = False
    for argument in given:
        skipping = argument == "--only" or (skipping and not argument.startswith("--"))
        if not skipping:
            yield argument
