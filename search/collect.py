"""What came out of a study, as tables? reports.jsonl -> trials.csv, epochs.parquet, study.json.

Runs at the end of each study; by hand also on a live or a dead one, which it leaves as it is::

    python -m search.collect studies/NAME
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from search.final import final_results
from search.journal import Journal, TrialRecord, records, status_of, winner
from search.study_file import read_study, write_study, write_whole

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


def collect(study_dir: Path) -> dict[str, Any]:
    """Writes the tables of a study and brings study.json up to date.

    Returns:
        The content of study.json.

    Raises:
        ValueError: The folder holds no study, or its journal is damaged.
    """
    study_dir = Path(study_dir)
    study = read_study(study_dir)
    events = Journal(study_dir / "reports.jsonl").read()
    trials = records(events)
    searched = [trial for trial in trials.values() if not trial.is_final]
    write_whole(
        study_dir / "trials.csv",
        trials_table(searched, study).to_csv(index=False, lineterminator="\n").encode(),
    )
    temporary = study_dir / "epochs.parquet.tmp"
    epochs_table(trials).to_parquet(temporary, index=False)
    temporary.replace(study_dir / "epochs.parquet")
    best = winner(trials)
    study |= {
        "trials": len(searched),
        "statuses": pd.Series([status_of(t, study) for t in searched], dtype="str").value_counts().to_dict(),
        "epochs_spent": sum(trial.epoch for trial in searched),
        "epochs_unpruned": len(searched) * study["options"]["epochs"],
        "lost_workers": dict(Counter(event["lost"] for event in events if "lost" in event)),  # by cause
        "busy_fraction": busy_fraction(trials),
        "best": best
        and {"trial_id": best.trial_id, "config": best.config, "val_accuracy": best.val_accuracy},
        "final": final_results(trials),
    }
    write_study(study_dir, study)
    return study


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
            if "epoch_seconds" in report:
                span = (report["finished_at"] - report["epoch_seconds"], report["finished_at"])
                workers.setdefault((report.get("node"), report.get("pid")), []).append(span)
    busy = sum(end - start for spans in workers.values() for start, end in spans)
    there = sum(max(e for _, e in spans) - min(s for s, _ in spans) for spans in workers.values())
    return round(busy / there, 4) if there else None


def main(arguments: list[str] | None = None) -> int:
    """Collects the studies named on the command line."""
    folders = sys.argv[1:] if arguments is None else arguments
    if not folders:
        print("error: give one study folder or more: python -m search.collect studies/NAME", file=sys.stderr)
        return 2
    for folder in folders:
        try:
            study = collect(Path(folder))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{folder}: {study['trials']} trials, {study['epochs_spent']} epochs, status {study['status']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
