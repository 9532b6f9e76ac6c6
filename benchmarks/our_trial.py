"""What do well-made peers run, too? Our training code, without our engine."""

from __future__ import annotations

from pathlib import Path

from tunefleet.benchmarks.task import Row, Task, no_op_accuracy, row
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.device import choose
from tunefleet.trainables.training import TrainingRun


class OurTrial:
    """A trial by tunefleet's training code."""

    def __init__(self, task: Task, data: ImageData | None, trial: int) -> None:
        self.trial, self.epochs_done = trial, 0
        self.run = None
        if not task.no_op:
            assert data is not None
            levers = choose(task.device, task.precision)
            self.run = TrainingRun(task.config(trial), data, levers, Path(task.data_dir))

    def epoch(self) -> Row:
        """Train and evaluates an epoch, or only says so."""
        self.epochs_done += 1
        if self.run is None:
            return row(self.trial, self.epochs_done, no_op_accuracy(self.trial, self.epochs_done))
        accuracy = self.run.epoch()["val_accuracy"]
        return row(self.trial, self.epochs_done, accuracy)
