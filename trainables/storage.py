"""Where is a study kept that its nodes share no disk for? Under a URL of an object store, through pyarrow.

A store has no appending and no renaming that is cheap; a whole file appears at once or not at all. So each
node works on a copy of its own and puts whole files. A store that is out of reach, refuses a request or does
not answer is tried again for minutes: that costs a study time and no trial.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from pyarrow import fs

from tunefleet.files import is_full

PATIENCE_SECONDS = 600.0  # for which an operation is tried again
BRIEF_SECONDS = 5.0  # the same where a person waits for the answer
WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0  # after the first failure, doubled up to the longest
HANG_SECONDS = 60.0  # without an answer, besides what the bytes take
SLOWEST = 250_000  # bytes a second
S3_ATTEMPTS = (
    3  # of the AWS SDK per request, 3 s each where nothing comes; its default takes 99 s (pyarrow 26)
)

T = TypeVar("T")


class StoreError(OSError):
    """A store could not be used for so long that the study has to stop; no trial is to blame."""


@dataclass(frozen=True)
class Storage:
    """The files of one study in an object store; only the URL travels between processes.

    Args:
        url: ``s3://bucket/prefix/NAME``, ``gs://…`` or another that ``pyarrow.fs`` knows. Credentials and
            AWS_ENDPOINT_URL come from the environment of each node, as for any client.
        patience: Seconds for which each operation is tried again before it raises StoreError.
    """

    url: str
    patience: float = PATIENCE_SECONDS

    def put(self, file: Path, name: str) -> None:
        """Put a file under a name, in place of what was there.

        Raises:
            StoreError: The store could not be written.
            OSError: The file could not be read.
        """

        def copy(system: fs.FileSystem, path: str) -> None:
            with file.open("rb") as source, system.open_output_stream(path) as target:
                shutil.copyfileobj(source, target)

        self._try(copy, name, file.stat().st_size)

    def get(self, name: str, file: Path) -> bool:
        """Write what lies under a name to a file, whole; return False where nothing does.

        Raises:
            StoreError: The store could not be read.
        """
        info = self._try(lambda system, path: system.get_file_info(path), name)
        if info.type != fs.FileType.File:
            return False
        file.parent.mkdir(parents=True, exist_ok=True)

        def copy(system: fs.FileSystem, path: str) -> Path:
            # of its own: an attempt that was given up may still write
            part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
            try:
                with system.open_input_stream(path) as source, part.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            return part

        self._try(copy, name, info.size).replace(file)
        return True

    def write(self, content: bytes, name: str) -> None:
        """Put a few bytes under a name.

        Raises:
            StoreError: The store could not be written.
        """

        def put(system: fs.FileSystem, path: str) -> None:
            with system.open_output_stream(path) as target:
                target.write(content)

        self._try(put, name)

    def read(self, name: str) -> bytes | None:
        """Return the bytes under a name; None where there are none.

        Raises:
            StoreError: The store could not be read.
        """

        def get(system: fs.FileSystem, path: str) -> bytes | None:
            if system.get_file_info(path).type != fs.FileType.File:
                return None
            with system.open_input_stream(path) as source:
                return bytes(source.read())

        return self._try(get, name)

    def names(self, under: str = "") -> list[str]:
        """Return the names of all files, or of those under a folder's name.

        Raises:
            StoreError: The store could not be read.
        """

        def look(system: fs.FileSystem, path: str) -> list[fs.FileInfo]:
            return system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))

        root = _open(self.url)[1]
        found = [info.path for info in self._try(look, under) if info.type == fs.FileType.File]
        return sorted(path.removeprefix(f"{root}/") for path in found)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens where there is none.

        Raises:
            StoreError: The store could not be used.
        """

        def delete(system: fs.FileSystem, path: str) -> None:
            if system.get_file_info(path).type == fs.FileType.File:
                system.delete_file(path)

        self._try(delete, name)

    def _try(self, action: Callable[[fs.FileSystem, str], T], name: str, size: int = 0) -> T:
        """Return what an operation on a name returns, repeating it while the store fails.

        Raises:
            StoreError: It failed for ``patience`` seconds.
            OSError: This machine's disk is to blame.
        """
        end, wait = time.monotonic() + self.patience, WAIT_SECONDS
        while True:
            try:
                system, root = _open(self.url)
                path = f"{root}/{name}".rstrip("/")
                if system.type_name == "s3":  # its own requests end
                    return action(system, path)
                return within(HANG_SECONDS + size / SLOWEST, partial(action, system, path))
            except OSError as error:
                if is_full(error) or error.filename:  # a file of this machine
                    raise
                left = end - time.monotonic()
                if left <= 0:
                    raise StoreError(f"{self.url} cannot be used ({reason(error)})") from error
                time.sleep(min(wait, left))
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def within(seconds: float, action: Callable[[], T]) -> T:
    """Return what a function returns within some seconds.

    Raises:
        TimeoutError: It does not return, and its thread is left behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # noqa: BLE001  raised below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="storage", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


def reason(error: BaseException) -> str:
    """Return why a store failed, in a few words."""
    text = " ".join(str(error).split())
    aws = re.search(r"AWS Error (.+?) during \w+ operation: (?:curlCode: \d+, )?([^;(]*)", text)
    if aws is None:
        return text[:200]
    said = aws[2].strip().removesuffix("No response body.")
    return said or aws[1]


def url_under(url: str, name: str) -> str:
    """Return the URL of a study under a store's: a folder's name may hold what a URL may not."""
    return f"{url.rstrip('/')}/{quote(name, errors='surrogateescape')}"


def is_url(place: object) -> bool:
    """Returns whether a place is an object store's and no folder of this machine."""
    return "://" in str(place) and not str(place).startswith("file://")


@lru_cache
def _open(url: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        ValueError: pyarrow knows no such store.
        OSError: It cannot be reached, or a library of its client is missing.
    """
    try:
        system, path = fs.FileSystem.from_uri(url)  # asks S3 for the bucket's region: may fail for the moment
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise ValueError(
            f"{url} is no storage that can be opened ({reason(error)}); give s3://BUCKET/PREFIX, or a folder "
            "that all nodes share"
        ) from error
    if system.type_name == "s3":
        make, (options,) = system.__reduce__()
        system = make(options | {"retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)})
    return system, path.rstrip("/")
