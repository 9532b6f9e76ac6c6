"""What came out of a study, as tables? reports.jsonl -> trials.csv, epochs.parquet, study.json.

Runs at the end of each study, and by hand at any time::

    tunefleet collect studies/NAME
    tunefleet collect --keep-lines N studies/NAME    # of a damaged reports.jsonl

Of a study that is running it writes the tables only: study.json belongs to the process that runs it.
"""

from __future__ import annotations

import contextlib
import io
import operator
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from tunefleet.cli import Parser, counted, exit_code, printable
from tunefleet.files import write_whole
from tunefleet.search.final import final_results
from tunefleet.search.journal import Journal, TrialRecord, records, status_of, winner
from tunefleet.search.study_file import (
    RunningError,
    lock_of,
    read_events,
    read_study,
    write_study,
)

OTHER_SECONDS = 30.0  # that another process may take to write the same tables

EPOCH_COLUMNS = {
    "trial_id": "string",
    "epoch": "int64",
    "train_loss": "float64",
    "train_accuracy": "float64",
    "val_loss": "float64",
    "val_accuracy": "float64",
    "lr": "float64",
    "epoch_seconds": "float64",
    "finished_at": "float64",
}


def collect(study_dir: Path, *, live: bool = False, **facts: Any) -> dict[str, Any]:
    """Write the tables of a study, and study.json.

    Args:
        study_dir: The study's folder.
        live: Another process runs the study: leave study.json to it.
        facts: What the process that runs the study adds to study.json: status, seconds.

    Returns:
        The content of study.json.

    Raises:
        ValueError: The folder holds no study, its journal is damaged, or a finished study had more results.
    """
    study_dir = Path(study_dir)
    with _alone(study_dir):
        study = read_study(study_dir)
        events = read_events(study_dir, study)
        trials = records(events)
        searched = [trial for trial in trials.values() if not trial.is_final]
        best, final = winner(trials), final_results(trials)
        found = {
            "trials": len(searched),
            "epochs_spent": sum(trial.epoch for trial in searched),
            "final": final,
        }
        if study["status"] == "done" and any(map(operator.lt, _extent(found), _extent(study))):
            raise ValueError(
                f"{study_dir / 'reports.jsonl'} holds less than the finished study had; its results are left "
                "as they are; restore the file from a copy"
            )
        study |= facts
        table = trials_table(searched, study).to_csv(index=False, lineterminator="\n").encode()
        parquet = io.BytesIO()  # pyarrow opens no path that is not UTF-8
        epochs_table(trials).to_parquet(parquet, index=False)
        study |= found | {
            "statuses": dict(Counter(status_of(trial, study) for trial in searched).most_common()),
            "epochs_unpruned": len(searched) * study["options"]["epochs"],
            "lost_workers": dict(Counter(event["lost"] for event in events if "lost" in event)),  # by cause
            "busy_fraction": busy_fraction(trials),
            "best": best
            and {"trial_id": best.trial_id, "config": best.config, "val_accuracy": best.val_accuracy},
            "events": len(events),
        }
        write_whole(study_dir / "trials.csv", table)
        write_whole(study_dir / "epochs.parquet", parquet.getvalue())
        if not live:
            write_study(study_dir, study)
    return study


