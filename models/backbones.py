"""torchvision's and timm's networks up to a cut, and their weights.

`resnet34` is torchvision's, `timm:NAME` timm's. ResNets (He et al. 2016, https://arxiv.org/abs/1512.03385)
can be cut as in table 1 of the paper, all others before their last linear layer.
"""

import copy
import importlib
import zipfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import get_model, get_model_weights, list_models

from tunefleet.cli import expanded
from tunefleet.models.checks import nearest

IN_CHANNELS = 3  # of the first convolution, whose weights come with the rest
TIMM = "timm:"  # before a name of timm's
UNSUITED = (  # of torchvision's: two outputs in train mode; no linear layer at the end
    *("googlenet", "inception_v3"),
    "squeezenet*",
)
LAYERS = (  # of a ResNet in forward's order; "flatten" is a function in torchvision and a layer here
    *("conv1", "bn1", "relu", "maxpool"),
    *("layer1", "layer2", "layer3", "layer4"),
    *("avgpool", "flatten", "fc"),
)
POOL = "pool"  # the cut that every network has
CUTS = {"conv2_x": "layer1", "conv4_x": "layer3", POOL: "flatten", "fc": "fc"}  # the last of LAYERS kept
NAMES_SHOWN = 3  # keys of a faulty file that an error lists, per kind of fault


def check_backbone(name: Any, cut: str) -> None:
    """Raise ValueError unless there is such a network and it has this cut, a row of `CUTS`."""
    if str(name).startswith(TIMM):
        _timm_cfg(name)
    elif name not in (names := _torchvision_names()):
        raise ValueError(f"backbone={name} is unknown{nearest(name, names)}, or timm:NAME")
    if cut != POOL and not _is_resnet(name):
        resnets = ", ".join(filter(_is_resnet, _torchvision_names()))
        raise ValueError(
            f"backbone={name} cannot be cut at {cut}, only at its pooled features; give one of {resnets}, or "
            "a space that takes pooled features, such as resnet_softmax"
        )


def _torchvision_names() -> list[str]:
    return list_models(module=torchvision.models, exclude=UNSUITED)


def _bare(name: str) -> str:
    return name.removeprefix(TIMM)


def _is_resnet(name: str) -> bool:
    return "resne" in name and not name.startswith(TIMM)  # resnext50_32x4d, too


def _timm_cfg(name: str) -> Any:
    """Return timm's description of a network's weights.

    Raises:
        ValueError: timm is not installed, or has no such network.
    """
    timm, known = _timm(name), _bare(name)
    try:
        cfg = timm.get_pretrained_cfg(known, allow_unregistered=False) if timm.is_model(known) else None
    except RuntimeError:  # the tag behind the dot is unknown
        cfg = None
    if cfg is None:
        close = timm.list_models(pretrained=True) if "." in known else timm.list_models()
        meant = nearest(known, close).partition(" Choose")[0]
        raise ValueError(f"backbone={name} is unknown{meant} timm.list_models() lists timm's names")
    return cfg


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"backbone={name} needs timm, which cannot be imported ({error}); install it: "
            "pip install -c constraints.txt -e '.[timm]'"
        ) from error


