"""The cache of decoded images: lock, whole folders, statistics."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import Timeout

from tunefleet.files import holding
from tunefleet.trainables.data import FORMAT_VERSION, SPLITS, ImageData, Progress, load_split

KEPT = "kept"  # in a partial folder: what becomes the decoded folder
STEP_BYTES = 1 << 18  # hashed and summed at a time, within the processor's cache


@contextlib.contextmanager
def locked(data_dir: Path, show: Progress) -> Iterator[None]:
    """Context manager: hold the lock on `data_dir/decoded`."""
    data_dir.mkdir(parents=True, exist_ok=True)
    file = data_dir / "prepare.lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(holding(file, 0))
        except Timeout:
            show("waiting for another process", 0, 0)
            stack.enter_context(holding(file))
        yield


@contextlib.contextmanager
def partial_folder(data_dir: Path) -> Iterator[Path]:
    """Context manager: a folder of temporary files, with an empty folder KEPT. The caller holds the lock.

    It is removed at the end, as is one that a killed process has left.
    """
    decoded = data_dir / "decoded"
    decoded.mkdir(exist_ok=True)
    for leftover in decoded.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = decoded / "new.partial"
    (partial / KEPT).mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def keep(partial: Path, folder: Path, data: ImageData) -> ImageData:
    """Move the images in a partial folder to their place in the cache."""
    data = replace(data, folder=str(folder))
    (partial / KEPT / "data.json").write_text(json.dumps(data.to_dict(), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    (partial / KEPT).replace(folder)
    return data


def folder_of(data_dir: Path, content: str, image_size: int) -> Path:
    """Return the folder of decoded images."""
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, content, image_size]).encode()).hexdigest()[:32]
    return data_dir / "decoded" / key


def cached(folder: Path, name: str) -> ImageData | None:
    """Return the images decoded in `folder`; None if there are none, or they are damaged."""
    try:
        data = ImageData.from_dict(json.loads((folder / "data.json").read_text()))
        data = replace(data, name=name, folder=str(folder))  # both may have changed since
        arrays = [array for split in SPLITS for array in load_split(data, split)]
    except (OSError, EOFError, ValueError, TypeError):
        return None
    train, test = data.train_count, data.test_count
    shapes = [(train, *data.image_shape), (train,), (test, *data.image_shape), (test,)]
    return data if [array.shape for array in arrays] == shapes else None


def describe(
    folder: Path, name: str, classes: tuple[str, ...], notes: tuple[str, ...] = (), val_count: int = 0
) -> ImageData:
    """Count, hash and measure the images in `folder`."""
    arrays = {
        kind: np.load(folder / f"{kind}.npy", mmap_mode="r")
        for kind in ("train_images", "train_labels", "test_images", "test_labels")
    }
    train = arrays["train_images"]
    mean, std = _statistics(train)
    return ImageData(
        name=name,
        folder=str(folder),
        classes=classes,
        image_shape=(3, train.shape[2], train.shape[3]),
        train_count=len(train),
        test_count=len(arrays["test_images"]),
        mean=mean,
        std=std,
        sha256=_sha256(classes, list(arrays.values())),
        notes=notes,
        format_version=FORMAT_VERSION,
        val_count=val_count,
    )


def _sha256(classes: tuple[str, ...], arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps([classes, [array.shape for array in arrays]]).encode())
    for array in arrays:
        for rows in _steps(array):
            digest.update(array[rows].data)
    return digest.hexdigest()


def _statistics(images: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation per channel of uint8 images (N, 3, H, W), in 0..1."""
    total = np.zeros(3, dtype=np.int64)  # whole numbers: the same in any order and on any machine
    squares = np.zeros(3, dtype=np.int64)
    for rows in _steps(images):
        part = images[rows].astype(np.int32)
        total += part.sum(axis=(0, 2, 3), dtype=np.int64)
        squares += np.multiply(part, part, out=part).sum(axis=(0, 2, 3), dtype=np.int64)
    count = images.size // 3
    mean = total / count
    variance = squares / count - mean**2
    # Exactly 0 if all pixels are equal, where rounding may leave a little more or less.
    constant = [int(t) ** 2 == count * int(s) for t, s in zip(total, squares, strict=True)]
    std = np.sqrt(np.where(constant, 0, np.maximum(variance, 0)))
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _steps(array: np.ndarray) -> Iterator[slice]:
    rows = max(1, STEP_BYTES // (array.nbytes // len(array)))
    return (slice(start, start + rows) for start in range(0, len(array), rows))
