"""How much faster is a study with tunefleet than with what one would use instead?

Runs arms in turn (A B B A …) on the same configurations, images, epochs and number type, each from a cold
``python``, and prints the median of the repetitions' ratios. A repetition in which the machine's own speed
varied too much has none; another replaces it, up to nearly twice as many as were asked for. Writes
benchmarks/results/FAMILY.json after each::

    python -m tunefleet.benchmarks.compare ours tutorial --family softmax --data cifar10 --repeat 3
    python -m tunefleet.benchmarks.compare --family study     # all arms: when is a good trial found?
    python -m tunefleet.benchmarks.compare --table benchmarks/results/*.json    # README.md's table of results

The images are decoded before; what is computed from them, a frozen backbone's features too, is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from tunefleet.benchmarks.arms import ARMS
from tunefleet.benchmarks.families import FAMILIES, Family, absolute, configurations, subset
from tunefleet.benchmarks.task import Row, Task
from tunefleet.cli import Parser, exit_code
from tunefleet.host import cpu_count
from tunefleet.models.checks import check_integer, check_name
from tunefleet.trainables.data import DATA_DIR
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.provenance import commit, machine_name, versions

RESULTS = Path(__file__).with_name("results")
PEERS = tuple(arm for arm in ARMS if arm != "ours")
STEADY = 0.15  # by which fraction the machine's speed may vary before a ratio says nothing
RESAMPLES = 10_000  # of the bootstrap
PROBE_SECONDS = 2.0  # for which a probe is repeated
LEFT_SECONDS = 60.0  # that Ray's processes may take to exit after their driver
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def probe() -> float:
    """Return the machine's speed now: per second, products of 1024² matrices with a read of 256 MiB each.

    On one thread of the CPU; the median, after some that are not timed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b, memory = torch.rand(1024, 1024), torch.rand(1024, 1024), torch.ones(2**26)
        ends, began = [time.perf_counter()], time.perf_counter()
        while ends[-1] < began + PROBE_SECONDS or len(ends) < 5:
            _ = a @ b, memory.sum()
            ends.append(time.perf_counter())
        return 1 / float(np.median(np.diff(ends)[len(ends) // 4 :]))
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Measured:
    """One run of an arm."""

    seconds: float  # from starting python to its end
    cpu_seconds: float  # that the machine was busy, with anything: Ray's raylet hides those of its workers
    rows: list[Row]  # finished_at is in seconds from the start
    probes: tuple[float, float]  # just before and just after

    @property
    def best(self) -> float:
        """Return the highest val_accuracy of a trial's last report, a fraction."""
        return max({row["trial"]: row["val_accuracy"] or 0.0 for row in self.rows}.values())

    def seconds_until(self, accuracy: float | None) -> float:
        """Return when a report first reached an accuracy, else infinity; of None the run's seconds."""
        if accuracy is None:
            return self.seconds
        found = [row["finished_at"] for row in self.rows if (row["val_accuracy"] or 0.0) >= accuracy]
        return min(found, default=float("inf"))

    def to_dict(self, target: float | None) -> dict[str, Any]:
        """Return what a result keeps of the run."""
        times = [row["finished_at"] for row in self.rows]  # before and after lies what an engine costs
        return {
            "seconds": round(self.seconds, 2),
            "seconds_counted": round(self.seconds_until(target), 2),
            "reports_at": [round(min(times), 1), round(max(times), 1)],
            "cpu_seconds": round(self.cpu_seconds, 1),
            "epochs": len(self.rows),
            "best": round(self.best, 4),
            "probes": [round(speed, 2) for speed in self.probes],
        }


def measure(task: Task, before: float) -> Measured:
    """Run an arm in a process of its own; wait until all that it started has exited.

    Args:
        task: What it runs.
        before: What a probe has just found.

    Raises:
        RuntimeError: It failed; the end of what it printed.
    """
    folder = Path(task.folder)
    given, written, printed = (folder.with_suffix(end) for end in (".task", ".rows", ".txt"))
    task.write(given)
    command = [sys.executable, "-m", "tunefleet.benchmarks.arms", task.arm, str(given), str(written)]
    used, started, began = _cpu_seconds(), time.time(), time.perf_counter()
    with printed.open("w") as out, adopted_orphans():
        code = subprocess.call(
            command, env=environment(task.arm), stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
        seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - used
    if code != 0:
        raise RuntimeError(f"arm {task.arm} ended with code {code}:\n{printed.read_text()[-3000:]}")
    rows = json.loads(written.read_text())
    for row in rows:
        row["finished_at"] -= started
    check_same_work(task, rows)
    return Measured(seconds, cpu_seconds, rows, (before, probe()))


@contextlib.contextmanager
def adopted_orphans() -> Iterator[None]:
    """Context manager: make an arm's orphans children of this process, and wait for their end (Linux).

    Not for longer: a Ray worker takes its raylet for dead only once init has adopted it (Ray 2.60).
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
        until = time.monotonic() + LEFT_SECONDS
        with contextlib.suppress(ChildProcessError):  # none is left
            while time.monotonic() < until:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.05)
            raise RuntimeError(f"an arm left processes behind; see ps --ppid {os.getpid()}")
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def environment(arm: str) -> dict[str, str]:
    """Return a shell's variables, without those of Ray and Tune that ``search`` has set for itself.

    Those of the allocator belong to our training code, in whichever arm; the tutorial runs without them.
    """
    of_search = ("RAY_", "TUNE_", "MALLOC_") if arm == "tutorial" else ("RAY_", "TUNE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(of_search)}


def _cpu_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def check_same_work(task: Task, rows: list[Row]) -> None:
    """Raise RuntimeError unless an arm trained every trial, to its end where nobody prunes."""
    epochs: dict[int, int] = {}
    for row in rows:
        epochs[row["trial"]] = max(row["epoch"], epochs.get(row["trial"], 0))
    diverged = {row["trial"] for row in rows if row["val_accuracy"] is None}
    short = [t for t, epoch in epochs.items() if epoch < task.epochs and t not in diverged]
    if len(epochs) != len(task.configurations) or (short and not task.pruning):
        raise RuntimeError(f"arm {task.arm} ran {len(epochs)} trials, {len(short)} of them too short")


def pairs(measured: dict[str, list[Measured]], arm: str) -> list[tuple[Measured, Measured]]:
    """Return an arm's runs, each with ours of its repetition; none of ours, or without ours."""
    if arm == "ours" or "ours" not in measured:
        return []
    return list(zip(measured[arm], measured["ours"], strict=True))


def variation(*runs: Measured) -> float:
    """Return by which fraction of its median the machine's speed varied beside some runs."""
    speeds = sorted(speed for run in runs for speed in run.probes)
    return (speeds[-1] - speeds[0]) / speeds[len(speeds) // 2]


def ratios(measured: dict[str, list[Measured]], arm: str, target: float | None) -> list[float]:
    """Return, per steady repetition, how many times as long an arm took as ours.

    Args:
        measured: Runs of each arm, by repetition.
        arm: Its name.
        target: val_accuracy whose finding is timed; None: the whole run is.
    """
    return [
        theirs.seconds_until(target) / ours.seconds_until(target)
        for theirs, ours in pairs(measured, arm)
        if variation(theirs, ours) <= STEADY
    ]


def interval95(values: list[float]) -> tuple[float, float]:
    """Return the bootstrap's 95 % interval of the median of values ``(n,)``."""
    medians = np.median(np.random.default_rng(0).choice(values, (RESAMPLES, len(values))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)


def target_of(family: Family, measured: dict[str, list[Measured]]) -> float | None:
    """Return the val_accuracy that ends the race, the lowest best of the tutorial's runs; None: no race."""
    if not family.pruning or not measured.get("tutorial"):
        return None
    return min(run.best for run in measured["tutorial"])


def result(
    family: Family, options: argparse.Namespace, measured: dict[str, list[Measured]]
) -> dict[str, Any]:
    """Return what is kept of a benchmark; of unsteady repetitions no ratios."""
    target = target_of(family, measured)
    varied = {arm: [variation(*pair) for pair in pairs(measured, arm)] for arm in measured}
    return {
        "family": options.family,
        **dataclasses.asdict(family),
        "commit": commit(),
        "versions": versions(),
        "machine": machine_name(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {cpu_count()} cores",
        "precision": options.precision,
        "device": options.device,
        "target": target,
        "unsteady": [
            f"{arm}: {sum(one > STEADY for one in by)} of {len(by)} repetitions have no ratio: the machine's "
            f"speed varied by up to {max(by):.0%}"
            for arm, by in varied.items()
            if max(by, default=0.0) > STEADY
        ],
        "arms": {arm: [run.to_dict(target) for run in runs] for arm, runs in measured.items()},
        "ratios": {
            arm: {"median": median(found), "interval95": interval95(found), "values": found}
            for arm in measured
            if (found := ratios(measured, arm, target))
        },
    }


def cells(found: dict[str, Any]) -> list[str]:
    """Return the cells of one result: trials, number type, seconds of ours, and others' time over ours."""
    images = f"{found['images']:,} images" if found["images"] else "all images"
    work = "no-op" if found["no_op"] else f"{found['epochs']} × {images}"
    if found["pruning"]:
        work = f"at most {work}, until the tutorial's best"
    ours = [run["seconds_counted"] for run in found["arms"].get("ours", [])]
    line = [
        f"{found['family']}: {found['trials']} × {work}",
        f"{found['precision']}, {found['processor'].split(', ')[1]}",
        f"{median(ours):.0f}" if ours else "",
    ]
    for peer in PEERS:
        if ratio := found["ratios"].get(peer):
            low, high = ratio["interval95"]
            line.append(f"{ratio['median']:.2f} ({low:.2f} to {high:.2f}, n = {len(ratio['values'])})")
        else:
            line.append("unsteady" if peer in found["arms"] and ours else "")
    return line


def table(found: list[dict[str, Any]]) -> str:
    """Return a Markdown row per result, by number type and family; peers that no result has are left out."""
    found = sorted(found, key=lambda one: (one["precision"], cells(one)[0]))
    kept = [True] * 3 + [any(peer in one["arms"] for one in found) for peer in PEERS]
    lines = [["trials", "numbers", "ours, s", *PEERS], ["---"] * len(kept), *map(cells, found)]
    return "".join(
        "| " + " | ".join(cell for cell, keep in zip(line, kept, strict=True) if keep) + " |\n"
        for line in lines
    )


def read(file: Path) -> dict[str, Any]:
    """Return a result.

    Raises:
        ValueError: The file holds none.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        cells(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no result ({error!r}); give JSON files of tunefleet.benchmarks.compare"
        ) from None
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options.

    Raises:
        ValueError: One is impossible.
    """
    parser = Parser(prog="python -m tunefleet.benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("arms", nargs="*", metavar="ARM", help="; ".join(f"{a}: {ARMS[a][1]}" for a in ARMS))
    parser.add_argument("--family", default="softmax", help=", ".join(FAMILIES))
    parser.add_argument("--repeat", type=int, default=5, help="steady runs of each arm (%(default)s)")
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder or archive of 32×32 images")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR / "benchmarks", help="cache (%(default)s)")
    parser.add_argument("--weights", default="none", help="of ResNets: imagenet, none or a path")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", help="of our training code (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="trials at once (%(default)s)")
    for name in ("trials", "epochs", "images"):
        parser.add_argument(f"--{name}", type=int, help="instead of the family's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of FAMILY.json (%(default)s)")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="FILE", help="print results, and run nothing"
    )
    options = parser.parse_args(arguments)
    check_name("--family", options.family, FAMILIES)
    options.arms = options.arms or list(ARMS)
    for arm in options.arms:
        check_name("ARM", arm, ARMS)
    check_integer("--repeat", options.repeat, 1)
    check_integer("--workers", options.workers, 1)
    return options


def run_arm(
    arm: str, family: Family, turn: int, data: str, options: argparse.Namespace, speed: float
) -> Measured:
    """Run an arm once, without what an earlier one has computed from the images."""
    shutil.rmtree(options.data_dir / "prepared", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        (work := Path(folder, "arm")).mkdir()
        task = Task(
            arm=arm,
            configurations=configurations(family, absolute(options.weights), turn),
            epochs=family.epochs,
            pruning=family.pruning,
            no_op=family.no_op,
            data=data,
            data_dir=str(options.data_dir.absolute()),
            workers=options.workers,
            device=options.device,
            precision=options.precision,
            folder=str(work),
        )
        return measure(task, speed)


def compare(options: argparse.Namespace) -> int:
    """Run the arms in turn, write the result and print its table; return the exit code."""
    given = {name: value for name in ("trials", "epochs", "images") if (value := getattr(options, name))}
    family = dataclasses.replace(FAMILIES[options.family], **given)
    data = subset(options.data, options.data_dir, family.images)
    images = prepare(data, options.data_dir)
    if images.image_shape != (3, 32, 32):
        raise ValueError(f"--data={options.data} has images {images.image_shape}; give one of 3×32×32")
    print(
        f"{options.family}: {family.trials} trials × {family.epochs} epochs of {family.architecture}, "
        f"{images.train_count} images, {options.workers} at once, {options.precision}"
    )
    measured: dict[str, list[Measured]] = {arm: [] for arm in options.arms}
    peers = [arm for arm in options.arms if "ours" in options.arms and arm != "ours"]
    options.out.mkdir(parents=True, exist_ok=True)
    file, speed = options.out / f"{options.family}.json", probe()
    for turn in range(2 * options.repeat - 1):
        if turn >= options.repeat and all(len(ratios(measured, p, None)) >= options.repeat for p in peers):
            break
        for arm in options.arms if turn % 2 == 0 else options.arms[::-1]:
            done = run_arm(arm, family, turn, data, options, speed)
            measured[arm].append(done)
            print(
                f"  {arm:17}{done.seconds:8.1f} s{done.cpu_seconds:8.1f} CPU s, {len(done.rows)} epochs, "
                f"best {done.best:.4f}, speed {speed:.1f} to {done.probes[-1]:.1f}",
                flush=True,
            )
            speed = done.probes[-1]  # nothing lies between two arms
        found = result(family, options, measured)
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(table([found]), *(f"{line}\n" for line in found["unsteady"]), f"-> {file}", sep="")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Compare arms, or print results; return the exit code."""

    def command() -> int:
        options = parse(arguments)
        if not options.table:
            return compare(options)
        print(table([read(file) for file in options.table]), end="")
        return 0

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
