"""Ray Tune used well: reused workers, shared parameters, no loggers; our training code, Ray's ASHA."""

from __future__ import annotations

import os
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from tunefleet.benchmarks.arms.our_trial import OurTrial
from tunefleet.benchmarks.task import Row, Task
from tunefleet.trainables.data import ImageData


class PlainTrial(tune.Trainable):
    """One epoch per step."""

    def setup(self, config: dict[str, Any], task: Task | None = None, data: ImageData | None = None) -> None:
        """Start this worker's first trial."""
        assert task is not None
        self.task, self.data = task, data
        torch.set_num_threads(1)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start the next one."""
        self.ours = OurTrial(self.task, self.data, new_config["trial"])
        return True

    def step(self) -> dict[str, Any]:
        """Train an epoch."""
        reported = self.ours.epoch()
        return {**reported, "done": reported["epoch"] == self.task.epochs}


class Rows(tune.Callback):
    """Collect the trials' reports."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep our columns of a result."""
        self.rows.append({key: result[key] for key in ("trial", "epoch", "val_accuracy", "finished_at")})


def run(task: Task) -> list[Row]:
    """Run all trials."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    data = None if task.no_op else task.images()
    scheduler = None
    if task.pruning:
        scheduler = ASHAScheduler(time_attr="epoch", max_t=task.epochs, reduction_factor=3)
    rows = Rows()
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(PlainTrial, task=task, data=data),
            {"cpu": 1, "gpu": 1 / task.workers if task.device == "cuda" else 0},
        ),
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            scheduler=scheduler,
            reuse_actors=True,
            max_concurrent_trials=task.workers,
        ),
        param_space={"trial": tune.grid_search(list(range(len(task.configurations))))},
        run_config=tune.RunConfig(
            storage_path=task.folder,
            verbose=0,
            callbacks=[rows],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # writes none, which ours does
        ),
    )
    results = tuner.fit()
    assert not results.errors, results.errors
    return rows.rows
