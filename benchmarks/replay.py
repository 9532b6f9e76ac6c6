"""Which scheduler finds a good configuration in the fewest epochs? Replays on recorded curves.

::

    python -m tunefleet.benchmarks.replay benchmarks/curves/*.csv
    python -m tunefleet.benchmarks.replay studies/NAME --workers 8 --orders 200

Takes the curves of studies without pruner and lets every scheduler search them, with simulated workers
and in many orders of arrival, the same ones for all. ``stop`` and ``promote`` are search/scheduler.py
itself, ``ray_asha`` is Ray's own class, so what is compared is what runs; hence, alone in analysis/, this
file imports search and ray. No cluster is started. Prints a table per family and number of workers, and
writes replay.png and replay.json into --out. ASHA: Li et al. 2020, "A System for Massively Parallel
Hyperparameter Tuning".
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from tunefleet.benchmarks.compared import EXPLAINED, MEASURES, REFERENCE, as_text, compare, write
from tunefleet.benchmarks.curves import Curves, read
from tunefleet.benchmarks.simulate import Halving, ReplayedScheduler, Report, simulate
from tunefleet.cli import Parser, counted, exit_code, path_argument, printable, writing
from tunefleet.journal import Journal, TrialRecord, winner
from tunefleet.search.asha import Asha, least_epochs, rung_epochs
from tunefleet.search.scheduler import Scheduler

MOST_ORDERS = 100_000  # all are in memory at once
TOP = "top_"  # a scheduler's name with the number that goes on


class OfRay:
    """Ray's ASHA as Tune 2.60 drives it: on_trial_result, and on_trial_complete where a trial ends.

    Ray lets a trial whose value is NaN go on to max_t. A recorded curve ends there, so the trial ends by
    itself, which spares Ray's ASHA epochs that it would have spent.
    """

    def __init__(self, order: Sequence[int], rungs: tuple[int, ...], eta: int, epochs: int) -> None:
        self._ray: Any = AsyncHyperBandScheduler(
            time_attr="epoch",
            metric="val_accuracy",
            mode="max",
            max_t=epochs,
            grace_period=rungs[0] if rungs else epochs,
            reduction_factor=eta,
        )
        self._waiting = deque(order)

    def next(self) -> int | None:
        """Return the next in the order: Ray's ASHA chooses only who stops."""
        if not self._waiting:
            return None
        configuration = self._waiting.popleft()
        self._ray.on_trial_add(None, _trial(configuration))
        return configuration

    def report(self, configuration: int, report: Report) -> bool:
        """Return what Ray answers."""
        trial = _trial(configuration)
        if report["val_accuracy"] is None:  # a trial that says done passes on_trial_result by
            report = report | {"val_accuracy": math.nan}  # Ray raises TypeError for None
        elif self._decides(self._ray.on_trial_result, trial, report) == TrialScheduler.CONTINUE:
            return True
        self._decides(self._ray.on_trial_complete, trial, report)
        return False

    def _decides(self, told: Callable[..., Any], trial: Any, report: Report) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice")  # a rung where all diverged has no cutoff
            return told(None, trial, report)


@functools.cache
def _trial(configuration: int) -> Any:
    return SimpleNamespace(trial_id=str(configuration))


class NoJournal(Journal):
    """A study's journal that keeps nothing: a replay is not resumed."""

    def __init__(self) -> None:
        super().__init__(Path("none"))

    def append(self, event: dict[str, Any]) -> None:
        """Write nothing."""


