"""How does the metric depend on the learning rate, everything else fixed? Several seeds per value.

::

    tunefleet lr-study --space resnet_softmax_updatable
    tunefleet lr-study --space twolayernn --from studies/NAME --lrs 1e-4 1e-3 1e-2
    tunefleet lr-study --extend studies/NAME

Takes a study's best configuration, or the published one, and runs a log grid of lr through the same
engine as a search; the worse half of all trials stops at half time. Writes a study folder with
``lr_curve.csv`` beside the usual files. Its values are those of the validation images: the test split
stays closed. Exit codes as of search/run.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # from a clone: its own folder would make stats, data, … importable
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")
    from tunefleet.__main__ import script

    script("lr-study")

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from tunefleet.cli import exit_code, kept_environment, rounded, shell, shown
from tunefleet.files import write_whole
from tunefleet.journal import TrialRecord
from tunefleet.metric import ACCURACY, Metric
from tunefleet.models.checks import check_integer, check_number
from tunefleet.models.space import Space
from tunefleet.models.spaces import find_space
from tunefleet.search.display import print_text
from tunefleet.search.options import (
    StudyOptions,
    add_options,
    add_storage,
    check_given,
    parse_study,
    study_parser,
)
from tunefleet.search.running import resume, start
from tunefleet.search.session import Session
from tunefleet.search.wandb_options import add_wandb_flags
from tunefleet.study import Study, over_seeds

GRID = 12  # values
DECADES = 4.0  # that the grid spans, its middle at the best lr known
EXTENSION = 3  # values that --extend adds at the edge, in the grid's own ratio
SEEDS = 3
EPOCHS_SHARE = 1 / 3  # of the space's: enough to rank lrs, and 36 trials are many
RESUME = ("tunefleet", "lr-study", "--resume")
OPTIONS = (
    *("data", "data_dir", "image_size", "weights", "epochs", "seed", "device", "precision"),
    *("concurrency", "cpus_per_trial", "gpus_per_trial", "workers_per_trial", "max_failures"),
)
OF_THE_STUDY = ("data", "image_size", "weights")  # what --from takes over, unless it is given


def lr_grid(middle: float) -> list[float]:
    """Return GRID values, DECADES wide, evenly spaced in log lr around the middle."""
    exponents = np.linspace(-DECADES / 2, DECADES / 2, GRID)
    return [float(f"{middle * 10**exponent:.3g}") for exponent in exponents]


def extended(lrs: list[float], best: float) -> list[float]:
    """Return the values that continue a grid beyond the edge at which its best lies, nearest first.

    Raises:
        ValueError: The best lies inside; there is nothing to extend.
    """
    lrs = sorted(lrs)
    if best not in (lrs[0], lrs[-1]):
        raise ValueError(
            f"the best lr {best:.10g} lies inside {lrs[0]:.10g} to {lrs[-1]:.10g}; nothing to extend"
        )
    ratio = (lrs[-1] / lrs[0]) ** (1 / (len(lrs) - 1)) if len(lrs) > 1 else 10 ** (DECADES / (GRID - 1))
    step = ratio if best == lrs[-1] else 1 / ratio
    return [float(f"{best * step**k:.3g}") for k in range(1, EXTENSION + 1)]


def points_of(config: dict[str, Any], lrs: list[float], seeds: list[int]) -> list[dict[str, Any]]:
    """Return a point per (seed, lr), all lrs of one seed before the next seed.

    The lrs nearest to the config's own come first: in rising order, the first to arrive at half time would be
    hopeless ones, and continue because there is nothing better yet.
    """
    rest = {name: value for name, value in config.items() if name not in ("lr", "seed")}
    lrs = sorted(lrs, key=lambda lr: abs(math.log(lr / config["lr"])))
    return [rest | {"lr": lr, "seed": seed} for seed in seeds for lr in lrs]


def lr_curve(trials: list[TrialRecord], chance: float = -math.inf, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Return a row per lr, rising.

    Args:
        trials: All trials of the study.
        chance: val_accuracy up to which a network knows nothing.
        metric: What the study compares trials by.

    Returns:
        lr, seeds, done and diverged (seeds that ended so), epochs (of the seeds that went furthest), n
        (of those), mean, sd, low and high (Student's 95 % interval of the mean) of their metric,
        empty where every seed diverged, and verdict: done, pruned (stopped at half time), diverged
        (most seeds) or at chance.
    """
    rows = []
    for lr in sorted({trial.config["lr"] for trial in trials}):
        of_lr = [trial for trial in trials if trial.config["lr"] == lr]
        able = [t for t in of_lr if t.status in (None, "done") and t.value(metric) is not None]
        furthest = max((t.epoch for t in able), default=0)
        values = [value for t in able if t.epoch == furthest and (value := t.value(metric)) is not None]
        summary = over_seeds(values, metric) if values else {"mean": None, "sd": None, "interval95": None}
        diverged = sum(t.status == "diverged" for t in of_lr)
        done = sum(t.status == "done" for t in of_lr)
        mean = summary["mean"]
        if mean is None or diverged > len(of_lr) / 2:
            verdict = "diverged"
        elif mean <= chance:
            verdict = "at chance"
        else:
            verdict = "done" if done else "pruned"
        low, high = summary["interval95"] or (None, None)
        figures = {"mean": mean, "sd": summary["sd"], "low": low, "high": high}
        counts = {"seeds": len(of_lr), "done": done, "diverged": diverged, "epochs": furthest}
        rows.append({"lr": lr, **counts, "n": len(values), **figures, "verdict": verdict})
    return pd.DataFrame(rows)


