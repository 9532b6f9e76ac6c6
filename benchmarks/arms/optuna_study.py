"""Optuna in one process: one trial at a time on all cores, our training code."""

from __future__ import annotations

import optuna
import torch

from tunefleet.benchmarks.arms.our_trial import OurTrial
from tunefleet.benchmarks.task import Row, Task


def run(task: Task) -> list[Row]:
    """Run all trials."""
    torch.set_num_threads(task.workers)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    data = None if task.no_op else task.images()
    rows: list[Row] = []

    def objective(trial: optuna.Trial) -> float:
        index = trial.suggest_int("trial", 0, len(task.configurations) - 1)
        ours = OurTrial(task, data, index)
        accuracy = 0.0
        for _ in range(task.epochs):
            reported = ours.epoch()
            rows.append(reported)
            accuracy = reported["val_accuracy"] or 0.0
            trial.report(accuracy, reported["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    pruner = halving if task.pruning else optuna.pruners.NopPruner()
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for index in range(len(task.configurations)):
        study.enqueue_trial({"trial": index})
    study.optimize(objective, n_trials=len(task.configurations))
    return rows
