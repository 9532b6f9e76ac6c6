"""tunefleet itself, as ``tunefleet search`` runs a study; like the other arms without W&B and fresh seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from tunefleet.benchmarks.task import Row, Task, no_op_accuracy, row
from tunefleet.models.spaces import SPACES
from tunefleet.search import engine
from tunefleet.search.options import StudyOptions
from tunefleet.search.running import start
from tunefleet.search.session import Session
from tunefleet.search.session import leave as leave
from tunefleet.study import Study
from tunefleet.trainables.trial import Trial


class NoOpTrial(Trial):
    """A trial that trains nothing: what remains is the engine's cost."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start the next job."""
        self.job, self.epoch, self.located = new_config, new_config["reported"], False
        return True

    def step(self) -> dict[str, Any]:
        """Return where the job runs, as every trial does, then an epoch's report at once."""
        if not self.located:
            return super().step()
        self.epoch += 1
        trial = int(self.job["trial_id"])
        report = row(trial, self.epoch, no_op_accuracy(trial, self.epoch))
        ends = {"status": "done"} if self.epoch == self.job["config"]["epochs"] else {}
        return {"report": json.dumps({**report, "epoch_seconds": 0.0, **ends})}


def run(task: Task) -> list[Row]:
    """Run all trials."""
    if task.no_op:
        engine.Trial = NoOpTrial  # type: ignore[misc]  # no option of a study: nobody else needs it
    first = task.configurations[0]
    options = StudyOptions(
        space=SPACES[first["architecture"]],
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
    code = start(options, folder, Session(Console()), wandb={"mode": "off"})
    assert code == 0, code
    return [
        {name: event[name] for name in ("epoch", "val_accuracy", "finished_at")}
        | {"trial": int(event["trial_id"])}
        for event in Study(folder).events
        if event.get("epoch")
    ]
