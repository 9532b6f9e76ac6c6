"""Export a study to a database that Optuna and optuna-dashboard open."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import optuna
import pandas as pd
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from tunefleet.analysis import stats
from tunefleet.analysis.load import StudyResults
from tunefleet.analysis.text import listed, reason, words
from tunefleet.cli import shell
from tunefleet.journal import LOST
from tunefleet.metric import ACCURACY
from tunefleet.study import tested

TABLES = {"studies", "trials", "version_info", "alembic_version"}  # in every database of optuna's
TRIAL_SECONDS = 0.03  # that SQLite takes to add one (optuna 4 and 5)
STATES = {
    "done": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    **dict.fromkeys(LOST, TrialState.FAIL),
    **dict.fromkeys(("running", "paused"), TrialState.RUNNING),
}


def write(study: StudyResults, url: str) -> bool:
    """Add a study to a database, under its folder's name; return whether it was not there already.

    Args:
        study: Its trials get the numbers, values, states and ranges that they have here.
        url: As SQLAlchemy writes it: ``sqlite:///optuna.db``.

    Raises:
        ValueError: The database cannot be opened, or holds another study of that name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials = frozen_trials(study)
    try:
        storage = _open(url)
        if study.name in optuna.get_all_study_names(storage):
            if _content(optuna.load_study(study_name=study.name, storage=storage).trials) == _content(trials):
                return False
            delete = shell("optuna", "delete-study", "--storage", shown(url), "--study-name", study.name)
            raise ValueError(
                f"--optuna={shown(url)} holds another study {study.name!r}, or an older state of it; give "
                f"another database, or delete that study first: {delete}"
            )
        exported = optuna.create_study(
            storage=storage,
            study_name=study.name,
            direction="maximize" if study.metric.mode == "max" else "minimize",
        )
        try:
            for key in ("space", "status", "commit"):
                exported.set_user_attr(key, study.facts[key])
            exported.set_user_attr("test_accuracy", study.test_figures)
            if study.metric != ACCURACY:
                exported.set_user_attr("metric", study.metric.name)
                for name, figures in tested(study.facts["final"]).items():
                    exported.set_user_attr(name, figures)
            exported.set_user_attr("command", shell(*words(study.facts["command"])))
            exported.add_trials(trials)
        except BaseException:  # a Ctrl-C, too, must not leave half a study
            optuna.delete_study(study_name=study.name, storage=storage)
            raise
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
        raise ValueError(
            f"--optuna={shown(url)} cannot be used ({reason(error)}); give a database's URL, such as "
            "sqlite:///optuna.db"
        ) from None
    return True


def shown(url: str) -> str:
    """Return a database's URL without its password."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return url


def _open(url: str) -> Any:
    """Open a database that is optuna's own or empty, and change no other.

    RDBStorage creates its tables before it looks at what is there (optuna 4).
    """
    try:
        tables = set(sqlalchemy.inspect(sqlalchemy.create_engine(url)).get_table_names())
    except ValueError as error:  # of a port
        raise sqlalchemy.exc.ArgumentError(str(error)) from None
    if tables and not tables >= TABLES:
        raise ValueError(
            f"--optuna={shown(url)} holds another program's tables ({listed(sorted(tables))}); nothing was "
            "written; give a new database"
        )
    try:
        return optuna.storages.RDBStorage(
            url.replace("{", "{{").replace("}", "}}"),  # it fills in {SCHEMA_VERSION}
            skip_table_creation=bool(tables),
        )
    except RuntimeError as error:
        raise ValueError(f"--optuna={shown(url)} is of another version of optuna: {reason(error)}") from None


def frozen_trials(study: StudyResults) -> list[FrozenTrial]:
    """Return every trial as Optuna keeps one; trial 0007 is number 7.

    Raises:
        ValueError: Trials are missing from trials.csv, so that numbers would not be theirs.
    """
    distributions = {name: _distribution(study, name) for name in study.hyperparameters}
    reports, metric = dict(list(study.epochs.groupby("trial_id"))), study.metric.name
    trials = []
    order = study.trials.trial_id.astype(int).argsort()  # as text, 10000 comes before 9999
    for number, row in enumerate(study.trials.iloc[order].to_dict("records")):
        if int(row["trial_id"]) != number:
            raise ValueError(
                f"{study.folder} lacks trial {number:04d}; write its tables again: "
                f"{shell('tunefleet', 'collect', study.folder)}"
            )
        seen = reports.get(row["trial_id"], study.epochs.head(0))
        sampled = {n: d for n, d in distributions.items() if not pd.isna(row[n])}
        state = STATES[row["status"]]
        trial = optuna.trial.create_trial(
            state=state,
            value=_plain(row[metric]) if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
            params={n: stats.param(row[n], d) for n, d in sampled.items()},
            distributions=sampled,
            user_attrs={name: _plain(row[name]) for name in ("status", "rung", "epochs", "seconds", "node")},
            intermediate_values={
                int(epoch): float(value)
                for epoch, value in zip(seen.epoch, seen[metric], strict=True)
                if not pd.isna(value)
            },
        )
        if len(seen):
            trial.datetime_start = _time((seen.finished_at - seen.epoch_seconds).min())
            trial.datetime_complete = _time(seen.finished_at.max()) if state.is_finished() else None
        trials.append(trial)
    return trials


def _distribution(study: StudyResults, name: str) -> Any:
    """Return a range; of a study without ranges, that of its trials' values."""
    described = study.facts.get("ranges", {}).get(name)
    if described:
        return stats.distribution(described)
    values = study.trials[name].dropna()
    if values.dtype == np.float64 and (values > 0).all() and len(values):
        return optuna.distributions.FloatDistribution(values.min(), values.max(), log=True)
    return optuna.distributions.CategoricalDistribution(sorted(values.unique().tolist()))


def _content(trials: list[FrozenTrial]) -> list[tuple[Any, ...]]:
    """Return what two exports of a study have in common; not every database keeps microseconds."""
    return [(t.state, t.values, t.params, t.intermediate_values, t.user_attrs) for t in trials]


def _plain(value: Any) -> Any:
    return None if pd.isna(value) else value


def _time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(float(seconds))  # Optuna's times are local and have no zone
