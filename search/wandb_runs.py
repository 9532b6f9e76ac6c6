"""What does W&B get of a study, and what has it got? One run per trial, and one for the study.

All of it is read from the study's folder, so whatever happens to W&B, the same runs can be sent again.
``wandb/state.json`` keeps which of them are known to be there. Imports nothing heavy and never wandb.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunefleet.files import is_full, write_whole
from tunefleet.journal import TrialRecord
from tunefleet.search.wandb_options import LONGEST_NAME, WandbOptions, base_url
from tunefleet.study import Study

STUDY = "study"  # the key of the study's own run, beside trial ids
COLUMNS = (  # of a row, those of epochs.parquet
    *("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy"),
    *("lr", "epoch_seconds", "finished_at"),
)
FAILED = ("error", "out_of_memory")
AT_WORK = ("running", "paused")
NO_ROOM = "there is no room under wandb/"


@dataclass(frozen=True)
class Planned:
    """One run as W&B shall have it."""

    key: str  # trial id or STUDY
    run_id: str
    job_type: str  # trial, final (a seed of the winner) or study
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]  # with status
    media: tuple[str, ...] = ()  # files of the folder

    @property
    def ended(self) -> bool:
        """Returns whether nothing more is to come."""
        return self.summary["status"] not in AT_WORK

    @property
    def failed(self) -> bool:
        """Returns whether W&B shall show the run as failed."""
        return self.summary["status"] in FAILED

    @property
    def record(self) -> dict[str, Any]:
        """Returns what state.json says of the run once W&B has it."""
        return {"rows": len(self.rows), "status": self.summary["status"], "media": list(self.media)}


def plan(folder: Path) -> list[Planned]:
    """Returns all runs of a study as its folder tells them now.

    The study's own run is among them once the study is done or stopped.

    Raises:
        ValueError: The folder holds no study, or its journal is damaged.
    """
    study = Study(folder)
    status, trials = study.status, study.records.values()
    stem = run_stem(study.facts)
    runs = [_of_trial(trial, study.status_of(trial), stem) for trial in trials if trial.is_final]
    if runs:  # the search is over: what is paused was pruned
        study.status = "done"
    runs = [_of_trial(trial, study.status_of(trial), stem) for trial in trials if not trial.is_final] + runs
    if status != "running":
        runs.append(_of_study(folder, study.facts, stem))
    return runs


def run_stem(study: dict[str, Any]) -> str:
    """Returns what the ids of a study's runs begin with.

    Run ids are unique in a project for ever, and trial ids and folder names are not: two studies in
    folders of one name must not meet in one run, and a renamed folder is the same study.
    """
    identity = json.dumps([study.get(name) for name in ("started_at", "machine", "command", "seed")])
    return f"{study['space']}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _of_trial(trial: TrialRecord, status: str, stem: str) -> Planned:
    values = [r["val_accuracy"] for r in trial.reports.values() if r.get("val_accuracy") is not None]
    last = trial.reports.get(trial.epoch, {})
    summary: dict[str, Any] = {
        "status": status,
        "epochs": trial.epoch,
        "best_val_accuracy": max(values, default=None),
    }
    if status == "pruned":
        summary["pruned_at_epoch"] = trial.epoch
    if trial.error:
        summary["error"] = trial.error
    if "test_accuracy" in last:
        summary["test_accuracy"] = last["test_accuracy"]
    return Planned(
        key=trial.trial_id,
        run_id=f"{stem}-{trial.trial_id}",
        job_type="final" if trial.is_final else "trial",
        config=trial.config,
        rows=[{name: trial.reports[n].get(name) for name in COLUMNS} for n in sorted(trial.reports)],
        summary=summary,
    )


def _of_study(folder: Path, study: dict[str, Any], stem: str) -> Planned:
    best, final = study.get("best"), study.get("final")
    summary = {
        name: study.get(name) for name in ("status", "trials", "epochs_spent", "epochs_unpruned", "seconds")
    }
    if best:
        summary |= {"best_trial": best["trial_id"], "val_accuracy": best["val_accuracy"]}
        summary |= {f"best/{name}": value for name, value in best["config"].items()}
    if final and final["test_accuracy"]:
        test = final["test_accuracy"]
        low, high = test["interval95"] or (None, None)
        summary |= {"test_accuracy": test["mean"], "test_accuracy_sd": test["sd"]}
        summary |= {"test_accuracy_low": low, "test_accuracy_high": high, "seeds": len(test["values"])}
    config = {name: study.get(name) for name in ("space", "seed", "commit", "versions", "machine", "options")}
    media = [file.relative_to(folder).as_posix() for file in sorted((folder / "figures").glob("*.png"))]
    if all((folder / "best" / name).exists() for name in ("misclassified.npz", "predictions.parquet")):
        media.append("best/misclassified.npz")
    return Planned(STUDY, f"{stem}-{STUDY}", "study", config, [], summary, tuple(media))


@dataclass
class State:
    """``wandb/state.json``: what W&B is known to have, so that nothing is sent twice.

    Attributes:
        file: Where it stands.
        target: The server and project that ``runs`` are in.
        entity: Whose they are, as the server said.
        runs: ``Planned.record`` by key, of the runs that the server confirmed.
        offline: The same of the offline runs in the folder that are whole.
        sweep: The id of the study's sweep.
        error: Why the last attempt ended, in a line.
    """

    file: Path
    target: dict[str, Any]
    entity: str | None = None
    runs: dict[str, Any] = field(default_factory=dict)
    offline: dict[str, Any] = field(default_factory=dict)
    sweep: str | None = None
    error: str | None = None

    @classmethod
    def load(cls, folder: Path, options: WandbOptions) -> State:
        """Reads what is known of this server and project; of others nothing is.

        Raises:
            ValueError: The file is damaged.
        """
        file = folder / "wandb" / "state.json"
        target = {"base_url": base_url(), "project": options.project, "entity": options.entity}
        state = cls(file, target)
        if file.exists():
            try:
                content = json.loads(file.read_bytes().decode())
                if content["target"] == target:
                    for name in ("entity", "runs", "offline", "sweep", "error"):
                        setattr(state, name, content[name])
                state.runs, state.offline = dict(state.runs), dict(state.offline)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} is damaged ({error}); remove it: what W&B has is asked of W&B then"
                ) from None
        return state

    def save(self) -> None:
        """Write the file, whole or not at all; where there is no room, W&B is asked again the next time."""
        content = {name: value for name, value in vars(self).items() if name != "file"}
        try:
            self.file.parent.mkdir(exist_ok=True)
            write_whole(self.file, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            if not is_full(error):
                raise
            self.error = self.error or NO_ROOM

    def known(self, mode: str) -> dict[str, Any]:
        """Returns the records of the runs that need nothing more in this mode."""
        return self.runs if mode == "online" else self.offline

    def missing(self, runs: list[Planned], mode: str) -> list[Planned]:
        """Returns the runs that are not known to be as they shall be."""
        known = self.known(mode)
        return [run for run in runs if known.get(run.key) != run.record]


def standing(
    folder: Path, options: WandbOptions, why: str = "", state: State | None = None
) -> tuple[str, bool]:
    """Return how a study stands with W&B, in a line, and whether anything is missing there.

    Args:
        folder: The study's.
        options: Where its runs go.
        why: The reason for what is missing, where W&B gave none.
        state: What W&B is known to have; None: as the folder tells.
    """
    runs, state = plan(folder), state or State.load(folder, options)
    missing = state.missing(runs, options.mode)
    why = f" ({state.error or why})" if state.error or why else ""
    where = f"{state.entity or options.entity or ''}/{options.project}".lstrip("/")
    if options.mode == "online":
        if missing:
            return f"{len(missing)} of {len(runs)} runs are not synced{why}", True
        if options.sweep and not state.sweep:
            return f"all {len(runs)} runs are in {where}, the sweep is not{why}", True
        return f"all {len(runs)} runs are in {where}, group {options.group or legible(folder.name)}", False
    if missing:
        return f"{len(missing)} of {len(runs)} offline runs are not written{why}", True
    sweep = ", no sweep made" if options.sweep else ""
    return f"{len(runs)} runs written offline, none of them uploaded{sweep}", False


def legible(text: str, longest: int = LONGEST_NAME) -> str:
    """Return a name as W&B takes it: valid Unicode in one line, of limited length."""
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:longest]


def tidy(folder: Path) -> None:
    """Removes what W&B leaves behind and no one needs: all but offline runs and our state."""
    for path in (folder / "wandb").glob("*"):
        if path.name.startswith("offline-run-") or path.name in ("state.json", ".lock", "sync.log"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
