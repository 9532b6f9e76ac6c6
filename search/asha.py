"""Which trials go on? The asynchronous successive halving algorithm (ASHA), without Ray.

Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2. Two variants:
``promote`` holds every trial at each rung and lets the best paused one go on whenever a worker is
free; ``stop`` decides as a trial arrives. Values are maximised. Unlike Ray 2.60's ASHAScheduler, a
diverged or missing value ranks last, tied trials are ordered by arrival and never promoted
wholesale, and the state is a function of the reports: whoever has them can rebuild it.
"""

from __future__ import annotations

import bisect
import functools
import math
import random
from collections.abc import Iterable

PRUNERS = ("promote", "stop", "none")
SIMULATIONS, SIMULATED_TRIALS = 30, 3000  # for a forecast: at most so many searches, and trials in all
WORST = -math.inf  # of diverged, failed and missing values: ranks last, is never promoted


def rung_epochs(grace: int, eta: int, epochs: int) -> tuple[int, ...]:
    """Returns the epochs at which ASHA decides: grace·etaᵏ below epochs, rising.

    Raises:
        ValueError: No such rungs exist.
    """
    if eta < 2:
        raise ValueError(f"--eta={eta} is not possible; ASHA keeps 1 of eta trials, give at least 2")
    if grace < 1:
        raise ValueError(f"--grace={grace} is not possible; give at least 1 epoch")
    if grace > epochs:
        raise ValueError(
            f"--grace={grace} exceeds --epochs={epochs}; give --grace of at most {epochs}, or more --epochs"
        )
    rungs = []
    while grace < epochs:
        rungs.append(grace)
        grace *= eta
    return tuple(rungs)


