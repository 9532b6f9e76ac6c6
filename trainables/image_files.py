"""List the image files of a folder, and find the class of each image of a folder or archive."""

import hashlib
import itertools
import os
import posixpath
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tunefleet.cli import counted, printable
from tunefleet.trainables.decoding import (
    CAMERA_RAW,
    HEAD_BYTES,
    RAW_SUFFIXES,
    Entry,
    SourceError,
    format_of,
    reason_to_skip,
)

SUFFIXES = tuple(  # such a file is an image, or damaged; for other files the first bytes decide
    f".{name}"
    for name in "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png ppm tif tiff webp".split()  # noqa: SIM905
)
DEEPEST = 4  # path parts of TOP/train/CLASS/FILE; a folder is walked one level deeper, to report images there
MAX_IMAGE_BYTES = 500_000_000
TICK_SECONDS = 0.02  # changes within one tick of the kernel's clock (at most 0.01 s) get the same time
VALIDATION = ("val", "valid", "validation")  # names of a folder of validation images; all sort after train
SPLITS = frozenset(("train", "test", *VALIDATION))
LAYOUT = (
    "give train/CLASS/FILE and test/CLASS/FILE, perhaps val/CLASS/FILE, or CLASS/FILE alone, of which a part "
    "becomes the test images"
)


@dataclass
class Listing:
    """The contents of a folder or archive; names are paths inside it."""

    path: Path
    entries: list[Entry] = field(default_factory=list)  # the images
    folders: set[str] = field(default_factory=set)  # except hidden ones
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)  # files by folder and reason

    def accepts(self, name: str, size: int, read_head: Callable[[], bytes]) -> bool:
        """Return whether a file is an image; otherwise count it as skipped.

        Raises:
            SourceError: The image is too large.
        """
        folder, _, file = name.rpartition("/")
        if is_hidden(name):
            self.skipped[folder, "hidden"] += 1
            return False
        self.add_folder(folder)
        if not (suffix := file.lower()).endswith(SUFFIXES):
            raw = suffix.endswith(RAW_SUFFIXES)
            if raw or not format_of(head := read_head()):
                self.skipped[folder, CAMERA_RAW if raw else reason_to_skip(head)] += 1
                return False
        if size > MAX_IMAGE_BYTES:
            raise SourceError(f"holds {name!r} of {size:,} bytes; {MAX_IMAGE_BYTES:,} are allowed")
        return True

    def add_folder(self, name: str) -> None:
        """Add a folder and its parents, unless hidden."""
        while name and name not in self.folders and not is_hidden(name):
            self.folders.add(name)
            name = posixpath.dirname(name)


def scan(path: Path) -> tuple[Listing, list[tuple[str, int]], str]:
    """Look at a folder or archive of images without opening a file.

    Returns:
        A folder's listing without its images, the names and sizes of its files, and a signature that changes
        whenever the images may have: a hash of names, devices, inodes, sizes, mtimes and ctimes, which no
        program can set.

    Raises:
        SourceError: The path cannot be read.
    """
    listing = Listing(path)
    try:
        found = sorted(_walk(listing)) if path.is_dir() else [("", *_identity(path.stat()))]
    except OSError as error:
        raise SourceError(f"cannot be read ({error})") from error
    digest = hashlib.sha256(repr((sorted(listing.folders), sorted(listing.skipped.items()))).encode())
    for name, _, _, identity in found:
        digest.update(f"{name!r} {identity}\n".encode())
    newest = max((changed for _, _, changed, _ in found), default=0)
    if time.time_ns() - newest < TICK_SECONDS * 1e9:
        time.sleep(TICK_SECONDS)  # otherwise a change before the files are read might go unnoticed
    return listing, [(name, size) for name, size, _, _ in found], digest.hexdigest()


