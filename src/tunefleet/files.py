"""Full disks, files that are written whole, and locks.

A study that meets a full disk stops and can be resumed: no trial is to blame.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock

ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, the user's share used up, ulimit -f
SAID = re.compile(  # as errors say it that have no errno, or crossed processes
    r"no space left on device|disk quota exceeded|\[errno 27\]"
    r"|disk is full"  # SQLite
    r"|unexpected pos \d+ vs \d+"  # torch.save: its writer's second error hides the first (2.15)
    r"|\d+ requested and \d+ written",  # numpy's tofile, np.save
    re.IGNORECASE,
)


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it follows from, says that a disk is full."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in ERRNOS) or says_full(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def says_full(text: str) -> bool:
    """Return whether the text of an error says that a disk is full."""
    return SAID.search(text) is not None


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Context manager: yield a temporary name; what is written there replaces the file, if no error comes.

    Each writer has a name of its own: two processes, or a writer that was given up, never mix.
    """
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def locked(file: Path, seconds: float = -1) -> FileLock:
    """Return a held lock, which the system frees when the process dies.

    Args:
        file: Of the lock.
        seconds: To wait for another holder; negative: as long as it takes.

    Raises:
        filelock.Timeout: Another process holds it still.
        OSError: The file system refuses, or has no locks.
    """
    lock = FileLock(file, thread_local=False)  # may be released by another thread
    with contextlib.suppress(NotImplementedError), warnings.catch_warnings():  # for ENOSYS: filelock before 4
        warnings.simplefilter("ignore")
        lock.acquire(timeout=seconds)
        if not isinstance(lock, SoftFileLock):  # filelock 4 for ENOSYS, which would outlive a killed process
            return lock
        lock.release()
    raise OSError(errno.ENOLCK, "the file system has no locks", str(file))


@contextlib.contextmanager
def holding(file: Path, seconds: float = -1) -> Iterator[None]:
    """Context manager: hold a lock, as ``locked`` does."""
    lock = locked(file, seconds)
    try:
        yield
    finally:
        lock.release()


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all, a power cut included."""
    with replacing(file) as temporary, temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def read_whole(file: Path) -> bytes | None:
    """Return what a study's file holds; None where there is none. ValueError: it cannot be read."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}); restore it from a copy") from None