def training_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Return mean and std, fractions per channel, and pixels per side with which "imagenet" was trained."""
    if name.startswith(TIMM):
        cfg = _timm_cfg(name)
        return tuple(cfg.mean), tuple(cfg.std), cfg.input_size[-1]
    transforms = _imagenet(name).transforms()
    return tuple(transforms.mean), tuple(transforms.std), transforms.crop_size[0]


def _imagenet(name: str) -> Any:
    return next(iter(get_model_weights(name)))  # IMAGENET1K_V1 wherever there is one


def build_backbone(
    name: str, cut: str, image_shape: tuple[int, int, int], weights: str = "none"
) -> tuple[nn.Module, tuple[int, ...]]:
    """Build a network up to a cut, and find the shape of its output; the layers beyond it are discarded.

    Without weights all of the network is initialised from torch's global generator; with them nothing is
    drawn.

    Args:
        name: as `check_backbone` takes it.
        cut: a row of `CUTS`.
        image_shape: `(3, H, W)`.
        weights: as `load_network` takes it.

    Returns:
        Layers, and the shape of their output for one image: `(C, H', W')` or `(F,)`.

    Raises:
        ValueError: there is no such network, it does not take such images, or the weights cannot be loaded.
    """
    check_backbone(name, cut)
    network = load_network(name, weights)
    if _is_resnet(name):
        network.add_module("flatten", nn.Flatten())
        kept = LAYERS[: LAYERS.index(CUTS[cut]) + 1]
        backbone = nn.Sequential(OrderedDict((layer, getattr(network, layer)) for layer in kept))
    else:
        if name.startswith(TIMM):
            network.reset_classifier(0)
        else:
            network.set_submodule(_last(network), nn.Identity())
        # its name distinguishes it from another network of the same layers
        backbone = nn.Sequential(OrderedDict({name.replace(".", "_"): network}))
    tensors = {key: x.to("meta") for key, x in (*backbone.named_parameters(), *backbone.named_buffers())}
    try:
        with torch.no_grad():  # shapes only, a sixth of the time
            output = functional_call(backbone.eval(), tensors, torch.zeros(1, *image_shape, device="meta"))
            return backbone, tuple(output.shape[1:])
    except Exception as error:  # each network refuses a size in its own way
        reason, size = str(error).partition("\n")[0], "×".join(map(str, image_shape[1:]))
        raise ValueError(
            f"backbone={name} does not take images of {size} ({reason}); give --image-size "
            f"{training_of(name)[2]}"
        ) from error


def _create(name: str) -> Any:
    return _timm(name).create_model(_bare(name)) if name.startswith(TIMM) else get_model(name, weights=None)


def _last(network: nn.Module) -> str:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


def load_network(name: str, weights: str) -> Any:
    """Build a whole network.

    Args:
        name: the network, as `check_backbone` takes it.
        weights: "none" (random, from torch's global generator); "imagenet" (torchvision's or timm's,
            downloaded into their folder the first time); or the path of a state_dict of the whole network.

    Raises:
        ValueError: the download failed, or the file is not there, cannot be read without running code, or
            does not fit the network.
    """
    if weights == "none":
        return _create(name)
    return copy.deepcopy(_load(name, weights, weights_signature(weights)))


def weights_file(name: str | None, weights: str) -> Path | None:
    """Return the file of weights, as `load_network` takes them; None where there is none that we know of."""
    if weights == "none":
        return None
    if weights == "imagenet":
        if name not in _torchvision_names():
            return None
        return Path(torch.hub.get_dir(), "checkpoints", Path(_imagenet(name).url).name)
    return expanded("weights", weights).absolute()


def weights_signature(weights: str) -> tuple[int, ...]:
    """Return what changes when a file of weights may have changed; nothing if it cannot be read."""
    try:
        file = weights_file(None, weights)
        status = file.stat() if file else None
    except OSError:
        return ()
    if status is None:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=1)  # a worker builds trial after trial from the same 47 MB
def _load(name: str, weights: str, signature: tuple[int, ...]) -> nn.Module:
    """Return a network whose weights may map their file; again from it if it may have changed."""
    with torch.random.fork_rng(devices=[]):  # a head's numbers do not depend on whether this is cached
        state = _download(name) if weights == "imagenet" else _read_file(name, weights)
        network: nn.Module = _create(name)
    network.load_state_dict(_checked(state, network.state_dict(), name, weights), assign=True)
    return network


def _download(name: str) -> object:
    source = "timm's hub"
    try:
        if name.startswith(TIMM):
            return _timm(name).create_model(_bare(name), pretrained=True).state_dict()
        imagenet = _imagenet(name)
        source = f"{imagenet.url} by way of {torch.hub.get_dir()}"
        return imagenet.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    # Whatever urllib, http and socket raise, a wrong hash, or a broken copy in the cache (see _read_file).
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"weights='imagenet' cannot be had from {source} ({type(error).__name__}: {reason}); with no "
            f"network give --weights PATH, {_wanted(name)}, or --weights none"
        ) from error


def _read_file(name: str, weights: str) -> object:
    path = expanded("weights", weights)
    try:
        with path.open("rb") as file:
            mappable = zipfile.is_zipfile(
                file
            )  # torch's own format since 1.6; the one before cannot be mapped
    except OSError as error:
        raise ValueError(
            f"weights={weights!r} cannot be read ({error.strerror or error}); "
            f"give none, imagenet or the path of {_wanted(name)}"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    # torch 2.15 has no exception of its own for a bad file: 4,500 damaged ones raised nine types of error,
    # AssertionError and struct.error among them.
    except Exception as error:
        raise ValueError(
            f"weights={weights!r} cannot be loaded ({type(error).__name__}): it is damaged, or holds other "
            "Python objects than tensors; give a file written by "
            f"torch.save({_bare(name)}.state_dict(), PATH)"
        ) from error


def _wanted(name: str) -> str:
    return f"a state_dict of {'timm' if name.startswith(TIMM) else 'torchvision'}'s {_bare(name)}, whole"


def _checked(state: object, expected: dict[str, Tensor], network: str, weights: str) -> dict[str, Tensor]:
    """Return a network's state_dict; raise a ValueError that names the keys in which `state` is not one."""
    wanted = f"give {_wanted(network)}"
    if not isinstance(state, dict):
        raise ValueError(f"weights={weights!r} holds a {type(state).__name__}; {wanted}")
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
        raise ValueError(f"weights={weights!r} does not fit {_bare(network)}: {found}; {wanted}")
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
