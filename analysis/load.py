"""What does a study folder hold? Read once and checked, as tables; needs neither Ray nor torch."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.types import is_bool_dtype, is_numeric_dtype, is_string_dtype

from tunefleet.analysis.text import reason
from tunefleet.cli import printable, shell
from tunefleet.store import Store

NEEDED = ("study.json", "trials.csv", "epochs.parquet", "lr_curve.csv")  # of a study, beside best/
FINAL = "final-"  # trial ids of the winner's retrained seeds begin so
STATUSES = ("done", "pruned", "diverged", "out_of_memory", "error", "running", "paused")
CRC = ',\n  "crc": "'  # the last entry of study.json, of what precedes it (search/study_file.py)
UNREADABLE = (  # what readers of JSON, CSV, Parquet and NumPy files raise for a damaged one
    *(OSError, ValueError, KeyError, EOFError, RecursionError, OverflowError, NotImplementedError),
    *(pa.ArrowException, zipfile.BadZipFile),
)
ASKED: dict[str, Any] = {  # study.json from its study's start; a tuple (None, x) is what may be null
    **dict.fromkeys(("space", "status", "command", "data_sha256", "split_sha256"), str),
    "commit": (None, str),  # outside a checkout it is not known
    **dict.fromkeys(("seed", "validation_count"), int),
    "seconds": float,
    "rungs": [int],
    "data": {"name": str, "classes": [str]},
    "options": {"epochs": int, "pruner": str},
    "versions": {},
}
COLLECTED: dict[str, Any] = {  # what search/collect.py adds
    **dict.fromkeys(("trials", "epochs_spent", "epochs_unpruned"), int),
    "statuses": {},
    "best": (None, {"trial_id": str, "config": {}, "val_accuracy": float}),
    "final": (
        None,
        {
            "seeds": [int],
            "diverged": [int],
            "test_accuracy": (
                None,
                {"mean": float, "sd": (None, float), "interval95": (None, [float]), "values": [float]},
            ),
        },
    ),
}
TRIALS = {  # columns of trials.csv and their types; then come the hyperparameters
    **dict.fromkeys(("trial_id", "status"), str),
    **dict.fromkeys(("epochs", "rung"), int),
    **dict.fromkeys(("val_accuracy", "best_val_accuracy", "seconds"), float),
    "node": object,
}
EPOCHS = {
    "trial_id": str,
    "epoch": int,
    **dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy"), float),
    **dict.fromkeys(("lr", "epoch_seconds", "finished_at"), float),
}
PREDICTIONS = {"index": int, "label": int, "predicted": int, "confidence": float}
LR_CURVE = {"lr": float, "seeds": int, "mean": float, "low": float, "high": float, "verdict": str}
RESTORE = "restore it, or delete it to leave it out"
NAMES = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Study:
    """One study, finished or not; README.md, "A study folder", says what each file is."""

    folder: Path
    facts: dict[str, Any]  # study.json
    trials: pd.DataFrame  # trials.csv, trial_id as text
    epochs: pd.DataFrame  # epochs.parquet of the search
    finals: pd.DataFrame  # epochs.parquet of the winner's seeds
    predictions: pd.DataFrame | None
    misclassified: tuple[np.ndarray, np.ndarray] | None  # rows of predictions, uint8 (M, 3, H, W)
    first_layer: np.ndarray | None
    lr_curve: pd.DataFrame | None

    @property
    def name(self) -> str:
        """Return the folder's name, fit to be shown."""
        return str(printable(Path(os.path.abspath(self.folder)).name))  # noqa: PTH100  of "..", too

    @property
    def classes(self) -> list[str]:
        """Returns the names of the classes, in the order of labels."""
        return list(self.facts["data"]["classes"])

    @property
    def test_accuracy(self) -> dict[str, Any] | None:
        """Returns mean, sd, interval95 and values over the fresh seeds; None where none was tested."""
        final = self.facts.get("final")
        return final["test_accuracy"] if final else None

    @property
    def hyperparameters(self) -> list[str]:
        """Returns what was sampled, in the space's order; in older studies, the columns that vary."""
        if self.facts.get("ranges"):
            return list(self.facts["ranges"])
        after = list(self.trials.columns).index("node") + 1
        return [name for name in self.trials.columns[after:] if self.trials[name].nunique(dropna=False) > 1]


def load(folder: Path | str) -> Study:
    """Reads a study folder, or one in an object store by its URL.

    Texts are made printable (analysis/text.py): a class may be named by bytes that are no UTF-8.

    Raises:
        ValueError: It holds no study, or one that is incomplete or damaged.
    """
    if Store(str(folder)).folder is None:
        with tempfile.TemporaryDirectory() as copy:
            study = _load(fetch(str(folder), Path(copy)), str(folder))
        return replace(study, folder=Path(study.name))  # where a report of it goes
    return _load(Path(folder), str(folder))


