"""Which scheduler finds a good configuration in the fewest epochs? Replays on recorded curves.

::

    python -m tunefleet.benchmarks.replay benchmarks/curves/*
    python -m tunefleet.benchmarks.replay studies/NAME --workers 8 --orders 200

Takes the curves of studies without pruner and lets every scheduler (benchmarks/schedulers.py) search them,
with simulated workers and in many orders of arrival, the same ones for all. Prints a table per family and
number of workers. ASHA: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning".
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tunefleet.benchmarks.curves import Curves, read
from tunefleet.benchmarks.schedulers import REFERENCE, SCHEDULERS, Report, simulate
from tunefleet.cli import Parser, counted, exit_code
from tunefleet.journal import TrialRecord, winner
from tunefleet.models.checks import check_name
from tunefleet.search.asha import rung_epochs

MOST_ORDERS = 100_000  # all are in memory at once
RESAMPLES = 10_000  # of a bootstrap: the ends of an interval then differ by a hundredth of its width
MEASURES = ("epochs", "seconds", "regret", "regret_other")  # of one search
EXPLAINED = """\
epochs: spent by the whole search; ratio: to ray_asha's. seconds: simulated.
regret: final val_accuracy of the best curve less that of the one picked, in
points of percent; other: of the same pick on the other seeds' curves (random's
is what chance costs). above: more than ray_asha's, in the same orders.
a..b: 95 % bootstrap interval over orders of arrival, on these very curves."""


def reports_of(curves: Curves, seed: int) -> tuple[list[list[Report]], list[list[float]]]:
    """Return the reports of each configuration with the seed of this index, and their seconds."""
    reports, seconds = [], []
    for accuracy, loss, durations in zip(
        curves.accuracy[seed], curves.loss[seed], curves.seconds[seed], strict=True
    ):
        curve: list[Report] = []
        for epoch, (value, of_loss) in enumerate(zip(accuracy.tolist(), loss.tolist(), strict=True), start=1):
            if math.isnan(value):
                curve.append({"epoch": epoch, "val_accuracy": None, "val_loss": None, "status": "diverged"})
                break
            curve.append({"epoch": epoch, "val_accuracy": value, "val_loss": of_loss})
        curve[-1].setdefault("status", "done")
        reports.append(curve)
        seconds.append(durations[: len(curve)].tolist())
    return reports, seconds


def pick(seen: np.ndarray, reports: list[list[Report]], order: Sequence[int]) -> int | None:
    """Return the configuration that a study would call its best; None: all diverged.

    Args:
        seen: Epochs that each configuration saw, ``(N,)``.
        reports: Of each configuration, epoch by epoch.
        order: The configurations as they arrived.
    """
    trials = {}
    for configuration in order:
        last = reports[configuration][seen[configuration] - 1]
        name = str(configuration)
        trials[name] = TrialRecord(name, {}, {last["epoch"]: last}, last.get("status"))
    best = winner(trials)
    return None if best is None else int(best.trial_id)


def regrets(curves: Curves, seed: int, picked: int | None) -> tuple[float, float]:
    """Return how much val_accuracy a choice costs: at the last epoch, the best one's less the picked one's.

    Args:
        curves: What all would have reached; a diverged one has reached 0, as for a sampler.
        seed: Index of the seed whose curves were searched.
        picked: A configuration; None: none, which has reached 0.

    Returns:
        The regret on the curves of that seed, and the mean of those on the other seeds' curves, where a
        value that the search saw by luck counts for nothing; NaN where there is one seed.
    """
    last = np.nan_to_num(curves.accuracy[:, :, -1])  # (S, N)
    regret = last.max(axis=1) - (0.0 if picked is None else last[:, picked])
    others = np.delete(regret, seed)
    return float(regret[seed]), float(others.mean()) if len(others) else math.nan


def replay(
    curves: Curves, names: Sequence[str], orders: np.ndarray, *, workers: int, grace: int, eta: int
) -> np.ndarray:
    """Let schedulers search the same curves in the same orders.

    Args:
        curves: Of N configurations, S seeds, R epochs.
        names: Of M schedulers.
        orders: ``(orders, N)``, permutations of the configurations.
        workers: How many train at the same time.
        grace: First rung, an epoch.
        eta: Keep the top 1/eta at each rung.

    Returns:
        ``(M, S, orders, 4)``: MEASURES of each search: epochs spent, simulated seconds, and the regrets
        (fractions 0..1).

    Raises:
        ValueError: grace or eta is impossible.
    """
    epochs = curves.accuracy.shape[2]
    rungs = rung_epochs(grace, eta, epochs)
    found = np.empty((len(names), len(curves.seeds), len(orders), len(MEASURES)))
    for seed in range(len(curves.seeds)):
        reports, seconds = reports_of(curves, seed)
        for k, order in enumerate(orders.tolist()):
            for m, name in enumerate(names):
                scheduler = SCHEDULERS[name](order, rungs, eta, epochs)
                seen, took = simulate(scheduler, reports, seconds, workers)
                found[m, seed, k] = seen.sum(), took, *regrets(curves, seed, pick(seen, reports, order))
    return found


def bootstrap_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the means of bootstrap samples (Efron 1979), from which any function of them has an interval.

    Args:
        values: ``(n, k)``, k measures of the same n cases, which are drawn together: a difference or a
            ratio of two columns is a paired one.
        generator: Of the drawing.

    Returns:
        ``(RESAMPLES, k)``.
    """
    n = len(values)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.asarray(counts @ values / n)


