"""What does a trial's code print? logs/TRIAL.txt in the study has the beginning and the end of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tunefleet.store import Store

HALF = 32 * 2**10  # characters that a log has of the beginning, and as many of the end
CUT = f"\n[cut here: a log has the first and the last {HALF:,} characters of what a trial prints]\n"


def bounded(text: str) -> str:
    """Return a log's text, without its middle where it is too long."""
    return text if len(text) <= 2 * HALF + len(CUT) else text[:HALF] + CUT + text[-HALF:]


class Printed:
    """A worker's standard output and standard error, of which a copy goes to its trial's log.

    All of it is passed on to the worker's own standard output, which Ray has in its logs; so is everything
    else that a stream has, such as ``fileno``.
    """

    def __init__(self) -> None:
        self.stream, self.text = sys.stdout, ""

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager: record what Python code prints; another language's goes to Ray's logs only."""
        with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
            yield

    def write(self, text: str) -> int:
        """Record a text and pass it on, unless there is no room."""
        self.text = bounded(self.text + text)
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on what the stream has, unless there is no room."""
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def save(self, store: Store, trial_id: str) -> str:
        """Append what was printed to a trial's log; return the log's name, nothing where there is none.

        What cannot be written is kept for the next time: a log is not worth a trial, nor minutes of waiting.
        """
        name, store = f"logs/{trial_id}.txt", store.patient(0)
        try:
            log = (store.read(name) or b"").decode(errors="replace") + self.text
            if self.text:
                store.write(bounded(log).encode(errors="backslashreplace"), name)
        except OSError:
            return ""
        self.text = ""
        return name if log else ""
