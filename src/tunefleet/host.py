"""CPUs, memory events and GPUs of this host, without torch, whose import takes seconds, and without CUDA.

Containers and batch systems give less than the machine has. A process that asks CUDA takes half a gigabyte of
each GPU for as long as it lives, so this reads NVIDIA's driver instead.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide every GPU
SMI_SECONDS = 20.0  # nvidia-smi without its daemon takes some on a host of eight GPUs


def cpu_count(root: Path = ROOT) -> int:
    """Return the CPUs this process may use: at least 1, at most its affinity and its cgroups' quotas."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([affinity, *_quotas(root)])))


def oom_kills(root: Path = ROOT) -> int:
    """Return how often the kernel has killed a process of this one's memory cgroup, or of one above it."""
    counts = [0]
    for folder in _cgroups("memory", root):
        for name in ("memory.events", "memory.oom_control"):  # version 2 and 1
            for line in contents_of(folder / name).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.isdigit():
                    counts.append(int(value))
    return max(counts)


def process_start(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; None: it has ended."""
    fields = contents_of(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return None if not fields or fields[0] in "ZX" else fields[19]  # a zombie, dead


def hidden_by_environment() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES hides every GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in HIDDEN


def driver_gpus() -> tuple[dict[str, str], str]:
    """Return the names of all GPUs that NVIDIA's driver lists, by UUID, and the driver's version."""
    try:
        rows = _query("uuid,name,driver_version")
    except (OSError, subprocess.SubprocessError):  # containers may have the driver alone
        version = contents_of(Path("/sys/module/nvidia/version")) or "unknown version"
        return dict.fromkeys(_listed_by_kernel(), "GPU"), version
    return {row[0]: row[1] for row in rows if len(row) == 3}, rows[0][-1] if rows else "unknown"


def free_bytes() -> int | None:
    """Return the free memory of the fullest GPU that CUDA_VISIBLE_DEVICES leaves; None: not known here."""
    try:
        free = {uuid: int(mib) * 2**20 for uuid, mib in _query("uuid,memory.free")}
    except (OSError, subprocess.SubprocessError, ValueError):  # a MIG device's memory is "[N/A]"
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    entries = [str(index) for index in range(len(free))] if visible is None else visible.split(",")
    chosen = [
        size
        for index, (uuid, size) in enumerate(free.items())
        if any(entry == str(index) or (entry and uuid.startswith(entry)) for entry in entries)
    ]
    return min(chosen, default=None)


def is_listed(entry: str, uuids: list[str]) -> bool:
    """Return whether an entry of CUDA_VISIBLE_DEVICES names one of these GPUs."""
    if entry.isdigit():
        return int(entry) < len(uuids)
    return entry.startswith("MIG-") or any(uuid.startswith(entry) for uuid in uuids)


def _query(fields: str) -> list[list[str]]:
    """Return nvidia-smi's rows of these fields; memory in MiB."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    return [line.split(", ") for line in answer.strip().splitlines()]


def _listed_by_kernel() -> list[str]:
    folder = Path("/proc/driver/nvidia/gpus")
    return sorted(gpu.name for gpu in folder.iterdir()) if folder.is_dir() else []


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quota of each cgroup that has one, in CPUs."""
    for folder in _cgroups("cpu", root):
        quota, period = contents_of(folder / "cpu.cfs_quota_us"), contents_of(folder / "cpu.cfs_period_us")
        if not quota:
            quota, _, period = contents_of(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of all above it, of both versions.

    In a container /proc may name the host's path, of which only the top is there.
    """
    for line in contents_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [controllers, controller] if controllers else ["", "unified"]
        for inside in (PurePosixPath(path), *PurePosixPath(path).parents):
            for mount in dict.fromkeys(mounts):
                folder = root / "sys/fs/cgroup" / mount / str(inside).lstrip("/")
                if folder.is_dir():
                    yield folder


def contents_of(file: Path) -> str:
    """Return what a file of the kernel says; nothing where it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
