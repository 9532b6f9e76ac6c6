"""reports.jsonl: what happened in a study, one JSON line per event, appended before anything acts on it.

README.md lists the kinds of lines. Each ends with its number ``"n"`` and with ``"crc"``, the CRC-32 of what
precedes it; a journal whose first line has neither is of the old form, and is read and continued as it is.
Rungs, tables and resuming are rebuilt from this file alone. A repeated (trial, epoch) replaces the earlier.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunefleet.cli import shell
from tunefleet.files import read_whole, write_whole
from tunefleet.metric import ACCURACY, Metric

FINAL = "final-"  # trial ids of the winner's retrained seeds begin so
FAILED = ("error", "out_of_memory")  # statuses that are no result of the configuration
LOST = ("diverged", *FAILED)  # of trials that ended before their time
STATUSES = ("done", *LOST)  # with which a trial ends
NUMBERS = (  # of a report; null where not finite or not measured
    *("train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_accuracy"),
    *("lr", "epoch_seconds", "finished_at"),
)
CRC = b', "crc": "'


class ClosedError(Exception):
    """An event came after the study was stopped."""


class DamagedError(ValueError):
    """A journal is not as it was written."""


class Journal:
    """The append-only log of one study; the file is opened per line, so a copy or pickle is safe."""

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        self._size, self._last = 0, 0  # of the file and number of its last line, after our last append
        self._closed = False

    def append(self, event: dict[str, Any]) -> None:
        """Write one line before anything acts on it.

        Raises:
            OSError: It cannot be written, not even in part.
            ClosedError: The study has been stopped.
        """
        if self._closed:
            raise ClosedError
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        before = os.fstat(descriptor).st_size
        try:
            if before != self._size:  # another Journal has written
                self._last = self._read()[1]
            line = _line({key: finite(value) for key, value in event.items()}, self._last)
            left = line
            while left:  # a nearly full disk takes a part
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, before)
            raise
        finally:
            os.close(descriptor)
        self._size = before + len(line)
        self._last += self._last >= 0

    def close(self) -> None:
        """Refuse all further events: what happens after a study was stopped is not part of it."""
        self._closed = True

    def read(self) -> list[dict[str, Any]]:
        """Return all events; a last line cut off by a kill or a full disk is left out.

        Raises:
            DamagedError: A line is damaged, lost, repeated or moved; the error names it.
        """
        return self._read()[0]

    def _read(self, count: int | None = None) -> tuple[list[dict[str, Any]], int]:
        """Return the first ``count`` events, and the last one's number; -1: the old form has none."""
        lines = self._lines()[:-1][:count]
        numbered = not lines or CRC in lines[0]
        events: list[dict[str, Any]] = []
        started: set[str] = set()
        for number, line in enumerate(lines, start=1):
            try:
                event = _opened(line, number) if numbered else _parsed(line)
                if not numbered:
                    _check(event, started)
            except (ValueError, RecursionError) as error:
                raise DamagedError(
                    f"{self.file} line {number} is damaged ({error}); {self._remedy(number - 1)}"
                ) from None
            events.append(event)
        return events, len(lines) if numbered else -1

    def check_holds(self, events: list[dict[str, Any]], count: int) -> None:
        """Raise DamagedError where fewer events were read than the study is known to have had."""
        if len(events) < count:
            raise DamagedError(
                f"{self.file} ends after line {len(events)} of {count}; {self._remedy(len(events))}"
            )

    def _remedy(self, whole: int) -> str:
        """Return what to do about a journal of which only the first lines are whole."""
        command = shell("tunefleet", "collect", "--keep-lines", whole, self.file.parent)
        return f"restore the file from a copy, or give up what follows: {command}"

    def drop_torn_line(self) -> int:
        """Cut off a torn last line, before more are appended; return how many bytes it had."""
        if torn := self.torn():
            os.truncate(self.file, self.file.stat().st_size - torn)
        return torn

    def torn(self) -> int:
        """Return how many bytes of a last line without its end there are."""
        return len(self._lines()[-1])

    def keep(self, count: int) -> None:
        """Cut off all but the first lines; the whole file stays as reports.jsonl.damaged, or .damaged-2, ….

        Raises:
            ValueError: One of these lines is damaged, or there are not so many.
        """
        lines = self._lines()[:-1]
        if not 0 <= count <= len(lines):
            raise ValueError(f"--keep-lines={count} is not possible; {self.file} has {len(lines)} lines")
        self._read(count)
        suffixes = itertools.chain([".damaged"], (f".damaged-{k}" for k in itertools.count(2)))
        copy = next(file for suffix in suffixes if not (file := Path(f"{self.file}{suffix}")).exists())
        write_whole(copy, self.file.read_bytes())
        write_whole(self.file, b"".join(line + b"\n" for line in lines[:count]))

    def _lines(self) -> list[bytes]:
        """Return the file's lines, the last one being what follows the last line end."""
        return (read_whole(self.file) or b"").split(b"\n")


