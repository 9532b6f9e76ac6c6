"""Is a disk full? A study that meets one stops and can be resumed: no trial is to blame."""

from __future__ import annotations

import errno

FULL = ("No space left on device", "Disk quota exceeded")  # as errors that crossed processes say it


def is_full(error: BaseException) -> bool:
    """Returns whether an error says that a disk, or its user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
