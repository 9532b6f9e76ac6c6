"""What does a network read in each step? Tensors prepared once per node and shared by all its trials.

Three kinds, chosen by the config alone:

- ``features``: outputs of a frozen backbone, when nothing is augmented (trainables/features.py)
- ``normalised``: images as the network sees them, when nothing is augmented or enlarged
- ``images``: uint8, augmented, normalised and enlarged per batch on the device

On the CPU the tensors are memory-mapped from ``data_dir/prepared``, so all workers of a node share
one copy in the page cache; no worker decodes, normalises or computes a feature twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from models import ARCHITECTURES
from trainables.config import TrainConfig
from trainables.data import ImageData, expanded, load_split, split_sha256, split_validation
from trainables.decoded import allocate
from trainables.disk import is_full
from trainables.features import backbone_sha256, extractor
from trainables.image_files import printable
from trainables.levers import Levers
from trainables.pipeline import Pipeline

FORMAT_VERSION = 2  # of the files under data_dir/prepared
FLAT_HEADS = ("softmax", "twolayernn")  # read pixels in NCHW order
PREPARE_BATCH = 512  # images
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


def load_inputs(config: TrainConfig, data: ImageData, levers: Levers, data_dir: Path) -> Inputs:
    """Loads the inputs of a config onto the device, preparing them first where no trial has yet.

    Args:
        config: The trial.
        data: The decoded images.
        levers: The device's choices.
        data_dir: Where prepared tensors are cached, on this node.
    """
    wanted = _Prepared.of(config, data, levers)
    key = (wanted, config.refit)
    if key not in _loaded:  # a reused worker opens its inputs once and not once per trial
        if len(_loaded) >= LOADED_MAX:
            _loaded.pop(next(iter(_loaded)))
        _loaded[key] = _load(wanted, config, data, levers, expanded("--data-dir", data_dir))
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


def _load(wanted: _Prepared, config: TrainConfig, data: ImageData, levers: Levers, data_dir: Path) -> Inputs:
    images, labels = load_split(data, "train")
    train, val = split_validation(labels)
    split = split_sha256(train, val)
    order = np.concatenate([train, val])  # one array: a refit reads it whole
    name = hashlib.sha256(repr((wanted, split)).encode()).hexdigest()[:32]
    file = data_dir / "prepared" / f"{name}.npy"
    try:
        if not file.exists():  # otherwise the folder may be read-only
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_suffix(".lock")):  # one worker prepares, the others wait and read
                if not file.exists():
                    partial = file.with_suffix(".partial")
                    try:
                        _write(
                            partial, images, order, _preparation(config, data, levers), wanted.channels_last
                        )
                        partial.replace(file)
                    finally:
                        partial.unlink(missing_ok=True)
    except (OSError, NotImplementedError) as error:
        if is_full(error):
            raise
        raise ValueError(
            f"--data-dir={printable(data_dir)} cannot be written ({printable(error)}); give another"
        ) from error
    device = torch.device(levers.device)
    x = _read(file, wanted.channels_last).to(device)
    y = torch.from_numpy(labels[order]).to(device)
    count = len(order) if config.refit else len(train)
    return Inputs(wanted.kind, x[:count], y[:count], x[count:], y[count:], split)


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
) -> None:
    """Writes prepare(images[index]) as one array, a batch at a time; bfloat16 as the bits of int16."""
    out = None
    for start in range(0, len(index), PREPARE_BATCH):
        rows = index[start : start + PREPARE_BATCH]
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
