"""Tensors that trials read, prepared once per node and shared by all its trials.

Three kinds, chosen by the config alone:

- ``features``: outputs of a frozen backbone, when nothing is augmented
- ``normalised``: images as the network sees them, when nothing is augmented or enlarged
- ``images``: uint8, augmented, normalised and enlarged per batch on the device

On the CPU the tensors are memory-mapped from ``data_dir/prepared``, so all workers of a node share
one copy in the page cache; no worker decodes, normalises or computes a feature twice.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tunefleet.cli import expanded, printable
from tunefleet.files import holding, is_full
from tunefleet.models.backbones import weights_signature
from tunefleet.models.space import TrainConfig
from tunefleet.trainables.data import (
    ImageData,
    Progress,
    allocate,
    load_split,
    split_sha256,
    split_validation,
)
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.pipeline import Pipeline

FORMAT_VERSION = 3  # of the files under data_dir/prepared
PREPARE_BATCH = 512  # images, on a CPU
GPU_PREPARE_BYTES = 128 * 2**20  # of float32 images, as stored, in one batch where there is a GPU
SAMPLE_IMAGES = 256  # whose inputs are prepared for a forecast
LOADED_MAX = 2  # inputs that a worker keeps open: a study has one kind, or two where it may augment


@dataclass(frozen=True)
class Inputs:
    """The training and validation tensors of a trial, on its device or, where a GPU has no room, on the host.

    ``train_x`` and ``val_x`` are uint8 images ``(N, 3, H, W)``, normalised images of the same shape
    or features ``(N, …)``; labels are int64 ``(N,)``. With ``refit`` there are no validation images.
    """

    kind: str
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    split_sha256: str


def kind_of(config: TrainConfig, data: ImageData) -> str:
    """Return which kind of inputs a config reads: features, normalised or images."""
    augments = getattr(config.space.run, "augments", None)  # of a TrainingRun of a person's own
    if config.augment != "none" or (augments and augments()):
        return "images"
    if config.space.feature_cache:
        return "features"
    return "normalised" if config.image_size == data.image_shape[1] else "images"


def load_inputs(
    config: TrainConfig,
    data: ImageData,
    settings: DeviceSettings,
    data_dir: Path,
    progress: Progress | None = None,
) -> Inputs:
    """Load the inputs of a config, preparing them first where no trial has yet.

    Args:
        config: The trial.
        data: The decoded images.
        settings: The device's settings.
        data_dir: Where prepared tensors are cached, on this node.
        progress: Called with the phase, images prepared and images in all.
    """
    images, labels, order, train_count, split = _training_split(data)
    preparation = _Preparation(config, data, settings)
    key = (preparation.file(data_dir, split), config.refit)
    if key not in _loaded:  # a reused worker opens its inputs once and not once per trial
        if len(_loaded) >= LOADED_MAX:
            _loaded.pop(next(iter(_loaded)))
        x = preparation.mapped(key[0], images, order, progress).to(settings.inputs_device)
        y = torch.from_numpy(labels).to(settings.inputs_device)
        count = len(order) if config.refit else train_count
        _loaded[key] = Inputs(preparation.kind, x[:count], y[:count], x[count:], y[count:], split)
    return _loaded[key]


def mapped_tensor(array: np.ndarray) -> Tensor:
    """Return a read-only array as a tensor; writing to it ends the process.

    Linux refuses a copy-on-write map of a file that is larger than memory and swap together.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of arrays that it cannot write
        return torch.from_numpy(array)


def split_counts(data: ImageData) -> tuple[int, int, str]:
    """Return how many images train and validate, and the split's hash."""
    _, _, order, train_count, split = _training_split(data)
    return train_count, len(order) - train_count, split


def is_prepared(config: TrainConfig, data: ImageData, settings: DeviceSettings, data_dir: Path) -> bool:
    """Return whether the inputs of a config are there already; the arguments are load_inputs's."""
    return _Preparation(config, data, settings).file(data_dir, split_counts(data)[2]).exists()


