"""Which trials continue? The asynchronous successive halving algorithm (ASHA), without Ray.

Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2. Two variants:
``promote`` pauses every trial at each rung and continues the best paused one whenever a worker is
free; ``stop`` decides as a trial arrives. Values are maximised. Unlike in Ray 2.60's ASHAScheduler, a
diverged or missing value ranks last, ties are ordered by arrival, and the state is a function of the
reports.
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
    """Return the epochs at which ASHA decides: grace·etaᵏ below epochs, rising.

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
    """The rungs of one study: rising epochs, none without pruning, each with its top 1/eta of the trials."""

    def __init__(self, rungs: tuple[int, ...], eta: int) -> None:
        self.rungs = rungs
        self.eta = eta
        self.values: dict[int, dict[str, float]] = {rung: {} for rung in rungs}  # in order of arrival
        self.promoted: dict[int, set[str]] = {rung: set() for rung in rungs}  # from that rung
        # -value, arrival, trial id; sorted as they come: a sort per report slowed a study as it grew
        self._ranking: dict[int, list[tuple[float, int, str]]] = {rung: [] for rung in rungs}

    def record(self, trial_id: str, epoch: int, value: float | None) -> None:
        """Record a trial's first report of an epoch; beyond a rung it marks the trial as promoted from it."""
        for rung in self.rungs:
            if epoch == rung:
                self._rank(trial_id, rung, WORST if value is None or math.isnan(value) else value)
            elif epoch > rung:
                self.promoted[rung].add(trial_id)

    def record_failure(self, trial_id: str, epoch: int) -> None:
        """Rank a trial that failed at or after this epoch last in the rung it would have reached next."""
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
        """Return the ids of a rung's best trials, best value first; ties stay in order of arrival."""
        return [trial_id for _, _, trial_id in self._ranking[rung][:count]]

    def promote(self, trial_id: str, rung: int) -> None:
        """Mark a trial as promoted from a rung."""
        self.promoted[rung].add(trial_id)

    def survives(self, trial_id: str, rung: int) -> bool:
        """Return whether the ``stop`` variant continues a trial from a rung that it has reported.

        It must be among the best ``n // eta`` of the n reports so far, itself included; while there are
        fewer than eta, it must be the best.
        """
        values = self.values[rung]
        return trial_id in self.best(rung, max(1, len(values) // self.eta)) and values[trial_id] > WORST

    def promotable(self, settled: float = 0) -> tuple[str, int] | None:
        """Return the trial that the ``promote`` variant continues next, and its rung; the highest rung first.

        While trials still arrive at a rung, at most n // eta are promoted from it in total. The paper
        promotes once per new top-1/eta trial: about 25 % more epochs for the same winner. Once a rung is
        settled, its best n // eta are promoted, whoever was before: some were among the best only of the
        first to arrive (docs/decisions.md).

        Args:
            settled: No trial can arrive any more at the rungs up to this epoch. At least one trial is
                promoted from each of them, so that the best trial of every study sees all epochs.
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
        """Return the highest rung at which no trial can arrive any more, once no trial starts; 0: none.

        Args:
            reached: Epochs that the running trials have reported.
        """
        least, settled = min(reached, default=math.inf), 0
        for rung in self.rungs:
            if least < rung:
                break
            settled, waiting = rung, self.promotable(settled=rung)
            if waiting and waiting[1] <= rung:  # a trial promoted from here arrives at the next
                break
        return settled


@functools.lru_cache
def expected_epochs(trials: int, rungs: tuple[int, ...], eta: int, epochs: int, pruner: str) -> int:
    """Return the epochs that a search of n trials spends on average, from simulated searches.

    A trial's values at two rungs are as loosely related as in recorded studies: a quality of its own plus as
    much noise at each rung.
    """
    simulated = max(2, min(SIMULATIONS, SIMULATED_TRIALS // trials))
    spent = [_simulated_epochs(trials, rungs, eta, epochs, pruner, seed) for seed in range(simulated)]
    return round(sum(spent) / simulated)


def _simulated_epochs(
    trials: int, rungs: tuple[int, ...], eta: int, epochs: int, pruner: str, seed: int
) -> int:
    """Return the epochs of one search by a single worker, none of whose trials fails."""
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