def best_lr(curve: pd.DataFrame, metric: Metric = ACCURACY) -> float | None:
    """Return the lr with the best mean among those that saw all epochs; None where none did."""
    done = curve[curve.verdict == "done"].astype({"mean": float})
    return None if done.empty else float(done.lr.iloc[int(done["mean"].map(metric.score).argmax())])


def finish(folder: Path, console: Console) -> int:
    """Write lr_curve.csv and print the curve; return the exit code."""
    study = Study(folder)
    curve = curve_of(study)
    best = best_lr(curve, study.metric)
    write_whole(folder / "lr_curve.csv", curve.to_csv(index=False, lineterminator="\n").encode())
    console.print(curve_table(curve, best, study.metric.name))
    if best is None:
        print_text(console, "no lr was trained to the end")
        return 1
    print_text(console, f"best lr {best:.10g} -> {shown(folder / 'lr_curve.csv')}")
    if best in (curve.lr.min(), curve.lr.max()):
        command = shell("tunefleet", "lr-study", "--extend", shown(folder))
        text = " the best lr is at the grid's edge; the true best may be beyond it. "
        print_text(console, f"{text}To look there: {command}", "warning:", "yellow")
    return 0


def curve_of(study: Study) -> pd.DataFrame:
    """Return ``lr_curve`` of a learning-rate study."""
    chance = -math.inf
    if study.metric == ACCURACY and (classes := len(study.spec["data"]["classes"])):
        chance = 1 / classes + 3 * math.sqrt((1 - 1 / classes) / classes / study.spec["validation_count"])
    return lr_curve(list(study.records.values()), chance, study.metric)


def curve_table(curve: pd.DataFrame, best: float | None, metric: str = ACCURACY.name) -> Table:
    """Return the curve as a table that fits 80 columns."""
    table = Table("lr", metric, "95 % interval", "n", "epochs", "", box=None, header_style="bold")
    for row in curve.to_dict("records"):
        mean = "-" if pd.isna(row["mean"]) else rounded(row["mean"])
        interval = "-" if pd.isna(row["low"]) else f"{rounded(row['low'])} to {rounded(row['high'])}"
        mark = "best" if row["lr"] == best else row["verdict"].replace("done", "")
        table.add_row(
            f"{row['lr']:.10g}", mean, interval, f"{row['n']}/{row['seeds']}", str(row["epochs"]), mark
        )
    return table


