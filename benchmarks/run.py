"""How much faster is a study by tunefleet than by what one would use instead?

Runs arms in turn (A B B A …) on the same configurations, images, epochs and number type, each from a cold
``python``, and prints the median of the repetitions' ratios. A repetition in which the machine's own speed
varied too much has none; another makes up for it, up to nearly twice as many as were asked for. Writes
benchmarks/results/FAMILY.json after each::

    python -m tunefleet.benchmarks.run ours tutorial --family softmax --data cifar10 --repeat 3
    python -m tunefleet.benchmarks.run --family study          # all arms: when is a good trial found?

The images are decoded before; what is computed from them, a frozen backbone's features too, is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tunefleet.analysis import stats
from tunefleet.benchmarks.arms import ARMS
from tunefleet.benchmarks.families import FAMILIES, Family, configurations
from tunefleet.benchmarks.measured import Measured, measure
from tunefleet.benchmarks.probe import probe, spread
from tunefleet.benchmarks.task import Task
from tunefleet.cli import Parser, exit_code
from tunefleet.trainables.config import check_integer, check_name
from tunefleet.trainables.data import DATA_DIR, load_split
from tunefleet.trainables.host import cpu_count
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.provenance import commit, machine_name, versions

RESULTS = Path(__file__).with_name("results")
STEADY = 0.15  # by which fraction probes may vary before a ratio says nothing


def subset(data_name: str, data_dir: Path, images: int | None) -> str:
    """Return a folder of some training images, of each class as many, for all arms to read.

    Args:
        data_name: As ``--data`` takes it.
        data_dir: The cache folder; the tree is kept there.
        images: How many; None: all, of the data itself.
    """
    data = prepare(data_name, data_dir)
    if images is None:
        return absolute(data_name)
    folder = data_dir / f"benchmark-{data.sha256[:12]}-{images}"
    if not folder.exists():
        x, y = load_split(data, "train")
        building = Path(tempfile.mkdtemp(dir=data_dir))
        for k, name in enumerate(data.classes):
            for split, of_class in _parts(np.flatnonzero(y == k), images // len(data.classes)):
                (where := building / split / name).mkdir(parents=True)
                for index in of_class:
                    Image.fromarray(x[index].transpose(1, 2, 0)).save(where / f"{index:06d}.png")
        building.rename(folder)
    return str(folder)


def absolute(name: str) -> str:
    """Return a path that means the same in every process, and what is no path as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _parts(of_class: np.ndarray, count: int) -> list[tuple[str, np.ndarray]]:
    """Return what becomes train/, and a test/ that nothing reads but that a data set must have."""
    if len(of_class) <= count:
        raise ValueError(f"a class has {len(of_class)} images, too few for {count} of each; give more --data")
    return [("train", of_class[:count]), ("test", of_class[count : count + 1])]


def interval95(ratios: list[float]) -> tuple[float, float]:
    """Return the bootstrap's 95 % interval of the median of ratios ``(n,)``."""
    drawn = np.random.default_rng(0).choice(ratios, size=(stats.RESAMPLES, len(ratios)))
    low, high = stats.interval95(np.median(drawn, axis=1))
    return float(low), float(high)


def ratios(measured: dict[str, list[Measured]], arm: str, target: float | None) -> list[float]:
    """Return, per steady repetition, how many times as long an arm took as ours.

    Args:
        measured: Runs of each arm, by repetition.
        arm: Which.
        target: val_accuracy whose finding is timed; None: the whole run is.
    """
    return [
        seconds_of(theirs, target) / seconds_of(ours, target)
        for theirs, ours in _pairs(measured, arm)
        if variation(theirs, ours)[0] <= STEADY
    ]


def _pairs(measured: dict[str, list[Measured]], arm: str) -> list[tuple[Measured, Measured]]:
    """Return an arm's runs, each with ours of its repetition; none of ours, or without ours."""
    if arm == "ours" or "ours" not in measured:
        return []
    return list(zip(measured[arm], measured["ours"], strict=True))


def variation(*runs: Measured) -> tuple[float, str]:
    """Return by which fraction the machine's speed varied beside some runs, and in what it did most."""
    probes = [probed for run in runs for probed in run.probes]
    return max((spread([probed[name] for probed in probes]), name) for name in probes[0])


def seconds_of(run: Measured, target: float | None) -> float:
    """Return the seconds of a run that count; infinity where it never reached the target."""
    if target is None:
        return run.seconds
    found = run.seconds_until(target)
    return float("inf") if found is None else found


def target_of(family: Family, measured: dict[str, list[Measured]]) -> float | None:
    """Return the val_accuracy that ends the race, the lowest best of the tutorial's runs; None: no race."""
    if not family.pruning or "tutorial" not in measured:
        return None
    return min(run.best for run in measured["tutorial"])


def print_table(family: Family, measured: dict[str, list[Measured]]) -> None:
    """Print a row per arm, 80 columns wide, and which repetitions were left out of the ratios."""
    target = target_of(family, measured)
    if target is not None:
        print(f"seconds until val_accuracy {target:.4f}, the tutorial's best")
    print(f"{'arm':17}{'seconds':>8}{'CPU s':>8}{'epochs':>8}{'best':>8}{'÷ ours':>8}  95 % interval")
    for arm, runs in measured.items():
        line = (
            f"{arm:17}{statistics.median(seconds_of(run, target) for run in runs):8.1f}"
            f"{statistics.median(run.cpu_seconds for run in runs):8.1f}"
            f"{statistics.median(len(run.rows) for run in runs):8.0f}"
            f"{statistics.median(run.best for run in runs):8.4f}"
        )
        if found := ratios(measured, arm, target):
            low, high = interval95(found)
            line += f"{statistics.median(found):8.2f}  {low:.2f} to {high:.2f}, n = {len(found)}"
        print(line)
    for said in unsteady(measured):
        print(said)