def fetch(url: str, into: Path) -> Path:
    """Copies what a report needs of a study from an object store; returns the copy's folder.

    Args:
        url: ``s3://bucket/prefix/NAME``, or another that ``pyarrow.fs`` knows.
        into: Where the copy's folder is made, under the study's name.

    Raises:
        ValueError: The store cannot be read.
    """
    folder = into / url.rstrip("/").rpartition("/")[2]
    (folder / "best").mkdir(parents=True)
    store = Store(url.rstrip("/"), patience=0)
    try:
        for name in store.names():
            in_best = name.startswith("best/") and name.count("/") == 1 and not name.endswith(".pt")
            if name in NEEDED or in_best:
                store.fetch([name], folder)
    except (OSError, ValueError) as error:
        why = reason(error.__cause__ or error)
        raise ValueError(f"{url} cannot be read ({why}); check the address and the credentials") from None
    return folder


def read_facts(folder: Path, place: str) -> dict[str, Any]:
    """Return study.json, checked.

    Args:
        folder: Where it is.
        place: What the user calls the study.

    Raises:
        ValueError: There is none, or not what a collected study has.
    """
    file = f"{place.rstrip('/')}/study.json"
    try:
        text = (folder / "study.json").read_text(encoding="utf-8")
        raw = json.loads(text)
        crc = f"{zlib.crc32(text.rpartition(CRC)[0].encode()):08x}"
        if isinstance(raw, dict) and raw.pop("crc", crc) != crc:
            raise ValueError("its checksum is wrong")
        _check(raw, ASKED, "it")
        _check(raw.get("ranges", {}), {}, "ranges")
        if raw.keys() >= COLLECTED.keys():
            _check(raw, COLLECTED, "it")
            for name, described in raw.get("ranges", {}).items():
                _check_range(name, described)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{place} holds no study: there is no study.json in it") from None
    except UNREADABLE as error:
        raise ValueError(
            f"{file} cannot be read ({reason(error)}); restore it, or run the study again"
        ) from None
    if not raw.keys() >= COLLECTED.keys():
        raise ValueError(f"{place} has no results yet; {_again(place)}")
    return printable(raw) | {"command": raw["command"]}  # analysis/text.py, shell, quotes its words


def _load(folder: Path, place: str) -> Study:
    facts = read_facts(folder, place)
    try:
        trials = _read_trials(folder / "trials.csv", facts.get("ranges", {}))
        epochs = _read_epochs(folder / "epochs.parquet")
        is_final = epochs.trial_id.str.startswith(FINAL)
        _check_trials(facts, trials, epochs)
    except UNREADABLE as error:
        raise ValueError(
            f"{place} has no tables that can be read ({reason(error)}); {_again(place)}"
        ) from None
    study = Study(
        folder=folder,
        facts=facts,
        trials=trials,
        epochs=epochs[~is_final],
        finals=epochs[is_final],
        predictions=_read(place, folder, "best/predictions.parquet", _predictions),
        misclassified=_read(place, folder, "best/misclassified.npz", _misclassified),
        first_layer=_read(place, folder, "best/first_layer.npy", _first_layer),
        lr_curve=_read(place, folder, "lr_curve.csv", _lr_curve),
    )
    if study.predictions is not None:
        labels = study.predictions[["label", "predicted"]].to_numpy()
        rows = set(study.predictions["index"])
        shown = set(study.misclassified[0].tolist()) if study.misclassified else set()
        if labels.size and (labels.min() < 0 or labels.max() >= len(study.classes)):
            raise ValueError(f"{place}/best/predictions.parquet has labels of other classes; {RESTORE}")
        if len(rows) < len(labels) or not shown <= rows:
            raise ValueError(f"{place}/best/misclassified.npz is of other predictions; {RESTORE}")
    return study


def _again(place: str) -> str:
    """Return what to do about missing tables."""
    if Store(place).folder is None:  # its driver collects it
        return f"resume it: {shell('tunefleet', 'resume', place)}"
    return f"write them again: {shell('tunefleet', 'collect', place)}"


def _read(place: str, folder: Path, name: str, read: Callable[[Path], Any]) -> Any:
    """Return what a file of a study holds; None where there is none."""
    file = folder / name
    try:
        return read(file) if file.exists() else None
    except UNREADABLE as error:
        raise ValueError(f"{place}/{name} cannot be read ({reason(error)}); {RESTORE}") from None


