"""Where do the images come from, which of them test and validate, and where do they lie decoded?

A source is decoded once into `data_dir/decoded/KEY/`, which every trial then maps into memory.
"""

import contextlib
import difflib
import hashlib
import http.client
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from PIL import Image

from trainables.decoding import Progress, pixels, read_tree, write_tree
from trainables.image_files import fingerprint

DATA_DIR = (
    Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tunefleet"
)  # default of --data-dir
BUILT_IN = ("cifar10", "digits")
SPLIT_SEED = 0  # draws the validation images, and the test images of a source that has none; never varied
VALIDATION_FRACTION = 0.1  # of the training images; of few images more, for 100 cannot tell 96 from 98 %
VALIDATION_ENOUGH = 1000  # images: 1 % is then about one and a half standard deviations at 95 %
VALIDATION_FRACTION_MAX = 0.3
TEST_FRACTION = 0.2  # of a source that has no test images
FORMAT_VERSION = 1  # of the decoded folder; raise it when the same source would be decoded differently
BUILT_IN_SIZE = 32  # pixels per side; CIFAR-10's own, and the digits' 8 leave nothing after three poolings
HASH_IMAGES = 1024  # images per step of the hash and the statistics

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

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` takes, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ImageData":
        """Reverses `to_dict`, also after JSON has made lists of the tuples."""
        return cls(**{name: _hashable(value) for name, value in fields.items()})


def prepare(source: str, data_dir: Path, image_size: int = 32, progress: Progress | None = None) -> ImageData:
    """Decodes a source into `data_dir/decoded/KEY/`, or finds it there.

    Args:
        source: `cifar10` (downloaded), `digits` (scikit-learn's 1,797 images) or the path of a folder or
            archive of `train/CLASS/FILE` and `test/CLASS/FILE`, or of `CLASS/FILE`, of which 20 % test.
        data_dir: Where downloads and decoded images are kept.
        image_size: Pixels per side to which larger, not square or differently sized images are resized.
        progress: Called with (images done, images in all) about every thousand image files.

    Raises:
        ValueError: The source or `data_dir` cannot be used; one line that says what was given and what to do.
    """
    if image_size < 1:
        raise ValueError(f"image_size={image_size} is impossible; give the pixels per side, 1 or more")
    data_dir = data_dir.expanduser().absolute()
    path = Path(source).expanduser()
    if source in BUILT_IN:
        image_size = min(image_size, BUILT_IN_SIZE)  # one folder for every larger size
    elif not path.exists():
        close = difflib.get_close_matches(source.lower(), BUILT_IN, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"--data={source} does not exist; {hint}Give cifar10, digits, "
            "or the path of a folder or archive of images"
        )
    content = source if source in BUILT_IN else fingerprint(path)
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, content, image_size]).encode()).hexdigest()[:32]
    name = source if source in BUILT_IN else path.absolute().name
    folder = data_dir / "decoded" / key
    if cached := _cached(folder, name):
        return cached

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / "prepare.lock"):
            # Whoever held the lock may have decoded it meanwhile.
            return _cached(folder, name) or _decode(source, name, folder, data_dir, image_size, progress)
    except OSError as error:  # those of the source are ValueErrors by now
        raise ValueError(f"--data-dir={data_dir} cannot be written ({error}); give another") from error


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `folder` at the end, or vanishes with an exception.

    What a kill leaves of it is removed at the next attempt. The caller holds a lock.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def _cached(folder: Path, name: str) -> ImageData | None:
    """What lies decoded in `folder`; None where nothing does, or it is damaged and needs decoding again."""
    try:
        data = ImageData.from_dict(json.loads((folder / "data.json").read_text()))
        data = replace(data, name=name, folder=str(folder))  # both may have changed since
        arrays = [array for split in SPLITS for array in load_split(data, split)]
    except (OSError, EOFError, ValueError, TypeError):
        return None
    train, test = data.train_count, data.test_count
    shapes = [(train, *data.image_shape), (train,), (test, *data.image_shape), (test,)]
    return data if [array.shape for array in arrays] == shapes else None


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _decode(
    source: str, name: str, folder: Path, data_dir: Path, image_size: int, progress: Progress | None
) -> ImageData:
    with written_whole(folder) as partial:
        if source == "cifar10":
            classes = _write_cifar10(partial, data_dir, image_size)
        elif source == "digits":
            classes = _write_digits(partial, image_size)
        else:
            tree = read_tree(Path(source).expanduser())
            is_test = _draw_test(tree.labels) if tree.is_test is None else tree.is_test
            write_tree(partial, tree, is_test, image_size, progress)
            classes = tree.classes
        data = replace(_describe(partial, name, classes), folder=str(folder))
        (partial / "data.json").write_text(json.dumps(data.to_dict(), indent=2) + "\n")
    return data


def _write_cifar10(folder: Path, data_dir: Path, image_size: int) -> tuple[str, ...]:
    from torchvision.datasets import CIFAR10  # here, since workers only load what is decoded

    try:
        sets = {split: CIFAR10(str(data_dir), train=split == "train", download=True) for split in SPLITS}
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ValueError(
            f"--data=cifar10 could not be downloaded ({error}); without a network put cifar-10-python.tar.gz "
            f"into --data-dir={data_dir}, or give --data PATH, a folder or archive of images "
            "train/CLASS/*.png and test/CLASS/*.png"
        ) from error
    for split, images in sets.items():
        _write_images(folder, split, map(Image.fromarray, images.data), image_size)
        np.save(folder / f"{split}_labels.npy", np.array(images.targets, dtype=np.int64))
    return tuple(sets["train"].classes)


def _write_digits(folder: Path, image_size: int) -> tuple[str, ...]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    size = (image_size, image_size)
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the originals' range is 0..16
    is_test = _draw_test(digits.target)
    for split, chosen in (("train", ~is_test), ("test", is_test)):
        images = (Image.fromarray(image).resize(size, Image.Resampling.BILINEAR) for image in grey[chosen])
        _write_images(folder, split, images, image_size)
        np.save(folder / f"{split}_labels.npy", digits.target[chosen].astype(np.int64))
    return tuple(str(name) for name in digits.target_names)


def _write_images(folder: Path, split: str, images: Iterable[Image.Image], size: int) -> None:
    np.save(folder / f"{split}_images.npy", np.stack([pixels(image, size) for image in images]))


def _draw_test(labels: np.ndarray) -> np.ndarray:
    """Which images test where the source does not say: bool (N,)."""
    _, test = split_validation(labels, TEST_FRACTION)
    return np.isin(np.arange(len(labels)), test)


def _describe(folder: Path, name: str, classes: tuple[str, ...]) -> ImageData:
    """Counts, hashes and measures what was decoded into `folder`."""
    arrays = {
        kind: np.load(folder / f"{kind}.npy", mmap_mode="r")
        for kind in ("train_images", "train_labels", "test_images", "test_labels")
    }
    shapes = [array.shape for array in arrays.values()]
    digest = hashlib.sha256(json.dumps([classes, shapes]).encode())
    for array in arrays.values():
        for start in range(0, len(array), HASH_IMAGES):
            digest.update(array[start : start + HASH_IMAGES].tobytes())

    train = arrays["train_images"]
    total = np.zeros(3, dtype=np.int64)  # whole numbers: the same in any order and on any machine
    squares = np.zeros(3, dtype=np.int64)
    for start in range(0, len(train), HASH_IMAGES):
        some = train[start : start + HASH_IMAGES].astype(np.int64)
        total += some.sum(axis=(0, 2, 3))
        squares += (some**2).sum(axis=(0, 2, 3))
    pixel_count = train.size // 3
    mean = total / pixel_count
    std = np.sqrt(squares / pixel_count - mean**2)
    return ImageData(
        name=name,
        folder=str(folder),
        classes=classes,
        image_shape=(3, train.shape[2], train.shape[3]),
        train_count=len(train),
        test_count=len(arrays["test_images"]),
        mean=tuple((mean / 255).tolist()),
        std=tuple((std / 255).tolist()),
        sha256=digest.hexdigest(),
    )