@contextlib.contextmanager
def _alone(study_dir: Path) -> Iterator[None]:
    """Context manager: no other process writes the tables meanwhile, from an older journal."""
    lock = FileLock(study_dir / ".collect.lock")
    with contextlib.suppress(Timeout):  # the other one was stopped; a study's end does not wait for it
        lock.acquire(timeout=OTHER_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _extent(study: dict[str, Any]) -> tuple[int, int, int]:
    """Return how much a study.json tells of: trials, their epochs, and seeds of the winner that ended."""
    final = study.get("final") or {"seeds": [], "failed": []}
    return study.get("trials", 0), study.get("epochs_spent", 0), len(final["seeds"]) + len(final["failed"])


def trials_table(searched: list[TrialRecord], study: dict[str, Any]) -> pd.DataFrame:
    """Returns a row per trial: what it reached, then every hyperparameter under its own name."""
    rungs = study["rungs"]
    rows = []
    for trial in searched:
        accuracies = [report.get("val_accuracy") for report in trial.reports.values()]
        last = trial.reports.get(trial.epoch, {})
        rows.append(
            {
                "trial_id": trial.trial_id,
                "status": status_of(trial, study),
                "epochs": trial.epoch,
                "rung": sum(rung <= trial.epoch for rung in rungs),  # rungs reached
                "val_accuracy": trial.val_accuracy,
                "best_val_accuracy": max((a for a in accuracies if a is not None), default=None),
                "seconds": round(
                    sum(report.get("epoch_seconds") or 0.0 for report in trial.reports.values()), 3
                ),
                "node": last.get("node"),
                **{name: value for name, value in trial.config.items() if name != "epochs"},  # the horizon
            }
        )
    return pd.DataFrame(rows)


def epochs_table(trials: dict[str, TrialRecord]) -> pd.DataFrame:
    """Returns a row per report, of the search and of the winner's seeds."""
    rows = [
        {"trial_id": trial.trial_id, **trial.reports[epoch]}
        for trial in trials.values()
        for epoch in sorted(trial.reports)
    ]
    return pd.DataFrame(rows, columns=list(EPOCH_COLUMNS)).astype(EPOCH_COLUMNS)


def busy_fraction(trials: dict[str, TrialRecord]) -> float | None:
    """Returns seconds inside epochs ÷ worker seconds between each worker's first and last of them."""
    workers: dict[Any, list[tuple[float, float]]] = {}
    for trial in trials.values():
        for report in trial.reports.values():
            seconds, end = report.get("epoch_seconds"), report.get("finished_at")
            if seconds is not None and end is not None:
                workers.setdefault((report.get("node"), report.get("pid")), []).append((end - seconds, end))
    busy = sum(end - start for spans in workers.values() for start, end in spans)
    there = sum(max(e for _, e in spans) - min(s for s, _ in spans) for spans in workers.values())
    return round(busy / there, 4) if there else None


def collect_by_hand(folder: Path, keep_lines: int | None) -> str:
    """Collect a study that may be running; return how it stands, in a line.

    Args:
        folder: The study's.
        keep_lines: Cut its journal off after so many lines; None: leave it as it is.

    Raises:
        ValueError: As ``collect``; or the journal of a finished or a running study would be cut.
    """
    study, journal = read_study(folder), Journal(folder / "reports.jsonl")
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(lock_of(folder).release)
        except RunningError:
            if keep_lines is not None:
                raise
            live = True
        else:
            live = False
        if keep_lines is not None:
            if study["status"] == "done":
                raise ValueError(
                    f"{folder} is done; its results in study.json and trials.csv stay as they are"
                )
            journal.keep(keep_lines)
            write_study(folder, read_study(folder) | {"events": len(journal.read())})
        study = collect(folder, live=live)
        torn = "" if live or not journal.torn() else f", a torn last line of {journal.torn()} bytes left out"
    extent = f"{counted(study['trials'], 'trial')}, {counted(study['epochs_spent'], 'epoch')}"
    return f"{extent}, status {study['status']}{torn}"


def main(arguments: list[str] | None = None) -> int:
    """Collect the studies named on the command line; return the exit code."""
    parser = Parser(prog="tunefleet collect", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, nargs="+", help="a study's folder")
    parser.add_argument(
        "--keep-lines",
        type=int,
        metavar="N",
        help="keep N lines of a damaged reports.jsonl; the whole file stays as reports.jsonl.damaged",
    )
    given = parser.parse_args(arguments)

    def run() -> int:
        for folder in given.study:
            print(f"{printable(str(folder))}: {collect_by_hand(folder, given.keep_lines)}")
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
