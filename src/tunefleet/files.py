"""Full disks, and files that are written whole.

A study that meets a full disk stops and can be resumed: no trial is to blame.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
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
    """Context manager: yield a temporary name; what is written there replaces the file, if no error comes.

    Each writer has a name of its own: two processes, or a writer that was given up, never mix.
    """
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
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
