"""Decode a folder, an archive or a built-in data set into the cache."""

import contextlib
import hashlib
import http.client
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tunefleet.trainables.data import FORMAT_VERSION, SPLITS, TEST_FRACTION, ImageData, split_validation
from tunefleet.trainables.decoded import allocate, cached, describe, folder_of, keep, locked, partial_folder
from tunefleet.trainables.decoders import Chunk, run_chunks
from tunefleet.trainables.decoding import Decoder, SourceError, square
from tunefleet.trainables.image_files import Progress, Source, printable
from tunefleet.trainables.trees import Tree, read_tree

BUILT_IN_SIZE = 32  # pixels per side; CIFAR-10's own, and the digits' 8 leave nothing after three poolings
CHUNK_IMAGES, CHUNK_BYTES = 128, 16 << 20  # at most, read and decoded by a process at a time
PROCESS_BYTES = 8 << 20  # of image files per process that is started
FILE_BYTES = 8 << 10  # that take as long as opening a file


def prepare_files(path: Path, data_dir: Path, image_size: int, show: Progress, processes: int) -> ImageData:
    """Prepare a folder or archive; see tunefleet.trainables.data.prepare.

    Raises:
        SourceError: It cannot be used.
        OSError: `data_dir` cannot be written.
    """
    show("listing files", 0, 0)
    source, records = Source(path), data_dir / "sources"
    name = printable(path.absolute().name)
    signature = hashlib.sha256(f"{FORMAT_VERSION} {source.signature}".encode()).hexdigest()

    def find(content: str, notes: Iterable[str]) -> ImageData | None:
        data = cached(folder_of(data_dir, content, image_size), name)
        return data and replace(data, notes=(*notes, *data.notes))

    def remembered() -> ImageData | None:
        """Return the decoded images of a source that has not changed since it was last read."""
        for record in records.glob(f"*-{signature}.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged
                fields = json.loads(record.read_text())
                return find(fields["content"], fields["notes"])
        return None

    if data := remembered():
        return data
    with locked(data_dir, show), partial_folder(data_dir) as partial:
        if data := remembered():  # prepared by the process that held the lock
            return data
        spool = partial / "spool"
        tree = read_tree(source.read_listing(spool, show))
        files = _Files(path, spool, tree, show, processes)
        sizes = hashlib.sha256(_lines(tree.places, (entry.size for entry in tree.entries))).hexdigest()
        # Files of the same names and sizes were decoded before: compare contents before decoding again.
        content = files.read("comparing")[0] if any(records.glob(f"{sizes}-*")) else None
        data = find(content, tree.notes) if content else None
        if not data:
            content, rotated = files.decode(partial, image_size)
            spool.unlink(missing_ok=True)
            note = f"rotated {rotated:,} of {len(tree.entries):,} images by their EXIF orientation"
            data = describe(partial, name, tree.classes, (note,) if rotated else ())
            data = keep(partial, folder_of(data_dir, content, image_size), data)
            data = replace(data, notes=tree.notes + data.notes)
        records.mkdir(exist_ok=True)
        record = records / f"{sizes}-{signature}.json"
        record.write_text(json.dumps({"content": content, "notes": tree.notes}))
        return data


class _OtherSizeError(Exception):
    """Not all images have the size of the first one."""


class _Files:
    """The image files of a folder or archive, while they are read."""

    def __init__(self, path: Path, spool: Path, tree: Tree, show: Progress, processes: int) -> None:
        self.path, self.spool, self.tree, self.show, self.processes = path, spool, tree, show, processes
        self.is_test = _draw_test(tree.labels) if tree.is_test is None else tree.is_test
        self.tests_before = np.cumsum(self.is_test) - self.is_test  # of each image

    def decode(self, folder: Path, image_size: int) -> tuple[str, int]:
        """Decode every image into `folder`; return what read() does.

        Images of one square size of at most `image_size` are stored as they are; otherwise each is resized,
        and a rectangle squeezed, to `image_size` × `image_size`.
        """
        for split, chosen in (("train", ~self.is_test), ("test", self.is_test)):
            np.save(folder / f"{split}_labels.npy", self.tree.labels[chosen])
        with contextlib.closing(Decoder(str(self.path), str(self.spool))) as decoder:
            width, height = _checked(decoder.size_of(self.tree.entries[0]))["size"]
        if width == height < image_size:
            with contextlib.suppress(_OtherSizeError):
                return self.read("decoding", outputs=self._allocate(folder, width), size=width)
        outputs = self._allocate(folder, image_size)
        return self.read("decoding", outputs=outputs, size=image_size, resize=True)

    def read(self, phase: str, **decoding: Any) -> tuple[str, int]:
        """Read every file and, if Decoder gets outputs, decode it.

        Returns:
            A hash of all contents, and the number of images rotated.

        Raises:
            SourceError: A file cannot be read or decoded.
            _OtherSizeError: An image would have to be resized.
        """
        arguments = {"source": str(self.path), "spool": str(self.spool), **decoding}
        sizes = [entry.size for entry in self.tree.entries]
        parts = _parts(sizes, 3 * decoding.get("size", 0) ** 2)
        processes = min(self.processes, (sum(sizes) + FILE_BYTES * len(sizes)) // PROCESS_BYTES)
        content, rotated = hashlib.sha256(), 0
        self.show(phase, 0, len(sizes))
        with contextlib.closing(run_chunks(arguments, parts, self._chunk, processes)) as answers:
            for part, answer in zip(parts, answers, strict=True):
                content.update(_lines(self.tree.places[part], _checked(answer)["sha256"]))
                rotated += answer["rotated"]
                self.show(phase, part.stop, len(sizes))
        return content.hexdigest(), rotated

    def _chunk(self, part: slice) -> Chunk:
        before = int(self.tests_before[part.start])
        splits = self.is_test[part].astype(int).tolist()
        return self.tree.entries[part], splits, [part.start - before, before]

    def _allocate(self, folder: Path, size: int) -> list[tuple[str, int]]:
        """Return per split the file for its images and the offset of the first."""
        count, test_count = len(self.is_test), int(self.is_test.sum())
        needed, free = 3 * size**2 * count, shutil.disk_usage(folder).free
        if needed > free:
            raise SourceError(
                f"needs {needed:,} bytes for {count:,} images of {size} × {size} pixels, and --data-dir has "
                f"{free:,} free; free some, or give another --data-dir or a smaller --image-size"
            )
        outputs = []
        for split, images in zip(SPLITS, (count - test_count, test_count), strict=True):
            file = folder / f"{split}_images.npy"
            outputs.append((str(file), allocate(file, np.uint8, (images, 3, size, size)).offset))
        return outputs


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer of Decoder, or raise the error that it reports."""
    if "other_size" in answer:
        raise _OtherSizeError
    if "refused" in answer:
        raise SourceError(answer["refused"])
    if "failed" in answer:
        raise OSError(*answer["failed"])
    return answer


def _parts(sizes: list[int], stored_bytes: int) -> list[slice]:
    """Return the chunks of files of these sizes, each decoded to `stored_bytes`."""
    parts, start, nbytes = [], 0, 0
    for stop, size in enumerate(sizes, 1):
        nbytes += size + stored_bytes
        if stop - start == CHUNK_IMAGES or nbytes >= CHUNK_BYTES or stop == len(sizes):
            parts.append(slice(start, stop))
            start, nbytes = stop, 0
    return parts


def _lines(places: Iterable[str], values: Iterable[object]) -> bytes:
    lines = (f"{place}\0{value}\n" for place, value in zip(places, values, strict=True))
    return "".join(lines).encode("utf-8", "surrogateescape")


def prepare_built_in(source: str, data_dir: Path, image_size: int, show: Progress) -> ImageData:
    """Prepare a source of BUILT_IN; see tunefleet.trainables.data.prepare."""
    image_size = min(image_size, BUILT_IN_SIZE)  # one folder for every larger size
    folder = folder_of(data_dir, source, image_size)
    if data := cached(folder, source):
        return data
    with locked(data_dir, show), partial_folder(data_dir) as partial:
        if data := cached(folder, source):
            return data
        write = _write_cifar10 if source == "cifar10" else _write_digits
        return keep(partial, folder, describe(partial, source, write(partial, data_dir, image_size)))


def _write_cifar10(folder: Path, data_dir: Path, image_size: int) -> tuple[str, ...]:
    from torchvision.datasets import CIFAR10  # here, since workers only load what is decoded

    try:
        sets = {split: CIFAR10(str(data_dir), train=split == "train", download=True) for split in SPLITS}
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise SourceError(
            f"could not be downloaded ({error}); without a network put cifar-10-python.tar.gz "
            f"into --data-dir={printable(data_dir)}, or give --data PATH, a folder or archive of images "
            "train/CLASS/*.png and test/CLASS/*.png"
        ) from error
    for split, images in sets.items():
        _write_images(folder, split, map(Image.fromarray, images.data), image_size)
        np.save(folder / f"{split}_labels.npy", np.array(images.targets, dtype=np.int64))
    return tuple(sets["train"].classes)


def _write_digits(folder: Path, data_dir: Path, image_size: int) -> tuple[str, ...]:
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
    stored = [np.frombuffer(square(image, size), np.uint8).reshape(3, size, size) for image in images]
    np.save(folder / f"{split}_images.npy", np.stack(stored))


def _draw_test(labels: np.ndarray) -> np.ndarray:
    """Draw the test images of a source without a test split: bool (N,)."""
    _, test = split_validation(labels, TEST_FRACTION)
    return np.isin(np.arange(len(labels)), test)
