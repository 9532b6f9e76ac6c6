"""What two studies that did the same have in common, for tests: everything but times and places."""

from pathlib import Path

from tunefleet.journal import Journal
from tunefleet.study import Study

MEASURED = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_accuracy", "lr", "status")


def table(study: Path, but: tuple[str, ...] = ("seconds",)) -> list[list[str]]:
    """Returns trials.csv, its header first, without the columns that may differ."""
    header, *rows = (line.split(",") for line in (study / "trials.csv").read_text().splitlines())
    kept = [k for k, name in enumerate(header) if name not in but]
    return [[row[k] for k in kept] for row in (header, *rows)]


def measured(study: Path) -> dict[tuple[str, int], list]:
    """Returns what each epoch of each trial measured."""
    events = Journal(study / "reports.jsonl").read()
    epochs = (event for event in events if event.get("epoch"))
    return {(e["trial_id"], e["epoch"]): [e.get(name) for name in MEASURED] for e in epochs}


def result(study: Path) -> tuple:
    """Returns a study's status, its winner and its finals."""
    content = Study(study).facts
    return content["status"], content["best"], content["final"]
