"""tunefleet itself, as ``tunefleet search`` runs a study; like the other arms without W&B and fresh seeds."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tunefleet.benchmarks.arms import no_op
from tunefleet.benchmarks.task import Row, Task
from tunefleet.models.spaces import SPACES
from tunefleet.search.options import StudyOptions
from tunefleet.search.running import start
from tunefleet.search.session import Session
from tunefleet.search.session import leave as leave
from tunefleet.study import Study


def run(task: Task) -> list[Row]:
    """Run all trials."""
    first, points = task.configurations[0], task.configurations
    if task.no_op:
        points = [{"trial": number} for number in range(len(points))]
    options = StudyOptions(
        space=no_op.SPACE if task.no_op else SPACES[first["architecture"]],
        points=points,
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
