"""Images that a person's function returns: checked, and written to the cache in parts.

The function is called once, on the driver. From the cache on its images are as those of a folder, under
their content: another function, or a later study, that returns the same images shares them.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tunefleet.cli import expanded, printable
from tunefleet.models.checks import nearest
from tunefleet.models.sources import describe, find_function
from tunefleet.trainables.data import SPLITS, Progress, allocate_images, draw_test
from tunefleet.trainables.decoding import SourceError, square, upright
from tunefleet.trainables.image_files import check_classes

KEYS = ("train", "val", "test", "classes")
RETURN = "return a dict with train and classes, perhaps val and test"
SPLIT = "give (images, labels), or a Dataset of (image, label)"
SHAPES = "give (N, H, W), (N, H, W, 3) or (N, 3, H, W)"
PART_BYTES = 16 << 20  # of images, read and written at a time


class OtherSizeError(Exception):
    """Not all images have the size of the first one."""


def is_function(source: str) -> bool:
    """Return whether ``--data`` is FILE.py:FUNCTION or module:FUNCTION, or names what came from Python."""
    location, _, name = source.rpartition(":")
    named = location and name.isidentifier() and not os.path.exists(expanded("--data", source))  # noqa: PTH110
    return bool(named) or _is_from_python(source)


def reference_of(given: Any) -> str:
    """Return how a study names a function, FILE.py:FUNCTION, which a resume may call, or a dict: <NAME>."""
    name = getattr(given, "__name__", type(given).__name__)
    with contextlib.suppress(TypeError):  # no function
        file = inspect.getsourcefile(given)
        if name == given.__qualname__ and name.isidentifier() and file and Path(file).is_file():
            return f"{os.path.abspath(file)}:{name}"  # noqa: PTH100
    return f"<{name.strip('<>')}>"


def load_images(reference: str, given: Any = None) -> OwnImages:
    """Call a person's function and check its result, as far as that reads no image.

    Args:
        reference: As ``--data`` has it.
        given: The function or its result; None: the reference names the function.

    Raises:
        ValueError: There is no such function, it fails, or its result is not what RETURN says.
    """
    folder = Path(reference).parent if os.sep in reference else None
    if given is None:
        if _is_from_python(reference):
            raise ValueError(
                f"--data={printable(reference)} was given in Python, and its images are not under --data-dir "
                "any more; give it again: tunefleet.resume(STUDY, data=…)"
            )
        given, folder = find_function(reference)
    try:
        if callable(given):
            with _errors_of(folder):
                given = given()
        return OwnImages(reference, given, folder)
    except SourceError as error:
        raise ValueError(f"--data={printable(reference)} {printable(str(error))}") from error


def _is_from_python(reference: str) -> bool:
    return reference.startswith("<") and reference.endswith(">")


class OwnImages:
    """What a person's function returned.

    Args:
        reference: As ``--data`` has it.
        given: The result.
        folder: Of the person's files; None: not known.

    Raises:
        SourceError: It is not what RETURN says.
    """

    def __init__(self, reference: str, given: Any, folder: Path | None) -> None:
        self.reference, self.name = reference, printable(Path(reference).name)
        if not isinstance(given, Mapping):
            raise SourceError(f"gives a {type(given).__name__}; {RETURN}")
        for key in given:
            if key not in KEYS:
                raise SourceError(f"gives {key!r}{nearest(str(key), KEYS)}")
        if lacking := [key for key in ("train", "classes") if given.get(key) is None]:
            raise SourceError(f"gives no {lacking[0]}; {RETURN}")
        names = given["classes"]
        are_names = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        if not are_names or len(set(names)) < max(len(names), 2):
            raise SourceError(f"gives the classes {names!r:.60}; give a list of two or more different names")
        self.classes = tuple(map(printable, names))
        self.splits = {
            name: _Split(name, given[name], len(names), folder)
            for name in KEYS[:3]
            if given.get(name) is not None
        }
        self.count = sum(split.count for split in self.splits.values())

    def write(self, folder: Path, image_size: int, show: Progress) -> tuple[tuple[str, ...], int]:
        """Write images and labels, as trainables/preparation.py does of files.

        Args:
            folder: Where to.
            image_size: Images of one square size below this are stored as they are, others resized to it.
            show: Called with what is done, images done and images in all.

        Returns:
            Notes for the user, and how many of the training images, at the end, validate.

        Raises:
            SourceError: An image or a label is none, or the disk is too small.
        """
        train, val, test = (self.splits.get(name) for name in KEYS[:3])
        assert train is not None
        note, is_test = "", np.zeros(train.count, dtype=bool)
        if val and not test:
            val, test = None, val
            note = "no test images: val is the test split, and validation images are drawn from train"
        elif not test:
            note = "no test images: 20 % of each class's images are used as test images"
            labels = train.read_labels(show)
            check_classes(self.classes, labels, None)
            is_test = draw_test(labels)
        plan = [
            (train, is_test),
            *((split, np.full(split.count, split is test)) for split in (val, test) if split),
        ]
        val_count = val.count if val else 0
        width, height = train.first_size()
        if not width == height < image_size:
            self._write(folder, plan, val_count, image_size, show, resize=True)
        else:
            try:
                self._write(folder, plan, val_count, width, show, resize=False)
            except OtherSizeError:
                self._write(folder, plan, val_count, image_size, show, resize=True)
        return (note,) if note else (), val_count

    def _write(
        self,
        folder: Path,
        plan: list[tuple[_Split, np.ndarray]],
        val_count: int,
        size: int,
        show: Progress,
        *,
        resize: bool,
    ) -> None:
        """Write splits, of each the images that test apart from the others."""
        is_test = np.concatenate([chosen for _, chosen in plan])
        labels, done, filled = np.zeros(len(is_test), dtype=np.int64), 0, [0, 0]
        arrays = allocate_images(folder, (int((~is_test).sum()), int(is_test.sum())), size, show)
        for split, _ in plan:
            for images, part in split.parts(size, resize=resize):
                rows = slice(done, done + len(part))
                labels[rows], done = part, rows.stop
                for k, chosen in enumerate((~is_test[rows], is_test[rows])):
                    filled[k] += int(chosen.sum())
                    arrays[k][filled[k] - int(chosen.sum()) : filled[k]] = images[chosen]
                show("writing", done, len(is_test))
        tested = plan[-1][0].name if len(plan) > 1 else "test"
        check_classes(self.classes, labels, is_test, val_count, f"{tested}/")
        for name, chosen in zip(SPLITS, (~is_test, is_test), strict=True):
            np.save(folder / f"{name}_labels.npy", labels[chosen])


class _Split:
    """The images and labels of train, val or test: arrays, or a Dataset, of which nothing is read yet."""

    def __init__(self, name: str, given: Any, classes: int, folder: Path | None) -> None:
        self.name, self.given, self.classes, self.folder = name, given, classes, folder
        self.images: Any = None
        if isinstance(given, tuple) and len(given) == 2:
            self.images, labels = given
            _check_images(f"{name} images", self.images)
            self.count = len(self.images)
            self.labels = self._checked(labels)
        elif isinstance(given, Mapping | str) or not (
            hasattr(given, "__len__") and hasattr(given, "__getitem__")
        ):
            raise SourceError(f"gives {name} as a {type(given).__name__}; {SPLIT}")
        else:
            with _errors_of(folder, f" at len({name})"):
                self.count = len(given)
        if not self.count:
            raise SourceError(f"gives no image in {name}; {SPLIT}")

    def first_size(self) -> tuple[int, int]:
        """Return width and height of the first image."""
        image = self._sample(0)[0] if self.images is None else self.images[:1]
        if isinstance(image, Image.Image):
            return image.size
        with _errors_of(self.folder):
            height, width = _channels_first(np.asarray(image)).shape[2:]
        return width, height

    def read_labels(self, show: Progress) -> np.ndarray:
        """Return all labels ``(N,)``; a Dataset is read for them."""
        if self.images is not None:
            return self.labels
        labels = np.zeros(self.count, dtype=np.int64)
        for k in range(self.count):
            labels[k] = self._sample(k)[1]
            show("reading labels", k + 1, self.count)
        return labels

    def parts(self, size: int, *, resize: bool) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield images uint8 ``(n, 3, size, size)`` and their labels ``(n,)``.

        Raises:
            OtherSizeError: An image has another size, and is not to be resized.
        """
        if self.images is None:
            for k in range(self.count):
                image, label = self._sample(k)
                yield _stored(image, size, resize=resize), [label]
            return
        step = max(1, PART_BYTES // int(np.prod(self.images.shape[1:])))
        for start in range(0, self.count, step):
            with _errors_of(self.folder):
                part = np.asarray(self.images[start : start + step])
            yield _stored(part, size, resize=resize), self.labels[start : start + step]

    def _sample(self, k: int) -> tuple[Any, int]:
        """Return image and label of a Dataset: an upright PIL image, or an array ``(1, …)``."""
        what = f"{self.name}[{k}]"
        with _errors_of(self.folder, f" at {what}"):
            sample = self.given[k]
            if not isinstance(sample, tuple | list) or len(sample) != 2:
                raise SourceError(f"gives {what} as a {type(sample).__name__}; {SPLIT}")
            image, label = sample
            if isinstance(image, Image.Image):
                image = upright(image)  # decodes it
        try:
            number = operator.index(label)
        except TypeError:
            raise SourceError(f"gives {what} the label {label!r:.60}; give an integer") from None
        self._check_range(number, number)
        if not isinstance(image, Image.Image):
            _check_images(what, image, of_dataset=True)
            with _errors_of(self.folder, f" at {what}"):
                image = np.asarray(image)[None]
        return image, number

    def _checked(self, labels: Any) -> np.ndarray:
        try:
            array = np.asarray(labels)
        except Exception as error:  # of lists of several lengths, of tensors on a GPU
            raise SourceError(
                f"gives {self.name} labels that are no array ({error}); give integers"
            ) from error
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise SourceError(
                f"gives {self.name} labels of {array.dtype} in the shape {array.shape}; give integers (N,)"
            )
        if len(array) != self.count:
            raise SourceError(
                f"gives {self.count:,} {self.name} images and {len(array):,} labels; give one for each image"
            )
        if self.count:
            self._check_range(int(array.min()), int(array.max()))
        return array.astype(np.int64)

    def _check_range(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self.classes:
            wrong = lowest if lowest < 0 else highest
            raise SourceError(
                f"gives {self.name} the label {wrong}, and there are {self.classes} classes; give labels "
                f"from 0 to {self.classes - 1}"
            )


def _check_images(what: str, images: Any, of_dataset: bool = False) -> None:
    """Raise SourceError unless an array is uint8 in one of SHAPES; a Dataset's image has no N."""
    kind = str(getattr(images, "dtype", type(images).__name__)).removeprefix("torch.")
    if "float" in kind:
        raise SourceError(f"gives {what} as {kind}; return images before transforms, as uint8")
    if kind != "uint8":
        raise SourceError(f"gives {what} as {kind}; give {'PIL images or ' if of_dataset else ''}uint8")
    shape = tuple(images.shape)
    whole = (1, *shape) if of_dataset else shape
    if len(whole) not in (3, 4) or (len(whole) == 4 and 3 not in (whole[1], whole[3])) or 0 in whole[1:]:
        raise SourceError(f"gives {what} in the shape {shape}; {SHAPES}{', without N' if of_dataset else ''}")


def _channels_first(images: np.ndarray) -> np.ndarray:
    """Return images of any of SHAPES as ``(n, 3, H, W)``."""
    if images.ndim == 3:
        return np.repeat(images[:, None], 3, axis=1)
    return images.transpose(0, 3, 1, 2) if images.shape[3] == 3 else images


def _stored(images: Any, size: int, *, resize: bool) -> np.ndarray:
    """Return a PIL image, or an array of images, as they are stored: uint8 ``(n, 3, size, size)``."""
    if isinstance(images, Image.Image):
        if images.size != (size, size) and not resize:
            raise OtherSizeError
        try:
            return np.frombuffer(square(images, size), np.uint8).reshape(1, 3, size, size)
        except ValueError as error:
            raise SourceError(
                f"gives an image that cannot be decoded ({error}); give 8 bits a channel"
            ) from error
    images = _channels_first(images)
    if images.shape[2:] == (size, size):
        return images
    if not resize:
        raise OtherSizeError
    pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    return np.concatenate([_stored(Image.fromarray(image), size, resize=True) for image in pixels])


@contextlib.contextmanager
def _errors_of(folder: Path | None, where: str = "") -> Iterator[None]:
    """Context manager: turn whatever a person's code raises into one line, with its file and line."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"fails{where}: {describe(error, folder)}; fix it") from error
