"""How does a command answer a wrong argument? In one line, like every other error of ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

from trainables.config import TrainConfig


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without argparse's page of usage before each error."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        print(f"error: {message}; {self.prog} --help lists the arguments", file=sys.stderr)
        raise SystemExit(2)


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code: 2 and a line on stderr for a ValueError, 3 for a Ctrl-C."""
    try:
        return command()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the study began; nothing was written", file=sys.stderr)
        return 3


def boolean(text: str) -> bool:
    """Returns what true or false means.

    Raises:
        ValueError: The text is neither.
    """
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text} is neither true nor false")
    return text.lower() == "true"


_BY_ANNOTATION: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": boolean}
FIELD_TYPES = {  # what reads a value of each hyperparameter from a command line
    field.name: _BY_ANNOTATION[str(field.type).removesuffix(" | None")] for field in fields(TrainConfig)
}
