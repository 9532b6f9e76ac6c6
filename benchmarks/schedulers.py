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
            asha=Asha(() if pruner == "none" else rungs, eta),
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


SCHEDULERS: dict[str, Make] = {
    REFERENCE: RayAsha,
    "stop": functools.partial(Ours, pruner="stop"),
    "promote": functools.partial(Ours, pruner="promote"),
    "random": functools.partial(Ours, pruner="none"),  # all see all epochs
}
