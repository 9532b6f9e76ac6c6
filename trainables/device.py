"""Device settings, chosen by capability; and what errors on a GPU mean.

Capabilities and never timings decide: a timing taken at start would choose differently from run to run, and
the same seed would give another result. The choice is recorded in study.json and kept on resume.
``python -m tunefleet.benchmarks.epoch`` shows on any machine whether it was right.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tunefleet import host
from tunefleet.models.space import PRECISIONS, Space

DEVICES = ("auto", "cpu", "cuda")
# Activations of one micro-batch that still fit a processor's caches while the backward pass reuses them
# (bytes; best for convnet with a trial on each core).
MICRO_BATCH_BYTES = 4 * 2**20
MICRO_BATCH_MIN = 8  # images; with fewer the convolution's own overhead shows
CONTEXT_BYTES = 2**30  # of a process on a GPU beside torch's allocator: kernels, handles, workspaces
# Only torch's own allocator raises torch.OutOfMemoryError; libraries have their own texts, cuDNN's also that
# no algorithm fits. Texts of torch 2.11 and 2.15 and of CUDA 12 and 13.
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
    """A CUDA error after which this process cannot use its GPU any more: the worker has to be replaced."""


@dataclass(frozen=True)
class DeviceSettings:
    """Settings of one device; recorded, so plain values only."""

    device: str  # cpu or cuda
    precision: str  # fp32 or bf16: the dtype of autocast and of cached inputs
    channels_last: bool  # memory format of convolutional networks
    micro_batch_bytes: int | None  # split a batch so that activations stay in cache; None: never
    cuda_graph: bool = False  # replay full batches' steps (trainables/graph.py); older studies did not
    inputs_on_device: bool = True  # False: a GPU has no room for them, and each batch is copied from the host

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of inputs and autocast."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def inputs_device(self) -> str:
        """Where a trial's inputs are."""
        return self.device if self.inputs_on_device else "cpu"

    def of(self, space: Space) -> DeviceSettings:
        """Return those of these settings that leave a space's numbers as they are."""
        return replace(
            self,
            channels_last=self.channels_last and bool(space.channels_last),
            micro_batch_bytes=self.micro_batch_bytes if space.micro_batches else None,
            cuda_graph=self.cuda_graph and space.cuda_graph and self.inputs_on_device,
        )

    def autocast(self) -> torch.autocast:
        """Return the context in which networks run."""
        return torch.autocast(self.device, self.dtype, enabled=self.precision == "bf16")


def choose(device: str = "auto", precision: str = "auto") -> DeviceSettings:
    """Choose the settings of a device from its capability flags.

    Args:
        device: auto, cpu or cuda. auto takes cuda where there is one.
        precision: auto, fp32 or bf16. auto takes bf16 where the device multiplies it faster than
            fp32 (AVX-512 BF16, AMX, CUDA from compute capability 8), where accuracy does not suffer.
            Elsewhere bf16 is emulated, up to 300 times slower.

    Raises:
        ValueError: Unknown names, cuda without a CUDA device, or a GPU that torch cannot use.
    """
    for flag, value, names in (("precision", precision, PRECISIONS), ("device", device, DEVICES)):
        if value not in names:
            raise ValueError(f"--{flag}={value} is unknown; choose from: {', '.join(names)}")
    device = _available(device)
    if precision == "auto":
        precision = "bf16" if _gains_by_bf16(device) else "fp32"
    on_cpu = device == "cpu"
    return DeviceSettings(
        device=device,
        precision=precision,
        channels_last=True,
        micro_batch_bytes=MICRO_BATCH_BYTES if on_cpu else None,
        cuda_graph=not on_cpu,
    )


def _available(device: str) -> str:
    """Return cpu or cuda; refuse to train on CPUs unasked where there is a GPU that torch cannot use."""
    if device == "cpu" or torch.cuda.is_available():
        return "cpu" if device == "cpu" else "cuda"
    why = why_unusable()
    if device == "cuda":
        why = why or "torch sees no CUDA device here"
        raise ValueError(f"--device=cuda, but {why}; give --device cpu")
    if why and not host.hidden_by_environment():
        raise ValueError(f"{why}; install a torch and a driver that fit, or give --device cpu")
    return "cpu"


def why_unusable() -> str | None:
    """Return why torch can use no GPU though there are some; None where there are none.

    Call it where ``torch.cuda.is_available()`` is false.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if host.hidden_by_environment():
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
    gpus, version = host.driver_gpus()
    if not gpus:
        return None
    if visible is not None and not any(host.is_listed(v.strip(), list(gpus)) for v in visible.split(",")):
        return f"CUDA_VISIBLE_DEVICES={visible} names none of this host's GPUs ({', '.join(gpus)})"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    try:
        torch.cuda.init()
        reason = "no reason given"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
    return (
        f"the driver ({version}) lists {len(gpus)} × {next(iter(gpus.values()))}, but torch "
        f"{torch.__version__}, {built}, cannot use them ({reason})"
    )


def _gains_by_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_exact_fp32() -> None:
    """Switch TF32 off, which torch (2.15) uses for convolutions on GPUs: fp32 is to mean fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def has_convolution(network: nn.Module) -> bool:
    """Return whether channels_last is worth anything to the network."""
    return any(isinstance(module, nn.Conv2d) for module in network.modules())


def micro_batch(settings: DeviceSettings, network: nn.Module, inputs: torch.Tensor, batch_size: int) -> int:
    """Return how many images to process at a time while gradients are accumulated.

    The sum of the parts' gradients is the batch's gradient, except under BatchNorm in training,
    whose statistics would be those of the part: such networks are never split.

    Args:
        settings: The device's settings.
        network: What is trained, in training mode.
        inputs: One prepared input ``(1, …)``, to see how large its activations get.
        batch_size: Images per optimizer step.
    """
    if settings.micro_batch_bytes is None or not has_convolution(network):
        return batch_size
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules()):
        return batch_size
    largest = 0

    def record(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel() * output.element_size())

    hooks = [m.register_forward_hook(record) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad(), settings.autocast():
        network(inputs)
    for hook in hooks:
        hook.remove()
    images = max(MICRO_BATCH_MIN, settings.micro_batch_bytes // max(1, largest))
    return min(batch_size, 2 ** (images.bit_length() - 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or what caused it, says that the GPU's (or the CPU's) memory is full."""
    return any(
        isinstance(cause, torch.OutOfMemoryError | MemoryError)
        or (isinstance(cause, RuntimeError) and any(text in str(cause) for text in OUT_OF_MEMORY))
        for cause in causes(error)
    )


@contextlib.contextmanager
def fitting(name: str, advice: str = "give smaller sizes") -> Iterator[None]:
    """Context manager: raise a ValueError of one line where a network does not fit into memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"{name} does not fit into memory here; {advice}") from error


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
    """Free what a failed trial held; exceptions leave cycles that hold tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limit_memory(limit_bytes: int) -> None:
    """Limit what torch's allocator in this process takes of its GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(limit_bytes, 0) / total))


@functools.lru_cache  # asked once while all is well: a GPU that is lost does not answer
def gpu_id() -> str:
    """Return the UUID of this process's GPU as CUDA_VISIBLE_DEVICES takes it: GPU-… or MIG-…."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    if visible.startswith("MIG-"):
        return visible
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
