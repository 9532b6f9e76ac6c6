"""Where do the images come from, which of them test and validate, and where do they lie decoded?

A source is decoded once into `data_dir/decoded/KEY/`, which every trial then maps into memory. The key is
made of its images' contents; `data_dir/sources/` remembers them, so that no unchanged source is read again.
"""

import contextlib
import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunefleet.trainables.decoding import SourceError
from tunefleet.trainables.host import cpu_count
from tunefleet.trainables.image_files import Progress, printable

BUILT_IN = ("cifar10", "digits")
SPLIT_SEED = 0  # draws the validation images, and the test images of a source that has none; never varied
VALIDATION_FRACTION = 0.1  # of the training images; of few images more, for 100 cannot tell 96 from 98 %
VALIDATION_ENOUGH = 1000  # images: 1 % is then about one and a half standard deviations at 95 %
VALIDATION_FRACTION_MAX = 0.3
TEST_FRACTION = 0.2  # of a source that has no test images
FORMAT_VERSION = 2  # of the decoded folder; raise it when the same source would be decoded differently
CHANGES = {2: "image files are recognized by content and rotated by their EXIF orientation"}  # per version

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


@dataclass(frozen=True)
class ImageData:
    """One decoded data set: where it lies and what it is."""

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

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` takes, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ImageData":
        """Reverses `to_dict`, also after JSON has made lists of the tuples."""
        return cls(**{name: _hashable(value) for name, value in fields.items()})


def _data_dir() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with contextlib.suppress(RuntimeError):  # no home folder: reported when the folder is used
        cache = cache.expanduser()
    return cache / "tunefleet"


DATA_DIR = _data_dir()  # default of --data-dir


def prepare(
    source: str,
    data_dir: Path,
    image_size: int = 32,
    progress: Progress | None = None,
    processes: int | None = None,
) -> ImageData:
    """Decode a source into `data_dir/decoded/KEY/`, or find it there.

    Args:
        source: `cifar10` (downloaded), `digits` (scikit-learn's 1,797 images) or the path of a folder or
            archive of `train/CLASS/FILE` and `test/CLASS/FILE`, or of `CLASS/FILE`, of which 20 % test.
        data_dir: Where downloads and decoded images are kept.
        image_size: Pixels per side to which larger, not square or differently sized images are resized.
        progress: Called as (phase, done, total) at the start of a phase and during it, with images done and
            in all; 0 of 0 if there is no count. Phases: "listing files", "12 % of the archive", "waiting for
            another process", "comparing" (with images decoded before) and "decoding".
        processes: Processes that decode; None: one per CPU that this process may use.

    Raises:
        ValueError: The source or `data_dir` cannot be used; one line that says what was given and what to do.
    """
    from tunefleet.trainables.preparation import (  # here, since it imports this module
        prepare_built_in,
        prepare_files,
    )

    if image_size < 1:
        raise ValueError(f"image_size={image_size} is impossible; give the pixels per side, 1 or more")
    data_dir = expanded("--data-dir", data_dir).absolute()
    show = progress or (lambda phase, done, total: None)
    try:
        if source in BUILT_IN:
            return prepare_built_in(source, data_dir, image_size, show)
        path = _existing(source)
        return prepare_files(path, data_dir, image_size, show, processes or cpu_count())
    except SourceError as error:
        raise ValueError(f"--data={printable(source)} {printable(error)}") from error
    except (OSError, NotImplementedError) as error:  # the latter from a file system without locks
        raise ValueError(
            f"--data-dir={printable(data_dir)} cannot be written ({printable(error)}); give another"
        ) from error


def _existing(source: str) -> Path:
    path = expanded("--data", source)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        close = difflib.get_close_matches(source.lower(), BUILT_IN, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SourceError(
            f"does not exist; {hint}Give cifar10, digits, or the path of a folder or archive of images"
        ) from error
    except OSError as error:  # a name that is too long, a folder that is closed, a loop of links
        raise SourceError(f"cannot be read ({error.strerror})") from error
    return path


def expanded(flag: str, path: Path | str) -> Path:
    """Return a path with its ``~`` expanded.

    Raises:
        ValueError: There is no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{flag}={printable(path)} has no home folder; set HOME, or give a path without ~"
        ) from error


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
    """Maps a split into memory, read-only: images uint8 (N, 3, H, W) and labels int64 (N,).

    Only trainables/evaluate.py may ask for "test".
    """
    folder = Path(data.folder)
    images = np.load(folder / f"{split}_images.npy", mmap_mode="r")
    return images, np.load(folder / f"{split}_labels.npy", mmap_mode="r")


def split_validation(
    labels: np.ndarray, fraction: float | None = None, seed: int = SPLIT_SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Splits each class of the labels (N,) by `fraction`, into sorted int64 indices: train and validation.

    Without a fraction it is a tenth; where that is too few to choose by, up to VALIDATION_ENOUGH images.

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
    """The hash of a split, which stands in study.json and in every checkpoint."""
    digest = hashlib.sha256(f"{len(train)} {len(val)} ".encode())
    for indices in (train, val):
        digest.update(indices.astype("<i8").tobytes())
    return digest.hexdigest()


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
