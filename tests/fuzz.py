"""Does every command answer everything in one line? Random input, damage, environments and terminals.

::

    python -m tests.fuzz search --draws 1000 --seed 0      # what writes and runs studies
    python -m tests.fuzz analysis --draws 1000 --seed 0    # what reads them

Prints a line per defect and a table of exit codes. A defect is a traceback, an exit code outside 0 to 3,
an error with code 2 that is not one line on stderr, a refused command or dry run that changed a file
outside its cache (the locks in a study's folder apart), and a command that takes longer than SECONDS.

Each draw is a fork of this process, which has imported the commands already, or for those that start Ray a
process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NoReturn

SECONDS = 240  # a draw may take; on a quiet machine a few
DRAWN_FROM = {"analysis": "tests.fuzz_analysis", "search": "tests.fuzz_search"}
TRACEBACK_LINES = 14  # that are shown
LOCKS = (".lock", ".collect.lock")
ROOT = Path(__file__).parents[1]


@dataclass
class Command:
    """A command to try.

    Attributes:
        kind: Under which it is counted.
        main: Its function; None: ``arguments`` start a process.
        arguments: Of the command line.
        environment: Variables to change; None: one to remove.
        cache: A folder whose content may change whatever the exit code.
        dry: Writes nothing even with exit code 0.
        errors: The most lines on stderr with exit code 2; more than one of a command for several studies.
        state: What was done to its input, for the report of a defect.
    """

    kind: str
    main: Callable[..., int] | None
    arguments: list[str]
    environment: dict[str, str | None] = field(default_factory=dict)
    cache: Path | None = None
    dry: bool = False
    errors: int = 1
    state: object = ""


def tree(folder: Path, cache: Path | None) -> dict[str, str]:
    """Return a hash of every file below a folder, and the folders; those of the cache and locks left out."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder"
        for file in folder.rglob("*")
        if not (cache and (file.is_relative_to(cache) or cache.is_relative_to(file)))
        and not (file.name in LOCKS and file.with_name("study.json").exists())
    }


def run(command: Command, folder: Path, streams: Path) -> int | str:
    """Run a command in a folder; return its exit code, or "timeout"."""
    variables: dict[str, str | None] = {**os.environ, "PYTHONPATH": str(ROOT / "src")} | command.environment
    environment = {name: value for name, value in variables.items() if value is not None}
    files = [(streams / name).open("wb") for name in ("out", "err")]
    if command.main is None:
        process = subprocess.Popen(
            command.arguments,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=files[0],
            stderr=files[1],
            start_new_session=True,
        )
        pid, poll = process.pid, process.poll
    else:
        pid = os.fork()
        if not pid:
            _be(command, folder, environment, [file.fileno() for file in files])

        def poll() -> int | None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(status) if ended else None

    began = time.monotonic()
    while (code := poll()) is None and time.monotonic() - began < SECONDS:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it left running, too
    for file in files:
        file.close()
    if code is None:
        while poll() is None:
            time.sleep(0.01)
        return "timeout"
    return code


def _be(command: Command, folder: Path, environment: dict[str, str], streams: list[int]) -> NoReturn:
    """Be the process of a command."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        encoding = environment.get("PYTHONIOENCODING") or "utf-8"
        for number, stream, errors in zip((1, 2), streams, ("strict", "backslashreplace"), strict=True):
            os.dup2(stream, number)
            text = io.TextIOWrapper(open(number, "wb", closefd=False), encoding, errors)  # noqa: SIM115
            setattr(sys, ("stdout", "stderr")[number - 1], text)
        warnings.resetwarnings()
        for ignored in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", ignored)  # as Python does
        sys.argv = [command.kind, *command.arguments]
        assert command.main is not None
        code = command.main(command.arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 99
    except BaseException:  # noqa: BLE001  what is looked for
        traceback.print_exc()
    finally:
        for text in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                text.flush()
        os._exit(code)


def draw(module: ModuleType, number: int, seed: int) -> tuple[str, str, str]:
    """Make and run one command; return its kind, its exit code and its defect, "" without one."""
    rng = random.Random(f"{seed}-{number}")
    with (
        tempfile.TemporaryDirectory(prefix="f") as temporary,
        tempfile.TemporaryDirectory(prefix="f") as streams,
        contextlib.chdir(temporary),
    ):
        folder = Path(temporary)
        command = module.make_command(rng, folder, number)
        before, began = tree(folder, command.cache), time.monotonic()
        code = run(command, folder, Path(streams))
        seconds = time.monotonic() - began
        after = tree(folder, command.cache)
        said = (Path(streams) / "err").read_bytes()
    lines, defect = said.count(b"\n"), ""
    if b"Traceback" in said:
        defect = "traceback"
        said = b"\n".join(said.splitlines()[-TRACEBACK_LINES:])
    elif code == "timeout":
        defect = "timeout"
    elif code not in range(4):
        defect = "code"
    elif not 0 < lines <= command.errors if code == 2 else code == 0 and lines:
        defect = "stderr"
    elif (code == 2 or (command.dry and code == 0)) and before != after:
        defect = "leftovers"
        said = repr(sorted(dict(before.items() ^ after.items()))).encode()
    if defect:
        shown = {name: value for name, value in command.environment.items() if name != "PATH"}
        defect = (
            f"draw {number}: {defect}, code {code}, {seconds:.0f} s: {command.kind} {command.arguments!a} "
            f"{shown!a} after {command.state!a}: {said.decode(errors='backslashreplace')}"
        )
    return command.kind, str(code), defect


def main(arguments: list[str] | None = None) -> int:
    """Run the draws; return 1 where one has a defect."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("commands", choices=DRAWN_FROM)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no draw begins")
    options = parser.parse_args(arguments)
    module = importlib.import_module(DRAWN_FROM[options.commands])
    began, counts, defects = time.monotonic(), Counter[tuple[str, str]](), Counter[str]()
    for number in range(options.first, options.first + options.draws):
        if time.monotonic() - began > options.seconds:
            break
        kind, code, defect = draw(module, number, options.seed)
        counts[kind, code] += 1
        if defect:
            defects[defect.partition(": ")[2].partition(",")[0]] += 1
            print(defect.encode("ascii", "backslashreplace").decode(), flush=True)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    seconds = time.monotonic() - began
    print(f"{counts.total()} draws from {options.first} on, seed {options.seed}, {commit}, {seconds:.0f} s")
    print(f"defects: {sum(defects.values())} {dict(defects) or ''}")
    codes = sorted({code for _, code in counts})
    print(f"| command | {' | '.join(f'exit code {code}' for code in codes)} |")
    for kind in sorted({kind for kind, _ in counts}):
        print(f"| {kind} | {' | '.join(str(counts[kind, code]) for code in codes)} |")
    return bool(defects)


if __name__ == "__main__":
    sys.exit(main())
