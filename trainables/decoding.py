"""How do image files become arrays? Which folder is which class, and which size is stored?"""

import contextlib
import io
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from trainables.image_files import image_files

Progress = Callable[[int, int], None]  # images done, images in all
Slots = dict[str, tuple[str, int]]  # an image's name -> its split and its index there

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")  # not Pillow's EPS, which starts Ghostscript
ONE_THREAD_PIXELS = 64 * 64  # per image
CHUNK_IMAGES = 64  # per job of the thread pool
PROGRESS_IMAGES = 16 * CHUNK_IMAGES
LAYOUT = (
    "give train/CLASS/FILE and test/CLASS/FILE, or CLASS/FILE alone, of which a part becomes the test images"
)


@dataclass(frozen=True)
class Tree:
    """The images of a folder or archive and their classes, sorted by name."""

    path: Path
    names: list[str]  # inside `path`
    classes: tuple[str, ...]  # sorted
    labels: np.ndarray  # int64 (N,), indices into classes
    is_test: np.ndarray | None  # bool (N,); None where the tree has no train/ and test/


def read_tree(path: Path) -> Tree:
    """Finds the images of `path` and their classes; decodes none.

    Raises:
        ValueError: `path` is not readable as `train/CLASS/FILE` and `test/CLASS/FILE`, or as `CLASS/FILE`,
            perhaps inside one single top folder; or its classes are too few, too small, or differ.
    """
    names = sorted(name for name, _ in image_files(path, read=False))
    if not names:
        raise ValueError(f"--data={path} holds no images (files known by their suffix); {LAYOUT}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"--data={path} holds {twice[0]!r} more than once; pack it again")

    places = [tuple(name.split("/")) for name in names]
    tops = {place[0] for place in places}
    if len(tops) == 1 and not tops & {"train", "test"} and min(map(len, places)) > 2:
        places = [place[1:] for place in places]
        tops = {place[0] for place in places}
    is_split = bool(tops & {"train", "test"})
    if is_split and tops != {"train", "test"}:
        raise ValueError(f"--data={path} holds {_listed(tops)}, not train/ and test/ alone; {LAYOUT}")
    for name, place in zip(names, places, strict=True):
        if len(place) != (3 if is_split else 2):
            raise ValueError(f"--data={path} holds {name!r}, which lies in no class's folder; {LAYOUT}")

    classes = tuple(sorted({place[-2] for place in places}))
    index = {name: label for label, name in enumerate(classes)}
    tree = Tree(
        path=path,
        names=names,
        classes=classes,
        labels=np.array([index[place[-2]] for place in places], dtype=np.int64),
        is_test=np.array([place[0] == "test" for place in places]) if is_split else None,
    )
    _check_classes(tree)
    return tree


def write_tree(
    folder: Path, tree: Tree, is_test: np.ndarray, image_size: int, progress: Progress | None = None
) -> None:
    """Decodes every image of the tree into `folder`: {train,test}_images.npy and {train,test}_labels.npy.

    Images of one square size of at most `image_size` are stored as they are; otherwise each is resized, and a
    rectangle squeezed, to `image_size` × `image_size`.

    Args:
        folder: Exists and is empty.
        tree: The images.
        is_test: Which of them are test images, bool (N,).
        image_size: Pixels per side.
        progress: Called with (images done, images in all) about every thousand images.

    Raises:
        ValueError: An image is corrupt, the tree changed since it was read, or the disk is too full.
    """
    slots: Slots = {}
    counts = {"train": 0, "test": 0}
    for name, tests in zip(tree.names, is_test, strict=True):
        split = "test" if tests else "train"
        slots[name] = split, counts[split]
        counts[split] += 1
    np.save(folder / "train_labels.npy", tree.labels[~is_test])
    np.save(folder / "test_labels.npy", tree.labels[is_test])

    name, content = next(image_files(tree.path, read=True))
    with _errors_naming(tree.path, name), _open(content) as first:
        width, height = first.size
    # Pillow lets go of the GIL only while it decodes and resizes. At 32 × 32 that is so short that two
    # threads take 12.7 s over 60,000 JPEGs and one takes 10.7 s (Pillow 13.0, 2 cores).
    threads = 1 if width * height <= ONE_THREAD_PIXELS else os.cpu_count() or 1
    if width == height < image_size:
        with contextlib.suppress(_OtherSizeError):
            return _decode(tree.path, slots, _allocate(folder, counts, width), False, threads, progress)
    return _decode(tree.path, slots, _allocate(folder, counts, image_size), True, threads, progress)


def pixels(image: Image.Image, size: int) -> np.ndarray:
    """Returns the image as uint8 (3, size, size); grey becomes RGB, transparency is dropped.

    Raises:
        ValueError: The image has more than 8 bits per channel.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
    if image.size != (size, size):
        # A JPEG is then decoded at 1/2, 1/4 or 1/8, but no smaller than this.
        image.draft("RGB", (2 * size, 2 * size))
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparent colours
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)  # Pillow's resize antialiases
    return np.frombuffer(image.tobytes(), np.uint8).reshape(size, size, 3).transpose(2, 0, 1)


class _OtherSizeError(Exception):
    """The images do not all have the first one's size."""


def _allocate(folder: Path, counts: dict[str, int], size: int) -> dict[str, np.ndarray]:
    needed, free = sum(counts.values()) * 3 * size * size, shutil.disk_usage(folder).free
    if needed > free:  # a full disk under a memory map would kill the process
        raise ValueError(f"--data-dir needs {needed:,} bytes, has {free:,} free; free some or give another")
    return {
        split: np.lib.format.open_memmap(
            folder / f"{split}_images.npy", mode="w+", dtype=np.uint8, shape=(count, 3, size, size)
        )
        for split, count in counts.items()
    }


def _decode(
    path: Path,
    slots: Slots,
    arrays: dict[str, np.ndarray],
    resize: bool,
    threads: int,
    progress: Progress | None,
) -> None:
    size = arrays["train"].shape[-1]

    def decode_chunk(chunk: list[tuple[str, bytes]]) -> int:
        for name, content in chunk:
            with _errors_naming(path, name), _open(content) as image:
                decoded = pixels(image, size) if resize or image.size == (size, size) else None
            if decoded is None:
                raise _OtherSizeError
            split, index = slots[name]
            arrays[split][index] = decoded
        return len(chunk)

    done = 0
    running: deque[Future[int]] = deque()
    with contextlib.closing(_read(path, slots)) as images, ThreadPoolExecutor(threads) as pool:
        while (chunk := list(islice(images, CHUNK_IMAGES))) or running:
            if chunk:
                running.append(pool.submit(decode_chunk, chunk))
            if not chunk or len(running) > 2 * threads:  # bounds the bytes in memory
                done += running.popleft().result()
                if progress and (done % PROGRESS_IMAGES == 0 or done == len(slots)):
                    progress(done, len(slots))


def _read(path: Path, slots: Slots) -> Generator[tuple[str, bytes]]:
    """Yields the name and bytes of each image that has a slot, once."""
    awaited = set(slots)
    for name, content in image_files(path, read=True):
        if name not in awaited:
            raise ValueError(f"--data={path} changed while it was read: {name!r} is new; try again")
        awaited.remove(name)
        yield name, content
    if awaited:
        raise ValueError(f"--data={path} changed while it was read: {min(awaited)!r} is gone; try again")


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=FORMATS)


