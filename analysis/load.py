"""What does a study folder hold? Read once, as tables; needs neither Ray nor torch."""

from __future__ import annotations

import json
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow import fs

NEEDED = ("study.json", "trials.csv", "epochs.parquet", "lr_curve.csv")  # of a study, beside best/
FINAL = "final-"  # trial ids of the winner's retrained seeds begin so


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
        """Returns the folder's name."""
        return self.folder.name

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

    Raises:
        ValueError: It holds no study, or one whose tables are missing or damaged.
    """
    if "://" in str(folder):
        with tempfile.TemporaryDirectory() as copy:
            study = _load(fetch(str(folder), Path(copy)))
        return replace(study, folder=Path(study.name))  # where a report of it goes
    return _load(Path(folder))


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
    try:
        system, root = fs.FileSystem.from_uri(url.rstrip("/"))
        found = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        for info in found:
            name = info.path.removeprefix(f"{root}/")
            in_best = name.startswith("best/") and name.count("/") == 1 and not name.endswith(".pt")
            if info.is_file and (name in NEEDED or in_best):
                with system.open_input_stream(info.path) as stream:
                    (folder / name).write_bytes(stream.read())
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{url} cannot be read ({reason}); check the address and the credentials") from None
    return folder


def read_facts(folder: Path) -> dict[str, Any]:
    """Return study.json; search/study_file.py says what its last entry is.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    file = folder / "study.json"
    try:
        text = file.read_bytes().decode()
        facts = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no study: there is no study.json in it") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from None
    content, _, _ = text.rpartition(',\n  "crc": "')
    crc = f"{zlib.crc32(content.encode()):08x}"
    if not isinstance(facts, dict) or facts.pop("crc", crc) != crc:
        raise ValueError(f"{file} is damaged; restore it from a copy")
    return facts


def _load(folder: Path) -> Study:
    facts = read_facts(folder)
    try:
        trials = pd.read_csv(
            folder / "trials.csv", dtype={"trial_id": "str"}, keep_default_na=False, na_values=[""]
        )
        epochs = pd.read_parquet(folder / "epochs.parquet")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no tables that can be read ({error}); write them anew: "
            f"python -m search.collect {folder}"
        ) from None
    is_final = epochs.trial_id.str.startswith(FINAL)
    best = folder / "best"
    return Study(
        folder=folder,
        facts=facts,
        trials=trials,
        epochs=epochs[~is_final],
        finals=epochs[is_final],
        predictions=_read(best / "predictions.parquet", pd.read_parquet),
        misclassified=_read(best / "misclassified.npz", _images),
        first_layer=_read(best / "first_layer.npy", np.load),
        lr_curve=_read(folder / "lr_curve.csv", pd.read_csv),
    )


def _images(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as arrays:
        return arrays["index"], arrays["images"]


def _read(file: Path, read: Any) -> Any:
    return read(file) if file.exists() else None
