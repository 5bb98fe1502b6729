"""What the GPU benchmarks share: one failure must not cost the rest of the time that a GPU is lent for."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_timing import Case, Group, Maker, Timing, copy_case, judged
from benchmarks.workers import Limits, Line, chosen, lines_of, shown, supervise, without_only
from tests.benchmarks.failing_groups import NAMES


class Once:
    def trial(self, cases: Sequence[Case]) -> list[float]:
        return [float(i + 1) for i in range(len(cases))]

    def wait(self) -> None: ...


def test_ratios_are_of_times_taken_in_the_same_trial() -> None:
    """Bug: a ratio of medians, which a clock that changes between trials moves; a share of another's bytes."""
    cases = [Case(name, num_bytes, list) for name, num_bytes in (("bf16", 400), ("w4", 100), ("copy", 1000))]
    trials = [[4.0, 2.0, 5.0], [8.0, 2.0, 5.0], [2.0, 0.5, 5.0]]
    group = Group("g", [Maker("bf16", lambda: cases[0])])
    bf16, w4, copy = judged(group, cases, trials)
    assert (bf16.ratio, w4.ratio, w4.lowest, w4.highest) == (1.0, 4.0, 2.0, 4.0)
    assert (w4.microseconds, w4.share, copy.share) == (2000.0, 0.25, 1.0)


def test_a_case_that_fails_is_left_out_and_says_why() -> None:
    """Bugs: a group lost because one library has no kernel for it; ratios over another case, as if over the first."""

    def broken() -> Case:
        raise RuntimeError("no kernel\nfor this")

    def late() -> Case:
        return Case("late", 1, lambda: 1 / 0)

    lines: list[Line] = []
    makers = [Maker("broken", broken), Maker("late", late), Maker("good", lambda: Case("good", 8, list))]
    Timing(Once(), copy_case(torch.device("cpu"), 8), 2).run(Group("g", makers), lines.append)
    assert [(line["name"], line.get("error", "")) for line in lines] == [
        ("broken", "RuntimeError: no kernel for this"),
        ("late", "ZeroDivisionError: division by zero"),
        ("good", ""),
        ("copy", ""),
    ]
    assert "LEFT OUT: ZeroDivisionError" in shown(lines[1])
    assert [line["ratio"] for line in lines[2:]] == [None, None]
    assert "no ratio: the first case failed" in shown(lines[2])


def test_a_worker_that_dies_or_hangs_is_replaced(tmp_path: Path) -> None:
    """Bugs: what was measured is lost with the process; a group that hangs takes the time of all others."""
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tests.benchmarks.failing_groups", str(out)]
    supervise(command, NAMES, out, Limits(seconds=100, group_seconds=2))
    lines = [line for line in lines_of(out) if "group" in line]
    assert [line["group"] for line in lines] == list(NAMES)
    assert [line.get("error") for line in lines] == [
        None,
        "ValueError: of one group",
        "the worker ended with 9",
        lines[3]["error"],
        None,
    ]
    assert lines[3]["error"].startswith("stopped after 2 s")


def test_groups_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    """Bug: a figure that is missing, and nobody knows why."""
    out = tmp_path / "out.jsonl"
    supervise([sys.executable, "-c", "raise SystemExit(1)"], ["a", "b"], out, Limits(seconds=0, group_seconds=1))
    assert [line["error"] for line in lines_of(out)] == ["left out: 0 s were over"] * 2


def test_workers_that_cannot_start_are_not_started_for_ever(tmp_path: Path) -> None:
    """Bug: fifty workers, one after the other, that all find no driver."""
    out = tmp_path / "out.jsonl"
    supervise([sys.executable, "-c", "raise SystemExit(1)"], ["a", "b", "c"], out, Limits(60, 60))
    assert [line["error"] for line in lines_of(out)] == ["the worker ended with 1 before its first group"] * 3


def test_groups_are_chosen_by_how_they_begin() -> None:
    names = ["linear 4 x 4, 1 rows", "linear 4 x 4, 16 rows", "sampling"]
    assert chosen(names, None) == names
    assert chosen(names, ["linear"]) == names[:2]
    with pytest.raises(SystemExit, match="no group begins with 'ops'; there are: linear"):
        chosen(names, ["ops"])
    assert list(without_only(["--only", "a", "b", "--out", "x"])) == ["--out", "x"]
