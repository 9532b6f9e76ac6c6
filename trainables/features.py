"""What does a frozen backbone say of each image? Computed once per node and shared by all trials."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunefleet.models import ARCHITECTURES
from tunefleet.models.building import Classifier, build
from tunefleet.models.resnet import weights_signature
from tunefleet.trainables.config import TrainConfig
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.levers import Levers
from tunefleet.trainables.pipeline import Pipeline


def extractor(
    config: TrainConfig, data: ImageData, levers: Levers, pipeline: Pipeline
) -> Callable[[Tensor], Tensor]:
    """Returns a function from uint8 images ``(N, 3, H, W)`` to features ``(N, …)`` on the CPU."""
    model = build_model(config, data).to(levers.device).eval()
    backbone = (
        model.to(memory_format=torch.channels_last).backbone if levers.channels_last else model.backbone
    )

    def extract(images: Tensor) -> Tensor:
        enabled = levers.precision == "bf16"
        with torch.inference_mode(), torch.autocast(levers.device, levers.dtype, enabled=enabled):
            return backbone(pipeline(images.to(levers.device))).to(levers.dtype).cpu()

    return extract


def build_model(config: TrainConfig, data: ImageData) -> Classifier:
    """Builds a config's network, initialised from its seed whatever ran before in this process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(
            config.architecture,
            len(data.classes),
            (3, config.image_size, config.image_size),
            hidden=config.hidden,
            kernel_size=config.kernel_size,
            weights=config.weights,
        )


def backbone_sha256(config: TrainConfig, data: ImageData) -> str:
    """Return a hash of a config's backbone as built: modules, names and tensors, but nothing of the head."""
    seed = config.seed if config.weights == "none" else None
    what = (ARCHITECTURES[config.architecture].cut, config.weights, weights_signature(config.weights), seed)
    if what not in _hashes:  # building and hashing takes 0.2 s
        _hashes[what] = _sha256(build_model(config, data).backbone)
    return _hashes[what]


_hashes: dict[tuple[Any, ...], str] = {}


def _sha256(module: nn.Module) -> str:
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
