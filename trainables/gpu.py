"""What do errors on a GPU mean, and what may a process take of it?

Texts of errors are those of torch 2.11 and 2.15 and of CUDA 12 and 13.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator

import torch

CONTEXT_BYTES = 2**30  # of a process on a GPU beside torch's allocator: kernels, handles, workspaces
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
        for cause in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and what it was raised from or while handling, back to the first."""
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
