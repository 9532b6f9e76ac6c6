"""Which image files does a folder or an archive hold, and where are their bytes?

No archive is unpacked to its members' names, so no member can be written outside. Images that cannot be read
from the archive itself (those of a compressed tar) are written to a single file, the spool.
"""

import contextlib
import fcntl
import hashlib
import lzma
import os
import posixpath
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from tunefleet.trainables.decoding import HEAD_BYTES, Entry, SourceError, format_of, reason_to_skip

Progress = Callable[[str, int, int], None]  # phase, done, total: see tunefleet.trainables.data.prepare
SUFFIXES = tuple(  # such a file is an image, or damaged; for other files the first bytes decide
    f".{name}"
    for name in "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png ppm tif tiff webp".split()  # noqa: SIM905
)
DEEPEST = 4  # path parts of TOP/train/CLASS/FILE; a folder is walked one level deeper, to report images there
MAX_MEMBERS = 10_000_000  # of an archive
MAX_IMAGE_BYTES = 500_000_000
MAX_EXPANSION = 200  # unpacked bytes per archive byte; JPEGs reach about 5, line drawings as BMP about 50
ALWAYS_ALLOWED_BYTES = 1_000_000_000  # below this, no expansion is suspicious
MAGIC_BYTES = 262  # a tar file says "ustar" at byte 257
COPIED_BYTES = 1 << 20  # at a time
PROGRESS_MEMBERS = 5_000
RAW_SUFFIXES = (".3fr", ".arw", ".cr2", ".dng", ".erf", ".nef", ".nrw", ".pef", ".srw")  # TIFF by content
CAMERA_RAW = "camera raw (not supported; convert to JPEG)"
TICK_SECONDS = 0.02  # changes within one tick of the kernel's clock (at most 0.01 s) get the same time
DECOMPRESSORS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "lzma"}  # Python's modules
# In a process of its own, decompression runs beside tarfile, which is as slow.
DECOMPRESS = "import {0}, shutil, sys; shutil.copyfileobj({0}.open(sys.stdin.buffer), sys.stdout.buffer)"
PIPE_BYTES = 1 << 20  # between the two; with Linux's 64 KiB they take turns
# What the readers of archives raise on missing or wrong bytes.
DAMAGE = (
    OSError,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


@dataclass
class Listing:
    """The contents of a folder or archive; names are paths inside it."""

    path: Path
    entries: list[Entry] = field(default_factory=list)  # the images
    folders: set[str] = field(default_factory=set)  # except hidden ones
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)  # files by folder and reason

    def wants(self, name: str, size: int, read_head: Callable[[], bytes]) -> bool:
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


class Source:
    """A folder or archive of images, before it is read.

    Attributes:
        signature: Changes whenever the images may have: a hash of names, devices, inodes, sizes, mtimes
            and ctimes, which no program can set.

    Raises:
        SourceError: The path cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listing = Listing(path)
        self.files: list[tuple[str, int]] = []  # of a folder: names and sizes
        try:
            found = sorted(_scan(self.listing)) if path.is_dir() else [("", *_identity(path.stat()))]
        except OSError as error:
            raise SourceError(f"cannot be read ({error})") from error
        others = (sorted(self.listing.folders), sorted(self.listing.skipped.items()))
        digest = hashlib.sha256(repr(others).encode())
        for name, size, _, identity in found:
            digest.update(f"{name!r} {identity}\n".encode())
            self.files.append((name, size))
        self.signature = digest.hexdigest()
        newest = max((changed for _, _, changed, _ in found), default=0)
        if time.time_ns() - newest < TICK_SECONDS * 1e9:
            time.sleep(TICK_SECONDS)  # otherwise a change before the files are read might go unnoticed

    def read_listing(self, spool: Path, progress: Progress) -> Listing:
        """Return the images, sorted by name; check all members of an archive.

        Args:
            spool: The file to write.
            progress: Called with how much of an archive is read.

        Raises:
            SourceError: The path is no archive, is truncated or corrupt, or holds a member that is unsafe
                (absolute, `..`, a link, a device) or unpacks to suspiciously much.
            OSError: The spool cannot be written.
        """
        if self.path.is_dir():
            self._read_heads()
        else:
            with spool.open("wb", buffering=COPIED_BYTES) as file:
                _Archive(self.listing, file, progress).read()
        self.listing.entries.sort()
        return self.listing

    def _read_heads(self) -> None:
        try:
            for name, size in self.files:
                if self.listing.wants(name, size, partial(self._head, name)):
                    self.listing.entries.append(Entry(name, size))
        except OSError as error:
            raise SourceError(f"cannot be read ({error})") from error

    def _head(self, name: str) -> bytes:
        with (self.path / name).open("rb", buffering=0) as file:
            return file.read(HEAD_BYTES)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder, or one of its parents, is hidden.

    macOS packs a "._NAME" beside each NAME in a tar, and a __MACOSX folder in a zip; neither holds images.
    """
    return "/." in f"/{name}" or "/__MACOSX/" in f"/{name}/"


