"""How does a command answer a wrong argument? In one line, like every other error of ours.

Imports nothing heavy: the process that feeds W&B beside a study needs it (search/wandb_sync.py).
"""

from __future__ import annotations

import argparse
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
    """Runs a command and returns its exit code, after a line on stderr where it is not the command's own.

    2 for a ValueError; 3 for a Ctrl-C, and for a disk that is full: both leave what can be gone on with.
    """
    try:
        return command()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the study began; nothing was written", file=sys.stderr)
        return 3
    except OSError as error:
        if not is_full(error):
            raise
        print(f"error: {error}; make room and run it again (a study: with --resume)", file=sys.stderr)
        return 3