def configuration(space: Space, source: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration to keep fixed, and the options that its study had.

    Raises:
        ValueError: The study is of another space, or has no best.
    """
    if source is None:
        return {**space.fixed, **space.start}, {}
    study = Study(source).facts
    if study["space"] != space.name:
        raise ValueError(f"--from={source} is a study of {study['space']}; give --space {study['space']}")
    if not study["best"]:
        raise ValueError(f"--from={source} has no best trial yet; run or resume it first")
    config = {
        name: study["best"]["config"][name]
        for name in {
            **space.ranges,
            **space.fixed,
            **study.get("ranges", {}),
            **(study["options"].get("fix") or {}),
        }
    }
    return config, {name: study["options"][name] for name in OF_THE_STUDY}


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return what to do, and the study's options that were given."""
    parser = study_parser("tunefleet lr-study", __doc__.split("\n")[0])
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="STUDY", help="take its best configuration"
    )
    parser.add_argument(
        "--lrs", type=float, nargs="+", help=f"values (default: {GRID} over {DECADES:g} decades)"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="per value (default: %(default)s)")
    parser.add_argument("--extend", type=Path, metavar="DIR", help="widen a finished study beyond its edge")
    add_storage(parser)
    add_options(parser, OPTIONS)
    add_wandb_flags(parser)
    return parse_study(parser, arguments)


def new_options(flags: argparse.Namespace, given: dict[str, Any]) -> StudyOptions:
    """Return the options of a new learning-rate study.

    Raises:
        ValueError: A value is impossible.
    """
    if not flags.space:
        raise ValueError("give --space NAME, --resume DIR or --extend DIR")
    space = find_space(flags.space)
    check_given(space, given)
    config, inherited = configuration(space, flags.source)
    if "lr" not in config:
        raise ValueError(f"{space.name} has no lr; give a space that searches or fixes one")
    check_integer("--seeds", flags.seeds, 1)
    lrs = sorted(set(flags.lrs or lr_grid(config["lr"])))
    for lr in lrs:
        check_number("--lrs", lr, 0, math.inf, low_allowed=False)
    given = inherited | given
    given.setdefault("epochs", math.ceil(space.epochs * EPOCHS_SHARE))
    epochs = given["epochs"]
    seed = given.get("seed", 0)
    return StudyOptions(
        space=space,
        points=points_of(config, lrs, list(range(seed, seed + flags.seeds))),
        pruner="promote",
        eta=2,
        grace=math.ceil(epochs / 2),  # the only rung: its double is not below the epochs
        final_seeds=0,
        **given,
    )


def extension(folder: Path) -> list[dict[str, Any]]:
    """Return the points of a finished study and further ones beyond the edge at which its best lies.

    Raises:
        ValueError: It is no finished learning-rate study, or its best lies inside the grid.
    """
    study = Study(folder)
    points = study.spec["options"].get("points")
    best = best_lr(curve_of(study), study.metric) if study.status == "done" and points else None
    if best is None:
        raise ValueError(
            f"{folder} is no finished learning-rate study; give one, or: {shell(*RESUME, folder)}"
        )
    lrs = extended(sorted({point["lr"] for point in points}), best)
    return [*points, *points_of(points[0], lrs, sorted({point["seed"] for point in points}))]


@kept_environment()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    flags, given = parse(arguments)
    session = Session(Console(), RESUME, finish)
    return session.stops.run(lambda: exit_code(lambda: run(flags, given, session)))


def run(flags: argparse.Namespace, given: dict[str, Any], session: Session) -> int:
    """Start, resume or extend a study; return the exit code.

    Raises:
        ValueError: It cannot run as asked.
    """
    if flags.extend:
        changes = given | {"points": extension(flags.extend), "trials": None}
        return resume(flags.extend, changes, session, wandb=flags.wandb, extend=True)
    if flags.resume:
        return resume(flags.resume, given, session, wandb=flags.wandb)
    options = new_options(flags, given)
    return start(
        options, flags.study_dir, session, dry_run=flags.dry_run, wandb=flags.wandb, storage=flags.storage
    )
