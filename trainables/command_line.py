"""How does a command answer a wrong argument? In one line, like every other error of ours.

Imports nothing heavy: the process that feeds W&B beside a study needs it (search/wandb_sync.py).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from typing import NoReturn

from trainables.disk import is_full


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without argparse's page of usage before each error."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        print(f"error: {message}; {self.prog} --help lists the arguments", file=sys.stderr)
        raise SystemExit(2)


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and return its exit code, after a line on stderr where it is not the command's own.

    2 for a ValueError and for a path that the system refuses; 3 for a Ctrl-C and a full disk, after both of
    which the command can be repeated or resumed.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show ends no command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return command()
    except ValueError as error:
        _print_error(str(error))
        return 2
    except KeyboardInterrupt:
        print("stopped before the study began; nothing was written", file=sys.stderr)
        return 3
    except Exception as error:
        if is_full(error):
            _print_error(f"{error}; make room and run it again (a study: with --resume)")
            return 3
        if isinstance(error, OSError) and error.filename:
            _print_error(f"{error.strerror}: {error.filename}")
            return 2
        raise


def _print_error(text: str) -> None:
    """Print an error in one line, whatever names are in it."""
    print("error: " + text.replace("\n", "\\n"), file=sys.stderr)
