"""How is a name, a number or a command written for people? What a study's tables hold -> text."""

from __future__ import annotations

import math
import shlex
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

JOINERS = "\u200c\u200d"  # invisible, but part of how names are written in Persian, Hindi and emoji
UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories without a shape, or that move text


def printable(value: Any) -> Any:
    r"""Return text without characters that break a line, a terminal or UTF-8; lists and dicts item by item.

    A newline becomes ``\n``, a byte of a file name that is not UTF-8 ``\xff``, a mark that turns the
    direction of writing ``\u202e``. Values that are no text stay as they are.
    """
    if isinstance(value, str):
        return value if value.isascii() and value.isprintable() else "".join(map(_visible, value))
    if isinstance(value, list):
        return [printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(name): printable(item) for name, item in value.items()}
    return value


def _visible(character: str) -> str:
    if unicodedata.category(character) not in UNSAFE or character in JOINERS:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a path, by Python's surrogateescape
        return f"\\x{code - 0xDC00:02x}"
    if code >= 0x80:
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character.encode("unicode_escape").decode()


def shell(*words: Any) -> str:
    r"""Quote words as one command line that can be pasted into a shell.

    Words with unprintable characters are quoted as bash, zsh and ksh do: ``$'a\nb'``.
    """
    return " ".join(map(_quoted, map(str, words)))


def _quoted(word: str) -> str:
    if printable(word) == word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"


def reason(error: BaseException) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def words(command: str) -> list[str]:
    """Return the words of a command line; of one whose quotes do not match, itself."""
    try:
        return shlex.split(command)
    except ValueError:
        return [command]


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return 1 trial, 2 trials, 10,000 trials."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


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


def decimals(values: Sequence[float], most: int = 12) -> int:
    """Return the smallest number of decimals that shows each value as it is.

    Rounding then moves none of them by more than a thousandth of their smallest difference.
    """
    rising = sorted(set(values))
    steps = [b - a for a, b in pairwise(rising)] or [abs(value) for value in rising]
    return next(
        (n for n in range(most) if all(abs(round(v, n) - v) <= min(steps) / 1000 for v in rising)), most
    )


def clock(seconds: float) -> str:
    """Return 75 as 1 min 15 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
