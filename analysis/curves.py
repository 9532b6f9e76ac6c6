"""What would each trial have reached, had nobody stopped it? The curves of a study without pruner.

They come from such a study's folder, or from the table that benchmarks/curves.py writes of one:
COLUMNS, a row per configuration, seed and epoch. An epoch at which a trial diverged or failed has no
val_accuracy and is its last.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from tunefleet.analysis.load import UNREADABLE, Study, check_table, load
from tunefleet.analysis.text import reason
from tunefleet.cli import printable, shell

COLUMNS = {
    **dict.fromkeys(("configuration", "seed", "epoch"), int),
    **dict.fromkeys(("val_accuracy", "val_loss", "epoch_seconds"), float),
}
LOST = ("diverged", "error", "out_of_memory")  # statuses of trials that ended before their time
HOW = "record one: tunefleet search SPACE --pruner none, or python -m tunefleet.benchmarks.curves"


@dataclass(frozen=True)
class Curves:
    """What S seeds of N configurations reached after each of R epochs."""

    name: str
    seeds: tuple[int, ...]
    accuracy: np.ndarray  # (S, N, R), val_accuracy; NaN from where a trial diverged or failed
    loss: np.ndarray  # (S, N, R), val_loss; NaN there, too
    seconds: np.ndarray  # (S, N, R), of the epoch; NaN after a trial's last


def read(place: str) -> Curves:
    """Reads the curves of a table (.csv), or of a study by its folder or URL.

    Raises:
        ValueError: There are none that can be replayed.
    """
    if not place.endswith(".csv"):
        study = load(place)
        return curves_of(study.name, table_of(study))
    file = Path(place)
    try:
        table = pd.read_csv(file, low_memory=False)
        check_table(table, COLUMNS)
    except UNREADABLE as error:
        raise ValueError(f"{place} is no table of curves ({reason(error)}); {HOW}") from None
    return curves_of(str(printable(file.stem)), table)


def table_of(study: Study) -> pd.DataFrame:
    """Returns a study's curves, a row per epoch that was trained, with COLUMNS.

    Configurations are numbered from 0 in the order of their first trial; trials that differ in their
    seed alone are one configuration.

    Raises:
        ValueError: The study has a pruner, or is not done.
    """
    if (pruner := study.facts["options"]["pruner"]) != "none":
        raise ValueError(
            f"{study.folder} was pruned (--pruner {pruner}), so its curves end early; "
            "record one that is not: --pruner none"
        )
    if study.facts["status"] != "done":
        resume = shell("tunefleet", "resume", study.folder)
        raise ValueError(f"{study.folder} is not done; resume it: {resume}")
    trials = study.trials
    if trials.empty or "seed" not in trials:
        raise ValueError(f"{study.folder} has no trial; {HOW}")
    hyperparameters = list(trials.columns[list(trials.columns).index("node") + 1 :])
    again = trials.groupby(hyperparameters, dropna=False).cumcount()  # a choice may be drawn twice
    others = [trials[name] for name in hyperparameters if name != "seed"]
    configuration = trials.groupby([*others, again], dropna=False, sort=False).ngroup()
    of_trial = pd.DataFrame(
        {
            "trial_id": trials.trial_id,
            "configuration": configuration,
            "seed": trials.seed,
            "status": trials.status,
            "last": trials.epochs,
        }
    )
    rows = study.epochs.merge(of_trial, on="trial_id")
    diverged = (rows.status == "diverged") & (rows.epoch == rows["last"])
    rows.loc[diverged, ["val_accuracy", "val_loss"]] = np.nan
    failed = of_trial[of_trial.status.isin(LOST) & (of_trial.status != "diverged")]
    unreported = failed.assign(epoch=failed["last"] + 1, epoch_seconds=0.0)  # how long it took is not known
    table = pd.concat([rows, unreported], ignore_index=True)[list(COLUMNS)]
    return table.sort_values(["configuration", "seed", "epoch"], ignore_index=True)


def curves_of(name: str, table: pd.DataFrame) -> Curves:
    """Returns a table's curves as arrays.

    Raises:
        ValueError: A curve is missing or ends before its time, or none sees the last epoch.
    """
    if table.empty:
        raise ValueError(f"{name} has no curves; {HOW}")
    seeds, epochs = sorted(table.seed.unique()), int(table.epoch.max())
    configurations = sorted(table.configuration.unique())
    found = dict(list(table.groupby(["configuration", "seed"])))
    for configuration, seed in product(configurations, seeds):
        curve = found.get((configuration, seed), table.head(0)).sort_values("epoch")
        seen, ends = len(curve), curve.val_accuracy.isna().to_numpy()
        if curve.epoch.tolist() != list(range(1, seen + 1)) or ends[:-1].any():
            raise ValueError(f"{name}: configuration {configuration}, seed {seed} lacks an epoch; {HOW}")
        if seen < epochs and not ends[-1:].any():
            raise ValueError(
                f"{name}: configuration {configuration}, seed {seed} has {seen} of {epochs} epochs and did "
                f"not diverge; {HOW}"
            )
        if not (curve.epoch_seconds >= 0).all():
            raise ValueError(f"{name}: configuration {configuration}, seed {seed} lacks seconds; {HOW}")
    shape = (len(seeds), len(configurations), epochs)
    accuracy, loss, seconds = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    for (configuration, seed), curve in found.items():
        at = seeds.index(seed), configurations.index(configuration), slice(len(curve))
        curve = curve.sort_values("epoch")
        accuracy[at], loss[at], seconds[at] = curve.val_accuracy, curve.val_loss, curve.epoch_seconds
    if np.isnan(accuracy[:, :, -1]).all(axis=1).any():
        raise ValueError(f"{name}: every configuration diverged, so there is no best one")
    return Curves(name, tuple(int(seed) for seed in seeds), accuracy, loss, seconds)
