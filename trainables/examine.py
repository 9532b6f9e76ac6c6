"""See by one batch what a person's network does: whether it trains, and what leaves its numbers alone.

What the built-in networks were measured to gain by (docs/log) is safe for a network only if its loss and its
gradients are the same with and without. Capturing a step as a CUDA graph cannot be judged by a batch: a space
asks for it (`Space.cuda_graph`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunefleet.cli import printable
from tunefleet.models.network import Network
from tunefleet.models.sources import describe
from tunefleet.models.space import Space, TrainConfig
from tunefleet.trainables.data import ImageData, load_split
from tunefleet.trainables.device import choose, has_convolution
from tunefleet.trainables.inputs import build_model
from tunefleet.trainables.pipeline import Pipeline

IMAGES = 8  # of the batch
PARTS = 2  # into which it is split
RTOL, ATOL = 1e-3, 1e-5  # of float32 in another order


def examine(config: TrainConfig, data: ImageData, say: Callable[[str], Any] = print) -> Space:
    """Return a config's space with what one batch shows of its network; built-in ones are known.

    Args:
        config: Of the space.
        data: Its images.
        say: Takes a line on what costs time.

    Raises:
        ValueError: The network cannot be built or trained; one line that says where and why.
    """
    space = config.space
    if not space.trains_images or isinstance(space.build, Network):
        return space
    folder = Path(space.source.folder) if space.source and space.source.folder else None
    try:
        model = build_model(config, data)
    except Exception as error:  # whatever a person's code raises
        raise ValueError(f"{space.name} cannot be built: {describe(error, folder)}") from error
    images, labels = load_split(data, "train")
    x = Pipeline.of(config, data, choose("cpu", "fp32"))(torch.from_numpy(np.array(images[:IMAGES])))
    y = torch.from_numpy(np.array(labels[:IMAGES]))
    try:
        logits = model.train()(x)
    except Exception as error:  # likewise
        shape = tuple(x.shape)
        raise ValueError(f"{space.name} fails on images {shape}: {describe(error, folder)}") from error
    check_output(space.name, logits, (len(x), len(data.classes)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{space.name} has no parameter to train")
    convolves = has_convolution(model)
    found: dict[str, Any] = {
        "channels_last": convolves and _is_same(model, x, y, _in_channels_last),
        "micro_batches": convolves and _is_same(model, x, y, _in_parts),
        "feature_cache": _is_cacheable(model, x),
    }
    if getattr(model, "frozen", False) and space.feature_cache is None and not found["feature_cache"]:
        say(f"{space.name} is no head(backbone(x)): its backbone's features are computed in every epoch")
    return replace(space, **{name: found[name] for name, known in space.traits.items() if known is None})


def check_output(name: str, logits: Any, shape: tuple[int, int]) -> None:
    """Raise ValueError unless a network's output is logits of this shape that gradients can follow."""
    wanted = f"return logits (N, {shape[1]}), one for each class"
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name} returns a {type(logits).__name__}; {wanted}")
    if tuple(logits.shape) != shape:
        raise ValueError(
            f"{name} returns {printable(str(tuple(logits.shape)))} of {shape[0]} images; {wanted}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"{name} returns {logits.dtype}; {wanted}, as floats")
    if not logits.requires_grad:
        raise ValueError(
            f"{name} returns logits without a gradient; train what they depend on, and do not detach"
        )


Gradients = tuple[Tensor, list[Tensor | None]]


def _gradients(model: nn.Module, x: Tensor, y: Tensor, parts: int = 1) -> Gradients:
    """Return the loss of a batch and the gradients, in train mode, from the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        total = torch.zeros(())
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = F.cross_entropy(model(part_x), part_y, reduction="sum") / len(x)
            loss.backward()
            total += loss.detach()
    return total, [parameter.grad for parameter in model.parameters()]


def _in_channels_last(model: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    model.to(memory_format=torch.channels_last)
    return _gradients(model, x.contiguous(memory_format=torch.channels_last), y)


def _in_parts(model: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    return _gradients(model, x, y, PARTS)


def _is_same(model: nn.Module, x: Tensor, y: Tensor, way: Callable[..., Gradients]) -> bool:
    """Return whether another way to compute a batch gives the same loss and gradients."""
    plain = _gradients(copy.deepcopy(model), x, y)
    try:
        other = way(copy.deepcopy(model), x, y)
    except Exception:  # noqa: BLE001  a view() of the plain memory format, say
        return False
    pairs = zip([plain[0], *plain[1]], [other[0], *other[1]], strict=True)
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.allclose(a, b, RTOL, ATOL))
        for a, b in pairs
    )


@torch.no_grad()
def _is_cacheable(model: nn.Module, x: Tensor) -> bool:
    """Return whether a network is a head behind a frozen backbone, and nothing else."""
    parts = [getattr(model, name, None) for name in ("backbone", "head")]
    if not getattr(model, "frozen", False) or not all(isinstance(part, nn.Module) for part in parts):
        return False
    backbone, head = parts
    assert backbone is not None
    assert head is not None
    model.eval()
    try:
        return torch.allclose(model(x), head(backbone(x)), RTOL, ATOL)
    except Exception:  # noqa: BLE001  it is put together in another way
        return False
    finally:
        model.train()
