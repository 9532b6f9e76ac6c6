"""Decode a folder, an archive or a built-in data set into the cache, once.

`data_dir/decoded/KEY/` is mapped into memory by every trial; its key is made of the images' contents.
`data_dir/sources/` remembers the contents of a source by its signature, so that an unchanged source is not
read again. Decoding runs on all cores, in processes of trainables/decoding.py: Pillow holds the GIL for most
of a small image, so threads gain nothing, and multiprocessing would import the user's main module.
"""

import contextlib
import difflib
import hashlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tunefleet.cli import expanded, printable
from tunefleet.host import cpu_count
from tunefleet.trainables import decoding
from tunefleet.trainables.archives import Archive
from tunefleet.trainables.data import (
    BUILT_IN,
    FORMAT_VERSION,
    KEPT,
    ImageData,
    Progress,
    allocate_images,
    cached,
    describe,
    draw_test,
    folder_of,
    keep,
    locked,
    partial_folder,
)
from tunefleet.trainables.decoding import Decoder, SourceError
from tunefleet.trainables.image_files import Tree, list_files, read_tree, scan
from tunefleet.trainables.own_images import OwnImages, is_function, load_images

BUILT_IN_SIZE = 32  # pixels per side; CIFAR-10's own, and the digits' 8 leave nothing after three poolings
CHUNK_IMAGES, CHUNK_BYTES = 128, 16 << 20  # at most, read and decoded by a process at a time
PROCESS_BYTES = 8 << 20  # of image files per process that is started
FILE_BYTES = 8 << 10  # that take as long as opening a file


def prepare(
    source: str | OwnImages,
    data_dir: Path,
    image_size: int = 32,
    progress: Progress | None = None,
    processes: int | None = None,
    earlier: ImageData | None = None,
) -> ImageData:
    """Decode a source into `data_dir/decoded/KEY/`, or find it there.

    Args:
        source: `cifar10` (downloaded), `digits` (scikit-learn's 1,797 images) or the path of a folder or
            archive of `train/CLASS/FILE` and `test/CLASS/FILE`, perhaps `val/CLASS/FILE`, or of `CLASS/FILE`,
            of which 20 % test. Without test/, val/ tests. Or FILE.py:FUNCTION, or what it has returned.
        data_dir: Where downloads and decoded images are kept.
        image_size: Pixels per side to which larger, not square or differently sized images are resized.
        progress: Called at the start of a phase and during it. Phases: "listing files", "12 % of the
            archive", "unpacking", "waiting for another process", "comparing" (with images decoded before)
            and "decoding".
        processes: Processes that decode; None: one per CPU that this process may use.
        earlier: A resumed study's images; where they are, no function is called.

    Raises:
        ValueError: The source or `data_dir` cannot be used; one line that says what was given and what to do.
    """
    if image_size < 1:
        raise ValueError(f"image_size={image_size} is impossible; give the pixels per side, 1 or more")
    data_dir = expanded("--data-dir", data_dir).absolute()
    show = progress or (lambda phase, done, total: None)
    name = source if isinstance(source, str) else source.reference
    try:
        if isinstance(source, OwnImages) or (source not in BUILT_IN and is_function(source)):
            return _prepare_own(source, data_dir, image_size, show, earlier)
        if source in BUILT_IN:
            return _prepare_built_in(source, data_dir, image_size, show)
        path = _existing(source)
        return _prepare_files(path, data_dir, image_size, show, processes or cpu_count())
    except SourceError as error:
        raise ValueError(f"--data={printable(name)} {printable(str(error))}") from error
    except OSError as error:
        shown = printable(str(data_dir))
        raise ValueError(
            f"--data-dir={shown} cannot be written ({printable(str(error))}); give another"
        ) from error


def _prepare_own(
    source: str | OwnImages, data_dir: Path, image_size: int, show: Progress, earlier: ImageData | None
) -> ImageData:
    """Write what a person's function returns; the key is the content, which is known once it is written."""

    def find(data: ImageData) -> tuple[Path, ImageData | None]:
        folder = folder_of(data_dir, f"{data.sha256} {data.val_count}", image_size)
        return folder, cached(folder, data.name)

    if earlier and (found := find(earlier)[1]):
        return found
    images = source if isinstance(source, OwnImages) else load_images(source)
    with locked(data_dir, show), partial_folder(data_dir) as partial:
        notes, val_count = images.write(partial / KEPT, image_size, show)
        data = describe(partial / KEPT, images.name, images.classes, notes, val_count)
        folder, found = find(data)
        return found or keep(partial, folder, data)


