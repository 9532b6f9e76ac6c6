"""What happened in a study? One JSON line per event, appended as it happens: reports.jsonl.

Five kinds of line, told apart by their keys, in the order in which the study saw them:

- a trial starts: ``{"trial_id", "epoch": 0, "config"}``
- a report: ``{"trial_id", "epoch": n, "val_accuracy", …}``, its last one with a ``"status"``
- a paused trial goes on: ``{"trial_id", "promoted_from": rung}``
- a trial's worker is gone, and it goes on with another: ``{"trial_id", "lost": cause, "error"}``, with its
  ``"gpu"`` where it was on one
- a trial ends without a report: ``{"trial_id", "status", "error"}``

Rungs, tables and resuming are rebuilt from this file alone. A repeated (trial, epoch) replaces the
earlier line. Numbers that are not finite are null, so every line is JSON to every reader.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FINAL = "final-"  # trial ids of the winner's retrained seeds begin so


class Journal:
    """The append-only log of one study; the file is opened per line, so a copy or pickle is safe."""

    def __init__(self, file: Path) -> None:
        self.file = Path(file)

    def append(self, event: dict[str, Any]) -> None:
        """Writes one line before anything acts on it.

        Raises:
            OSError: It cannot be written; nothing of it is.
        """
        line = json.dumps({key: finite(value) for key, value in event.items()}) + "\n"
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        before = os.fstat(descriptor).st_size
        try:
            left = line.encode()
            while left:  # a nearly full disk takes a part
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, before)
            raise
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """Returns all events; a last line cut off by a kill or a full disk is left out.

        Raises:
            ValueError: A line other than the last is no JSON; names it.
        """
        if not self.file.exists():
            return []
        lines = self.file.read_bytes().split(b"\n")
        events = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                events.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{self.file} line {number} is damaged ({error}); remove that line"
                ) from error
        return events

    def mend(self) -> None:
        """Cuts off a last line without its end, before more are appended."""
        if self.file.exists():
            content = self.file.read_bytes()
            if not content.endswith(b"\n"):
                with self.file.open("r+b") as stream:
                    stream.truncate(content.rfind(b"\n") + 1)


def finite(value: Any) -> Any:
    """Returns None for a float that is not finite, else the value."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class TrialRecord:
    """One trial as its events tell it."""

    trial_id: str
    config: dict[str, Any]
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)  # by epoch
    status: str | None = None  # done, diverged, out_of_memory, error; None: may go on
    error: str | None = None

    @property
    def epoch(self) -> int:
        """Returns the number of epochs reported."""
        return max(self.reports, default=0)

    @property
    def val_accuracy(self) -> float | None:
        """Returns the last report's value; None before any, and where it was not finite."""
        return self.reports[self.epoch].get("val_accuracy") if self.reports else None

    @property
    def is_final(self) -> bool:
        """Returns whether this is a seed of the retrained winner and no trial of the search."""
        return self.trial_id.startswith(FINAL)

    def take(self, event: dict[str, Any]) -> None:
        """Takes in one event of this trial."""
        if event.get("epoch"):
            self.reports[event["epoch"]] = event
        if "status" in event:
            self.status, self.error = event["status"], event.get("error")


def records(events: list[dict[str, Any]]) -> dict[str, TrialRecord]:
    """Returns all trials of a study by id, in the order in which they started."""
    trials: dict[str, TrialRecord] = {}
    for event in events:
        if event.get("epoch") == 0:
            trials.setdefault(event["trial_id"], TrialRecord(event["trial_id"], event["config"]))
        else:
            trials[event["trial_id"]].take(event)
    return trials


def status_of(trial: TrialRecord, study: dict[str, Any]) -> str:
    """Returns done, pruned, diverged, out_of_memory or error; running or paused in an unfinished study."""
    if trial.status:
        return trial.status
    if study["status"] == "done":
        return "pruned"
    return "paused" if trial.epoch in study["rungs"] else "running"


def winner(trials: dict[str, TrialRecord]) -> TrialRecord | None:
    """Returns the trial with the highest val_accuracy at its last report.

    Of equals, frequent on few validation images, the one with the lowest val_loss wins, then the
    earliest. Diverged and failed trials cannot win. None where no trial is left.
    """
    able = [t for t in trials.values() if not t.is_final and t.status in (None, "done") and t.val_accuracy]

    def merit(trial: TrialRecord) -> tuple[float, float]:
        loss = trial.reports[trial.epoch].get("val_loss")
        return trial.val_accuracy or 0.0, -math.inf if loss is None else -loss

    return max(able, key=merit, default=None)