def _read_trials(file: Path, ranges: dict[str, Any]) -> pd.DataFrame:
    if not file.read_bytes().strip():  # as a study without a trial has it
        return pd.DataFrame(columns=[*TRIALS, *ranges], dtype="str")
    options: Any = {"keep_default_na": False, "na_values": [""], "low_memory": False}
    table = pd.read_csv(file, dtype={"trial_id": "str"}, **options)
    check_table(table, TRIALS | dict.fromkeys(ranges, object))
    for name, described in ranges.items():
        if "low" in described:
            check_table(table, {name: float})
            if described["log"] and (table[name] <= 0).any():
                raise ValueError(f"{name} is not positive")
    return table.assign(node=table.node.map(printable, na_action="ignore"))


def _read_epochs(file: Path) -> pd.DataFrame:
    table = _parquet(file, EPOCHS).astype({"trial_id": "str"})
    check_table(table, EPOCHS)
    if table.duplicated(["trial_id", "epoch"]).any():
        raise ValueError("an epoch is there twice")
    return table


def _predictions(file: Path) -> pd.DataFrame:
    table = _parquet(file, PREDICTIONS)  # and no probability of each class
    check_table(table, PREDICTIONS)
    return table


def _parquet(file: Path, columns: dict[str, Any]) -> pd.DataFrame:
    with file.open("rb") as stream:  # pyarrow 26 opens no path that is not UTF-8
        return pd.read_parquet(stream, columns=list(columns))


def _lr_curve(file: Path) -> pd.DataFrame:
    table = pd.read_csv(file)
    check_table(table, LR_CURVE)
    return table


def _misclassified(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as arrays:
        index, images = arrays["index"], arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or (*index.shape, 3) != images.shape[:2]:
        raise ValueError(f"images of shape {images.shape} for {index.shape[:1]} rows")
    return index, images


def _first_layer(file: Path) -> np.ndarray:
    weights = np.load(file, mmap_mode="r")  # of a wide layer over large images, gigabytes
    if not isinstance(weights, np.ndarray) or weights.dtype.kind != "f":
        raise ValueError("it holds no array of weights")
    return weights


def check_table(table: pd.DataFrame, columns: dict[str, Any]) -> None:
    """Raise ValueError where a column is missing, or of another type."""
    for name, kind in columns.items():
        if name not in table:
            raise ValueError(f"there is no column {name}")
        column = table[name]
        if kind is object or column.empty:
            continue
        if kind is str:
            fits = bool(is_string_dtype(column) and column.notna().all())
        elif fits := bool(is_numeric_dtype(column) and not is_bool_dtype(column)):
            values = column.to_numpy(dtype=float, na_value=math.nan)
            fits = bool(not np.isinf(values).any() if kind is float else (values == np.floor(values)).all())
        if not fits:
            raise ValueError(f"{name} is not {NAMES[kind]} in every row")


def _check_trials(facts: dict[str, Any], trials: pd.DataFrame, epochs: pd.DataFrame) -> None:
    """Raise ValueError where the three files disagree, or hold an impossible trial."""
    if len(trials) != facts["trials"]:
        raise ValueError(f"trials.csv has {len(trials):,} rows, and study.json {facts['trials']:,} trials")
    if trials.trial_id.duplicated().any() or not trials.trial_id.str.fullmatch("[0-9]+").all():
        raise ValueError("trials.csv has a trial twice, or one without a number")
    if unknown := set(trials.status) - set(STATUSES):
        raise ValueError(f"trials.csv has the status {min(unknown)!r}")
    finals = {name for name in epochs.trial_id.unique() if re.fullmatch(f"{FINAL}[0-9]+", name)}
    if unknown := set(epochs.trial_id.unique()) - finals - set(trials.trial_id):
        raise ValueError(f"epochs.parquet has trial {min(unknown)!r}, which trials.csv has not")


def _check(value: Any, shape: Any, name: str) -> None:
    """Raise ValueError where a value of study.json does not match its shape in ASKED or COLLECTED."""
    if isinstance(shape, tuple):
        return None if value is None else _check(value, shape[1], name)
    kind = dict if isinstance(shape, dict) else list if isinstance(shape, list) else shape
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} is {str(value)[:40]!r}, and has to be {NAMES[kind]}")
    if kind is dict:
        for key, of in shape.items():
            if key not in value:
                raise ValueError(f"{name} lacks {key}")
            _check(value[key], of, key)
    elif kind is list:
        for item in value:
            _check(item, shape[0], name)
    return None


def _check_range(name: str, described: Any) -> None:
    if isinstance(described, dict) and isinstance(described.get("values"), list) and described["values"]:
        return
    _check(described, {"low": float, "high": float}, f"the range of {name}")
    low, high, log = described["low"], described["high"], described.get("log")
    if not isinstance(log, bool) or not low < high or (log and low <= 0):
        raise ValueError(f"the range of {name} is {described}")
