"""Decode image files; also a script that trainables/preparation.py starts once per core.

It imports only Pillow and the standard library: such a process starts in 0.05 s, and runs neither the user's
main module nor a file of theirs that has the name of one of ours.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin

# The formats that are read, under Pillow's names. Not EPS and PDF, which start or embed other programs.
_FORMATS = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<GIF>GIF8[79]a)|(?P<WEBP>RIFF....WEBP)"
    rb"|(?P<BMP>BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0)|(?P<PPM>P[1-6](?:\s+[#\d]|#))"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])|(?P<JPEG2000>\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n)"
    rb"|(?P<AVIF>....ftyp(?:avi[fs]|(?:mif1|msf1).{4}(?:.{4}){0,8}?avi[fs]))",
    re.DOTALL,
)
_HEIC = re.compile(rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)
HEAD_BYTES = 64  # that identify a file's format
RAW_SUFFIXES = (".3fr", ".arw", ".cr2", ".dng", ".erf", ".nef", ".nrw", ".pef", ".srw")  # TIFF by content
CAMERA_RAW = "camera raw (not supported; convert to JPEG)"
NOT_AN_IMAGE, HEIC = "not an image", "HEIC (not supported; convert to JPEG)"
TEXT_BYTES = 1 << 26  # of a PNG's metadata
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Entry(NamedTuple):
    """An image file of a folder or archive."""

    name: str  # inside the folder or archive
    size: int  # bytes
    offset: int = 0  # of an archive's image in the file that holds all of them


class SourceError(ValueError):
    """A folder or archive, or an image in it, cannot be used; the message completes "--data=PATH …"."""


def format_of(head: bytes) -> str | None:
    """Return Pillow's name of a file's format; None if it is not one of those that are read."""
    match = _FORMATS.match(head)
    return match.lastgroup if match else None


def reason_to_skip(head: bytes) -> str:
    """Return why a file of none of these formats is skipped."""
    return HEIC if _HEIC.match(head) else NOT_AN_IMAGE


def square(image: Image.Image, size: int) -> bytes:
    """Return an image's pixels as uint8 (3, size, size): resized, as RGB, without transparency.

    Raises:
        ValueError: The image has more than 8 bits per channel.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparent colours
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)  # Pillow's resize antialiases
    rows = image.tobytes()
    return rows[::3] + rows[1::3] + rows[2::3]


