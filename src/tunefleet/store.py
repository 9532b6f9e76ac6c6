"""A study's files, in a folder that all nodes see or under a URL of an object store, through pyarrow.fs.

A store has no appending and no cheap renaming: a whole file appears at once or not at all. So whole files are
written, in a folder under a temporary name that is moved, under a URL at once. A URL or a shared folder that
is out of reach, refuses a request or does not answer is tried again for minutes: that costs a study time and
no trial.
"""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from tunefleet.files import is_full, replacing

if TYPE_CHECKING:  # most studies are in a folder, and its import takes a while
    from pyarrow import fs

PATIENCE_SECONDS = 600.0  # for which an operation is tried again
BRIEF_SECONDS = 5.0  # the same where a person waits for the answer
WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0  # after the first failure, doubled up to the longest
GIVEN_UP_SECONDS = 0.1  # between looks at whether a wait was given up
HANG_SECONDS = 60.0  # without an answer, besides what the bytes take
SLOWEST = 250_000  # bytes a second
OUT_OF_REACH = (  # what a shared folder (NFS, a mount that broke) answers while its server is away
    *(errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EROFS, errno.ETIMEDOUT, errno.ENOTCONN),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET),
)
S3_ATTEMPTS = 3  # of the AWS SDK per request, 3 s each without an answer; its default takes 99 s (pyarrow 26)

T = TypeVar("T")


class StoreError(OSError):
    """A store could not be used for so long that the study has to stop; no trial is to blame."""


@dataclass(frozen=True)
class Store:
    """The files of one study; only the location travels between processes.

    Each method raises StoreError where the store could not be used for as long as its patience, and OSError
    where this machine's disk is to blame.

    Args:
        location: A folder, or a URL that ``pyarrow.fs`` knows: ``s3://bucket/prefix/NAME``, ``gs://…``.
            Credentials and AWS_ENDPOINT_URL come from the environment of each node, as for any client.
        patience: Seconds for which an operation is tried again while the store is out of reach.
    """

    location: str
    patience: float = PATIENCE_SECONDS

    @classmethod
    def of_study(cls, storage: str | None, folder: Path) -> Store:
        """Return where a study is kept, given its ``--storage`` URL, if any, and its folder."""
        return cls(storage).below(folder.name) if storage else cls(str(folder))

    @property
    def folder(self) -> Path | None:
        """Return the folder; None: it is a URL, and the driver works on a copy."""
        if "://" in self.location and not self.location.startswith("file://"):
            return None
        return Path(self.location.removeprefix("file://"))

    def below(self, name: str) -> Store:
        """Return the store of the study of that name, which may hold what a URL may not."""
        name = name if self.folder else quote(name, errors="surrogateescape")
        return replace(self, location=f"{self.location.rstrip('/')}/{name}")

    def absolute(self) -> Store:
        """Return the same store for another working directory: a node's."""
        return replace(self, location=str(self.folder.absolute())) if self.folder else self

    def patient(self, seconds: float) -> Store:
        """Return the same store with another patience."""
        return replace(self, patience=seconds)

    def write(self, content: bytes | memoryview, name: str) -> None:
        """Write a file whole, in place of what was there."""
        if folder := self.folder:

            def move() -> None:
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                with replacing(file) as temporary:
                    temporary.write_bytes(content)

            self._repeat(move)
            return

        def put(system: fs.FileSystem, path: str) -> None:
            with system.open_output_stream(path) as target:
                target.write(content)

        self._try(put, name, len(content))

    def read(self, name: str) -> bytes | None:
        """Return a file's content; None where there is no such file."""
        if folder := self.folder:

            def load() -> bytes | None:
                try:
                    return (folder / name).read_bytes()
                except (FileNotFoundError, NotADirectoryError):
                    return None

            return self._repeat(load)

        def get(system: fs.FileSystem, path: str) -> bytes | None:
            if not system.get_file_info(path).is_file:
                return None
            with system.open_input_stream(path) as source:
                return bytes(source.read())

        info = self._try(lambda system, path: system.get_file_info(path), name)
        return self._try(get, name, info.size) if info.is_file else None

    def names(self, under: str = "") -> list[str]:
        """Return the names of all files, or of those in a folder of the store."""
        if folder := self.folder:
            files = self._repeat(lambda: [file for file in (folder / under).rglob("*") if file.is_file()])
            return sorted(file.relative_to(folder).as_posix() for file in files)

        def look(system: fs.FileSystem, path: str) -> list[str]:
            from pyarrow import fs

            found = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
            return [info.path for info in found if info.is_file]

        paths = self._try(look, under)
        return sorted(path.removeprefix(f"{_open(self.location)[1]}/") for path in paths)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""
        if folder := self.folder:
            self._repeat(lambda: (folder / name).unlink(missing_ok=True))
            return

        def delete(system: fs.FileSystem, path: str) -> None:
            if system.get_file_info(path).is_file:
                system.delete_file(path)

        self._try(delete, name)

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy files under a URL to a folder of this machine, each whole; a folder's are there already."""
        for name in () if self.folder else names:
            if (content := self.read(name)) is not None:
                Store(str(folder)).write(content, name)

    def _try(self, action: Callable[[fs.FileSystem, str], T], name: str, size: int = 0) -> T:
        """Return what an operation on a name of a URL returns, repeating it while the store fails."""

        def attempt() -> T:
            system, root = _open(self.location)
            path = f"{root}/{name}".rstrip("/")
            if system.type_name == "s3":  # its own requests end
                return action(system, path)
            return within(HANG_SECONDS + size / SLOWEST, partial(action, system, path))

        return self._repeat(attempt)

    def _repeat(self, attempt: Callable[[], T]) -> T:
        """Return what an attempt returns, repeating it while what holds the files is out of reach."""
        end, wait = time.monotonic() + self.patience, WAIT_SECONDS
        while True:
            try:
                return attempt()
            except OSError as error:
                shared = self.folder is not None and error.errno in OUT_OF_REACH
                if is_full(error) or (error.filename and not shared):  # a file of this machine
                    raise
                left = end - time.monotonic()
                if left <= 0:
                    raise StoreError(f"{self.location} cannot be used ({reason(error)})") from error
                time.sleep(min(wait, left))
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def within(seconds: float, action: Callable[[], T], given_up: threading.Event | None = None) -> T:
    """Return what a function returns within some seconds.

    Args:
        seconds: The longest to wait.
        action: The function.
        given_up: Ends the wait when it is set.

    Raises:
        TimeoutError: It does not return, and its thread is left behind.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001  raised below, in the thread that waits
            future.set_exception(error)

    threading.Thread(target=run, name="limited", daemon=True).start()
    end = time.monotonic() + seconds
    while not future.done():
        if given_up and given_up.is_set():
            raise TimeoutError("interrupted")
        if (left := end - time.monotonic()) <= 0:
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        wait([future], min(left, GIVEN_UP_SECONDS))
    return future.result()


def reason(error: BaseException) -> str:
    """Return why a store failed, in a few words."""
    text = " ".join(str(error).split())
    aws = re.search(r"AWS Error (.+?) during \w+ operation: (?:curlCode: \d+, )?([^;(]*)", text)
    if aws is None:
        return text[:200]
    return aws[2].strip().removesuffix("No response body.") or aws[1]


@lru_cache
def _open(url: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        ValueError: pyarrow knows no such store.
        OSError: It cannot be reached, or a library of its client is missing.
    """
    from pyarrow import fs

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
