"""A trial that trains with tunefleet's code, without its engine: what well-made peers run."""

from __future__ import annotations

from pathlib import Path

from tunefleet.benchmarks.task import Row, Task, no_op_accuracy, row
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.device import choose
from tunefleet.trainables.training import TrainingRun


class OurTrial:
    """One trial of a task."""

    def __init__(self, task: Task, data: ImageData | None, trial: int) -> None:
        self.trial, self.epochs_done = trial, 0
        self.run = None
        if not task.no_op:
            assert data is not None
            settings = choose(task.device, task.precision)
            self.run = TrainingRun(task.config(trial), data, settings, Path(task.data_dir))

    def epoch(self) -> Row:
        """Train and evaluate an epoch; of a no-op trial, only report one."""
        self.epochs_done += 1
        if self.run is None:
            return row(self.trial, self.epochs_done, no_op_accuracy(self.trial, self.epochs_done))
        return row(self.trial, self.epochs_done, self.run.epoch()["val_accuracy"])
