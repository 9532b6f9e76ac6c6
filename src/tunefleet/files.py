"""Files that are written whole or not at all, and disks that are full."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

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
    """Context manager: give a path beside a file, which becomes that file unless the body raises."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all, a power cut included."""
    with replacing(file) as temporary, temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
