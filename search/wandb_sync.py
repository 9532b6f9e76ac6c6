"""Brings a study's runs to Weights & Biases, while it runs or at any time after.

::

    tunefleet sync studies/NAME             # uploads what W&B does not have yet
    tunefleet sync studies/NAME --offline   # writes offline runs into the folder instead

Everything comes from the study's folder, never from W&B's own files, so a torn one does no harm. A run
is opened with ``resume="allow"``: the server says how many rows it has, and gets the rest. Whatever
died before, each row arrives once. Afterwards the server is asked what it has; only that counts as
synced and is noted in ``wandb/state.json``. Exit code 0: W&B has everything, 1: something is missing,
2: bad input.

With ``--follow`` (search/wandb_sidecar.py) it does the same over and over until its stdin ends.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tunefleet.cli import Parser, exit_code, printable
from tunefleet.files import is_full
from tunefleet.search.wandb_options import WandbOptions, add_wandb_flags, choose, take_flags
from tunefleet.search.wandb_runs import NO_ROOM, Planned, State, legible, plan, standing, tidy
from tunefleet.search.wandb_sender import Sender, Trouble
from tunefleet.study import read_study

NICENESS = 10  # beside a study: trials come first
POLL_SECONDS = 2.0  # between looks at the journal
RETRY_SECONDS = 20.0  # after a failure, while the study goes on
PASSED_ON = ("API_KEY", "BASE_URL", "CONFIG_DIR", "IDENTITY_TOKEN_FILE", "INSECURE_DISABLE_SSL")


def follow(folder: Path, options: WandbOptions, state: State) -> None:
    """Sends what the study writes until stdin ends, then the rest; a failure is tried again later."""
    sender, seen, not_before = Sender(folder, options, state), -1, 0.0
    journal = folder / "reports.jsonl"
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        size = journal.stat().st_size if journal.exists() else 0
        if size == seen or time.monotonic() < not_before:
            continue
        seen, runs = size, plan(folder)
        if not any(run.rows for run in runs):
            continue  # workers are starting, and need the CPUs
        if not _attempt(sender, runs, live=True):
            not_before, seen = time.monotonic() + RETRY_SECONDS, -1
    finish(sender)


def finish(sender: Sender) -> bool:
    """Sends all that is missing and closes every run; returns whether W&B has everything."""
    runs = plan(sender.folder)
    if not _attempt(sender, runs, live=False):
        return False
    if sender.online and sender.options.sweep and not sender.state.sweep:
        try:
            sender.make_sweep(runs)
        except Trouble as trouble:
            sender.state.error = str(trouble)
            sender.state.save()
            return False
    return True


def _attempt(sender: Sender, runs: list[Planned], *, live: bool) -> bool:
    try:
        sender.send(runs, live=live)
        sender.state.error = None
    except Trouble as trouble:
        sender.state.error = str(trouble)
    sender.state.save()
    if sender.state.error or not live:
        sender.end()
    return not sender.state.error


def clean_environment() -> None:
    """Drops W&B's variables that would change a run behind our back: WANDB_RUN_ID, WANDB_SWEEP_ID, …."""
    for name in list(os.environ):
        if name.startswith("WANDB_") and name.removeprefix("WANDB_") not in PASSED_ON:
            del os.environ[name]
        elif name.startswith("WANDB_") and not os.environ[name].isprintable():
            raise ValueError(f"{name} has characters that W&B cannot take; set it again, or unset it")
    os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    logging.raiseExceptions = False  # a full disk is told in our line, not in logging's tracebacks


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(prog="tunefleet sync", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="the study's folder")
    parser.add_argument("--offline", action="store_true", help="write offline runs instead of uploading")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    add_wandb_flags(parser, mode=False)
    given = vars(parser.parse_args(arguments))
    return exit_code(lambda: carry_out(given))


def carry_out(given: dict[str, Any]) -> int:
    """Does what was asked for; returns the exit code.

    Raises:
        ValueError: It cannot be done.
    """
    with contextlib.ExitStack() as stack:
        try:
            return synchronise(as_utf8(Path(os.path.realpath(given["study"])), stack), given)
        except OSError as error:
            if not is_full(error):
                raise
            print(printable(f"error: {given['study']} is not synced ({NO_ROOM})"), file=sys.stderr)
            return 1


def as_utf8(folder: Path, stack: contextlib.ExitStack) -> Path:
    """Return a study's folder, or a link to it, by a path that W&B can pass on: it takes UTF-8 only."""
    if not _is_utf8(str(Path.cwd()), *sys.argv):  # which it passes on, too
        del sys.argv[1:]
        os.chdir("/")
    if _is_utf8(str(folder)):
        return folder
    link = Path(stack.enter_context(tempfile.TemporaryDirectory())) / legible(folder.name)
    link.symlink_to(folder)
    return link


def _is_utf8(*texts: str) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def synchronise(folder: Path, given: dict[str, Any]) -> int:
    """Sync a study's folder as the command line says; return the exit code.

    Raises:
        ValueError: It cannot be done.
    """
    remembered = read_study(folder).get("wandb") or {}
    flags = take_flags(given)
    if not given["follow"]:
        os.environ.pop("WANDB_MODE", None)  # who calls this wants to sync
        flags["mode"] = "offline" if given["offline"] else "online"
    options = choose(flags, remembered)
    plan(folder)  # a damaged journal is an error before anything else
    clean_environment()
    if options.key:
        os.environ["WANDB_API_KEY"] = options.key
    (folder / "wandb").mkdir(exist_ok=True)
    lock = FileLock(folder / "wandb" / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is syncing {given['study']}; wait for it") from None
    tidy(folder)
    state = State.load(folder, options)
    if given["follow"]:
        os.nice(NICENESS)
        follow(folder, options, state)
        code = 0
    else:
        sender = Sender(folder, options, state)
        sender.doubt()
        finish(sender)
        line, missing = standing(folder, options, state=state)
        print(printable(f"error: {line}" if missing else line), file=sys.stderr if missing else sys.stdout)
        code = int(missing)
    tidy(folder)
    lock.release()
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process that had printed its result once did not end; wandb 0.31 (NOTES.md)
