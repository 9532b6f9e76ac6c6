"""What does a search spend whose workers only take their time? Events, and the simplest scheduler."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Report = dict[str, Any]  # of one epoch, as a trial sends it: epoch, val_accuracy, val_loss, status at the end


class ReplayedScheduler(Protocol):
    """Decides which of N configurations, numbered from 0, is trained next, and for how long."""

    def next(self) -> int | None:
        """Return the configuration that a free worker trains, from where it stands; None: none now."""

    def report(self, configuration: int, report: Report) -> bool:
        """Take in the report of an epoch; return whether the worker goes on with it."""


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
    at_work: list[tuple[float, int, int]] = []  # when an epoch ends, a running number for ties, whose
    numbers = itertools.count()

    def train(configuration: int) -> None:
        end = now + seconds[configuration][seen[configuration]]
        heapq.heappush(at_work, (end, next(numbers), configuration))

    while True:
        while free and (configuration := scheduler.next()) is not None:
            free -= 1
            train(configuration)
        if not at_work:
            return np.array(seen), now
        now, _, configuration = heapq.heappop(at_work)
        report = reports[configuration][seen[configuration]]
        seen[configuration] += 1
        if scheduler.report(configuration, report):
            train(configuration)
        else:
            free += 1


class Halving:
    """Synchronous successive halving: at each rung all wait for the last one, then the best go on.

    Jamieson and Talwalkar 2016, algorithm 1. Ties stay in the order of arrival; who diverged does not
    go on.

    Args:
        order: The configurations as they arrive.
        rungs: Epochs at which all wait, rising; none lets everyone train to the end.
        keep: How many go on from each rung.
    """

    def __init__(self, order: Sequence[int], rungs: tuple[int, ...], keep: Sequence[int]) -> None:
        self._waiting, self._rest = deque(order), deque(zip(rungs, keep, strict=True))
        self._arrived = {configuration: number for number, configuration in enumerate(order)}
        self._at_work, self._values = 0, dict[int, float]()  # values at the next rung

    def next(self) -> int | None:
        """Return who is next at this rung; None where a worker has to wait for others."""
        if not self._waiting and not self._at_work and self._rest:
            keep = self._rest.popleft()[1]
            best = sorted(self._values, key=lambda k: (-self._values[k], self._arrived[k]))
            self._waiting.extend(best[:keep])
            self._values = {}
        if not self._waiting:
            return None
        self._at_work += 1
        return self._waiting.popleft()

    def report(self, configuration: int, report: Report) -> bool:
        """Return whether the next rung is still ahead."""
        if "status" not in report:
            if not self._rest or report["epoch"] < self._rest[0][0]:
                return True
            self._values[configuration] = report["val_accuracy"]
        self._at_work -= 1
        return False
