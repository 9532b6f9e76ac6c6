"""Which GPUs does NVIDIA's driver list? Asked without torch, whose import takes seconds, and without CUDA.

A process that asks CUDA takes half a gigabyte of each GPU for as long as it lives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide every GPU
SMI_SECONDS = 20.0  # nvidia-smi without its daemon takes some on a host of eight GPUs


def hidden_by_environment() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES hides every GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in HIDDEN


def may_be_used() -> bool:
    """Return whether this host may have a usable GPU, without importing CUDA; a driver is all it takes."""
    return not hidden_by_environment() and bool(shutil.which("nvidia-smi") or _listed_by_kernel())


def driver_gpus() -> tuple[dict[str, str], str]:
    """Return the names of all GPUs that NVIDIA's driver lists, by UUID, and the driver's version."""
    query = ["nvidia-smi", "--query-gpu=uuid,name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # containers may have the driver alone
        return dict.fromkeys(_listed_by_kernel(), "GPU"), _kernel_module_version()
    rows = [line.split(", ") for line in answer.strip().splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 3}, rows[0][-1] if rows else "unknown"


def free_bytes() -> int | None:
    """Return the free memory of the fullest GPU that CUDA_VISIBLE_DEVICES leaves; None: not known here.

    Asks the driver, since a process that asks CUDA takes half a gigabyte of each GPU.
    """
    query = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]  # MiB
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
        free = {
            uuid: int(mib) * 2**20 for uuid, mib in (row.split(", ") for row in answer.strip().splitlines())
        }
    except (OSError, subprocess.SubprocessError, ValueError):  # a MIG device's memory is "[N/A]"
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [
        size
        for index, (uuid, size) in enumerate(free.items())
        if visible is None
        or any(entry == str(index) or (entry and uuid.startswith(entry)) for entry in visible.split(","))
    ]
    return min(chosen, default=None)


def is_listed(entry: str, uuids: list[str]) -> bool:
    """Return whether an entry of CUDA_VISIBLE_DEVICES names one of these GPUs."""
    if entry.isdigit():
        return int(entry) < len(uuids)
    return entry.startswith("MIG-") or any(uuid.startswith(entry) for uuid in uuids)


def _listed_by_kernel() -> list[str]:
    folder = Path("/proc/driver/nvidia/gpus")
    return sorted(gpu.name for gpu in folder.iterdir()) if folder.is_dir() else []


def _kernel_module_version() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown version"