def _line(event: dict[str, Any], last: int) -> bytes:
    """Return an event as the line after line ``last``; -1: in the old form."""
    if last < 0:
        return (json.dumps(event) + "\n").encode()
    body = json.dumps(event | {"n": last + 1}).removesuffix("}").encode()
    return body + CRC + b'%08x"}\n' % zlib.crc32(body)


def _opened(line: bytes, number: int) -> dict[str, Any]:
    """Return the event of a line, without number and checksum, which have to fit."""
    body, _, crc = line.rpartition(CRC)
    if crc != b'%08x"}' % zlib.crc32(body):
        raise ValueError("its checksum is wrong")
    event = _parsed(body + b"}")
    if (written := event.pop("n", None)) != number:
        raise ValueError(f"it was written as line {written}")
    return event


def _parsed(line: bytes) -> dict[str, Any]:
    event = json.loads(line.decode())
    if not isinstance(event, dict):
        raise ValueError("it is no event")
    return event


def _check(event: dict[str, Any], started: set[str]) -> None:
    """Raise ValueError for a line of the old form that no study writes after the trials started so far."""
    trial_id, epoch, status = event.get("trial_id"), event.get("epoch"), event.get("status")
    if "run" in event:
        whole = event.keys() == {"run"} and isinstance(event["run"], dict)
    elif not isinstance(trial_id, str) or not re.fullmatch(r"[\w-]+", trial_id):
        raise ValueError("it names no trial")
    elif (trial_id in started) == (epoch == 0):
        raise ValueError(f"trial {trial_id} {'starts a second time' if epoch == 0 else 'has not started'}")
    elif epoch == 0:
        whole = event.keys() == {"trial_id", "epoch", "config"} and isinstance(event["config"], dict)
        started.add(trial_id)
    else:
        counts = [event[name] for name in ("epoch", "promoted_from") if name in event]
        numbers = [event[name] for name in NUMBERS if event.get(name) is not None]
        untested = event.get("test_accuracy") is None and "tested" not in event
        whole = (
            (status in STATUSES or (status is None and bool(counts or "lost" in event)))
            and all(type(count) is int and 0 <= count < 2**31 for count in counts)
            and all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in numbers)
            and isinstance(event.get("lost", ""), str)
            and not (trial_id.startswith(FINAL) and status in ("done", "diverged") and untested)
        )
    if not whole:
        raise ValueError("it is no event of a study")


def finite(value: Any) -> Any:
    """Return None for a float that is not finite, else the value."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class TrialRecord:
    """One trial as its events tell it."""

    trial_id: str
    config: dict[str, Any]
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)  # by epoch
    status: str | None = None  # done, diverged, out_of_memory, error; None: may continue
    error: str | None = None

    @property
    def epoch(self) -> int:
        """Return the number of epochs reported."""
        return max(self.reports, default=0)

    def value(self, metric: Metric = ACCURACY) -> float | None:
        """Return the last report's value; None before any, and where it was not finite."""
        return self.reports[self.epoch].get(metric.name) if self.reports else None

    def values(self, name: str) -> list[float]:
        """Return the values that all reports have of a number."""
        found = (report.get(name) for report in self.reports.values())
        return [value for value in found if value is not None]

    @property
    def is_final(self) -> bool:
        """Return whether this is a seed of the retrained winner and no trial of the search."""
        return self.trial_id.startswith(FINAL)

    def is_seed_of(self, other: TrialRecord) -> bool:
        """Return whether this retrains another trial's configuration from a fresh seed."""
        fresh = ("seed", "refit")
        mine, theirs = (
            {name: value for name, value in trial.config.items() if name not in fresh}
            for trial in (self, other)
        )
        return self.is_final and mine == theirs

    def take(self, event: dict[str, Any]) -> None:
        """Record one event of this trial."""
        if event.get("epoch"):
            self.reports[event["epoch"]] = event
        if "status" in event:
            self.status, self.error = event["status"], event.get("error")


def records(events: list[dict[str, Any]]) -> dict[str, TrialRecord]:
    """Return all trials of a study by id, in the order in which they started."""
    trials: dict[str, TrialRecord] = {}
    for event in events:
        if "run" in event:
            continue
        if event.get("epoch") == 0:
            trials.setdefault(event["trial_id"], TrialRecord(event["trial_id"], event["config"]))
        else:
            trials[event["trial_id"]].take(event)
    return trials


def winner(trials: dict[str, TrialRecord], metric: Metric = ACCURACY) -> TrialRecord | None:
    """Return the trial with the best value at its last report.

    Of equals, frequent on few validation images, the one with the lowest val_loss wins, then the
    earliest. Diverged and failed trials cannot win. None where no trial is left.
    """
    able = [
        trial
        for trial in trials.values()
        if not trial.is_final and trial.status in (None, "done") and trial.value(metric) is not None
    ]

    def merit(trial: TrialRecord) -> tuple[float, float]:
        loss = trial.reports[trial.epoch].get("val_loss")
        return metric.score(trial.value(metric)), -math.inf if loss is None else -loss

    return max(able, key=merit, default=None)