def printable(text: object) -> str:
    """Return a text with control characters and undecodable bytes escaped: one line, for any terminal."""
    text = os.fsencode(str(text)).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _identity(status: os.stat_result) -> tuple[int, int, str]:
    """Return a file's size, its ctime, and what changes if another file takes its place or it changes."""
    changed = status.st_ctime_ns
    text = f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {changed}"
    return status.st_size, changed, text


def _scan(listing: Listing) -> Iterator[tuple[str, int, int, str]]:
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


class _Archive:
    """Lists an archive's members."""

    def __init__(self, listing: Listing, spool: IO[bytes], progress: Progress) -> None:
        self.listing, self.spool, self.progress = listing, spool, progress
        self.path = listing.path
        self.bytes = self.path.stat().st_size
        self.limit = max(MAX_EXPANSION * self.bytes, ALWAYS_ALLOWED_BYTES)
        self.members = self.unpacked_bytes = 0
        self.spool_failed = False

    def read(self) -> None:
        """Add images and folders to the listing."""
        try:
            if not self.path.is_file():  # a pipe would block
                raise OSError("not a regular file")
            with self.path.open("rb") as file:
                magic = file.read(MAGIC_BYTES)
        except OSError as error:
            raise SourceError(f"cannot be read ({error})") from error
        try:
            if magic.startswith(b"PK"):
                self._read_zip()
                return
            module = next((name for start, name in DECOMPRESSORS.items() if magic.startswith(start)), None)
            if module is None and not magic.endswith(b"ustar"):
                raise SourceError(
                    "is neither a folder nor an archive (.tar, .tar.gz, .tar.bz2, .tar.xz, .zip)"
                )
            self._read_tar(module)
        except DAMAGE as error:
            if self.spool_failed:
                raise
            raise SourceError(f"is truncated or corrupt ({error}); copy it again") from error

    def _read_tar(self, module: str | None) -> None:
        with (
            self.path.open("rb") as file,
            _decompressed(file, module) if module else contextlib.nullcontext(file) as stream,
            tarfile.open(fileobj=stream, mode="r|" if module else "r:", tarinfo=_TarInfo) as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
                self._check(member.name, member.size, file)
                name = posixpath.normpath(member.name)  # ./CLASS/FILE is CLASS/FILE
                if not (member.isreg() or member.isdir()):
                    raise SourceError(
                        f"holds {member.name!r}, a link or device, and only files and "
                        "folders are read; pack it again with tar --dereference --hard-dereference"
                    )
                if member.isdir():
                    self.listing.add_folder(name)
                    continue
                content = _Member(tar.extractfile(member) if member.issparse() else tar.fileobj, member.size)
                if not self.listing.wants(name, member.size, content.read_head):
                    continue
                if module or member.issparse():
                    self._spool(name, member.size, content)
                else:
                    self.listing.entries.append(Entry(name, member.size, "raw", member.offset_data))

    def _read_zip(self) -> None:
        if _count_zip(self.path) > MAX_MEMBERS:  # zipfile loads the whole directory
            raise self._too_many()
        with zipfile.ZipFile(self.path) as archive:
            for member in archive.infolist():
                self._check(member.filename, member.file_size, member.header_offset)
                # Some Windows programs write backslashes.
                name = posixpath.normpath(member.filename.replace("\\", "/"))
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise SourceError(
                        f"holds {member.filename!r}, a link, and only files and folders "
                        "are read; pack it again without --symlinks"
                    )
                if member.filename.endswith(("/", "\\")):
                    self.listing.add_folder(name)
                    continue
                try:
                    self._add_zipped(archive, member, name)
                except RuntimeError as error:  # a password, or a compression that Python lacks
                    raise SourceError(f"cannot be unpacked ({error}); pack it again") from error

    def _add_zipped(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> None:
        def read_head() -> bytes:
            with archive.open(member) as content:
                return content.read(HEAD_BYTES)

        if not self.listing.wants(name, member.file_size, read_head):
            return
        form = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}.get(member.compress_type)
        if form and not member.flag_bits & 1:  # not encrypted
            where = (member.header_offset, member.compress_size, member.CRC)
            self.listing.entries.append(Entry(name, member.file_size, form, *where))
        else:
            with archive.open(member) as content:
                self._spool(name, member.file_size, _Member(content, member.file_size))

    def _spool(self, name: str, size: int, content: "_Member") -> None:
        """Copy an image to the spool."""
        offset = self.spool.tell()
        for piece in content:
            try:
                self.spool.write(piece)
            except OSError:
                self.spool_failed = True
                raise
        self.listing.entries.append(Entry(name, size, "spooled", offset))

    def _check(self, name: str, size: int, position: IO[bytes] | int) -> None:
        """Check a member's name and size; `position` is how far the archive is read, or its file."""
        self.members += 1
        self.unpacked_bytes += size
        if self.members % PROGRESS_MEMBERS == 0:
            done = position if isinstance(position, int) else os.lseek(position.fileno(), 0, os.SEEK_CUR)
            self.progress(f"{100 * done / self.bytes:.0f} % of the archive", 0, 0)
        parts = name.replace("\\", "/").split("/")
        if not parts[0] or ".." in parts:
            raise SourceError(f"holds {name!r}, which points outside; pack it again without")
        if self.unpacked_bytes > self.limit:
            raise SourceError(
                f"unpacks to more than {self.limit:,} bytes ({MAX_EXPANSION} times its "
                "size), as a decompression bomb would; if you trust it, unpack it and give the folder"
            )
        if self.members > MAX_MEMBERS:
            raise self._too_many()

    def _too_many(self) -> SourceError:
        return SourceError(f"holds more than {MAX_MEMBERS:,} files; unpack it and give the folder")


class _Member:
    """The content of an archive's member, read once and in order.

    Iterating yields all of it in pieces, `head` included.
    """

    def __init__(self, stream: Any, size: int) -> None:
        self.stream, self.left, self.head = stream, size, b""

    def read_head(self) -> bytes:
        """Return the first bytes."""
        self.head = self._read(HEAD_BYTES)
        return self.head

    def __iter__(self) -> Iterator[bytes]:
        yield self.head
        while self.left:
            yield self._read(COPIED_BYTES)

    def _read(self, count: int) -> bytes:
        piece = self.stream.read(min(self.left, count))
        self.left -= len(piece)
        if self.left and not piece:
            raise EOFError("a member ends early")
        return piece


class _TarInfo(tarfile.TarInfo):
    """Accepts only a block of zeros as the end of an archive.

    tarfile (Python 3.11) also takes a damaged header or the end of the file for it.
    """

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_TarInfo":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError("its end is missing or a header is damaged") from error


@contextlib.contextmanager
def _decompressed(file: IO[bytes], module: str) -> Iterator[IO[bytes]]:
    """Context manager: the decompressed stream of a file, whose position advances with it."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-c", DECOMPRESS.format(module)]
    with subprocess.Popen(command, stdin=file, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            assert process.stdout
            assert process.stderr
            with contextlib.suppress(OSError):  # more than the system allows
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            yield process.stdout
            while process.stdout.read(COPIED_BYTES):  # gzip and xz verify their checksums at the very end
                pass
            if process.wait():
                raise EOFError(process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2])
        finally:
            process.kill()


def _count_zip(path: Path) -> int:
    """Return the number of members that the end of a zip states; 0 if it states none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 17)))  # a comment of 64 KiB may follow
        tail = file.read()
    end, end64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    if end64 >= 0 and len(tail) >= end64 + 40:
        return int.from_bytes(tail[end64 + 32 : end64 + 40], "little")
    return int.from_bytes(tail[end + 10 : end + 12], "little") if end >= 0 else 0
