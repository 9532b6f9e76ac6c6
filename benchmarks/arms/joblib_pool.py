"""joblib, the simplest way: our training code in processes of one thread each."""

from __future__ import annotations

import torch
from joblib import Parallel, delayed

from tunefleet.benchmarks.arms.our_trial import OurTrial
from tunefleet.benchmarks.task import Row, Task
from tunefleet.trainables.data import ImageData


def train(task: Task, data: ImageData | None, trial: int) -> list[Row]:
    """Train one configuration to its end."""
    torch.set_num_threads(1)
    ours = OurTrial(task, data, trial)
    return [ours.epoch() for _ in range(task.epochs)]


def run(task: Task) -> list[Row]:
    """Run all trials."""
    data = None if task.no_op else task.images()
    done = Parallel(n_jobs=task.workers)(
        delayed(train)(task, data, trial) for trial in range(len(task.configurations))
    )
    return [reported for rows in done for reported in rows]