class Asha:
    """The rungs of one study.

    Args:
        rungs: Epochs at which to decide, rising; none means no pruning.
        eta: One of eta trials of a rung goes on.
    """

    def __init__(self, rungs: tuple[int, ...], eta: int) -> None:
        self.rungs = rungs
        self.eta = eta
        self.values: dict[int, dict[str, float]] = {rung: {} for rung in rungs}  # in order of arrival
        self.promoted: dict[int, set[str]] = {rung: set() for rung in rungs}  # from that rung
        # -value, arrival, trial id; sorted as they come: a sort per report slowed a study as it grew
        self._ranking: dict[int, list[tuple[float, int, str]]] = {rung: [] for rung in rungs}

    def record(self, trial_id: str, epoch: int, value: float | None) -> None:
        """Takes in a trial's first report of an epoch; beyond a rung it says that the trial was promoted."""
        for rung in self.rungs:
            if epoch == rung:
                self._rank(trial_id, rung, WORST if value is None or math.isnan(value) else value)
            elif epoch > rung:
                self.promoted[rung].add(trial_id)

    def record_failure(self, trial_id: str, epoch: int) -> None:
        """Counts a trial that failed at or after this epoch as last of the rung that it was to reach."""
        for rung in self.rungs:
            if rung >= epoch and trial_id not in self.values[rung]:
                self._rank(trial_id, rung, WORST)
                break

    def _rank(self, trial_id: str, rung: int, value: float) -> None:
        values = self.values[rung]
        if trial_id not in values:
            bisect.insort(self._ranking[rung], (-value, len(values), trial_id))
            values[trial_id] = value

    def best(self, rung: int, count: int) -> list[str]:
        """Returns the ids of a rung's best trials, best value first; ties stay in order of arrival."""
        return [trial_id for _, _, trial_id in self._ranking[rung][:count]]

    def promote(self, trial_id: str, rung: int) -> None:
        """Marks a trial as gone on from a rung."""
        self.promoted[rung].add(trial_id)

    def survives(self, trial_id: str, rung: int) -> bool:
        """Says whether the ``stop`` variant lets a trial go on from a rung that it has reported.

        It must stand among the best ``n // eta`` of the n reports so far, itself included; while
        there are fewer than eta, it must be the best.
        """
        values = self.values[rung]
        return trial_id in self.best(rung, max(1, len(values) // self.eta)) and values[trial_id] > WORST

    def promotable(self, settled: float = 0) -> tuple[str, int] | None:
        """Returns the trial that the ``promote`` variant lets go on next, and its rung.

        The highest rung is asked first. Of n trials that reached a rung, the best ``n // eta`` may go on,
        and while more may come no more than ``n // eta`` ever do: in the paper each newcomer to the best
        adds a promotion, which spends a quarter more epochs on the same best trial. Where a rung is
        settled its best ``n // eta`` go on, whoever else went before: that makes up for those who were
        among the best only of the first to arrive (docs/decisions.md).

        Args:
            settled: To the rungs up to this epoch nothing is added any more. From these at least one
                trial goes on, so that every study's best sees all its epochs.
        """
        for rung in reversed(self.rungs):
            values = self.values[rung]
            quota = len(values) // self.eta
            if rung <= settled:
                quota = max(1, quota)
            elif len(self.promoted[rung]) >= quota:
                continue
            for trial_id in self.best(rung, quota):
                if trial_id not in self.promoted[rung] and values[trial_id] > WORST:
                    return trial_id, rung
        return None

    def settled(self, reached: Iterable[int]) -> int:
        """Returns the highest rung to which nothing is added any more once no trial starts; 0: there is none.

        Args:
            reached: Epochs that the trials which run have reported.
        """
        least, settled = min(reached, default=math.inf), 0
        for rung in self.rungs:
            if least < rung:
                break
            settled, waiting = rung, self.promotable(settled=rung)
            if waiting and waiting[1] <= rung:  # who goes on from here adds to the next
                break
        return settled


def least_epochs(trials: int, rungs: tuple[int, ...], eta: int, epochs: int) -> int:
    """Returns the epochs that ``promote`` spends at least on n trials, none of which fails.

    More where some of the first to arrive go on that are not among the best of all. One trial in eta of
    each rung goes on, at least one: trials·r₀ + (trials // eta)·(r₁ - r₀) + …
    """
    spent, reached, alive = 0, 0, trials
    for rung in (*rungs, epochs):
        spent += alive * (rung - reached)
        reached, alive = rung, max(1, alive // eta)
    return spent


@functools.lru_cache
def expected_epochs(trials: int, rungs: tuple[int, ...], eta: int, epochs: int, pruner: str) -> int:
    """Returns the epochs that a search of n trials spends on average: that of simulated ones.

    The values of a trial at two rungs are related as loosely as they were in recorded studies: a quality of
    its own, and as much again by chance at each rung.
    """
    simulated = max(2, min(SIMULATIONS, SIMULATED_TRIALS // trials))
    spent = [_simulated_epochs(trials, rungs, eta, epochs, pruner, seed) for seed in range(simulated)]
    return round(sum(spent) / simulated)


def _simulated_epochs(
    trials: int, rungs: tuple[int, ...], eta: int, epochs: int, pruner: str, seed: int
) -> int:
    """Returns the epochs of one search by a single worker, none of whose trials fails."""
    draw, asha, horizon = random.Random(seed), Asha(rungs, eta), (*rungs, epochs)
    quality: dict[str, float] = {}
    spent = 0
    while True:
        settled = asha.settled([]) if len(quality) == trials else 0
        if pruner == "promote" and (found := asha.promotable(settled)):
            trial_id, reached = found
            asha.promote(trial_id, reached)
        elif len(quality) < trials:
            trial_id, reached = str(len(quality)), 0
            quality[trial_id] = draw.gauss(0, 1)
        else:
            return spent
        for rung in (rung for rung in horizon if rung > reached):
            spent += rung - reached
            reached = rung
            asha.record(trial_id, rung, quality[trial_id] + draw.gauss(0, 1))
            if pruner == "promote" or (rung in rungs and not asha.survives(trial_id, rung)):
                break
