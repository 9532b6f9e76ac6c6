"""What does a frozen backbone say of each image? Computed once per node and shared by all trials."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models import Classifier, build
from trainables.config import TrainConfig
from trainables.data import ImageData
from trainables.levers import Levers
from trainables.pipeline import Pipeline


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


def weights_sha256(weights: str) -> str:
    """Returns what identifies weights: their name, or a file's content."""
    file = Path(weights)
    if weights in ("none", "imagenet") or not file.is_file():
        return weights
    return _file_sha256(str(file.resolve()), file.stat().st_mtime_ns)


@functools.lru_cache
def _file_sha256(file: str, mtime_ns: int) -> str:
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