@contextlib.contextmanager
def _errors_naming(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of a damaged file Pillow raises OSError, SyntaxError, struct.error and more
        reason = "no image format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(
            f"--data={path} holds {name!r}, which cannot be decoded ({reason}); replace or remove it"
        ) from error


def _check_classes(tree: Tree) -> None:
    """Each class needs a test image and, for the validation split, two training images."""
    if len(tree.classes) < 2:
        raise ValueError(f"--data={tree.path} holds one class only, {tree.classes[0]!r}; give two or more")
    counts = {"": tree.labels}
    if tree.is_test is not None:
        counts = {"train/": tree.labels[~tree.is_test], "test/": tree.labels[tree.is_test]}
    fewest = {"": 3, "train/": 2, "test/": 1}
    for folder, labels in counts.items():
        for name, count in zip(tree.classes, np.bincount(labels, minlength=len(tree.classes)), strict=True):
            if count < fewest[folder]:
                raise ValueError(
                    f"--data={tree.path} holds {count} images of class {name!r} in {folder or 'its folder'}; "
                    f"every class needs {fewest[folder]} or more there; add images or remove the class"
                )


def _listed(folders: set[str]) -> str:
    shown = sorted(folders)
    return ", ".join(f"{name}/" for name in shown[:5]) + (
        f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    )