def compare(found: np.ndarray, names: Sequence[str], generator: np.random.Generator) -> pd.DataFrame:
    """Return a row per scheduler: what its searches took and found, and how that compares with REFERENCE.

    Args:
        found: ``(M, S, orders, 4)``, MEASURES of each search, by scheduler, seed and order of arrival.
        names: Of the M schedulers; REFERENCE is one of them.
        generator: Of the bootstrap, which draws orders; of the seeds, it sees the mean.

    Returns:
        scheduler; of each measure the mean; ``epochs_ratio``, ``seconds_ratio`` (to REFERENCE's mean),
        ``regret_above`` and ``regret_other_above`` (REFERENCE's mean subtracted), and beside each of these
        four, with ``_low`` and ``_high``, its 95 % interval.
    """
    reference = list(names).index(REFERENCE)
    columns: dict[str, Any] = {"scheduler": list(names)}
    for measure, values in zip(MEASURES, np.moveaxis(found.mean(axis=1), 2, 0), strict=True):  # (M, orders)
        means, samples = values.mean(axis=1), bootstrap_means(values.T, generator)
        against, ending = (np.subtract, "above") if measure.startswith("regret") else (np.divide, "ratio")
        name, compared = f"{measure}_{ending}", against(samples, samples[:, [reference]])
        columns[measure], columns[name] = means, against(means, means[reference])
        columns[f"{name}_low"], columns[f"{name}_high"] = np.percentile(compared, (2.5, 97.5), axis=0)
    return pd.DataFrame(columns)


def as_text(table: pd.DataFrame) -> str:
    """Return a comparison as text that fits 80 columns; regrets in points of percent."""
    lines = [
        f"{'':9}{'epochs':>7}{'ratio':>6}{'':11}{'seconds':>8}{'regret':>7}{'above':>13}{'other':>6}{'above':>13}"
    ]
    for row in table.to_dict("records"):
        ratio = f"{row['epochs_ratio']:6.2f} {row['epochs_ratio_low']:.2f}..{row['epochs_ratio_high']:.2f}"
        seconds = f"{row['seconds']:.0f}" if row["seconds"] >= 100 else f"{row['seconds']:.3g}"
        line = f"{row['scheduler']:9}{row['epochs']:7.0f}{ratio:17}{seconds:>8}"
        for measure, width in (("regret", 7), ("regret_other", 6)):
            low, high = row[f"{measure}_above_low"], row[f"{measure}_above_high"]
            above = "-" if math.isnan(low) else f"{_points(low, '+')}..{_points(high, '+')}"
            line += f"{_points(row[measure]):>{width}}{above:>13}"
        lines.append(line)
    return "\n".join(lines)


def _points(fraction: float, sign: str = "") -> str:
    points = 100 * fraction
    return "-" if math.isnan(points) else f"{points:{sign}.{1 if abs(points) >= 10 else 2}f}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = Parser(prog="python -m tunefleet.benchmarks.replay", description=__doc__.split("\n")[0])
    parser.add_argument("curves", nargs="+", help="a study without pruner (folder or URL)")
    parser.add_argument("--orders", type=int, default=100, help="of arrival (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2, 8, 32], help="at once (default: 1 2 8 32)"
    )
    parser.add_argument("--eta", type=int, default=3, help="keep the top 1/eta (default: %(default)s)")
    parser.add_argument("--grace", type=int, default=1, help="epochs before the first rung (%(default)s)")
    parser.add_argument(
        "--schedulers",
        nargs="+",
        metavar="NAME",
        default=list(SCHEDULERS),
        help=f"of: {', '.join(SCHEDULERS)} (default: all); {REFERENCE} is always compared",
    )
    parser.add_argument("--seed", type=int, default=0, help="of orders and bootstrap (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = parse(arguments)
    return exit_code(lambda: _replay(options))


def _replay(options: argparse.Namespace) -> int:
    for flag, value, least, most in (
        ("--orders", options.orders, 1, MOST_ORDERS),
        ("--seed", options.seed, 0, math.inf),
        *(("--workers", workers, 1, math.inf) for workers in options.workers),
    ):
        if not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most:,}"
            raise ValueError(f"{flag}={value} is not possible; give {limit}")
    for name in options.schedulers:
        check_name("--schedulers", name, SCHEDULERS)
    names = list(dict.fromkeys([REFERENCE, *options.schedulers]))
    families = [read(place) for place in options.curves]  # all of them, before any takes its time
    for curves in families:
        rung_epochs(options.grace, options.eta, curves.accuracy.shape[2])
    for curves in families:
        _, count, epochs = curves.accuracy.shape
        generator = np.random.default_rng(options.seed)
        orders = generator.permuted(np.tile(np.arange(count), (options.orders, 1)), axis=1)
        for workers in options.workers:
            found = replay(curves, names, orders, workers=workers, grace=options.grace, eta=options.eta)
            table = as_text(compare(found, names, generator))
            print(
                f"{curves.name}: {counted(count, 'configuration')}, {counted(epochs, 'epoch')}, "
                f"{counted(len(curves.seeds), 'seed')}, {counted(workers, 'worker')}, "
                f"{counted(options.orders, 'order')}\n{table}\n",
                flush=True,
            )
    print(EXPLAINED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
