"""What the machine offers to this process: memory, cores, a GPU. The only reader of /proc and /sys."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def free_memory(root: Path = ROOT) -> int:
    """Bytes this process may still take: the kernel's estimate, or what its control groups leave if that is less.

    `root` stands in for the file system in tests. Raises OSError when /proc/meminfo cannot be read.
    """
    available = _kib_field(root / "proc/meminfo", "MemAvailable:") * 1024
    return max(0, min([available, *(_headroom(group) for group in _memory_groups(root))]))


def num_cores(root: Path = ROOT) -> int:
    """Cores this process may use: its affinity mask, or the CPU quota of its control group if that is less."""
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas(root)]))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _kib_field(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"{path} has no {field}")


def _groups(root: Path, controller: str, v1_folder: str) -> Iterator[Path]:
    """Folders of the control groups of this process and their ancestors that exist: version 2, then version 1.

    A container often sees the host's path in /proc/self/cgroup and its own group at the mount point, so ancestors up
    to the mount point are all tried.
    """
    membership = root / "proc/self/cgroup"
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / v1_folder
        else:
            continue
        own = mount / name.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount) and folder.is_dir())


def _memory_groups(root: Path) -> Iterator[Path]:
    return _groups(root, "memory", "memory")


def _headroom(group: Path) -> int:
    """Bytes left under the group's limit, counting page cache that can be dropped as free; huge when unlimited."""
    limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes")
    if limit is None or used is None:
        return 1 << 62
    statistics = group / "memory.stat"
    droppable = 0
    if statistics.is_file():
        fields = dict(line.split() for line in statistics.read_text().splitlines())
        droppable = int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    return limit - used + droppable


def _quotas(root: Path) -> Iterator[int]:
    """CPU quotas in whole cores, rounded up."""
    for group in _groups(root, "cpu", "cpu"):
        v2 = group / "cpu.max"
        if v2.is_file():
            quota, period = v2.read_text().split()
            if quota != "max":
                yield math.ceil(int(quota) / int(period))
        v1_quota, v1_period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if v1_quota is not None and v1_quota > 0 and v1_period:
            yield math.ceil(v1_quota / v1_period)


def _number(path: Path) -> int | None:
    """The integer a file holds, or None when there is no such file or it says "max"."""
    if not path.is_file():
        return None
    text = path.read_text().strip()
    return None if text == "max" else int(text)
