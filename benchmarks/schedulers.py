"""What do schedulers spend when workers only take their time? Simulated searches over recorded reports.

``stop`` and ``promote`` are search/scheduler.py itself, ``ray_asha`` is Ray's own class, so what is compared
is what runs. No cluster is started.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from tunefleet.journal import Journal
from tunefleet.search.asha import Asha
from tunefleet.search.scheduler import Scheduler

REFERENCE = "ray_asha"  # what the others are compared with
TOP = "top_"  # a scheduler's name with the number of configurations that it keeps
Report = dict[str, Any]  # of one epoch, as a trial sends it: epoch, val_accuracy, val_loss, status at the end


class ReplayedScheduler(Protocol):
    """Decides which of N configurations, numbered from 0, is trained next, and for how long."""

    def next(self) -> int | None:
        """Return the configuration that a free worker continues; None: none now."""

    def report(self, configuration: int, report: Report) -> bool:
        """Record the report of an epoch; return whether the worker continues the configuration."""


def simulate(
    scheduler: ReplayedScheduler, reports: list[list[Report]], seconds: list[list[float]], workers: int
) -> tuple[np.ndarray, float]:
    """Run a search with workers that do nothing but take their time.

    Args:
        scheduler: A new one.
        reports: Of each configuration, epoch by epoch; the last one has a status.
        seconds: What each of these epochs takes.
        workers: How many train at the same time.

    Returns:
        The epochs that each configuration saw, ``(N,)``, and the seconds until the last one ended.
    """
    seen, now, free = [0] * len(reports), 0.0, workers
    training: list[tuple[float, int, int]] = []  # end of the epoch, a number for ties, configuration
    numbers = itertools.count()

    def train(configuration: int) -> None:
        end = now + seconds[configuration][seen[configuration]]
        heapq.heappush(training, (end, next(numbers), configuration))

    while True:
        while free and (configuration := scheduler.next()) is not None:
            free -= 1
            train(configuration)
        if not training:
            return np.array(seen), now
        now, _, configuration = heapq.heappop(training)
        report = reports[configuration][seen[configuration]]
        seen[configuration] += 1
        if scheduler.report(configuration, report):
            train(configuration)
        else:
            free += 1


class Halving:
    """Synchronous successive halving: at each rung all wait for the last one, then the best continue.

    Jamieson and Talwalkar 2016, algorithm 1. Ties are ordered by arrival; a diverged one never continues.

    Args:
        order: The configurations as they arrive.
        rungs: Epochs at which all wait, rising; without any, all are trained to the end.
        keep: How many continue from each rung.
    """

    def __init__(self, order: Sequence[int], rungs: tuple[int, ...], keep: Sequence[int]) -> None:
        self._waiting, self._rest = deque(order), deque(zip(rungs, keep, strict=True))
        self._arrived = {configuration: number for number, configuration in enumerate(order)}
        self._running, self._values = 0, dict[int, float]()  # values at the next rung

    def next(self) -> int | None:
        """Return the next one at this rung; None where a worker has to wait for others."""
        if not self._waiting and not self._running and self._rest:
            keep = self._rest.popleft()[1]
            best = sorted(self._values, key=lambda k: (-self._values[k], self._arrived[k]))
            self._waiting.extend(best[:keep])
            self._values = {}
        if not self._waiting:
            return None
        self._running += 1
        return self._waiting.popleft()

    def report(self, configuration: int, report: Report) -> bool:
        """Return whether the next rung is still ahead."""
        if "status" not in report:
            if not self._rest or report["epoch"] < self._rest[0][0]:
                return True
            self._values[configuration] = report["val_accuracy"]
        self._running -= 1
        return False


class RayAsha:
    """Ray's ASHA as Tune 2.60 drives it: on_trial_result, and on_trial_complete where a trial ends.

    Ray continues a trial whose value is NaN up to max_t. A recorded curve ends there, which spares Ray's
    ASHA epochs that it would have spent.
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
        self._trials = {k: SimpleNamespace(trial_id=str(k)) for k in order}
        self._waiting = deque(order)

    def next(self) -> int | None:
        """Return the next in the order: Ray's ASHA only chooses which trials stop."""
        if not self._waiting:
            return None
        configuration = self._waiting.popleft()
        self._ray.on_trial_add(None, self._trials[configuration])
        return configuration

    def report(self, configuration: int, report: Report) -> bool:
        """Return what Ray answers."""
        trial = self._trials[configuration]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice")  # a rung where all diverged has no cutoff
            if report["val_accuracy"] is None:  # such a trial is done, which skips on_trial_result
                report = report | {"val_accuracy": math.nan}  # Ray raises TypeError for None
            elif self._ray.on_trial_result(None, trial, report) == TrialScheduler.CONTINUE:
                return True
            self._ray.on_trial_complete(None, trial, report)
        return False


class NoJournal(Journal):
    """A study's journal that keeps nothing: a replay is never resumed."""

    def __init__(self) -> None:
        super().__init__(Path("none"))

    def append(self, event: dict[str, Any]) -> None:
        """Write nothing."""


class Ours:
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
        """Return the configuration of the next job."""
        job = self._jobs.next_job()
        return None if job is None else job.config["configuration"]

    def report(self, configuration: int, report: Report) -> bool:
        """Return what the study answers."""
        return self._jobs.report(self._trial_ids[configuration], report)


Make = Callable[[Sequence[int], tuple[int, ...], int, int], ReplayedScheduler]  # order, rungs, eta, epochs


def _halving(order: Sequence[int], rungs: tuple[int, ...], eta: int, epochs: int) -> ReplayedScheduler:
    return Halving(order, rungs, [max(1, len(order) // eta**k) for k in range(1, len(rungs) + 1)])


SCHEDULERS: dict[str, Make] = {
    REFERENCE: RayAsha,
    "stop": functools.partial(Ours, pruner="stop"),
    "promote": functools.partial(Ours, pruner="promote"),
    "halving": _halving,
    "random": lambda order, rungs, eta, epochs: Halving(order, (), ()),  # no pruning: all see all epochs
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


def default_schedulers(count: int, eta: int) -> list[str]:
    """Return the names to compare: all rows of SCHEDULERS, ``top_3`` and what is left at a third rung."""
    *others, last = SCHEDULERS
    tops = sorted({3, max(1, count // eta**2)})
    return [*others, *(f"{TOP}{k}" for k in tops if k <= count), last]
