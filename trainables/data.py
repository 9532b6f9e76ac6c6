"""A decoded data set: its description, arrays and splits. trainables/preparation.py makes it."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunefleet.cli import printable

BUILT_IN = ("cifar10", "digits")
SPLIT_SEED = 0  # draws the validation images, and the test images of a source that has none; never varied
VALIDATION_FRACTION = 0.1  # of the training images; of few images more, for 100 cannot tell 96 from 98 %
VALIDATION_ENOUGH = 1000  # images: 1 % is then about one and a half standard deviations at 95 %
VALIDATION_FRACTION_MAX = 0.3
TEST_FRACTION = 0.2  # of a source that has no test images
FORMAT_VERSION = 2  # of the decoded folder; raise it when the same source would be decoded differently
CHANGES = {2: "image files are recognized by content and rotated by their EXIF orientation"}  # per version

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

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ImageData":
        """Reverse `to_dict`, also after JSON has made lists of the tuples."""
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


def split_sha256(train: np.ndarray, val: np.ndarray) -> str:
    """Return the hash of a split, which study.json and every checkpoint record."""
    digest = hashlib.sha256(f"{len(train)} {len(val)} ".encode())
    for indices in (train, val):
        digest.update(indices.astype("<i8").tobytes())
    return digest.hexdigest()


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
