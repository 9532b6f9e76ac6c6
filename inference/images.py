"""Read the images of files, folders and archives one by one; what cannot be read is skipped with a line."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from tunefleet.trainables.archives import Archive
from tunefleet.trainables.decoding import (
    HEAD_BYTES,
    Decoder,
    Entry,
    SourceError,
    format_of,
    reason_to_skip,
)
from tunefleet.trainables.image_files import SUFFIXES, Listing, scan

Skip = Callable[[str], None]  # gets a line per file, or per kind of file, that is skipped


def read_images(paths: Iterable[Path], size: int, data_dir: Path, skip: Skip) -> Iterator[tuple[str, bytes]]:
    """Yield each image's path and its pixels, uint8 ``(3, size, size)``, decoded as for training.

    Args:
        paths: Images, folders (four levels deep) and archives.
        size: Pixels per side.
        data_dir: Where archives are unpacked meanwhile.
        skip: Gets a line for what is skipped; hidden files are, without one.
    """
    for path in paths:
        try:
            if not path.exists():
                raise SourceError("does not exist")
            if path.is_dir():
                yield from _of_folder(path, size, skip)
            elif _is_image(path):
                yield from _decoded(path.parent, [Entry(path.name, path.stat().st_size)], size, skip)
            else:
                yield from _of_archive(path, size, data_dir, skip)
        except SourceError as error:
            skip(f"{path} {error}")
        except OSError as error:
            if error.filename is None:  # the disk, not the path
                raise
            skip(f"{path} cannot be read ({error.strerror})")


def _is_image(path: Path) -> bool:
    """Return whether to decode a file; raise SourceError where it is no archive either."""
    if not path.is_file():  # a pipe would block
        raise SourceError("is not a regular file")
    head = _head(path)
    if format_of(head) or path.name.lower().endswith(SUFFIXES):
        return True
    try:
        Archive(path, _no_progress)
    except SourceError:
        raise SourceError(f"is {reason_to_skip(head)}") from None
    return False


def _of_folder(path: Path, size: int, skip: Skip) -> Iterator[tuple[str, bytes]]:
    listing, files, _ = scan(path)
    for name, file_size in files:
        try:
            if listing.accepts(name, file_size, partial(_head, path / name)):
                listing.entries.append(Entry(name, file_size))
        except OSError as error:
            skip(f"{path / name} cannot be read ({error.strerror})")
        except SourceError as error:
            skip(f"{path} {error}")
    _say_skipped(listing, skip)
    yield from _decoded(path, listing.entries, size, skip)


def _of_archive(path: Path, size: int, data_dir: Path, skip: Skip) -> Iterator[tuple[str, bytes]]:
    archive, listing = Archive(path, _no_progress), Listing(path)
    archive.check(listing)
    _say_skipped(listing, skip)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=data_dir)
    except OSError as error:
        raise ValueError(
            f"--data-dir={data_dir} cannot be written ({error.strerror}); give another"
        ) from error
    with temporary as folder:
        unpacked = archive.unpack(Path(folder) / "unpacked")
        yield from _decoded(unpacked, listing.entries, size, skip, path)


def _decoded(
    source: Path, entries: list[Entry], size: int, skip: Skip, shown: Path | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield the images of a folder, or of the one file in which they are; named as in ``shown``."""
    shown = shown or source
    with contextlib.closing(Decoder(str(source), size=size, resize=True)) as decoder:
        for entry in sorted(entries):
            try:
                pixels = decoder.pixels_of(entry)
            except SourceError as error:
                skip(f"{shown / entry.name} {error}")
            else:
                yield str(shown / entry.name), pixels


def _say_skipped(listing: Listing, skip: Skip) -> None:
    """Say how many files of a folder or archive are skipped, a line per reason; hidden ones do not count."""
    reasons: Counter[str] = Counter()
    for (_, reason), count in listing.skipped.items():
        reasons[reason] += count
    del reasons["hidden"]
    for reason, count in reasons.most_common():
        skip(f"{listing.path} holds {count:,} × {reason}")
    if not listing.entries and not reasons:
        skip(f"{listing.path} holds no images")


def _head(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(HEAD_BYTES)


def _no_progress(phase: str, done: int, total: int) -> None:
    """Show nothing: predicting prints results only."""
