"""What this machine can do at most: read memory and multiply integers. Speeds are judged against it.

Measured again between the pairs of a comparison, because a shared machine is not the same from minute to minute.
"""

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from kernels import native

if native.MISSING is None or TYPE_CHECKING:
    from kernels.native import _native

GIGA = 1e9
QUIET_SPAN_S = 1.0  # long enough that the kernel's ticks of 10 ms resolve one percent


@dataclass(frozen=True)
class Roof:
    """One measurement of the machine's limits."""

    read_one: float  # GB/s that one thread reads
    read_all: float  # GB/s that all threads read
    dot_all: float  # 10^9 operations per second of int8 dot products, all threads; a multiplication and a sum are two


def measure_roof(num_threads: int) -> Roof:
    """Half a second of reading and multiplying. Raises RuntimeError without the C++ library."""
    if native.MISSING is not None:
        raise RuntimeError(f"the probes are part of the C++ library: {native.MISSING}")
    rates = (_native.read_bandwidth(1), _native.read_bandwidth(num_threads), _native.dot_peak(num_threads))
    return Roof(*(rate / GIGA for rate in rates))


def median_roof(roofs: Sequence[Roof]) -> Roof:
    return Roof(*(statistics.median(getattr(roof, field.name) for roof in roofs) for field in fields(Roof)))


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def cpu_seconds(process_id: int) -> float:
    """User and system time that a process has used so far."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> tuple[float, float]:
    """(seconds that cores were busy or taken by the host, seconds that they existed), all cores, since the start."""
    line = Path("/proc/stat").read_text().splitlines()[0]  # "cpu user nice system idle iowait irq softirq steal ..."
    ticks = [int(field) for field in line.split()[1:9]]
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / per_second, sum(ticks) / per_second


def wait_until_quiet(share: float, limit_s: float) -> bool:
    """Sleep until all processes together use at most `share` of the cores; False when `limit_s` pass before."""
    deadline = time.monotonic() + limit_s
    while True:
        busy, total = machine_seconds()
        time.sleep(QUIET_SPAN_S)
        busy_now, total_now = machine_seconds()
        if busy_now - busy <= share * (total_now - total):
            return True
        if time.monotonic() > deadline:
            return False
