"""Export a study as TensorBoard's event files: a run per trial, and the HParams plugin's records."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from tunefleet.analysis.load import StudyResults
from tunefleet.cli import INSTALL
from tunefleet.journal import LOST

NOT_SCALARS = ("trial_id", "epoch", "finished_at")  # columns of the reports' table; all others are numbers
UNFINISHED = ("running", "paused")
EVENTS = "events.out.tfevents."  # the beginning of names that TensorBoard looks for


def write(study: StudyResults, out: Path) -> Path:
    """Write ``out/tensorboard``, whole or not at all; return it.

    A run per trial, and one per fresh seed of the winner, holds every number that was reported, by epoch, at
    the time of each report. The hyperparameters are those that were sampled, with their ranges.

    Raises:
        ValueError: TensorBoard is not installed, or the folder holds something else.
    """
    try:
        from tensorboard.plugins.hparams import summary_v2  # noqa: F401
        from tensorboard.summary.writer import record_writer  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--tensorboard needs the package tensorboard ({error}); {INSTALL}") from None
    folder = out / "tensorboard"
    check_ours(folder)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".tensorboard-") as temporary:
        new = Path(temporary) / "new"
        _write_runs(study, new)
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
    return folder


def _write_runs(study: StudyResults, folder: Path) -> None:
    from tensorboard.plugins.hparams import summary_v2

    reports = pd.concat([study.epochs, study.finals])
    others = ["val_loss", "train_loss"] if study.trains_images else _scalars_of(reports)
    began = float((reports.finished_at - reports.epoch_seconds).min()) if len(reports) else 0.0
    experiment = summary_v2.hparams_config_pb(
        [summary_v2.HParam(name, _domain(study, name)) for name in study.hyperparameters],
        [summary_v2.Metric(name) for name in dict.fromkeys((study.metric.name, *others))],
        time_created_secs=began,
    )
    _write_run(folder, [_event(began, summary=experiment)])
    trials = study.trials.set_index("trial_id")
    for trial_id, rows in reports.groupby("trial_id", sort=True):
        times = rows.finished_at - rows.epoch_seconds
        events = []
        if trial_id in trials.index:
            values = trials.loc[trial_id, study.hyperparameters].dropna().to_dict()
            plain = {n: value.item() if hasattr(value, "item") else value for n, value in values.items()}
            start = summary_v2.hparams_pb(plain, str(trial_id), float(times.iloc[0]))
            events.append(_event(float(times.iloc[0]), summary=start))
        events += _scalars(rows)
        if trial_id in trials.index:
            events += _end(str(trials.at[trial_id, "status"]), float(rows.finished_at.iloc[-1]))
        _write_run(folder / str(trial_id), events)


def check_ours(folder: Path) -> None:
    """Raise ValueError where a folder that is to be replaced holds anything but event files."""
    others = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(EVENTS)]
    if others or (folder.exists() and not folder.is_dir()):
        raise ValueError(
            f"{others[0] if others else folder} is no event file, so {folder} is not replaced; "
            "give another folder by --out"
        )


def _write_run(folder: Path, events: list[Any]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True)
    with (folder / f"{EVENTS}0.tunefleet").open("wb") as stream:  # each of their writer class has a thread
        writer = RecordWriter(stream)
        for event in (_event(events[0].wall_time, file_version="brain.Event:2"), *events):
            writer.write(event.SerializeToString())


def _scalars_of(reports: pd.DataFrame) -> list[str]:
    """Return the columns that hold numbers of an epoch."""
    return [name for name in reports.columns if name not in NOT_SCALARS and reports[name].notna().any()]


def _scalars(rows: pd.DataFrame) -> list[Any]:
    from tensorboard.compat.proto.summary_pb2 import Summary

    events, names = [], _scalars_of(rows)
    for row in rows.sort_values("epoch").to_dict("records"):
        values = [Summary.Value(tag=n, simple_value=row[n]) for n in names if not pd.isna(row[n])]
        events.append(_event(row["finished_at"], step=int(row["epoch"]), summary=Summary(value=values)))
    return events


def _end(status: str, at: float) -> list[Any]:
    """Return the plugin's record that a trial ended; it knows success and failure, and pruned is no failure.

    tensorboard 2.21 makes that record in ``hparams.summary`` alone, which imports TensorFlow.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    if status in UNFINISHED:
        return []
    ended = plugin_data_pb2.SessionEndInfo(
        status=api_pb2.STATUS_FAILURE if status in LOST else api_pb2.STATUS_SUCCESS, end_time_secs=at
    )
    described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=ended))
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=described, tensor=metadata.NULL_TENSOR)
    return [_event(at, summary=Summary(value=[value]))]


def _event(at: float, **content: Any) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=at, **content)


def _domain(study: StudyResults, name: str) -> Any:
    """Return a range as the plugin has it; of older and learning-rate studies, the values that occur."""
    from tensorboard.plugins.hparams import summary_v2

    described = study.facts.get("ranges", {}).get(name)
    if described and "low" in described:
        return summary_v2.RealInterval(float(described["low"]), float(described["high"]))
    values = described["values"] if described else study.trials[name].dropna().unique().tolist()
    kinds = {type(value) for value in values}
    if kinds == {int, float}:  # the plugin wants one type
        values = [float(value) for value in values]
    elif len(kinds) > 1:
        values = [str(value) for value in values]
    return summary_v2.Discrete(list(dict.fromkeys(values)))
