"""How does optuna-dashboard read a study? As an Optuna study in a database that optuna opens."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import optuna
import pandas as pd
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from analysis import stats
from analysis.load import Study

STATES = {
    **dict.fromkeys(("done",), TrialState.COMPLETE),
    **dict.fromkeys(("pruned",), TrialState.PRUNED),
    **dict.fromkeys(("diverged", "out_of_memory", "error"), TrialState.FAIL),
    **dict.fromkeys(("running", "paused"), TrialState.RUNNING),
}


def write(study: Study, url: str) -> bool:
    """Adds a study to a database, under its folder's name; returns whether it was not there already.

    Args:
        study: Its trials get the numbers, values, states and ranges that they have here.
        url: As SQLAlchemy writes it: ``sqlite:///optuna.db``.

    Raises:
        ValueError: The database cannot be opened, or holds another study of that name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name, trials = study.folder.absolute().name, frozen_trials(study)
    try:
        storage = optuna.storages.RDBStorage(url)
        if name in optuna.get_all_study_names(storage):
            if _content(optuna.load_study(study_name=name, storage=storage).trials) == _content(trials):
                return False
            raise ValueError(
                f"--optuna={url} holds another study {name!r}, or an older state of it; give another "
                f"database, or delete that study first: optuna delete-study --storage {url} "
                f"--study-name {name!r}"
            )
        exported = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        for key in ("space", "status", "test_accuracy", "commit", "command"):
            value = study.test_accuracy if key == "test_accuracy" else study.facts[key]
            exported.set_user_attr(key, value)
        exported.add_trials(trials)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--optuna={url} cannot be opened ({reason}); give a database's URL, such as sqlite:///optuna.db"
        ) from None
    return True


def frozen_trials(study: Study) -> list[FrozenTrial]:
    """Returns every trial as Optuna keeps one; trial 0007 is number 7.

    Raises:
        ValueError: Trials are missing from trials.csv, so that numbers would not be theirs.
    """
    distributions = {name: _distribution(study, name) for name in study.hyperparameters}
    reports = dict(list(study.epochs.groupby("trial_id")))
    trials = []
    for number, row in enumerate(study.trials.sort_values("trial_id").to_dict("records")):
        if int(row["trial_id"]) != number:
            raise ValueError(
                f"{study.folder} lacks trial {number:04d}; write its tables anew: "
                f"python -m search.collect {study.folder}"
            )
        seen = reports.get(row["trial_id"], study.epochs.head(0))
        told = {n: d for n, d in distributions.items() if not pd.isna(row[n])}
        state = STATES[row["status"]]
        trial = optuna.trial.create_trial(
            state=state,
            value=row["val_accuracy"] if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
            params={n: stats.param(row[n], d) for n, d in told.items()},
            distributions=told,
            user_attrs={name: _plain(row[name]) for name in ("status", "rung", "epochs", "seconds", "node")},
            intermediate_values={
                int(epoch): float(value)
                for epoch, value in zip(seen.epoch, seen.val_accuracy, strict=True)
                if not pd.isna(value)
            },
        )
        if len(seen):
            trial.datetime_start = _time((seen.finished_at - seen.epoch_seconds).min())
            trial.datetime_complete = _time(seen.finished_at.max()) if state.is_finished() else None
        trials.append(trial)
    return trials


def _distribution(study: Study, name: str) -> Any:
    """Returns a range; of a study that names none, what its trials have of it."""
    described = study.facts.get("ranges", {}).get(name)
    if described:
        return stats.distribution(described)
    values = study.trials[name].dropna()
    if values.dtype == np.float64 and (values > 0).all() and len(values):
        return optuna.distributions.FloatDistribution(values.min(), values.max(), log=True)
    return optuna.distributions.CategoricalDistribution(sorted(values.unique().tolist()))


def _content(trials: list[FrozenTrial]) -> list[tuple[Any, ...]]:
    """Returns what makes two exports the same study; not every database keeps times to the microsecond."""
    return [(t.state, t.values, t.params, t.intermediate_values, t.user_attrs) for t in trials]


def _plain(value: Any) -> Any:
    return None if pd.isna(value) else value


def _time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(float(seconds))  # Optuna's times are local and say no zone