def list_files(listing: Listing, files: list[tuple[str, int]]) -> None:
    """Add the images among a folder's files to its listing, by suffix or first bytes.

    Raises:
        SourceError: A file cannot be read, or is too large.
    """

    def head_of(name: str) -> bytes:
        with (listing.path / name).open("rb", buffering=0) as file:
            return file.read(HEAD_BYTES)

    try:
        for name, size in files:
            if listing.accepts(name, size, lambda: head_of(name)):  # noqa: B023  called at once
                listing.entries.append(Entry(name, size))
    except OSError as error:
        raise SourceError(f"cannot be read ({error})") from error


def is_hidden(name: str) -> bool:
    """Return whether a file or folder, or one of its parents, is hidden.

    macOS packs a "._NAME" beside each NAME in a tar, and a __MACOSX folder in a zip; neither holds images.
    """
    return "/." in f"/{name}" or "/__MACOSX/" in f"/{name}/"


def _identity(status: os.stat_result) -> tuple[int, int, str]:
    """Return a file's size, its ctime, and what changes if another file replaces it or it changes."""
    changed = status.st_ctime_ns
    text = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {changed}"
    return status.st_size, changed, text


def _walk(listing: Listing) -> Iterator[tuple[str, int, int, str]]:
    """Yield name and identity of each regular file; add folders and skipped files to the listing."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(listing.path / folder) as items:
            for item in items:
                name = f"{folder}/{item.name}" if folder else item.name
                if is_hidden(item.name):
                    listing.skipped[folder, "hidden"] += 1
                    continue
                try:
                    status = item.stat()
                except OSError:
                    if not item.is_symlink():
                        raise
                    listing.skipped[folder, "broken link"] += 1
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield name, *_identity(status)
                elif not stat.S_ISDIR(status.st_mode):
                    listing.skipped[folder, "not a regular file"] += 1
                else:
                    listing.folders.add(name)
                    if name.count("/") < DEEPEST:  # also ends a loop of links
                        waiting.append(name)
                    else:
                        listing.skipped[folder, "folder nested too deep"] += 1


@dataclass(frozen=True)
class Tree:
    """The images of a folder or archive and their classes, sorted by name."""

    entries: list[Entry]
    paths: list[str]  # per image: train/CLASS/FILE or CLASS/FILE, without a folder around all
    classes: tuple[str, ...]  # sorted
    labels: np.ndarray  # int64 (N,), indices into classes
    is_test: np.ndarray | None  # bool (N,); None where none is given
    val_count: int  # of those that don't test, how many at the end validate; 0: they are drawn
    notes: tuple[str, ...]  # for the user


def read_tree(listing: Listing) -> Tree:
    """Find the images' classes.

    Raises:
        SourceError: The layout is not `train/CLASS/FILE` and `test/CLASS/FILE`, `train/CLASS/FILE` alone or
            `CLASS/FILE`, perhaps inside a single top folder; or there are too few classes, or a class has
            too few images.
    """
    entries = listing.entries
    skipped = _skipped(listing.skipped)
    if not entries:
        raise SourceError(f"holds no images{f' ({skipped})' if skipped else ''}; {LAYOUT}")
    for before, after in itertools.pairwise(entries):
        if before.name == after.name:
            raise SourceError(f"holds {after.name!r} more than once; pack it again")

    top = _top(entries)
    paths = [entry.name.removeprefix(top) for entry in entries]
    is_split = any(path.count("/") > 1 and path.partition("/")[0] in SPLITS for path in paths)
    depth = 2 if is_split else 1
    tops = {path.partition("/")[0] for path in paths}
    validation = sorted(tops & set(VALIDATION)) if is_split else []
    if is_split and (not tops <= SPLITS or len(validation) > 1):
        raise SourceError(f"holds {_listed(tops)}, not train/, val/ and test/ alone; {LAYOUT}")
    for entry, path in zip(entries, paths, strict=True):
        if path.count("/") != depth:
            raise SourceError(f"holds {entry.name!r}, which is in no class's folder; {LAYOUT}")
    if is_split and "train" not in tops:
        raise SourceError(f"holds {_listed(tops)} but no train/; {LAYOUT}")

    folders = [path.split("/")[depth - 1] for path in paths]
    _check_folders(listing, top, {path.rpartition("/")[0] for path in paths})
    names = sorted(set(folders))
    index = {name: label for label, name in enumerate(names)}
    notes = [f"skipped in {printable(str(listing.path))}: {skipped}"] if skipped else []
    tested = "test" if is_split and "test" in tops else validation[0] if validation else ""
    if not tested:
        notes.append("no test/ folder: 20 % of each class's images are used as test images")
    elif tested != "test":
        notes.append(
            f"no test/ folder: {tested}/ is the test split, and validation images are drawn from train/"
        )
    validates = tuple(f"{name}/" for name in validation if name != tested)
    tree = Tree(
        entries=entries,
        paths=paths,
        classes=tuple(printable(name) for name in names),
        labels=np.array([index[name] for name in folders], dtype=np.int64),
        is_test=np.array([path.startswith(f"{tested}/") for path in paths]) if tested else None,
        val_count=sum(path.startswith(validates) for path in paths),
        notes=tuple(notes),
    )
    check_classes(tree.classes, tree.labels, tree.is_test, tree.val_count, f"{tested}/")
    return tree


def _top(entries: list[Entry]) -> str:
    """Return the folder around all images that is neither a class nor a split, with its slash, or ""."""
    tops = {entry.name.partition("/")[0] for entry in entries}
    top = tops.pop()
    parts_min = 1 + min(entry.name.count("/") for entry in entries)
    return f"{top}/" if not tops and parts_min > (3 if top in SPLITS else 2) else ""


def _check_folders(listing: Listing, top: str, filled: set[str]) -> None:
    """Raise SourceError if a folder beside the class folders has no image: it is meant as a class."""
    parents = {folder.rpartition("/")[0] for folder in filled}
    for folder in sorted(listing.folders):
        path = folder.removeprefix(top)
        if folder.startswith(top) and path.rpartition("/")[0] in parents and path not in filled:
            within = Counter(
                {key: n for key, n in listing.skipped.items() if f"{key[0]}/".startswith(f"{folder}/")}
            )
            reason = f" ({_skipped(within)})" if within else ""
            raise SourceError(
                f"holds the folder {folder!r}, which has no readable image{reason}; "
                "add images or remove the folder"
            )


def check_classes(
    classes: tuple[str, ...],
    labels: np.ndarray,
    is_test: np.ndarray | None,
    val_count: int = 0,
    tested: str = "test/",
) -> None:
    """Check that each class has a test image and, for validation, two training images.

    The arguments are Tree's, and what is called the test split.

    Raises:
        SourceError: One of them has not, or there is one class only.
    """
    if len(classes) < 2:
        raise SourceError(f"holds one class only, {classes[0]!r}; give two or more")
    counts = {"": labels}
    if is_test is not None:
        train = labels[~is_test]
        counts = {"train/": train[: len(train) - val_count], tested: labels[is_test]}
    fewest = {"": 3, "train/": 1 if val_count else 2, tested: 1}
    for folder, of_split in counts.items():
        for name, count in zip(classes, np.bincount(of_split, minlength=len(classes)), strict=True):
            if count < fewest[folder]:
                raise SourceError(
                    f"holds {counted(count, 'image')} of class {name!r} in {folder or 'its folder'}; "
                    f"every class needs {fewest[folder]} or more there; add images or remove the class"
                )


def _skipped(counts: Counter[tuple[str, str]]) -> str:
    """Return the number of skipped files per reason, as text."""
    reasons: Counter[str] = Counter()
    for (_, reason), count in counts.items():
        reasons[reason] += count
    return ", ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common())


def _listed(folders: set[str]) -> str:
    shown = sorted(map(printable, folders))
    return ", ".join(f"{name}/" for name in shown[:5]) + (
        f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    )
