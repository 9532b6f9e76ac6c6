"""Checks of single values, which all commands phrase alike: what was given, what is allowed."""

from __future__ import annotations

import difflib
import math
import numbers
from typing import Any

ALIKE = 0.7  # of a misspelt word to the one that was meant: resnet34 is no misspelt resnet_conv


def nearest(word: str, words: Any) -> str:
    """Return '; did you mean …? Choose from: …' for an error message."""
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=ALIKE)
    meant = f"; did you mean {close[0]}?" if close else ";"
    return f"{meant} Choose from: {', '.join(words)}"


def check_name(name: str, value: Any, allowed: Any) -> None:
    """Raise ValueError unless value is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{name}={value} is unknown{nearest(value, allowed)}")


def check_integer(name: str, value: Any, lowest: int) -> None:
    """Raise ValueError unless value is an integer of at least lowest."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < lowest:
        raise ValueError(f"{name}={value} is not possible; give an integer of at least {lowest}")


def check_number(name: str, value: Any, low: float, high: float, *, low_allowed: bool = True) -> None:
    """Raise ValueError unless value is a finite number in [low, high] (or in (low, high])."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (value == low and not low_allowed):
        allowed = f"at least {low}" if low_allowed else f"above {low}"
        limit = "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"{name}={value} is not possible; give a number {allowed}{limit}")


def check_statistics(value: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return a mean and a standard deviation, each of three channels.

    Raises:
        ValueError: They are none, as fractions of 0 to 1.
    """
    try:
        mean, std = (tuple(map(float, numbers)) for numbers in value)
    except (TypeError, ValueError):
        mean, std = (), ()
    if len(mean) != 3 or len(std) != 3 or not all(0 <= number <= 1 for number in mean + std):
        raise ValueError(
            f"normalise={value!r} is not possible; give data, imagenet, a function, or mean and std as "
            "((r, g, b), (r, g, b)), fractions of 0 to 1"
        )
    return mean, std


def boolean(text: str) -> bool:
    """Return the value of the word true or false.

    Raises:
        ValueError: The text is neither.
    """
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text} is neither true nor false")
    return text.lower() == "true"