class OfOurs:
    """What decides in a study of ours: search/scheduler.py."""

    def __init__(
        self, order: Sequence[int], rungs: tuple[int, ...], eta: int, epochs: int, *, pruner: str
    ) -> None:
        self._jobs = Scheduler(
            suggest=lambda number, _: {"configuration": order[number]} if number < len(order) else None,
            asha=Asha(rungs, eta),
            pruner=pruner,
            trials=len(order),
            fixed={},
            final_seeds=0,
            journal=NoJournal(),
            max_failures=0,
        )
        self._trial_ids = {configuration: f"{number:04d}" for number, configuration in enumerate(order)}

    def next(self) -> int | None:
        """Return whose job is next."""
        job = self._jobs.next_job()
        return None if job is None else job.config["configuration"]

    def report(self, configuration: int, report: Report) -> bool:
        """Return what the study answers."""
        return self._jobs.report(self._trial_ids[configuration], report)


Make = Callable[[Sequence[int], tuple[int, ...], int, int], ReplayedScheduler]  # order, rungs, eta, epochs


def _halving(order: Sequence[int], rungs: tuple[int, ...], eta: int, epochs: int) -> ReplayedScheduler:
    return Halving(order, rungs, [max(1, len(order) // eta**k) for k in range(1, len(rungs) + 1)])


def _random(order: Sequence[int], rungs: tuple[int, ...], eta: int, epochs: int) -> ReplayedScheduler:
    return Halving(order, (), ())


SCHEDULERS: dict[str, Make] = {
    REFERENCE: OfRay,
    "stop": functools.partial(OfOurs, pruner="stop"),
    "promote": functools.partial(OfOurs, pruner="promote"),
    "halving": _halving,
    "random": _random,  # no pruning: every configuration sees all epochs
}


def scheduler_of(name: str) -> Make:
    """Return what makes a scheduler: a row of SCHEDULERS, or ``top_K``: the first rung alone.

    Raises:
        ValueError: The name is unknown.
    """
    if name in SCHEDULERS:
        return SCHEDULERS[name]
    number = name.removeprefix(TOP)
    if not name.startswith(TOP) or not number.isdigit() or not int(number):
        raise ValueError(f"--schedulers {name} is unknown; choose from: {', '.join(SCHEDULERS)}, top_K")
    return lambda order, rungs, eta, epochs: Halving(order, rungs[:1], [int(number)] * len(rungs[:1]))


def default_schedulers(count: int, rungs: tuple[int, ...], eta: int, epochs: int) -> list[str]:
    """Return the names to compare: all rows of SCHEDULERS and three ``top_K``.

    K is 3, the most that spend no more epochs than halving, and what halving has left at its third rung.
    """
    tops = {3, max(1, count // eta**2)}
    if rungs:
        left = least_epochs(count, rungs, eta, epochs) - count * rungs[0]
        tops.add(max(1, left // (epochs - rungs[0])))
    *others, last = SCHEDULERS
    return [*others, *(f"{TOP}{k}" for k in sorted(tops) if k <= count), last]


def pick(seen: np.ndarray, reports: list[list[Report]], order: Sequence[int]) -> int | None:
    """Return the configuration that a study would call its best (journal.winner); None: all diverged.

    Args:
        seen: Epochs that each configuration saw, ``(N,)``.
        reports: Of each configuration, epoch by epoch.
        order: The configurations as they arrived.
    """
    trials = {}
    for configuration in order:
        last = reports[configuration][seen[configuration] - 1]
        trials[str(configuration)] = TrialRecord(
            str(configuration), {}, {last["epoch"]: last}, last.get("status")
        )
    best = winner(trials)
    return None if best is None else int(best.trial_id)


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


def regrets(curves: Curves, seed: int, picked: int | None) -> tuple[float, float]:
    """Return how much val_accuracy a choice costs: at the last epoch, the best one's less the picked one's.

    Args:
        curves: What all would have reached; who diverged has reached 0, as searchers are told.
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
        eta: One of eta goes on at each rung.

    Returns:
        ``(M, S, orders, 4)``: MEASURES of each search: epochs spent, simulated seconds, and the regrets
        (fractions 0..1).

    Raises:
        ValueError: A name, grace or eta is impossible.
    """
    epochs = curves.accuracy.shape[2]
    rungs = rung_epochs(grace, eta, epochs)
    makers = [scheduler_of(name) for name in names]
    found = np.empty((len(names), len(curves.seeds), len(orders), len(MEASURES)))
    for seed in range(len(curves.seeds)):
        reports, seconds = reports_of(curves, seed)
        for k, order in enumerate(orders.tolist()):
            for m, make in enumerate(makers):
                seen, took = simulate(make(order, rungs, eta, epochs), reports, seconds, workers)
                found[m, seed, k] = (
                    seen.sum(),
                    took,
                    *regrets(curves, seed, pick(seen, reports, order)),
                )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(prog="python -m tunefleet.benchmarks.replay", description=__doc__.split("\n")[0])
    parser.add_argument(
        "curves", nargs="+", help="a study without pruner (folder or URL), or a table of benchmarks/curves.py"
    )
    parser.add_argument("--orders", type=int, default=100, help="of arrival (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2, 8, 32], help="at once (default: 1 2 8 32)"
    )
    parser.add_argument("--eta", type=int, default=3, help="one of eta goes on (default: %(default)s)")
    parser.add_argument("--grace", type=int, default=1, help="epochs before the first rung (%(default)s)")
    parser.add_argument(
        "--schedulers",
        nargs="+",
        metavar="NAME",
        help=f"of: {', '.join(SCHEDULERS)}, top_K (default: these and three K); {REFERENCE} is always there",
    )
    parser.add_argument("--seed", type=int, default=0, help="of orders and bootstrap (default: %(default)s)")
    parser.add_argument(
        "--out", type=path_argument, default=Path("replay"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: carry_out(options))


def carry_out(do: argparse.Namespace) -> int:
    """Replay, prints and writes what was asked for; return the exit code.

    Raises:
        ValueError: It cannot be done.
    """
    for flag, value, most in (
        ("--orders", do.orders, MOST_ORDERS),
        *(("--workers", workers, math.inf) for workers in do.workers),
    ):
        if not 1 <= value <= most:
            limit = "at least 1" if value < 1 else f"at most {most:,}"
            raise ValueError(f"{flag}={value} is not possible; give {limit}")
    if do.seed < 0:
        raise ValueError(f"--seed={do.seed} is not possible; give 0 or more")
    families = [read(place) for place in do.curves]  # all of them, before any takes its time
    plans = []
    for curves in families:
        _, count, epochs = curves.accuracy.shape
        rungs = rung_epochs(do.grace, do.eta, epochs)
        names = do.schedulers or default_schedulers(count, rungs, do.eta, epochs)
        plans.append([REFERENCE, *(name for name in dict.fromkeys(names) if name != REFERENCE)])
        for name in plans[-1]:
            scheduler_of(name)  # refuses an unknown one
    with writing(do.out):
        do.out.mkdir(parents=True, exist_ok=True)
    tables = []
    for curves, names in zip(families, plans, strict=True):
        _, count, epochs = curves.accuracy.shape
        generator = np.random.default_rng(do.seed)
        orders = generator.permuted(np.tile(np.arange(count), (do.orders, 1)), axis=1)
        for workers in do.workers:
            found = replay(curves, names, orders, workers=workers, grace=do.grace, eta=do.eta)
            table = compare(found, names, generator)
            print(
                f"{curves.name}: {counted(count, 'configuration')}, {counted(epochs, 'epoch')}, "
                f"{counted(len(curves.seeds), 'seed')}, {counted(workers, 'worker')}, "
                f"{counted(do.orders, 'order')}\n{as_text(table)}\n",
                flush=True,
            )
            table.insert(0, "family", curves.name)
            table.insert(1, "workers", workers)
            tables.append(table)
    print(EXPLAINED)
    asked = {name: getattr(do, name) for name in ("curves", "orders", "eta", "grace", "seed")}
    with writing(do.out):
        for file in write(pd.concat(tables, ignore_index=True), asked, do.out):
            print(printable(str(file)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
