"""Groups of measurements that outlive each other: results written as they come, by a process that may fail.

Groups run in a *worker*, a process that adds a line of JSON to a file for each result and each failure. A worker that
ends or hangs, as it does when a kernel reads what it may not, is replaced by another that goes on with the next group.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_S = 0.05
START_S = 60.0  # for a worker to import what it needs
MOST_IDLE = 2  # workers in a row that end before they begin anything: what ends them ends the next one too
ERROR_CHARACTERS = 300

Line = dict[str, Any]
Write = Callable[[Line], None]


def said(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_CHARACTERS]


def writer(path: Path, is_json: bool = False) -> Write:
    """Adds lines to a file, which has each of them at once, and prints them, for people or as they are."""

    def write(line: Line) -> None:
        text = json.dumps(line)
        with path.open("a") as file:
            file.write(text + "\n")
        if is_json or not line.keys() & {"begin", "end"}:
            print(text if is_json else shown(line), flush=True)

    return write


def lines_of(path: Path) -> list[Line]:
    """What is in the file; a line that is still being written is not."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def shown(line: Line) -> str:
    """A line of results for people."""
    if "microseconds" in line:
        ratio = "  no ratio: the first case failed"
        if line["ratio"] is not None:
            ratio = f"{line['ratio']:6.2f}x ({line['lowest']:.2f} to {line['highest']:.2f})"
        spent = f"{line['microseconds']:9.1f} us {100 * line['share']:4.0f} % of copy"
        return f"{line['group']:34} {line['name']:22} {spent} {ratio}"
    if "error" in line:
        return f"{line['group']:34} {line.get('name', ''):22} LEFT OUT: {line['error']}"
    return json.dumps(line)


@dataclass(frozen=True)
class Limits:
    seconds: float  # of all groups; those that have not begun by then are left out
    group_seconds: float  # of one, compiling included


def supervise(command: Sequence[str], names: Sequence[str], path: Path, limits: Limits) -> None:
    """Run `command --only NAMES` until each group has had its turn; a group that ends its worker has had it."""
    write, left, started, num_idle = writer(path, "--json" in command), list(names), time.monotonic(), 0
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
        num_idle = 0 if begun or ended else num_idle + 1
        if num_idle == MOST_IDLE:
            for name in left:
                write({"group": name, "error": f"{reason or 'the worker ended'} before its first group"})
            return
        if begun:
            write({"group": begun[0], "error": reason or "the worker ended"})
        left = [name for name in left if name not in {*ended, *begun}]


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
    names: Sequence[str], group_of: Callable[[str], Callable[[Write], None]], write: Write, settle: Callable[[], None]
) -> None:
    """What a worker does: run each group, say when it begins and ends, and `settle`, which may end the worker."""
    for name in names:
        write({"begin": name})
        try:
            group_of(name)(write)
        except Exception as error:
            write({"group": name, "error": said(error)})
        settle()
        write({"end": name})


def chosen(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """Raises SystemExit for a beginning that no group has."""
    if only is None:
        return list(names)
    unknown = [beginning for beginning in only if not any(name.startswith(beginning) for name in names)]
    if unknown:
        raise SystemExit(f"no group begins with {unknown[0]!r}; there are: {', '.join(names)}")
    return [name for name in names if any(name.startswith(beginning) for beginning in only)]


def without_only(given: Sequence[str]) -> Iterator[str]:
    """The command line without --only and what it names."""
    skipping = False
    for argument in given:
        skipping = argument == "--only" or (skipping and not argument.startswith("--"))
        if not skipping:
            yield argument
