"""What does a network read in each step? Tensors prepared once per node and shared by all its trials.

Three kinds, chosen by the config alone:

- ``features``: outputs of a frozen backbone, when nothing is augmented (trainables/features.py)
- ``normalised``: images as the network sees them, when nothing is augmented or enlarged
- ``images``: uint8, augmented, normalised and enlarged per batch on the device

On the CPU the tensors are memory-mapped from ``data_dir/prepared``, so all workers of a node share
one copy in the page cache; no worker decodes, normalises or computes a feature twice.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from tunefleet.cli import printable
from tunefleet.files import is_full
from tunefleet.models import ARCHITECTURES
from tunefleet.trainables.config import TrainConfig
from tunefleet.trainables.data import (
    ImageData,
    Progress,
    allocate,
    expanded,
    load_split,
    split_sha256,
    split_validation,
)
from tunefleet.trainables.features import backbone_sha256, extractor
from tunefleet.trainables.levers import Levers
from tunefleet.trainables.pipeline import Pipeline

FORMAT_VERSION = 2  # of the files under data_dir/prepared
FLAT_HEADS = ("softmax", "twolayernn")  # read pixels in NCHW order
PREPARE_BATCH = 512  # images, on a CPU
GPU_PREPARE_BYTES = 128 * 2**20  # of float32 images, as stored, in one batch where there is a GPU
SAMPLE_IMAGES = 256  # whose inputs are prepared for a forecast
LOADED_MAX = 2  # inputs that a worker keeps open: a study has one kind, or two where it may augment


@dataclass(frozen=True)
class Inputs:
    """The training and validation tensors of a trial, on its device.

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
    """Returns which kind of inputs a config reads: features, normalised or images."""
    if config.augment != "none":
        return "images"
    if ARCHITECTURES[config.architecture].frozen:
        return "features"
    return "normalised" if config.image_size == data.image_shape[1] else "images"


def load_inputs(
    config: TrainConfig,
    data: ImageData,
    levers: Levers,
    data_dir: Path,
    progress: Progress | None = None,
) -> Inputs:
    """Loads the inputs of a config onto the device, preparing them first where no trial has yet.

    Args:
        config: The trial.
        data: The decoded images.
        levers: The device's choices.
        data_dir: Where prepared tensors are cached, on this node.
        progress: Called with what is done, images prepared and images in all.
    """
    wanted = _Prepared.of(config, data, levers)
    key = (wanted, config.refit)
    if key not in _loaded:  # a reused worker opens its inputs once and not once per trial
        if len(_loaded) >= LOADED_MAX:
            _loaded.pop(next(iter(_loaded)))
        _loaded[key] = _load(wanted, config, data, levers, Path(data_dir), progress)
    return _loaded[key]


@dataclass(frozen=True)
class _Prepared:
    """All that prepared tensors depend on, and nothing else: trials that differ elsewhere share them."""

    kind: str
    data_sha256: str
    pipeline: Pipeline | None  # None: uint8 images, which every pipeline reads
    dtype: torch.dtype | None
    device: str
    channels_last: bool
    backbone: str | None  # backbone_sha256 of features
    version: int = FORMAT_VERSION

    @classmethod
    def of(cls, config: TrainConfig, data: ImageData, levers: Levers) -> _Prepared:
        row = ARCHITECTURES[config.architecture]
        kind = kind_of(config, data)
        as_stored = kind == "images"
        flat = row.cut is None and row.head in FLAT_HEADS
        return cls(
            kind=kind,
            data_sha256=data.sha256,
            pipeline=None if as_stored else Pipeline.of(config, data, levers),
            dtype=None if as_stored else levers.dtype,
            device=levers.device,
            channels_last=levers.channels_last and not flat,
            backbone=backbone_sha256(config, data) if kind == "features" else None,
        )


_loaded: dict[tuple[_Prepared, bool], Inputs] = {}


def _load(
    wanted: _Prepared,
    config: TrainConfig,
    data: ImageData,
    levers: Levers,
    data_dir: Path,
    progress: Progress | None,
) -> Inputs:
    images, labels = load_split(data, "train")
    train, val = split_validation(labels)
    split = split_sha256(train, val)
    order = np.concatenate([train, val])  # one array: a refit reads it whole
    file = _file(data_dir, wanted, split)
    preparation = functools.partial(_preparation, config, data, levers)
    _prepare_file(file, images, order, preparation, wanted.channels_last, progress)
    device = torch.device(levers.device)
    x = _read(file, wanted.channels_last).to(device)
    y = torch.from_numpy(labels[order]).to(device)
    count = len(order) if config.refit else len(train)
    return Inputs(wanted.kind, x[:count], y[:count], x[count:], y[count:], split)


def split_counts(data: ImageData) -> tuple[int, int, str]:
    """Returns how many images train and validate, and the split's hash."""
    train, val = split_validation(load_split(data, "train")[1])
    return len(train), len(val), split_sha256(train, val)


