"""ResNet-18 cut to a backbone, and its weights.

The network is torchvision's (He et al. 2016, https://arxiv.org/abs/1512.03385); the cuts are named as in
table 1 of the paper.
"""

import math
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

IN_CHANNELS = 3  # of the first convolution, whose weights come with the rest
LAYERS = (  # in forward's order; "flatten" is a function in torchvision and a layer here
    *("conv1", "bn1", "relu", "maxpool"),
    *("layer1", "layer2", "layer3", "layer4"),
    *("avgpool", "flatten", "fc"),
)
NAMES_SHOWN = 3  # keys of a faulty file that an error lists, per kind of fault


@dataclass(frozen=True)
class Cut:
    """A place to cut ResNet-18.

    Attributes:
        last: the last of `LAYERS` that is kept.
        channels: what comes out: channels of a map, or features.
        stride: pixels of the image per cell of the map; None where the map is already averaged away.
    """

    last: str
    channels: int
    stride: int | None = None


CUTS: dict[str, Cut] = {
    "conv2_x": Cut("layer1", channels=64, stride=4),
    "conv4_x": Cut("layer3", channels=256, stride=16),
    "pool": Cut("flatten", channels=512),
    "fc": Cut("fc", channels=1000),
}


def build_backbone(cut: str, weights: str = "none") -> nn.Sequential:
    """Build ResNet-18 up to a cut; the layers beyond it are discarded.

    Without weights all of ResNet-18 is initialised from torch's global generator; with them nothing is drawn.

    Args:
        cut: a row of `CUTS`.
        weights: as `load_weights` takes it.

    Returns:
        Layers under torchvision's names; `(N, 3, H, W)` to `(N, *output_shape(cut, (3, H, W)))`.

    Raises:
        ValueError: the weights cannot be loaded.
    """
    state = load_weights(weights)
    # The meta device spares the random numbers that the weights would only replace: 0.04 s instead of 0.11.
    with torch.device("cpu" if state is None else "meta"):
        network = resnet18(weights=None)
    network.add_module("flatten", nn.Flatten())
    kept = LAYERS[: LAYERS.index(CUTS[cut].last) + 1]
    backbone = nn.Sequential(OrderedDict((name, getattr(network, name)) for name in kept))
    if state is not None:
        copies = {name: state[name].clone() for name in backbone.state_dict()}
        backbone.load_state_dict(copies, assign=True)
    return backbone


def output_shape(cut: str, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the shape of a backbone's output for one image: `(C, H, W)` or `(F,)`."""
    channels, stride = CUTS[cut].channels, CUTS[cut].stride
    if stride is None:
        return (channels,)
    # Each of ResNet's strided layers is padded so that it halves and rounds up.
    return (channels, math.ceil(image_shape[1] / stride), math.ceil(image_shape[2] / stride))


def load_weights(weights: str) -> dict[str, Tensor] | None:
    """Load all of ResNet-18's weights, of which a backbone takes those up to its cut.

    Args:
        weights: "none" (random initialisation); "imagenet" (torchvision's IMAGENET1K_V1, downloaded into
            torch.hub's folder the first time); or the path of a torchvision ResNet-18 state_dict.

    Returns:
        None for "none"; else every entry of ResNet-18's state_dict, on the CPU. The dict is cached and may
        map the file: read it, do not write to it.

    Raises:
        ValueError: the download failed, or the file is not there, cannot be read without running code, or is
            not a ResNet-18 state_dict.
    """
    return None if weights == "none" else _load(weights, weights_signature(weights))


def weights_file(weights: str) -> Path | None:
    """Return the file of weights, as `load_weights` takes them; None for "none"."""
    if weights == "none":
        return None
    if weights == "imagenet":
        url = ResNet18_Weights.IMAGENET1K_V1.url
        return Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    return _expanded(weights).absolute()


def weights_signature(weights: str) -> tuple[int, ...]:
    """Return what changes when the file of weights may have changed; nothing if it cannot be read."""
    try:
        file = weights_file(weights)
        status = file.stat() if file else None
    except OSError:
        return ()
    if status is None:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _expanded(weights: str) -> Path:
    try:
        return Path(weights).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"weights={weights!r} has no home folder; set HOME, or give a path without ~"
        ) from error


