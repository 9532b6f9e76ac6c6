"""Which GPUs are there, and what do their errors mean?

Texts of errors are those of torch 2.11 and 2.15 and of CUDA 12 and 13.
"""

from __future__ import annotations

import functools
import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide every GPU
CONTEXT_BYTES = 2**30  # of a process on a GPU beside torch's allocator: kernels, handles, workspaces
SMI_SECONDS = 20.0  # nvidia-smi without its daemon takes some on a host of eight GPUs
# torch.OutOfMemoryError is raised by its own allocator alone; libraries say it in their own ways, cuDNN also
# by finding no algorithm that fits.
OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cublasCreate on a full GPU
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "Unable to find a valid cuDNN algorithm",
    "unable to find an engine to execute this computation",
    "not enough memory: you tried to allocate",  # torch's CPU allocator
    "can't allocate memory",
)


class BrokenGpuError(Exception):
    """A CUDA error after which this process can use its GPU no more: the worker has to be replaced."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or what caused it, says that the GPU's (or the CPU's) memory is full."""
    return any(
        isinstance(cause, torch.OutOfMemoryError | MemoryError)
        or (isinstance(cause, RuntimeError) and any(text in str(cause) for text in OUT_OF_MEMORY))
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_usable() -> bool:
    """Return whether this process can still use its GPU; after some errors (asserts, ECC) none can."""
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        return is_out_of_memory(error)
    return True


def free_memory() -> None:
    """Give back what a failed trial held; exceptions leave cycles that hold tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limit_memory(limit_bytes: int) -> None:
    """Let torch's allocator in this process take so much of its GPU and no more."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(limit_bytes, 0) / total))


@functools.lru_cache  # asked once while all is well: a GPU that is lost does not answer
def gpu_id() -> str:
    """Return the UUID of this process's GPU as CUDA_VISIBLE_DEVICES takes it: GPU-… or MIG-…."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    if visible.startswith("MIG-"):
        return visible
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


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


def why_unusable() -> str | None:
    """Return why torch can use no GPU though there are some; None where there are none.

    Call it where ``torch.cuda.is_available()`` is false.
    """
    if hidden_by_environment():
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides every GPU"
    gpus, driver = driver_gpus()
    if not gpus:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not any(_is_listed(entry.strip(), list(gpus)) for entry in visible.split(",")):
        return f"CUDA_VISIBLE_DEVICES={visible} names none of this host's GPUs ({', '.join(gpus)})"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    try:
        torch.cuda.init()
        reason = "no reason given"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
    return (
        f"the driver ({driver}) lists {len(gpus)} × {next(iter(gpus.values()))}, but torch "
        f"{torch.__version__}, {built}, cannot use them ({reason})"
    )


def _is_listed(entry: str, uuids: list[str]) -> bool:
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