def sample_inputs(
    config: TrainConfig, data: ImageData, settings: DeviceSettings, data_dir: Path, count: int
) -> tuple[Inputs, float]:
    """Prepare inputs to time training on, a few images again and again, without a file.

    The arguments are load_inputs's, and how many training images are wanted.

    Returns:
        The inputs, and the seconds that preparing all of them would take; 0 where they are prepared.
    """
    images, labels, order, train_count, split = _training_split(data)
    preparation = _Preparation(config, data, settings)
    count = min(count, train_count)
    val_count = max(1, count * (len(order) - train_count) // train_count)
    rows = order[:SAMPLE_IMAGES]
    prepare = preparation.function()
    prepare(torch.from_numpy(images[rows[:1]]))  # initialises what is initialised once
    began = time.perf_counter()
    prepared = prepare(torch.from_numpy(images[rows])).to(settings.inputs_device)
    seconds = (time.perf_counter() - began) * len(order) / len(rows)
    repeated = torch.arange(count + val_count, device=prepared.device) % len(rows)
    x, y = prepared[repeated], torch.from_numpy(labels[: len(rows)]).to(prepared.device)[repeated]
    if x.dim() == 4 and preparation.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if preparation.file(data_dir, split).exists():
        seconds = 0.0
    return Inputs(preparation.kind, x[:count], y[:count], x[count:], y[count:], split), seconds


def cached_features(
    config: TrainConfig, data: ImageData, settings: DeviceSettings, data_dir: Path, images: np.ndarray
) -> Tensor:
    """Return a frozen backbone's features of test images, on the CPU; computed once per node.

    The arguments are load_inputs's, and uint8 images ``(N, 3, H, W)``, which only trainables/evaluate.py has.
    """
    preparation = _Preparation(config, data, settings)
    return preparation.mapped(preparation.file(data_dir, "test"), images, np.arange(len(images)))


def build_model(config: TrainConfig, data: ImageData) -> nn.Module:
    """Build a config's network, initialised from its seed whatever ran before in this process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = config.space.network(len(data.classes), (3, config.image_size, config.image_size), config)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{config.space.name} returns a {type(model).__name__}; return an nn.Module")
        if getattr(model, "frozen", False) and not isinstance(getattr(model, "backbone", None), nn.Module):
            raise ValueError(
                f"{config.space.name} is frozen and has no backbone; call the part that is not trained "
                "backbone, or call frozen otherwise"
            )
        if any(map(is_lazy, model.parameters())):  # such layers get their sizes from a first batch
            with torch.no_grad():
                model.eval()(torch.zeros(2, 3, config.image_size, config.image_size))
        return model.train()


def backbone_sha256(config: TrainConfig, data: ImageData) -> str:
    """Return a hash of a config's backbone as built: modules, names and tensors, but nothing of the head."""
    space, model = config.space, json.dumps(config.model, sort_keys=True)
    sources = space.source.sha256 if space.source else ""
    key = (space.name, sources, model, config.weights, weights_signature(config.weights), config.seed)
    if key not in _hashes:  # building and hashing takes 0.2 s
        _hashes[key] = sources + _module_sha256(build_model(config, data).get_submodule("backbone"))
    return _hashes[key]


def _module_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _training_split(data: ImageData) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, str]:
    """Return all training images; labels and order, those that validate last; how many train; a hash."""
    images, labels = load_split(data, "train")
    if data.val_count:
        train, val = np.split(np.arange(len(labels)), [len(labels) - data.val_count])
    else:
        train, val = split_validation(labels)
    order = np.concatenate([train, val])  # one array: a refit reads it whole
    return images, labels[order], order, len(train), split_sha256(train, val)


_loaded: dict[tuple[Path, bool], Inputs] = {}
_hashes: dict[tuple[Any, ...], str] = {}


class _Preparation:
    """How a config's inputs are made of images."""

    def __init__(self, config: TrainConfig, data: ImageData, settings: DeviceSettings) -> None:
        settings = settings.of(config.space)
        self.config, self.data, self.settings = config, data, settings
        self.kind = kind_of(config, data)
        self.channels_last = settings.channels_last
        self.pipeline = Pipeline.of(config, data, settings)
        # All that prepared tensors depend on, and nothing else: trials that differ elsewhere share them.
        self.key: list[Any] = [FORMAT_VERSION, self.kind, data.sha256, settings.device, self.channels_last]
        if self.kind != "images":
            self.key += [self.pipeline, settings.dtype]
        if self.kind == "features":
            self.key.append(backbone_sha256(config, data))

    def file(self, data_dir: Path, split: str) -> Path:
        """Return the file of prepared images; split is a hash, or "test"."""
        name = hashlib.sha256(repr((self.key, split)).encode()).hexdigest()[:32]
        return expanded("--data-dir", data_dir) / "prepared" / f"{name}.npy"

    def mapped(
        self, file: Path, images: np.ndarray, order: np.ndarray, progress: Progress | None = None
    ) -> Tensor:
        """Map prepared images, in an order, from their file; one process writes it, others wait for it."""
        if not file.exists():  # else its folder may be read-only
            partial = file.with_suffix(".partial")
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with holding(file.with_suffix(".lock")):
                    if not file.exists():
                        try:
                            self._write(partial, images, order, progress)
                            partial.replace(file)
                        finally:
                            partial.unlink(missing_ok=True)
            except OSError as error:
                if is_full(error):
                    raise
                shown = printable(str(file.parents[1]))
                raise ValueError(
                    f"--data-dir={shown} cannot be written ({printable(str(error))}); give another"
                ) from error
        tensor = mapped_tensor(np.load(file, mmap_mode="r"))
        if tensor.dtype == torch.int16:
            tensor = tensor.view(torch.bfloat16)
        return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 and self.channels_last else tensor

    def function(self) -> Callable[[Tensor], Tensor]:
        """Return a function from uint8 images ``(N, 3, H, W)`` to inputs."""
        if self.kind == "features":
            return self._extractor()
        return self.pipeline if self.kind == "normalised" else lambda images: images

    def _extractor(self) -> Callable[[Tensor], Tensor]:
        settings, pipeline = self.settings, self.pipeline
        model = build_model(self.config, self.data).to(settings.device).eval()
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)

        def extract(images: Tensor) -> Tensor:
            with torch.inference_mode(), settings.autocast():
                features: Tensor = model.get_submodule("backbone")(pipeline(images.to(settings.device)))
                return features.to(settings.dtype).cpu()

        return extract

    def _write(self, file: Path, images: np.ndarray, order: np.ndarray, progress: Progress | None) -> None:
        """Write prepared images as one array, a batch at a time; bfloat16 as the bits of int16."""
        prepare, out, size = self.function(), None, PREPARE_BATCH
        if torch.cuda.is_available():  # large enough to keep a GPU busy
            size = max(size, GPU_PREPARE_BYTES // (4 * images[0].size))
        for start in range(0, len(order), size):
            if progress:
                progress("computing", start, len(order))
            batch = prepare(torch.from_numpy(images[order[start : start + size]]))
            if batch.dim() == 4 and self.channels_last:
                batch = batch.permute(0, 2, 3, 1)
            if batch.dtype == torch.bfloat16:
                batch = batch.contiguous().view(torch.int16)
            if out is None:
                out = allocate(file, batch.numpy().dtype, (len(order), *batch.shape[1:]))
            out[start : start + len(batch)] = batch.numpy()