class Decoder:
    """Read and hash image files and, given outputs, decode them.

    Args:
        source: The folder of the images; or the one file in which they are, at their offsets.
        outputs: Per split: the file to write and the offset of its first image.
        size: Pixels per side of a stored image.
        resize: Resize images of other sizes; otherwise run() reports the first.
    """

    def __init__(
        self, source: str, outputs: Iterable[tuple[str, int]] = (), size: int = 0, resize: bool = False
    ) -> None:
        self.source, self.size, self.resize = source, size, resize
        self.outputs = [(os.open(file, os.O_WRONLY), start) for file, start in outputs]
        # Settings that Pillow documents: by default one chunk of 1 MiB refuses an image.
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = TEXT_BYTES
        self.file = None if os.path.isdir(source) else os.open(source, os.O_RDONLY)  # noqa: PTH112

    def close(self) -> None:
        """Close all files."""
        for opened in (self.file, *(file for file, _ in self.outputs)):
            if opened is not None:
                os.close(opened)

    def run(self, images: Sequence[tuple[Sequence[Any], int, int]]) -> dict[str, Any]:
        """Read image files and decode them.

        Args:
            images: Per file: its Entry, its split's index in `outputs`, and its row there.

        Returns:
            {"sha256": [per file], "rotated": images rotated by EXIF}; or {"other_size": True} if an image
            would have to be resized; or {"refused": message}; or {"failed": arguments of an OSError}.
        """
        hashes, rotated = [], 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of damaged metadata and large images
                for fields, split, row in images:
                    entry = Entry(*fields)
                    content = self._read(entry)
                    hashes.append(hashlib.sha256(content).hexdigest())
                    if self.outputs:
                        with _errors_naming(entry.name):
                            pixels, is_rotated = self._decode(content)
                        if not pixels:
                            return {"other_size": True}
                        output, start = self.outputs[split]
                        os.pwrite(output, pixels, start + row * len(pixels))
                        rotated += is_rotated
        except SourceError as error:
            return {"refused": str(error)}
        except OSError as error:
            return {"failed": [error.errno, error.strerror]}
        return {"sha256": hashes, "rotated": rotated}

    def size_of(self, entry: Entry) -> tuple[int, int]:
        """Return an image's width and height; raise SourceError if it cannot be read."""
        content = self._read(entry)
        with _errors_naming(entry.name):
            return _open(content).size

    def pixels_of(self, entry: Entry) -> bytes:
        """Return an image's pixels as ``run`` stores them.

        Raises:
            SourceError: It cannot be decoded; the message completes "PATH …".
        """
        content = self._read(entry)
        try:
            if entry.name.lower().endswith(RAW_SUFFIXES):
                raise ValueError(CAMERA_RAW)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._decode(content)[0]
        except Exception as error:
            raise SourceError(f"cannot be decoded ({_reason(error)})") from error

    def _read(self, entry: Entry) -> bytes:
        try:
            if self.file is None:
                with open(f"{self.source}/{entry.name}", "rb", buffering=0) as file:  # noqa: PTH123  3 µs less
                    content = file.read()
            else:
                content = os.pread(self.file, entry.size, entry.offset)
        except OSError as error:
            raise SourceError(f"cannot be read ({error.strerror}: {entry.name!r})") from error
        if len(content) != entry.size:
            raise SourceError(f"changed while it was read (at {entry.name!r}); try again")
        return content

    def _decode(self, content: bytes) -> tuple[bytes, bool]:
        """Return an image's pixels, empty if it has another size, and whether EXIF rotated it."""
        image = _open(content)
        draft(image, self.size)
        image.load()
        rotation = None
        if image.format != "JPEG" or b"Exif" in content or b"rientation" in content:  # saves the others 5 µs
            rotation = _rotation(image)
        upright = image if rotation is None else image.transpose(rotation)
        if not self.resize and upright.size != (self.size, self.size):
            return b"", False
        return square(upright, self.size), rotation is not None


def _open(content: bytes) -> Image.Image:
    found = format_of(content[:HEAD_BYTES])
    if not found:
        raise ValueError(reason_to_skip(content[:HEAD_BYTES]))
    return Image.open(io.BytesIO(content), formats=(found,))


def draft(image: Image.Image, size: int) -> None:
    """Have a JPEG of another size decoded at 1/2, 1/4 or 1/8 of it, but no smaller than twice ``size``."""
    if image.size != (size, size):
        image.draft("RGB", (2 * size, 2 * size))


def upright(image: Image.Image) -> Image.Image:
    """Return an image rotated as its EXIF orientation says; itself, where there is none."""
    image.load()
    rotation = _rotation(image)
    return image if rotation is None else image.transpose(rotation)


@contextlib.contextmanager
def _errors_naming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of a damaged file Pillow raises OSError, SyntaxError, struct.error and more
        raise SourceError(
            f"holds {name!r}, which cannot be decoded ({_reason(error)}); replace or remove it"
        ) from error


def _reason(error: Exception) -> str:
    unclear = isinstance(error, Image.UnidentifiedImageError)  # "cannot identify <_io.BytesIO object …>"
    return type(error).__name__ if unclear or not str(error) else str(error)


def _rotation(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that rotates a loaded image upright; None if it is upright."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001  damaged metadata: Pillow raises many types; the pixels are intact
        return None


def main() -> None:
    """Decode every N-th chunk of a file, from the K-th; print an answer per chunk.

    Arguments: the file, K and N. Its first line has Decoder's arguments, each other line a chunk, as JSON.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit silently if the parent is killed
    file, first, step = sys.argv[1:]
    with open(file, encoding="ascii") as lines:  # noqa: PTH123
        decoder = Decoder(**json.loads(next(lines)))
        for line in itertools.islice(lines, int(first), None, int(step)):
            print(json.dumps(decoder.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
