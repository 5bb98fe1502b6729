"""What the machine offers, read from a file system made up for the test."""

import os
from pathlib import Path

import pytest

from engine.machine import free_memory, num_cores

GIB = 1 << 30


def machine(root: Path, groups: str = "", **files: str) -> Path:
    """A machine with 8 GiB available and these control group files; names use __ for / and _DOT_ for a dot."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_the_kernel_is_asked(tmp_path: Path) -> None:
    assert free_memory(machine(tmp_path)) == 8 * GIB


def test_a_container_sees_its_limit_at_the_mount_point(tmp_path: Path) -> None:
    """Version 2, where page cache that can be dropped counts as free."""
    root = machine(
        tmp_path,
        "0::/\n",
        memory_DOT_max=f"{4 * GIB}\n",
        memory_DOT_current=f"{3 * GIB}\n",
        memory_DOT_stat=f"anon {GIB}\ninactive_file {2 * GIB}\n",
    )
    assert free_memory(root) == 3 * GIB


def test_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/service/worker\n",
        service__memory_DOT_max=str(2 * GIB),
        service__memory_DOT_current=str(GIB),
        service__worker__memory_DOT_max="max\n",
        service__worker__memory_DOT_current=str(GIB),
    )
    assert free_memory(root) == GIB


def test_version_1_groups(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "4:memory:/job\n1:cpu,cpuacct:/job\n",
        memory__job__memory_DOT_limit_in_bytes=str(5 * GIB),
        memory__job__memory_DOT_usage_in_bytes=str(4 * GIB),
        cpu__job__cpu_DOT_cfs_quota_us="150000\n",
        cpu__job__cpu_DOT_cfs_period_us="100000\n",
    )
    assert free_memory(root) == GIB
    assert num_cores(root) == min(2, len(os.sched_getaffinity(0)))


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", memory_DOT_max=str(GIB), memory_DOT_current=str(2 * GIB))
    assert free_memory(root) == 0


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("30000 100000", 1), ("max 100000", None)])
def test_a_quota_bounds_the_cores(tmp_path: Path, quota: str, cores: int | None) -> None:
    """Bug: 64 threads on a container that may use one core."""
    root = machine(tmp_path, "0::/\n", cpu_DOT_max=quota)
    assert num_cores(root) == (cores or len(os.sched_getaffinity(0)))


def test_the_machine_it_runs_on_can_be_read() -> None:
    assert free_memory() > 0
    assert num_cores() >= 1
