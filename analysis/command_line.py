"""How do the commands of analysis/ end? Wrong input and impossible files: one line, code 2."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainables.command_line import printable

INSTALL = "in the clone of tunefleet: pip install -c constraints.txt -e '.[reports]'"


def run(command: Callable[[], int]) -> int:
    """Run a command and return its exit code: its own, 2 after a line on stderr, 3 for a Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None without a terminal
            stream.reconfigure(errors="backslashreplace")  # ± in an ASCII pipe
    try:
        code = command()
        if sys.stdout:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 3
    except (OSError, ValueError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2


def folder(text: str) -> Path:
    """Return the path that an argument names; a shell leaves the ~ of --out=~/reports as it is."""
    if not text:
        raise ValueError("no path")  # as of an unset variable; argparse names the flag
    return Path(os.path.expanduser(text))  # noqa: PTH111  Path's raises RuntimeError for an unknown user


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Context manager: turn an OSError into one line that says what to do.

    Raises:
        ValueError: The system refused it.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ValueError(f"{out} cannot be written to ({error}); give another folder: --out") from None
