"""Read the learning curves of a study without pruner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tunefleet.analysis.load import load
from tunefleet.cli import shell
from tunefleet.journal import FAILED, LOST, TrialRecord

HOW = "record one: tunefleet search SPACE --pruner none"


@dataclass(frozen=True)
class Curves:
    """What S seeds of N configurations reached after each of R epochs."""

    name: str
    seeds: tuple[int, ...]
    accuracy: np.ndarray  # (S, N, R), val_accuracy; NaN from where a trial diverged or failed
    loss: np.ndarray  # (S, N, R), val_loss; NaN there, too
    seconds: np.ndarray  # (S, N, R), of the epoch; NaN after a trial's last


def read(place: str) -> Curves:
    """Read the curves of a study, by its folder or URL.

    Trials that differ in their seed alone are one configuration; a configuration that was drawn twice is two.
    Configurations are in the order of their first trial.

    Raises:
        ValueError: There are none that can be replayed.
    """
    study = load(place)
    if not study.trains_images:
        raise ValueError(f"{place} is of an own training, and a replay compares val_accuracy; give another")
    if (pruner := study.facts["options"]["pruner"]) != "none":
        raise ValueError(f"{place} was pruned (--pruner {pruner}), so its curves end early; {HOW}")
    if study.status != "done":
        raise ValueError(f"{place} is not done; resume it: {shell('tunefleet', 'resume', place)}")
    if not any(trial.reports for trial in study.searched):
        raise ValueError(f"{place} has no trial; {HOW}")
    found: dict[tuple[object, ...], dict[int, TrialRecord]] = {}
    for trial in study.searched:
        config = dict(trial.config)
        seed, again = config.pop("seed", 0), 0
        while seed in found.setdefault((*sorted(config.items()), again), {}):
            again += 1
        found[*sorted(config.items()), again][seed] = trial
    seeds = sorted({seed for trials in found.values() for seed in trials})
    shape = (len(seeds), len(found), max(trial.epoch for trial in study.searched))
    accuracy, loss, seconds = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    for n, trials in enumerate(found.values()):
        for s, seed in enumerate(seeds):
            _check(study.name, n, seed, trials.get(seed), shape[2])
            trial = trials[seed]
            for epoch, report in trial.reports.items():
                at = s, n, epoch - 1
                seconds[at] = report["epoch_seconds"]
                if trial.status != "diverged" or epoch < trial.epoch:
                    accuracy[at], loss[at] = report["val_accuracy"], report.get("val_loss") or np.nan
            if trial.status in FAILED:
                seconds[s, n, trial.epoch] = 0.0  # the time of the epoch in which it failed is unknown
    if np.isnan(accuracy[:, :, -1]).all(axis=1).any():
        raise ValueError(f"{study.name}: every configuration diverged, so there is no best one")
    return Curves(study.name, tuple(seeds), accuracy, loss, seconds)


def _check(name: str, configuration: int, seed: int, trial: TrialRecord | None, epochs: int) -> None:
    """Raise ValueError where a curve is missing, or ends early though its trial was not lost."""
    which = f"{name}: configuration {configuration}, seed {seed}"
    if trial is None or sorted(trial.reports) != list(range(1, trial.epoch + 1)):
        raise ValueError(f"{which} lacks an epoch; {HOW}")
    if trial.epoch < epochs and trial.status not in LOST:
        raise ValueError(f"{which} has {trial.epoch} of {epochs} epochs and did not diverge; {HOW}")
    if not all((report.get("epoch_seconds") or -1) >= 0 for report in trial.reports.values()):
        raise ValueError(f"{which} lacks seconds; {HOW}")
