"""Check every member of an archive, then unpack its images into one file of the cache.

No member is written under its own name, so none can be written outside. An uncompressed tar is its own
unpacked file. (tarfile.extractall takes 0.2 ms per image: for 60,000 more than decoding them.)
"""

import contextlib
import fcntl
import lzma
import os
import posixpath
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tunefleet.files import is_full
from tunefleet.trainables.data import Progress
from tunefleet.trainables.decoding import HEAD_BYTES, Entry, SourceError
from tunefleet.trainables.image_files import Listing

MAX_MEMBERS = 10_000_000
MAX_EXPANSION = 200  # unpacked bytes per archive byte; JPEGs reach about 5, line drawings as BMP about 50
ALWAYS_ALLOWED_BYTES = 1_000_000_000  # below this, no expansion is suspicious
MAGIC_BYTES = 262  # a tar file says "ustar" at byte 257
COPIED_BYTES = 1 << 20  # at a time
KEPT_BYTES = 1 << 28  # of a compressed tar, from its check; a larger one is decompressed a second time
PROGRESS_MEMBERS = 5_000
DECOMPRESSORS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "lzma"}  # Python's modules
# In a process of its own, decompression runs beside tarfile, which is as slow.
DECOMPRESS = "import {0}, shutil, sys; shutil.copyfileobj({0}.open(sys.stdin.buffer), sys.stdout.buffer)"
PIPE_BYTES = 1 << 20  # between the two; with Linux's 64 KiB they take turns
# What the readers of archives raise on missing or wrong bytes.
DAMAGE = (
    OSError,
    EOFError,
    UnicodeDecodeError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


class Archive:
    """An archive of images.

    Attributes:
        unpacked_bytes: What unpack() will write; known after check().

    Raises:
        SourceError: The file cannot be read, or is no archive.
    """

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self.progress = path, progress
        try:
            if not path.is_file():  # a pipe would block
                raise OSError("not a regular file")
            with path.open("rb") as file:
                magic = file.read(MAGIC_BYTES)
            self.bytes = path.stat().st_size
        except OSError as error:
            raise SourceError(f"cannot be read ({error})") from error
        self.is_zip = magic.startswith(b"PK")
        self.module = next((name for start, name in DECOMPRESSORS.items() if magic.startswith(start)), None)
        if not (self.is_zip or self.module or magic.endswith(b"ustar")):
            raise SourceError("is neither a folder nor an archive (.tar, .tar.gz, .tar.bz2, .tar.xz, .zip)")
        self.limit = max(MAX_EXPANSION * self.bytes, ALWAYS_ALLOWED_BYTES)
        self.members = self.member_bytes = self.unpacked_bytes = 0
        self.zipped: list[zipfile.ZipInfo] = []  # the images
        self.kept: _KeepingStream | None = None

    def check(self, listing: Listing) -> None:
        """Add images and folders to the listing; write nothing.

        Raises:
            SourceError: The archive is truncated, or holds a member that is unsafe (absolute, `..`, a link, a
                device) or unpacks to suspiciously much.
        """
        with _damage_named():
            if self.is_zip:
                self._check_zip(listing)
            elif self.module:
                with self._decompressed() as stream:
                    self.kept = _KeepingStream(stream)
                    self._check_tar(listing, self.kept, "r|")
            else:
                with self.path.open("rb") as self.file:
                    self._check_tar(listing, self.file, "r:")

    def unpack(self, spool: Path) -> Path:
        """Return the file in which the images are at their offsets: the archive, or `spool`, then written.

        Raises:
            SourceError: The archive is corrupt.
            OSError: `spool` cannot be written.
        """
        if not (self.is_zip or self.module):
            return self.path
        with spool.open("wb", buffering=COPIED_BYTES) as output, _damage_named():
            if self.is_zip:
                with zipfile.ZipFile(self.path) as archive:
                    for member in self.zipped:
                        with archive.open(member) as content:
                            shutil.copyfileobj(content, output, COPIED_BYTES)
            elif self.kept and self.kept.content is not None:
                output.write(self.kept.content)
                self.kept = None
            else:
                left = self.unpacked_bytes  # not what follows the tar's end: it was not checked
                with self._decompressed() as stream:
                    while piece := stream.read(min(left, COPIED_BYTES)):
                        left -= output.write(piece)
        return spool

    def _check_tar(self, listing: Listing, stream: Any, mode: Any) -> None:
        with tarfile.open(fileobj=stream, mode=mode, tarinfo=_TarInfo) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
                self._check(member.name, member.size, os.lseek(self.file.fileno(), 0, os.SEEK_CUR))
                name = posixpath.normpath(member.name)  # ./CLASS/FILE is CLASS/FILE
                if member.isdir():
                    listing.add_folder(name)
                elif not member.isreg():
                    raise SourceError(
                        f"holds {member.name!r}, a link or device, and only files and folders are read; "
                        "pack it again with tar --dereference --hard-dereference"
                    )
                elif member.issparse():
                    raise SourceError(f"holds {member.name!r} with holes; pack it again without --sparse")
                elif listing.accepts(name, member.size, lambda: _head(tar.extractfile(member))):
                    listing.entries.append(Entry(name, member.size, member.offset_data))
            self.unpacked_bytes = tar.offset if self.module else 0

    def _check_zip(self, listing: Listing) -> None:
        if _count_zip(self.path) > MAX_MEMBERS:  # zipfile loads the whole directory
            raise _too_many()
        with zipfile.ZipFile(self.path) as archive:
            for member in archive.infolist():
                self._check(member.filename, member.file_size, member.header_offset)
                # Some Windows programs write backslashes.
                name = posixpath.normpath(member.filename.replace("\\", "/"))
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise SourceError(
                        f"holds {member.filename!r}, a link, and only files and folders are read; "
                        "pack it again without --symlinks"
                    )
                if member.filename.endswith(("/", "\\")):
                    listing.add_folder(name)
                elif listing.accepts(name, member.file_size, lambda: _head(archive.open(member))):  # noqa: B023
                    listing.entries.append(Entry(name, member.file_size, self.unpacked_bytes))
                    self.unpacked_bytes += member.file_size
                    self.zipped.append(member)

    def _check(self, name: str, size: int, position: int) -> None:
        """Check a member's name and size; `position` is how far the archive is read."""
        self.members += 1
        self.member_bytes += size
        if self.members % PROGRESS_MEMBERS == 0:
            self.progress(f"{100 * position / self.bytes:.0f} % of the archive", 0, 0)
        parts = name.replace("\\", "/").split("/")
        if not parts[0] or ".." in parts:
            raise SourceError(f"holds {name!r}, which points outside; pack it again without")
        if self.member_bytes > self.limit:
            raise SourceError(
                f"unpacks to more than {self.limit:,} bytes ({MAX_EXPANSION} times its "
                "size), as a decompression bomb would; if you trust it, unpack it and give the folder"
            )
        if self.members > MAX_MEMBERS:
            raise _too_many()

    @contextlib.contextmanager
    def _decompressed(self) -> Iterator[IO[bytes]]:
        """Context manager: the tar, decompressed in another process; `self.file` advances with it."""
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", "-c", DECOMPRESS.format(self.module)]
        with (
            self.path.open("rb") as self.file,
            subprocess.Popen(
                command, stdin=self.file, stdout=pipe, stderr=pipe, start_new_session=True
            ) as process,
        ):
            try:
                assert process.stdout
                assert process.stderr
                with contextlib.suppress(OSError):  # more than the system allows
                    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
                yield process.stdout
                while process.stdout.read(COPIED_BYTES):  # gzip and xz verify their checksums at the very end
                    pass
                if process.wait():
                    message = process.stderr.read().decode(errors="replace")
                    raise EOFError(message.strip().rpartition("\n")[2])
            finally:
                process.kill()


class _KeepingStream:
    """A stream that keeps what is read from it in `content`, which is None above KEPT_BYTES."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.content: bytearray | None = bytearray()

    def read(self, size: int) -> bytes:
        piece = self.stream.read(size)
        if self.content is not None:
            self.content += piece
            if len(self.content) > KEPT_BYTES:
                self.content = None
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
def _damage_named() -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        if is_full(error):  # the disk to which the archive is unpacked
            raise
        raise SourceError(f"is truncated or corrupt ({error}); copy it again") from error
    except RuntimeError as error:  # of zipfile: a password, or a compression that Python lacks
        raise SourceError(f"cannot be unpacked ({error}); pack it again") from error


def _head(content: IO[bytes] | None) -> bytes:
    assert content
    with content:
        return content.read(HEAD_BYTES)


def _too_many() -> SourceError:
    return SourceError(f"holds more than {MAX_MEMBERS:,} files; unpack it and give the folder")


def _count_zip(path: Path) -> int:
    """Return the number of members that the end of a zip states; 0 if it states none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 17)))  # a comment of 64 KiB may follow
        tail = file.read()
    end, end64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    if end64 >= 0 and len(tail) >= end64 + 40:
        return int.from_bytes(tail[end64 + 32 : end64 + 40], "little")
    return int.from_bytes(tail[end + 10 : end + 12], "little") if end >= 0 else 0
