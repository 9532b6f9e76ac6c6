"""tunefleet itself, as ``search/run.py`` runs a study; like the others without W&B and fresh seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.task import Row, Task, no_op_accuracy, row
from search import engine
from search.journal import Journal
from search.launch import leave as leave
from search.launch import start
from search.options import StudyOptions
from trainables.trial import Trial


class NoOpTrial(Trial):
    """A trial that trains nothing."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Starts the next job."""
        self.job, self.epoch = new_config, new_config["reported"]
        return True

    def step(self) -> dict[str, Any]:
        """Reports an epoch, after no time."""
        self.epoch += 1
        trial = int(self.job["trial_id"])
        report = row(trial, self.epoch, no_op_accuracy(trial, self.epoch))
        ends = {"status": "done"} if self.epoch == self.job["config"]["epochs"] else {}
        return {"report": json.dumps({**report, "epoch_seconds": 0.0, **ends})}


def run(task: Task) -> list[Row]:
    """Runs all trials."""
    if task.no_op:
        engine.Trial = NoOpTrial  # type: ignore[misc]  # no option of a study: nobody else wants it
    first = task.configurations[0]
    options = StudyOptions(
        space=first["architecture"],
        points=task.configurations,
        epochs=task.epochs,
        weights=first["weights"],
        pruner=None if task.pruning else "none",
        final_seeds=0,
        data=task.data,
        data_dir=task.data_dir,
        concurrency=task.workers,
        device=task.device,
        precision=task.precision,
    )
    folder = Path(task.folder, "study")
    code = start(options, folder, Console(), wandb={"mode": "off"})
    assert code == 0, code
    events = Journal(folder / "reports.jsonl").read()
    return [
        {
            "trial": int(event["trial_id"]),
            "epoch": event["epoch"],
            "val_accuracy": event["val_accuracy"],
            "finished_at": event["finished_at"],
        }
        for event in events
        if event.get("epoch")
    ]
