"""What does this host give to this process? Containers and batch systems give less than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def cpu_count(root: Path = ROOT) -> int:
    """Return the CPUs this process may use: at least 1, at most its affinity and its cgroups' quotas.

    Args:
        root: Where /proc and /sys lie.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([affinity, *_quotas(root)])))


def oom_kills(root: Path = ROOT) -> int:
    """Return how often the kernel has killed a process of this one's memory cgroup, or of one above it."""
    counts = [0]
    for folder in _cgroups("memory", root):
        for name in ("memory.events", "memory.oom_control"):  # version 2 and 1
            for line in _read(folder / name).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.isdigit():
                    counts.append(int(value))
    return max(counts)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quota of each cgroup that has one, in CPUs."""
    for folder in _cgroups("cpu", root):
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if not quota:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of all above it, of both versions.

    In a container /proc may name the host's path, of which only the top is there.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [controllers, controller] if controllers else ["", "unified"]
        for inside in (PurePosixPath(path), *PurePosixPath(path).parents):
            for mount in dict.fromkeys(mounts):
                folder = root / "sys/fs/cgroup" / mount / str(inside).lstrip("/")
                if folder.is_dir():
                    yield folder


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
