"""How is a device used to its limit? Decided here, from what the device can do.

Capabilities and never timings decide: a timing taken at start would choose differently from run to
run, and the same seed would give another result. The choice stands in study.json and is kept on
resume. ``python -m tunefleet.benchmarks.epoch`` shows on any machine whether it was right.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tunefleet.trainables import driver
from tunefleet.trainables.config import PRECISIONS

DEVICES = ("auto", "cpu", "cuda")

# Activations of one micro-batch that still sit in a processor's caches while they are reused by the
# backward pass (bytes; best for convnet with a trial on each core, NOTES.md).
MICRO_BATCH_BYTES = 4 * 2**20
MICRO_BATCH_MIN = 8  # images; below it the convolution's own overhead shows


@dataclass(frozen=True)
class Levers:
    """The choices for one device; recorded, so plain values only."""

    device: str  # cpu or cuda
    precision: str  # fp32 or bf16: the dtype of autocast and of cached inputs
    channels_last: bool  # memory format of convolutional networks
    micro_batch_bytes: int | None  # split a batch so that activations stay in cache; None: never
    cuda_graph: bool = False  # replay full batches' steps (trainables/graph.py); older studies did not

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of inputs and autocast."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-able values."""
        return asdict(self)


def choose(device: str = "auto", precision: str = "auto") -> Levers:
    """Chooses the levers of a device from its capability flags.

    Args:
        device: auto, cpu or cuda. auto takes cuda where there is one.
        precision: auto, fp32 or bf16. auto takes bf16 where the device multiplies it faster than
            fp32 (AVX-512 BF16, AMX, CUDA from compute capability 8) and accuracy was seen not to
            suffer (NOTES.md). Elsewhere bf16 is emulated, up to 300 times slower.

    Raises:
        ValueError: Unknown names, cuda without a CUDA device, or a GPU that torch cannot use.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"--precision={precision} is unknown; choose from: {', '.join(PRECISIONS)}")
    if device not in DEVICES:
        raise ValueError(f"--device={device} is unknown; choose from: {', '.join(DEVICES)}")
    device = _available(device)
    if precision == "auto":
        precision = "bf16" if _gains_by_bf16(device) else "fp32"
    on_cpu = device == "cpu"
    return Levers(
        device=device,
        precision=precision,
        channels_last=True,
        micro_batch_bytes=MICRO_BATCH_BYTES if on_cpu else None,
        cuda_graph=not on_cpu,
    )


def _available(device: str) -> str:
    """Returns cpu or cuda; a GPU that is there and cannot be used is no reason to train on CPUs unasked."""
    if device == "cpu" or torch.cuda.is_available():
        return "cpu" if device == "cpu" else "cuda"
    why = why_unusable()
    if device == "cuda":
        why = why or "torch sees no CUDA device here"
        raise ValueError(f"--device=cuda, but {why}; give --device cpu")
    if why and not driver.hidden_by_environment():
        raise ValueError(f"{why}; install a torch and a driver that fit, or give --device cpu")
    return "cpu"


def why_unusable() -> str | None:
    """Return why torch can use no GPU though there are some; None where there are none.

    Call it where ``torch.cuda.is_available()`` is false.
    """
    if driver.hidden_by_environment():
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides every GPU"
    gpus, version = driver.driver_gpus()
    if not gpus:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not any(
        driver.is_listed(entry.strip(), list(gpus)) for entry in visible.split(",")
    ):
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


def use_exact_fp32() -> None:
    """Switches TF32 off, which torch (2.15) uses for convolutions on GPUs: fp32 is to mean fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _gains_by_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_convolution(network: nn.Module) -> bool:
    """Returns whether channels_last is worth anything to the network."""
    return any(isinstance(module, nn.Conv2d) for module in network.modules())


def micro_batch(levers: Levers, network: nn.Module, inputs: torch.Tensor, batch_size: int) -> int:
    """Returns how many images to push through at a time, gradients being accumulated.

    Args:
        levers: The device's choices.
        network: What is trained, in training mode.
        inputs: One prepared input ``(1, …)``, to see how large its activations get.
        batch_size: Images per optimizer step.

    The sum of the parts' gradients is the batch's gradient, except under BatchNorm in training,
    whose statistics would be those of the part: such networks are never split.
    """
    if levers.micro_batch_bytes is None or not has_convolution(network):
        return batch_size
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules()):
        return batch_size
    largest = 0

    def record(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel() * output.element_size())

    hooks = [m.register_forward_hook(record) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad(), torch.autocast(levers.device, levers.dtype, enabled=levers.precision == "bf16"):
        network(inputs)
    for hook in hooks:
        hook.remove()
    images = max(MICRO_BATCH_MIN, levers.micro_batch_bytes // max(1, largest))
    return min(batch_size, 2 ** (images.bit_length() - 1))
