"""One-line errors, exit codes, and text that is safe to print: what all commands share."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tunefleet.files import is_full

INSTALL = "in the clone of tunefleet: pip install -c constraints.txt -e '.[reports]'"
JOINERS = "\u200c\u200d"  # invisible, but part of how names are written in Persian, Hindi and emoji
UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories without a shape, or that move text


NOTHING_WRITTEN = "stopped before the study began; nothing was written"


def end_at_once(number: int, frame: Any) -> None:
    """Handle a signal in the seconds in which a command imports its modules: a line, and exit code 3."""
    print(NOTHING_WRITTEN, file=sys.stderr, flush=True)
    os._exit(3)


@contextlib.contextmanager
def kept_environment() -> Iterator[None]:
    """Context manager, and decorator: the environment is afterwards as it was before."""
    before = os.environ.copy()
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without argparse's page of usage before each error."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse; of ``--flag=--`` Python 3.11 makes an empty list, whatever the flag's type."""
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"{word} has no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        print(f"error: {printable(message)}; {self.prog} --help lists the arguments", file=sys.stderr)
        raise SystemExit(2)


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and return its exit code, after a line on stderr where it is not the command's own.

    0 where the reader of its output has left (``| head``); 2 for a ValueError and for what the system
    refuses; 3 for a Ctrl-C and a full disk, after which the command can be repeated or resumed.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show ends no command
        if isinstance(stream, io.TextIOWrapper):  # None without a terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command()
        if sys.stdout:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except Exception as error:
        said = printable(str(error))
        if is_full(error):
            print(f"error: {said}; make room and run it again (a study: tunefleet resume)", file=sys.stderr)
            return 3
        if isinstance(error, OSError) and error.errno is not None:  # no ConnectionError of Ray's
            said = f"{error.strerror}: {printable(str(error.filename))}" if error.filename else said
            print(f"error: {said}", file=sys.stderr)
            return 2
        raise


def path_argument(text: str) -> Path:
    """Return the path that an argument names; a shell leaves the ~ of --out=~/reports as it is."""
    if not text:
        raise ValueError("no path")  # as of an unset variable; argparse names the flag
    return Path(os.path.expanduser(text))  # noqa: PTH111  Path's raises RuntimeError for an unknown user


def expanded(flag: str, path: Path | str) -> Path:
    """Return a path with its ``~`` expanded.

    Raises:
        ValueError: There is no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{flag}={printable(str(path))} has no home folder; set HOME, or give a path without ~"
        ) from error


@contextlib.contextmanager
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


def shown(location: Path | str) -> str:
    """Return a path as short as the reader's working directory allows; a URL, which is text, as it is."""
    if isinstance(location, str):
        return location
    relative = os.path.relpath(location)
    return str(location) if relative.startswith("..") else relative


def counted(count: float, noun: str, plural: str = "") -> str:
    """Return 1 trial, 2 trials, 10,000 trials, 0.5 GPUs."""
    shown = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{shown} {noun if count == 1 else plural or f'{noun}s'}"


def clock(seconds: float) -> str:
    """Return 75 as 1 min 15 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def megabytes(size: int) -> str:
    """Return bytes as 609 MB or 1.2 GB."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def rounded(value: float, form: str = "f") -> str:
    """Return a number to four digits, and more where it would read 0 or 1 and is neither."""
    digits = 4
    while float(text := f"{value:.{digits}{form}}") in (0, 1) and float(text) != value and digits < 17:
        digits += 1
    return text
