"""A decoded data set: its description, arrays and splits, and the cache that keeps it.

trainables/preparation.py makes it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import Timeout

from tunefleet.cli import megabytes, printable
from tunefleet.files import holding
from tunefleet.trainables.decoding import SourceError

BUILT_IN = ("cifar10", "digits")
SPLIT_SEED = 0  # draws the validation images, and the test images of a source that has none; never varied
VALIDATION_FRACTION = 0.1  # of the training images; of few images more, for 100 cannot tell 96 from 98 %
VALIDATION_ENOUGH = 1000  # images: 1 % is then about one and a half standard deviations at 95 %
VALIDATION_FRACTION_MAX = 0.3
TEST_FRACTION = 0.2  # of a source that has no test images
FORMAT_VERSION = 2  # of the decoded folder; raise it when the same source would be decoded differently
CHANGES = {2: "image files are recognized by content and rotated by their EXIF orientation"}  # per version
KEPT = "kept"  # in a partial folder: what becomes the decoded folder
STEP_BYTES = 1 << 18  # summed at a time, within the processor's cache

Progress = Callable[[str, int, int], None]  # phase, items done, items in all; 0 of 0 without a count
Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


@dataclass(frozen=True)
class ImageData:
    """One decoded data set."""

    name: str  # "cifar10", "digits" or the given path's last component
    folder: str  # absolute: train_images.npy, train_labels.npy, test_images.npy, test_labels.npy, data.json
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]  # as stored: (3, H, W), H = W
    train_count: int
    test_count: int
    mean: tuple[float, float, float]  # per channel over all training images, 0..1
    std: tuple[float, float, float]
    sha256: str  # of the decoded arrays and the class names: the same from a folder and from an archive of it
    notes: tuple[str, ...] = ()  # for the user: files skipped, images rotated
    format_version: int = 1  # FORMAT_VERSION of the code that decoded them
    val_count: int = 0  # of the training images, how many at the end validate; 0: they are drawn

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ImageData":
        """Reverse `asdict`, also after JSON has made lists of the tuples."""
        return cls(**{name: _hashable(value) for name, value in fields.items()})


def _data_dir() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with contextlib.suppress(RuntimeError):  # no home folder: reported when the folder is used
        cache = cache.expanduser()
    return cache / "tunefleet"


DATA_DIR = _data_dir()  # default of --data-dir


def check_sha256(data: ImageData, source: str, sha256: str, format_version: int) -> None:
    """Compare images with those of a study.

    Args:
        data: The images now.
        source: --data.
        sha256: The study's ``data_sha256``.
        format_version: The ``format_version`` in the study's ``data``; 1 if there is none.

    Raises:
        ValueError: They differ; the message says whether this version may decode the same files differently.
    """
    if data.sha256 == sha256:
        return
    changes = "; ".join(text for version, text in CHANGES.items() if version > format_version)
    why = "the files have changed; restore them"
    if changes:
        why = (
            f"the files have changed, or this version decodes them differently ({changes}); restore them, or "
            "resume with the commit in study.json"
        )
    raise ValueError(
        f"--data={printable(source)} is not what the study began with (sha256 {data.sha256[:12]}, "
        f"was {sha256[:12]}): {why}"
    )


def load_split(data: ImageData, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Map a split into memory, read-only: images uint8 (N, 3, H, W) and labels int64 (N,).

    Only trainables/evaluate.py may ask for "test".
    """
    folder = Path(data.folder)
    images = np.load(folder / f"{split}_images.npy", mmap_mode="r")
    return images, np.load(folder / f"{split}_labels.npy", mmap_mode="r")


def allocate(file: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """Create a .npy file and reserve its disk space; writing to a map on a full disk kills the process.

    Raises:
        OSError: The disk is too full.
    """
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    with file.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, array.offset + array.nbytes)
    return array


def split_validation(
    labels: np.ndarray, fraction: float | None = None, seed: int = SPLIT_SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Split each class of the labels (N,) by `fraction`, into sorted int64 indices: train and validation.

    By default a tenth; where that is too few to choose by, up to VALIDATION_ENOUGH images.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or a class has fewer than two images.
    """
    if fraction is None:
        enough = min(VALIDATION_ENOUGH / max(len(labels), 1), VALIDATION_FRACTION_MAX)
        fraction = max(VALIDATION_FRACTION, enough)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} is impossible; give one above 0 and below 1")
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise ValueError(f"class {label} has one image only; each side of the split needs one")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[generator.permutation(members)[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def draw_test(labels: np.ndarray) -> np.ndarray:
    """Draw the test images of a source without a test split: bool (N,)."""
    _, test = split_validation(labels, TEST_FRACTION)
    return np.isin(np.arange(len(labels)), test)


def split_sha256(train: np.ndarray, val: np.ndarray) -> str:
    """Return the hash of a split, which study.json and every checkpoint record."""
    digest = hashlib.sha256(f"{len(train)} {len(val)} ".encode())
    for indices in (train, val):
        digest.update(indices.astype("<i8").tobytes())
    return digest.hexdigest()


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


def allocate_images(folder: Path, counts: tuple[int, int], size: int, show: Progress) -> list[np.memmap]:
    """Say what the files of training and test images take, uint8 (N, 3, size, size), and create them.

    Raises:
        SourceError: The disk is too small.
    """
    needed, free = 3 * size**2 * sum(counts), shutil.disk_usage(folder).free
    if needed > free:
        raise SourceError(
            f"needs {needed:,} bytes for {sum(counts):,} images of {size} × {size} pixels, and --data-dir "
            f"has {free:,} free; free some, or give another --data-dir or a smaller --image-size"
        )
    show(f"writing {megabytes(needed)} under --data-dir,", 0, sum(counts))
    return [
        allocate(folder / f"{split}_images.npy", np.uint8, (count, 3, size, size))
        for split, count in zip(SPLITS, counts, strict=True)
    ]


def keep(partial: Path, folder: Path, data: ImageData) -> ImageData:
    """Move the images in a partial folder to their place in the cache."""
    data = replace(data, folder=str(folder))
    (partial / KEPT / "data.json").write_text(json.dumps(asdict(data), indent=2) + "\n")
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
        digest.update(array.data)
    return digest.hexdigest()


def _statistics(images: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation per channel of uint8 images (N, 3, H, W), in 0..1."""
    total = np.zeros(3, dtype=np.int64)  # whole numbers: the same in any order and on any machine
    squares = np.zeros(3, dtype=np.int64)
    step = max(1, STEP_BYTES // images[0].nbytes)
    for start in range(0, len(images), step):
        part = images[start : start + step].astype(np.int32)
        total += part.sum(axis=(0, 2, 3), dtype=np.int64)
        squares += np.multiply(part, part, out=part).sum(axis=(0, 2, 3), dtype=np.int64)
    count = images.size // 3
    mean = total / count
    variance = squares / count - mean**2
    # Exactly 0 if all pixels are equal, where rounding may leave a little more or less.
    constant = [int(t) ** 2 == count * int(s) for t, s in zip(total, squares, strict=True)]
    std = np.sqrt(np.where(constant, 0, np.maximum(variance, 0)))
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
