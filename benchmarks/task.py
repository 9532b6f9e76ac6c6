"""What is an arm asked to run, and what does it report? A Task as a JSON file, and rows.

Nothing here imports ``search``, which sets variables of Ray and Tune: the other arms have Tune's defaults.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefleet.models.space import TrainConfig
from tunefleet.models.spaces import SPACES
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.preparation import prepare

Row = dict[str, Any]  # a report: trial, epoch, val_accuracy (fraction), finished_at (seconds since 1970)


@dataclass(frozen=True)
class Task:
    """A study that every arm runs.

    Attributes:
        arm: Name of the arm.
        configurations: The trials, as fields of TrainConfig, in the order in which they start.
        epochs: Of each trial, at most.
        pruning: Whether each arm prunes, in its own way.
        no_op: Whether trials only report, and train nothing.
        data: A data set, or a folder of images, whose decoded copy lies under data_dir.
        data_dir: The cache folder.
        workers: Trials at once.
        device: cpu or cuda.
        precision: fp32 or bf16, of arms that train with our code.
        folder: An empty one, where the arm may write.
    """

    arm: str
    configurations: list[dict[str, Any]]
    epochs: int
    pruning: bool
    no_op: bool
    data: str
    data_dir: str
    workers: int
    device: str
    precision: str
    folder: str

    @classmethod
    def read(cls, file: Path) -> Task:
        """Read what ``write`` wrote."""
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        """Write the task for a process to read."""
        file.write_text(json.dumps(dataclasses.asdict(self)))

    def config(self, trial: int) -> TrainConfig:
        """Return a trial's configuration."""
        config = self.configurations[trial]
        return SPACES[config["architecture"]].config(config)

    def images(self) -> ImageData:
        """Return the decoded images."""
        return prepare(self.data, Path(self.data_dir))


def no_op_accuracy(trial: int, epoch: int) -> float:
    """Return what a trial that trains nothing reports: a fraction that differs between trials."""
    return (trial * 37 % 101 + epoch) / 200


def row(trial: int, epoch: int, val_accuracy: float | None) -> Row:
    """Return a report that was finished now."""
    return {"trial": trial, "epoch": epoch, "val_accuracy": val_accuracy, "finished_at": time.time()}
