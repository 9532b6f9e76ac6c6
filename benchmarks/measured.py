"""What did one run of an arm take? Seconds, the machine's CPU seconds, and what it reported."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tunefleet.benchmarks.probe import probe
from tunefleet.benchmarks.task import Row, Task

LEFT_SECONDS = 60.0  # that Ray's processes may take to go after their driver
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Make orphans of an arm children of this process, which can then wait for their end (Linux).

    Not for longer: a Ray worker takes its raylet for dead only once init has adopted it (Ray 2.60).
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@dataclass(frozen=True)
class Measured:
    """One run of an arm."""

    seconds: float  # from starting python to its end
    cpu_seconds: float  # that the machine was busy, for whomever: Ray's raylet hides those of its workers
    rows: list[Row]  # finished_at is in seconds from the start
    probes: list[dict[str, float]]  # just before and just after
    load: float  # of the last minute, just before

    @property
    def best(self) -> float:
        """Return the highest val_accuracy of a trial's last report, a fraction."""
        last = {row["trial"]: row["val_accuracy"] or 0.0 for row in self.rows}
        return max(last.values())

    @property
    def first_and_last(self) -> tuple[float, float]:
        """Return when the first report came, and the last: before and after lies what an engine costs."""
        times = [row["finished_at"] for row in self.rows]
        return min(times), max(times)

    def seconds_until(self, accuracy: float) -> float | None:
        """Return when a report first reached an accuracy; None: never."""
        found = [row["finished_at"] for row in self.rows if (row["val_accuracy"] or 0.0) >= accuracy]
        return min(found, default=None)


def measure(task: Task, before: dict[str, float]) -> Measured:
    """Run an arm in a process of its own and waits until all that it started is gone.

    Args:
        task: What it shall run.
        before: What a probe just found.

    Raises:
        RuntimeError: It failed; the end of what it printed.
    """
    load = os.getloadavg()[0]
    folder = Path(task.folder)
    asked, answered, printed = (folder.with_suffix(end) for end in (".task", ".rows", ".txt"))
    task.write(asked)
    command = [sys.executable, "-m", "tunefleet.benchmarks.arms", task.arm, str(asked), str(answered)]
    used, started, began = _cpu_seconds(), time.time(), time.perf_counter()
    with printed.open("w") as out, adopting_orphans():
        code = subprocess.call(
            command, env=environment(task.arm), stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
        seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - used
        _reap()
    if code != 0:
        raise RuntimeError(f"arm {task.arm} ended with code {code}:\n{printed.read_text()[-3000:]}")
    rows = json.loads(answered.read_text())
    for row in rows:
        row["finished_at"] -= started
    check_same_work(task, rows)
    return Measured(seconds, cpu_seconds, rows, [before, probe()], load)


def environment(arm: str) -> dict[str, str]:
    """Return a shell's variables, without those of Ray and Tune that ``search`` has set for itself.

    Those of the allocator go with our training code, to whichever arm runs it; the tutorial has its own.
    """
    of_search = ("RAY_", "TUNE_", "MALLOC_") if arm == "tutorial" else ("RAY_", "TUNE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(of_search)}


def _cpu_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _reap() -> None:
    """Wait for all children, those that were orphaned to us included."""
    until = time.monotonic() + LEFT_SECONDS
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
        except ChildProcessError:
            return
    raise RuntimeError(f"an arm left processes behind; see ps --ppid {os.getpid()}")


def check_same_work(task: Task, rows: list[Row]) -> None:
    """Raise RuntimeError unless an arm trained every trial, to its end where nobody prunes."""
    epochs: dict[int, int] = {}
    for row in rows:
        epochs[row["trial"]] = max(row["epoch"], epochs.get(row["trial"], 0))
    diverged = {row["trial"] for row in rows if row["val_accuracy"] is None}
    short = [t for t, epoch in epochs.items() if epoch < task.epochs and t not in diverged]
    if len(epochs) != len(task.configurations) or (short and not task.pruning):
        raise RuntimeError(f"arm {task.arm} ran {len(epochs)} trials, {len(short)} of them too short")
