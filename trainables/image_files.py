"""Which image files does a folder or an archive hold, and what are their bytes?

An archive is read as a stream and never unpacked, so no member can be written anywhere.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"})
DEEPEST = 4  # path parts of TOP/train/CLASS/FILE; a folder is walked one further, to report what lies there
MAX_IMAGE_BYTES = 500_000_000
MAX_EXPANSION = 200  # unpacked bytes per archive byte; JPEGs reach about 5, line drawings as BMP about 50
ALWAYS_ALLOWED_BYTES = 1_000_000_000  # below this, no expansion is suspicious
MAGIC_BYTES = 262  # a tar file says "ustar" at byte 257
STREAM_BUFFER_BYTES = 1 << 20
DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
# What the readers of archives raise where bytes are missing or wrong.
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


def image_files(path: Path, *, read: bool) -> Iterator[tuple[str, bytes]]:
    """Yields (path inside `path`, bytes) of every image, known by its suffix; hidden files are passed over.

    A folder's images come in sorted order, an archive's in its own. The bytes are empty unless `read`.
    Every member of an archive is checked, images or not, whether `read` or not.

    Raises:
        ValueError: `path` cannot be read, is no archive, is truncated or corrupt, or holds a member that is
            unsafe (absolute, `..`, a link, a device) or unpacks to suspiciously much.
    """
    if path.is_dir():
        yield from _folder_files(path, read)
        return
    try:
        with path.open("rb") as file:
            magic = file.read(MAGIC_BYTES)
    except OSError as error:
        raise ValueError(f"--data={path} cannot be read ({error})") from error
    try:
        if magic.startswith(b"PK"):
            yield from _zip_files(path, read)
            return
        kind = next((start for start in DECOMPRESSORS if magic.startswith(start)), None)
        if kind is None and not magic.endswith(b"ustar"):
            raise ValueError(
                f"--data={path} is neither a folder nor an archive (.tar, .tar.gz, .tar.bz2, .tar.xz, .zip)"
            )
        yield from _tar_files(path, DECOMPRESSORS[kind] if kind else Path.open, read)
    except DAMAGE as error:
        raise ValueError(f"--data={path} is truncated or corrupt ({error}); copy it again") from error


def fingerprint(path: Path) -> str:
    """A key that changes with the images: an archive's sha256, or that of a folder's names, sizes and mtimes.

    Raises:
        ValueError: `path` cannot be read.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        stats = ((name, (path / name).stat()) for name, _ in image_files(path, read=False))
        listing = [(name, status.st_size, status.st_mtime_ns) for name, status in stats]
    except OSError as error:
        raise ValueError(f"--data={path} cannot be read ({error})") from error
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _is_image(name: str) -> bool:
    # macOS packs a "._NAME" beside each NAME in a tar, and a __MACOSX folder in a zip; neither is images.
    hidden = "/." in f"/{name}" or "__MACOSX/" in name
    return posixpath.splitext(name)[1].lower() in SUFFIXES and not hidden


def _folder_files(folder: Path, read: bool) -> Iterator[tuple[str, bytes]]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    try:
        names = []
        for parent, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
            inside = Path(parent).relative_to(folder)
            if len(inside.parts) >= DEEPEST:
                subfolders.clear()  # also ends a loop of links
            names += [(inside / name).as_posix() for name in files]
        for name in sorted(filter(_is_image, names)):
            yield name, (folder / name).read_bytes() if read else b""
    except OSError as error:
        raise ValueError(f"--data={folder} cannot be read ({error})") from error


def _tar_files(path: Path, open_stream: Callable[..., Any], read: bool) -> Iterator[tuple[str, bytes]]:
    check = _member_check(path)
    with (
        open_stream(path, "rb") as unpacked,
        io.BufferedReader(unpacked, STREAM_BUFFER_BYTES) as stream,  # tarfile reads a header at a time
        tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
        for member in tar:
            name = check(member.name, member.size)
            if not (member.isreg() or member.isdir()):
                raise ValueError(
                    f"--data={path} holds {member.name!r}, a link or device, and only files and folders "
                    "are read; pack it again with tar --dereference --hard-dereference"
                )
            if member.isreg() and _is_image(name):
                content = tar.extractfile(member) if read else None
                yield name, content.read() if content else b""
        # For tarfile (Python 3.11) a damaged header, or the end of the file, is the end of the archive.
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing or a header is damaged")
        while stream.read(STREAM_BUFFER_BYTES):  # gzip and xz compare their checksums at the very end
            pass


def _zip_files(path: Path, read: bool) -> Iterator[tuple[str, bytes]]:
    check = _member_check(path)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = check(member.filename, member.file_size)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(
                    f"--data={path} holds {member.filename!r}, a link, and only files and folders are read; "
                    "pack it again without --symlinks"
                )
            if not member.is_dir() and _is_image(name):
                try:
                    content = archive.read(member) if read else b""
                except RuntimeError as error:  # a password, or a compression that Python lacks
                    raise ValueError(f"--data={path} cannot be unpacked ({error}); pack it again") from error
                yield name, content


def _member_check(path: Path) -> Callable[[str, int], str]:
    """Returns the function that checks an archive's members, one after the other, by name and unpacked bytes.

    It returns the name in its plainest form: `./CLASS/FILE` as `CLASS/FILE`.
    """
    limit = max(MAX_EXPANSION * path.stat().st_size, ALWAYS_ALLOWED_BYTES)
    unpacked_bytes = 0

    def check(name: str, size: int) -> str:
        nonlocal unpacked_bytes
        unpacked_bytes += size
        parts = name.replace("\\", "/").split("/")
        if not parts[0] or ".." in parts:
            raise ValueError(f"--data={path} holds {name!r}, which points outside; pack it again without")
        if unpacked_bytes > limit:
            raise ValueError(
                f"--data={path} unpacks to more than {limit:,} bytes ({MAX_EXPANSION} times its size), as a "
                "decompression bomb would; if you trust it, unpack it and give the folder"
            )
        if size > MAX_IMAGE_BYTES and _is_image(name):
            raise ValueError(
                f"--data={path} holds {name!r} of {size:,} bytes; {MAX_IMAGE_BYTES:,} are allowed"
            )
        return posixpath.normpath(name)

    return check
