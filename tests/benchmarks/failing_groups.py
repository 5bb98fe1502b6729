"""A benchmark whose groups fail in every way: python -m tests.benchmarks.failing_groups (test_gpu_timing.py)."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.workers import Write, run_groups, writer

NAMES = ("first", "raises", "dies", "hangs", "last")


def run(name: str, write: Write) -> None:
    if name == "raises":
        raise ValueError("of one group")
    if name == "dies":
        os._exit(9)
    if name == "hangs":
        time.sleep(60)
    write({"group": name, "name": "case", "found": 1})


def group_of(name: str) -> Callable[[Write], None]:
    return partial(run, name)


if __name__ == "__main__":
    _, out, _, *names = sys.argv
    run_groups(names, group_of, writer(Path(out)), lambda: None)
