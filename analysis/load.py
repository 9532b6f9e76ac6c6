"""Read a study folder for a report: its journal, and what best/ holds; needs neither Ray nor torch."""

from __future__ import annotations

import functools
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tunefleet.analysis.text import reason
from tunefleet.cli import printable
from tunefleet.store import Store
from tunefleet.study import REACHED, Study

NEEDED = ("study.json", "result.json", "reports.jsonl", "lr_curve.csv")  # of a study, beside best/
UNREADABLE = (  # what readers of CSV, Parquet and NumPy files raise for a damaged one
    *(OSError, ValueError, KeyError, EOFError, OverflowError, NotImplementedError),
    *(pa.ArrowException, zipfile.BadZipFile),
)
PREDICTIONS = {"index": "i", "label": "i", "predicted": "i", "confidence": "f"}  # columns, kinds of dtype
LR_CURVE = {"lr": "if", "seeds": "i", "mean": "if", "low": "if", "high": "if"}
RESTORE = "restore it, or delete it to leave it out"


class StudyResults(Study):
    """A study with what its report shows; README.md, "A study folder", describes each file.

    Texts are printable (tunefleet.cli): a class may have a name of bytes that are not UTF-8.

    Raises:
        ValueError: The folder holds no study, or a damaged one.
    """

    def __init__(self, folder: Path, location: str) -> None:
        super().__init__(folder)
        for name, described in self.spec.get("ranges", {}).items():
            if not _is_range(described) or name not in self.trials:
                raise ValueError(
                    f"{location}/study.json has an impossible range of {name}; restore it from a copy"
                )
        self.predictions = _read(location, folder, "best/predictions.parquet", _predictions)
        self.misclassified = _read(location, folder, "best/misclassified.npz", _misclassified)
        self.first_layer = _read(location, folder, "best/first_layer.npy", _first_layer)
        self.lr_curve = _read(location, folder, "lr_curve.csv", _lr_curve)
        if self.predictions is not None:
            labels = self.predictions[["label", "predicted"]].to_numpy()
            rows = set(self.predictions["index"])
            shown = set(self.misclassified[0].tolist()) if self.misclassified else set()
            if labels.size and (labels.min() < 0 or labels.max() >= len(self.classes)):
                raise ValueError(
                    f"{location}/best/predictions.parquet has labels of other classes; {RESTORE}"
                )
            if len(rows) < len(labels) or not shown <= rows:
                raise ValueError(f"{location}/best/misclassified.npz is of other predictions; {RESTORE}")

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Return all that is known of the study but its trials."""
        facts = super().facts
        kept = {"command": facts["command"]}  # analysis/text.py, shell, quotes its words
        if isinstance(ranges := facts.get("ranges"), dict):
            kept["ranges"] = {name: _flat(described) for name, described in printable(ranges).items()}
        return printable(facts) | kept

    @functools.cached_property
    def trials(self) -> pd.DataFrame:
        """Return a row per trial of the search."""
        table = super().trials
        cells = {name: table[name].map(_cell) for name in map(str, table) if table[name].dtype == object}
        return table.assign(**cells).assign(node=table.node.map(printable, na_action="ignore"))

    @property
    def name(self) -> str:
        """Return the folder's name, fit to be shown."""
        return str(printable(Path(os.path.abspath(self.folder)).name))  # noqa: PTH100  of "..", too

    @property
    def trains_images(self) -> bool:
        """Return whether its trials train a network on images, and no training of the person's own."""
        return bool(self.classes)

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes, in the order of labels."""
        return list(self.facts["data"]["classes"])

    @property
    def test_figures(self) -> dict[str, Any] | None:
        """Return mean, sd, interval95 and values of test_accuracy over the fresh seeds; None without it."""
        final = self.facts["final"]
        return final["test_accuracy"] if final else None

    @property
    def hyperparameters(self) -> list[str]:
        """Return what was sampled, in the space's order; in older studies, the columns that vary."""
        if self.facts.get("ranges"):
            return list(self.facts["ranges"])
        names = self.trials.columns[len(REACHED) :]
        return [name for name in names if self.trials[name].nunique(dropna=False) > 1]


def load(folder: Path | str) -> StudyResults:
    """Read a study folder, or one in an object store by its URL.

    Raises:
        ValueError: It holds no study, or one that is damaged.
    """
    if Store(str(folder)).folder:
        return StudyResults(Path(folder), str(folder))
    with tempfile.TemporaryDirectory() as copy:
        study = StudyResults(fetch(str(folder), Path(copy)), str(folder))
    study.folder = Path(study.name)  # where a report of it goes
    return study


def fetch(url: str, into: Path) -> Path:
    """Copy what a report needs of a study from an object store; return the copy's folder.

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


def _cell(value: Any) -> Any:
    """Return a hyperparameter's value as a table holds it: a list or an object as text."""
    return str(value) if isinstance(value, list | dict) else value


def _flat(described: Any) -> Any:
    """Return a range whose choices are as in a table."""
    if not isinstance(described, dict) or not isinstance(described.get("values"), list):
        return described
    return described | {"values": [_cell(value) for value in described["values"]]}


def _is_range(described: Any) -> bool:
    """Return whether a value of study.json's ranges is ``{"values"}`` or ``{"low", "high", "log"}``."""
    if not isinstance(described, dict) or "values" in described:
        return isinstance(described, dict) and bool(described["values"])
    low, high, log = described.get("low"), described.get("high"), described.get("log")
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return False
    return isinstance(log, bool) and low < high and not (log and low <= 0)


def _read(location: str, folder: Path, name: str, read: Callable[[Path], Any]) -> Any:
    """Return what a file of a study holds; None where there is none."""
    file = folder / name
    try:
        return read(file) if file.exists() else None
    except UNREADABLE as error:
        raise ValueError(f"{location}/{name} cannot be read ({reason(error)}); {RESTORE}") from None


def _predictions(file: Path) -> pd.DataFrame:
    with file.open("rb") as stream:  # pyarrow 26 opens no path that is not UTF-8
        table = pd.read_parquet(stream, columns=list(PREDICTIONS))  # and no probability of each class
    return _checked(table, PREDICTIONS)


def _lr_curve(file: Path) -> pd.DataFrame:
    table = _checked(pd.read_csv(file), LR_CURVE)
    if not table.verdict.map(lambda verdict: isinstance(verdict, str)).all():
        raise ValueError("verdict is not text in every row")
    return table


def _checked(table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Return a table whose columns have these kinds of dtype.

    Raises:
        ValueError: One is missing, of another kind, or not finite.
    """
    for name, kinds in columns.items():
        if name not in table:
            raise ValueError(f"there is no column {name}")
        values = table[name].to_numpy()
        if len(table) and (values.dtype.kind not in kinds or np.isinf(values).any()):
            raise ValueError(f"{name} is not {'a whole number' if kinds == 'i' else 'a number'} in every row")
    return table


def _misclassified(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the predictions, and their images, uint8 ``(M, 3, H, W)``."""
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