def unsteady(measured: dict[str, list[Measured]]) -> list[str]:
    """Says, a line per arm, of how many repetitions the machine's speed varied too much for a ratio."""
    lines = []
    for arm in measured:
        varied = [variation(*pair) for pair in _pairs(measured, arm)]
        if left_out := [worst for worst in varied if worst[0] > STEADY]:
            by, name = max(left_out)
            lines.append(
                f"{arm}: {len(left_out)} of {len(varied)} repetitions have no ratio: "
                f"the machine's {name} varied by up to {by:.0%}"
            )
    return lines


def result(
    family: Family, options: argparse.Namespace, measured: dict[str, list[Measured]]
) -> dict[str, Any]:
    """Return what is kept of a benchmark; of unsteady repetitions no ratios."""
    target = target_of(family, measured)
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
        "unsteady": unsteady(measured),
        "arms": {
            arm: [
                {
                    "seconds": round(run.seconds, 2),
                    "seconds_counted": round(seconds_of(run, target), 2),
                    "reports_at": [round(seconds, 1) for seconds in run.first_and_last],
                    "cpu_seconds": round(run.cpu_seconds, 1),
                    "epochs": len(run.rows),
                    "best": round(run.best, 4),
                    "load": round(run.load, 2),
                    "probes": [
                        {name: round(value, 2) for name, value in probed.items()} for probed in run.probes
                    ],
                }
                for run in runs
            ]
            for arm, runs in measured.items()
        },
        "ratios": {
            arm: {"median": statistics.median(found), "interval95": interval95(found), "values": found}
            for arm in measured
            if (found := ratios(measured, arm, target))
        },
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options.

    Raises:
        ValueError: One is impossible.
    """
    parser = Parser(prog="python -m tunefleet.benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_argument("arms", nargs="*", metavar="ARM", help="; ".join(f"{a}: {ARMS[a][1]}" for a in ARMS))
    parser.add_argument("--family", default="softmax", help=", ".join(FAMILIES))
    parser.add_argument("--repeat", type=int, default=5, help="steady runs of each arm (%(default)s)")
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder or archive of 32×32 images")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR / "benchmarks", help="cache (%(default)s)")
    parser.add_argument("--weights", default="none", help="of ResNets: imagenet, none or a path")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--precision", default="fp32", help="of our training code (%(default)s, as the others)"
    )
    parser.add_argument("--workers", type=int, default=2, help="trials at once (%(default)s)")
    for name in ("trials", "epochs", "images"):
        parser.add_argument(f"--{name}", type=int, help="instead of the family's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of FAMILY.json (%(default)s)")
    options = parser.parse_args(arguments)
    check_name("--family", options.family, FAMILIES)
    options.arms = options.arms or list(ARMS)
    for arm in options.arms:
        check_name("ARM", arm, ARMS)
    check_integer("--repeat", options.repeat, 1)
    check_integer("--workers", options.workers, 1)
    return options


def compare(options: argparse.Namespace) -> int:
    """Run the arms in turn, prints the table and writes the result."""
    given = {name: value for name in ("trials", "epochs", "images") if (value := getattr(options, name))}
    family = dataclasses.replace(FAMILIES[options.family], **given)
    data = subset(options.data, options.data_dir, family.images)
    images = prepare(data, options.data_dir)
    if images.image_shape != (3, 32, 32):
        raise ValueError(f"--data={options.data} has images {images.image_shape}; give one of 3×32×32")
    measured: dict[str, list[Measured]] = {arm: [] for arm in options.arms}
    print(
        f"{options.family}: {family.trials} trials × {family.epochs} epochs of {family.architecture}, "
        f"{images.train_count} images, {options.workers} at once, {options.precision}"
    )
    compared = [arm for arm in options.arms if "ours" in options.arms and arm != "ours"]
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{options.family}.json"
    probed = probe()
    for turn in range(2 * options.repeat - 1):
        steady = all(len(ratios(measured, arm, None)) >= options.repeat for arm in compared)
        if turn >= options.repeat and steady:
            break
        for arm in options.arms if turn % 2 == 0 else options.arms[::-1]:
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
                done = measure(task, probed)
            measured[arm].append(done)
            probed = done.probes[-1]  # nothing lies between two arms
            print(
                f"  {arm:17}{done.seconds:8.1f} s{done.cpu_seconds:8.1f} CPU s, best {done.best:.4f}, load "
                f"{done.load:.1f}, "
                + " to ".join(f"{p['gflops']:.0f} GFLOP/s {p['gbytes']:.1f} GB/s" for p in done.probes),
                flush=True,
            )
        file.write_text(json.dumps(result(family, options, measured), indent=1) + "\n")
    print_table(family, measured)
    print(f"-> {file}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Compare arms; return the exit code."""
    return exit_code(lambda: compare(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
