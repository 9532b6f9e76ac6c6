"""Write names, numbers and commands for people."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any


def reason(error: BaseException) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def words(command: str) -> list[str]:
    """Return the words of a command line; of one whose quotes do not match, itself."""
    try:
        return shlex.split(command)
    except ValueError:
        return [command]


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return a, b, c; of many, the first and how many more there are."""
    rest = len(names) - most
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:most])} and {rest:,} more"


def number(value: Any, digits: int = 4) -> str:
    """Return a number with ``digits`` significant digits, and more where 0.99999 would read 1."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if 10 ** (digits - 1) <= abs(value) < 1e15:
        return f"{value:.0f}"
    while (text := f"{value:.{digits}g}") == "1" and value != 1:
        digits += 1
    return text


def percent(fraction: float, digits: int = 0) -> str:
    """Return a fraction in percent, without the sign; only 0 reads 0, and only 1 reads 100."""
    text, step = f"{100 * fraction:.{digits}f}", 10.0**-digits
    if fraction > 0 and not float(text):
        return f"<{step:.{digits}f}"
    if fraction < 1 and float(text) == 100:
        return f">{100 - step:.{digits}f}"
    return text


def spread_digits(sd: float | None, least: int) -> int:
    """Return the decimals of a mean and its sd: ``least``, or more if the sd would read 0 and is not."""
    return least if not sd else max(least, min(12, math.ceil(-math.log10(sd))))


def mean_and_spread(test: dict[str, Any], *, fraction: bool = True) -> tuple[str, str, str]:
    """Return what seeds gave: the mean, " ± sd" or nothing, "low to high" of the interval or nothing.

    Args:
        test: mean, sd and interval95.
        fraction: Write percent, without the sign.
    """
    mean, sd, ends = test["mean"], test["sd"], test["interval95"]
    if fraction:
        digits = spread_digits(100 * (sd or 0), 2)
        spread = "" if sd is None else f" ± {100 * sd:.{digits}f}"
        return percent(mean, digits), spread, " to ".join(percent(end, digits) for end in ends or ())
    digits = 4 if not sd or not mean else max(4, min(12, 2 + math.ceil(math.log10(abs(mean) / sd))))
    spread = "" if sd is None else f" ± {number(sd, 2)}"
    return number(mean, digits), spread, " to ".join(number(end, digits) for end in ends or ())