def sample_inputs(
    config: TrainConfig, data: ImageData, levers: Levers, data_dir: Path, count: int
) -> tuple[Inputs, float]:
    """Prepares inputs to time training on, and keeps them nowhere: a few images again and again.

    Args:
        config: The trial.
        data: The decoded images.
        levers: The device's choices.
        data_dir: Where prepared tensors are cached, on this node.
        count: Training images wanted; there are no more than the data has.

    Returns:
        The inputs, and the seconds that preparing all of them would take; 0 where they are there.
    """
    images, labels = load_split(data, "train")
    train, val = split_validation(labels)
    order, split = np.concatenate([train, val]), split_sha256(train, val)
    wanted = _Prepared.of(config, data, levers)
    count = min(count, len(train))
    val_count = max(1, count * len(val) // len(train))
    rows = order[:SAMPLE_IMAGES]
    prepare = _preparation(config, data, levers)
    prepare(torch.from_numpy(images[rows[:1]]))  # what is initialised once
    began = time.perf_counter()
    some = prepare(torch.from_numpy(images[rows])).to(levers.device)
    seconds = (time.perf_counter() - began) * len(order) / len(rows)
    again = torch.arange(count + val_count, device=some.device) % len(rows)
    x, y = some[again], torch.from_numpy(labels[rows]).to(levers.device)[again]
    if x.dim() == 4 and wanted.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if _file(data_dir, wanted, split).exists():
        seconds = 0.0
    return Inputs(wanted.kind, x[:count], y[:count], x[count:], y[count:], split), seconds


def cached_features(
    config: TrainConfig, data: ImageData, levers: Levers, data_dir: Path, images: np.ndarray
) -> Tensor:
    """Returns a frozen backbone's features of test images, on the CPU; computed once per node.

    Args:
        config: The trial.
        data: The decoded images.
        levers: The device's choices.
        data_dir: Where prepared tensors are cached, on this node.
        images: uint8 ``(N, 3, H, W)``; only trainables/evaluate.py has those.
    """
    wanted = _Prepared.of(config, data, levers)
    assert wanted.kind == "features"
    file = _file(data_dir, wanted, "test")
    preparation = functools.partial(_preparation, config, data, levers)
    _prepare_file(file, images, np.arange(len(images)), preparation, wanted.channels_last)
    return _read(file, wanted.channels_last)


def _file(data_dir: Path, wanted: _Prepared, split: str) -> Path:
    name = hashlib.sha256(repr((wanted, split)).encode()).hexdigest()[:32]
    return expanded("--data-dir", data_dir) / "prepared" / f"{name}.npy"


def _prepare_file(
    file: Path,
    images: np.ndarray,
    order: np.ndarray,
    preparation: Callable[[], Callable[[Tensor], Tensor]],
    channels_last: bool,
    progress: Progress | None = None,
) -> None:
    """Writes prepared images into a file unless it is there; one process does, others wait for it."""
    if file.exists():  # then its folder may be read-only
        return
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if file.exists():
                return
            try:
                _write(partial, images, order, preparation(), channels_last, progress)
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
    except (OSError, NotImplementedError) as error:  # the latter from a file system without locks
        if is_full(error):
            raise
        shown = printable(str(file.parents[1]))
        raise ValueError(
            f"--data-dir={shown} cannot be written ({printable(str(error))}); give another"
        ) from error


def _preparation(config: TrainConfig, data: ImageData, levers: Levers) -> Callable[[Tensor], Tensor]:
    kind = kind_of(config, data)
    if kind == "images":
        return lambda images: images
    pipeline = Pipeline.of(config, data, levers)
    return pipeline if kind == "normalised" else extractor(config, data, levers, pipeline)


def _write(
    file: Path,
    images: np.ndarray,
    index: np.ndarray,
    prepare: Callable[[Tensor], Tensor],
    channels_last: bool,
    progress: Progress | None,
) -> None:
    """Writes prepare(images[index]) as one array, a batch at a time; bfloat16 as the bits of int16."""
    out, size = None, PREPARE_BATCH
    if torch.cuda.is_available():  # large enough to keep a GPU busy
        size = max(size, GPU_PREPARE_BYTES // (4 * images[0].size))
    for start in range(0, len(index), size):
        if progress:
            progress("computing", start, len(index))
        rows = index[start : start + size]
        batch = prepare(torch.from_numpy(images[rows]))
        if batch.dim() == 4 and channels_last:
            batch = batch.permute(0, 2, 3, 1)
        if batch.dtype == torch.bfloat16:
            batch = batch.contiguous().view(torch.int16)
        if out is None:
            dtype = batch.numpy().dtype
            shape = (len(index), *batch.shape[1:])
            out = allocate(file, dtype, shape)
        out[start : start + len(rows)] = batch.numpy()


def _read(file: Path, channels_last: bool) -> Tensor:
    # "c" is copy-on-write: shared pages like "r", without torch's warning about read-only arrays
    tensor = torch.from_numpy(np.load(file, mmap_mode="c"))
    if tensor.dtype == torch.int16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 and channels_last else tensor