def _existing(source: str) -> Path:
    path = expanded("--data", source)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        close = difflib.get_close_matches(source.lower(), BUILT_IN, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SourceError(
            f"does not exist; {hint}Give cifar10, digits, the path of a folder or archive of images, or "
            "FILE.py:FUNCTION"
        ) from error
    except OSError as error:  # a name that is too long, a folder that is closed, a loop of links
        raise SourceError(f"cannot be read ({error.strerror})") from error
    if path.suffix == ".py":
        raise SourceError(f"is Python; name a function in it that returns images: --data {path}:FUNCTION")
    return path


def _prepare_files(path: Path, data_dir: Path, image_size: int, show: Progress, processes: int) -> ImageData:
    show("listing files", 0, 0)
    listing, names, signature = scan(path)
    records, name = data_dir / "sources", printable(path.absolute().name)
    signature = hashlib.sha256(f"{FORMAT_VERSION} {signature}".encode()).hexdigest()

    def find(content: str, notes: Iterable[str]) -> ImageData | None:
        data = cached(folder_of(data_dir, content, image_size), name)
        return data and replace(data, notes=(*notes, *data.notes))

    def find_unchanged() -> ImageData | None:
        """Return the decoded images of a source that has not changed since it was last read."""
        for record in records.glob(f"*-{signature}.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged
                fields = json.loads(record.read_text())
                return find(fields["content"], fields["notes"])
        return None

    if data := find_unchanged():
        return data
    with locked(data_dir, show), partial_folder(data_dir) as partial:
        if data := find_unchanged():  # prepared by the process that held the lock
            return data
        archive = None if path.is_dir() else Archive(path, show)
        if archive:
            archive.check(listing)
        else:
            list_files(listing, names)
        listing.entries.sort()
        tree = read_tree(listing)
        files = _Files(_unpacked(archive, partial, show) if archive else path, partial, tree, show, processes)
        sizes = hashlib.sha256(_lines(tree.paths, (entry.size for entry in tree.entries))).hexdigest()
        # Files of the same names and sizes were decoded before: compare contents before decoding again.
        content = files.read("comparing")[0] if any(records.glob(f"{sizes}-*")) else None
        data = find(content, tree.notes) if content else None
        if not data:
            content, rotated = files.decode(image_size)
            note = f"rotated {rotated:,} of {len(tree.entries):,} images by their EXIF orientation"
            data = describe(partial / KEPT, name, tree.classes, (note,) if rotated else (), tree.val_count)
            data = keep(partial, folder_of(data_dir, content, image_size), data)
            data = replace(data, notes=tree.notes + data.notes)
        records.mkdir(exist_ok=True)
        record = records / f"{sizes}-{signature}.json"
        record.write_text(json.dumps({"content": content, "notes": tree.notes}))
        return data


def _unpacked(archive: Archive, folder: Path, show: Progress) -> Path:
    """Return the file that holds a checked archive's images at their offsets."""
    needed, free = archive.unpacked_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise SourceError(
            f"needs {needed:,} bytes to be unpacked, and --data-dir has {free:,} free; free some, or give "
            "another --data-dir, or the unpacked folder"
        )
    if needed:
        show("unpacking", 0, 0)
    return archive.unpack(folder / "unpacked")


class _OtherSizeError(Exception):
    """Not all images have the size of the first one."""


@dataclass
class _Files:
    """The image files of a folder or archive, read by Decoder in several processes."""

    source: Path  # Decoder's
    partial: Path  # of partial_folder
    tree: Tree
    show: Progress
    processes: int

    def __post_init__(self) -> None:
        tree, self.folder = self.tree, self.partial / KEPT
        self.is_test = draw_test(tree.labels) if tree.is_test is None else tree.is_test
        tests_before = np.cumsum(self.is_test) - self.is_test  # each image
        self.rows = np.where(self.is_test, tests_before, np.arange(len(self.is_test)) - tests_before)

    def decode(self, image_size: int) -> tuple[str, int]:
        """Decode every image; return what read() does.

        Images of one square size of at most `image_size` are stored as they are; otherwise each is resized,
        and a rectangle squeezed, to `image_size` × `image_size`.
        """
        for split, chosen in (("train", ~self.is_test), ("test", self.is_test)):
            np.save(self.folder / f"{split}_labels.npy", self.tree.labels[chosen])
        with contextlib.closing(Decoder(str(self.source))) as decoder:
            width, height = decoder.size_of(self.tree.entries[0])
        if width == height < image_size:
            with contextlib.suppress(_OtherSizeError):
                return self.read("decoding", outputs=self._allocate(width), size=width)
        return self.read("decoding", outputs=self._allocate(image_size), size=image_size, resize=True)

    def read(self, phase: str, **options: Any) -> tuple[str, int]:
        """Read every file and, if the options (Decoder's) name outputs, decode it.

        Returns:
            A hash of all contents, and the number of images rotated.

        Raises:
            SourceError: A file cannot be read or decoded.
            _OtherSizeError: An image would have to be resized.
        """
        sizes = [entry.size for entry in self.tree.entries]
        parts = _parts(sizes, 3 * options.get("size", 0) ** 2)
        processes = min(self.processes, (sum(sizes) + FILE_BYTES * len(sizes)) // PROCESS_BYTES)
        images = list(
            zip(self.tree.entries, self.is_test.astype(int).tolist(), self.rows.tolist(), strict=True)
        )
        content, rotated = hashlib.sha256(), 0
        self.show(phase, 0, len(sizes))
        arguments = {"source": str(self.source), **options}
        answers = _decode(arguments, [images[part] for part in parts], self.partial, processes)
        with contextlib.closing(answers):
            for part, answer in zip(parts, answers, strict=True):
                if "other_size" in answer:
                    raise _OtherSizeError
                if "refused" in answer:
                    raise SourceError(answer["refused"])
                if "failed" in answer:
                    raise OSError(*answer["failed"])
                content.update(_lines(self.tree.paths[part], answer["sha256"]))
                rotated += answer["rotated"]
                self.show(phase, part.stop, len(sizes))
        return content.hexdigest(), rotated

    def _allocate(self, size: int) -> list[tuple[str, int]]:
        """Return per split the file for its images and the offset of the first."""
        tests = int(self.is_test.sum())
        arrays = allocate_images(self.folder, (len(self.is_test) - tests, tests), size)
        return [(str(array.filename), array.offset) for array in arrays]


def _parts(sizes: list[int], stored_bytes: int) -> list[slice]:
    """Return the chunks of files of these sizes, each decoded to `stored_bytes`."""
    parts, start, nbytes = [], 0, 0
    for stop, size in enumerate(sizes, 1):
        nbytes += size + stored_bytes
        if stop - start == CHUNK_IMAGES or nbytes >= CHUNK_BYTES or stop == len(sizes):
            parts.append(slice(start, stop))
            start, nbytes = stop, 0
    return parts


def _lines(paths: Iterable[str], values: Iterable[object]) -> bytes:
    lines = (f"{path}\0{value}\n" for path, value in zip(paths, values, strict=True))
    return "".join(lines).encode("utf-8", "surrogateescape")


def _decode(
    arguments: dict[str, Any], chunks: list[list[Any]], folder: Path, processes: int
) -> Generator[dict[str, Any]]:
    """Yield Decoder.run's answer to each chunk, in order; one process is this one.

    Args:
        arguments: Decoder's.
        chunks: Arguments of Decoder.run.
        folder: Where to write them for the processes.
        processes: Number of processes; the K-th takes every K-th chunk.

    Raises:
        ValueError: A process cannot be started, or died.
    """
    if processes <= 1:
        with contextlib.closing(Decoder(**arguments)) as decoder:
            yield from map(decoder.run, chunks)
        return
    with (folder / "chunks").open("w") as file:
        for line in (arguments, *chunks):
            file.write(json.dumps(line) + "\n")
    with contextlib.ExitStack() as started:
        workers = [started.enter_context(_process(folder / "chunks", k, processes)) for k in range(processes)]
        for number in range(len(chunks)):
            worker = workers[number % processes]
            assert worker.stdout
            if not (answer := worker.stdout.readline()):
                code = worker.wait()
                reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise ValueError(
                    f"a process that decodes images died ({reason}); free memory, or give a smaller "
                    "--image-size"
                )
            yield json.loads(answer)


@contextlib.contextmanager
def _process(chunks: Path, first: int, step: int) -> Iterator[subprocess.Popen[str]]:
    """Context manager: a process of decoding.py, killed at the end."""
    # -P keeps the working directory off sys.path. In its own session, Ctrl-C does not reach the process;
    # it exits when it writes an answer that nobody reads, that is, with this process.
    command = [sys.executable, "-P", decoding.__file__, str(chunks), str(first), str(step)]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    except OSError as error:
        raise ValueError(f"cannot start processes that decode ({error.strerror}); free memory") from error
    with process:
        try:
            yield process
        finally:
            process.kill()


def _prepare_built_in(source: str, data_dir: Path, image_size: int, show: Progress) -> ImageData:
    image_size = min(image_size, BUILT_IN_SIZE)  # one folder for every larger size
    folder = folder_of(data_dir, source, image_size)
    if data := cached(folder, source):
        return data
    with locked(data_dir, show), partial_folder(data_dir) as partial:
        if data := cached(folder, source):
            return data
        given = _cifar10(data_dir) if source == "cifar10" else _digits(image_size)
        images = OwnImages(source, given, None)
        images.write(partial / KEPT, image_size, show)  # of the digits it draws the test images
        return keep(partial, folder, describe(partial / KEPT, source, images.classes))


def _cifar10(data_dir: Path) -> dict[str, Any]:
    from torchvision.datasets import CIFAR10  # here, since its import takes 2 s

    try:
        train, test = (CIFAR10(str(data_dir), train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise SourceError(
            f"could not be downloaded ({error}); without a network put cifar-10-python.tar.gz "
            f"into --data-dir={printable(str(data_dir))}, or give --data PATH, a folder or archive of images "
            "train/CLASS/*.png and test/CLASS/*.png"
        ) from error
    splits = {name: (part.data, part.targets) for name, part in (("train", train), ("test", test))}
    return {**splits, "classes": train.classes}


def _digits(image_size: int) -> dict[str, Any]:
    from sklearn.datasets import load_digits

    digits, size = load_digits(), (image_size, image_size)
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the originals' range is 0..16
    images = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in grey]
    return {"train": (np.stack(images), digits.target), "classes": list(map(str, digits.target_names))}