@lru_cache(maxsize=1)  # a worker builds trial after trial from the same 47 MB
def _load(weights: str, signature: tuple[int, ...]) -> dict[str, Tensor]:
    """Load weights, again if the file may have changed."""
    return _checked(_download_imagenet() if weights == "imagenet" else _read_file(weights), weights)


def _download_imagenet() -> object:
    imagenet = ResNet18_Weights.IMAGENET1K_V1
    try:
        return imagenet.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    # Whatever urllib, http and socket raise, a wrong hash, or a broken copy in the cache (see _read_file).
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"weights='imagenet' cannot be had from {imagenet.url} by way of {torch.hub.get_dir()} "
            f"({type(error).__name__}: {reason}); with no network give "
            "--weights PATH, a torchvision ResNet-18 state_dict, or --weights none"
        ) from error


def _read_file(weights: str) -> object:
    path = _expanded(weights)
    try:
        with path.open("rb") as file:
            mappable = zipfile.is_zipfile(
                file
            )  # torch's own format since 1.6; the one before cannot be mapped
    except OSError as error:
        raise ValueError(
            f"weights={weights!r} cannot be read ({error.strerror or error}); "
            "give none, imagenet or the path of a torchvision ResNet-18 state_dict"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    # torch 2.15 has no exception of its own for a bad file: 4,500 damaged ones raised nine types of error,
    # AssertionError and struct.error among them.
    except Exception as error:
        raise ValueError(
            f"weights={weights!r} cannot be loaded ({type(error).__name__}): it is damaged, or holds other "
            "Python objects than tensors; give a file written by torch.save(resnet18.state_dict(), PATH)"
        ) from error


def _checked(state: object, weights: str) -> dict[str, Tensor]:
    """Return ResNet-18's state_dict; raise a ValueError that names the keys in which `state` is not one."""
    wanted = "give a torchvision ResNet-18 state_dict, its 1000-way fc included"
    if not isinstance(state, dict):
        raise ValueError(f"weights={weights!r} holds a {type(state).__name__}; {wanted}")
    with torch.device("meta"):  # shapes only: no memory, and no draw from the generator
        expected = resnet18(weights=None).state_dict()
    # Files from before torch 0.4.1 lack these counters. Only BatchNorm with momentum=None reads them: 0 does.
    counters = {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
    state = counters | state
    faults = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [str(name) for name in state if name not in expected],
        "of the wrong shape": [
            f"{name} {_shape(state[name])}, not {_shape(tensor)}"
            for name, tensor in expected.items()
            if name in state and _shape(state[name]) != _shape(tensor)
        ],
    }
    if any(faults.values()):
        found = ", ".join(
            f"{len(names)} {fault} ({_first(names)})" for fault, names in faults.items() if names
        )
        raise ValueError(f"weights={weights!r} does not fit ResNet-18: {found}; {wanted}")
    loaded = {name: state[name].to(tensor.dtype) for name, tensor in expected.items()}
    broken = [
        name
        for name, tensor in loaded.items()
        if not tensor.isfinite().all() or (name.endswith("running_var") and (tensor < 0).any())
    ]
    if broken:
        raise ValueError(
            f"weights={weights!r} has NaN, infinite values or negative variances ({len(broken)} in all: "
            f"{_first(broken)}); give weights of a training that did not diverge"
        )
    return loaded


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _first(names: list[str]) -> str:
    return "; ".join(names[:NAMES_SHOWN]) + ("; …" if len(names) > NAMES_SHOWN else "")
