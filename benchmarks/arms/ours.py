"""tunefleet itself, as ``search/run.py`` runs a study; like the others without W&B and fresh seeds."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tunefleet.benchmarks.task import Row, Task
from tunefleet.journal import Journal
from tunefleet.search.options import StudyOptions
from tunefleet.search.running import start
from tunefleet.search.session import Session
from tunefleet.search.session import leave as leave


def run(task: Task) -> list[Row]:
    """Run all trials."""
    if task.no_op:
        from tunefleet.benchmarks.no_op import take_part  # imports torch, which a study does while Ray starts

        take_part()
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
    code = start(options, folder, Session(Console()), wandb={"mode": "off"})
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
