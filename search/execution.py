"""Execute a study that is ready: write its folder, run its trials, stop or finish it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tunefleet.cli import counted, printable, shell, shown
from tunefleet.files import is_full
from tunefleet.journal import TrialRecord, winner
from tunefleet.metric import Metric
from tunefleet.mirror import Mirror
from tunefleet.models.sources import write
from tunefleet.search.asha import Asha
from tunefleet.search.connection import RayWatch
from tunefleet.search.display import Progress, print_text, say
from tunefleet.search.engine import run_jobs
from tunefleet.search.failures import named
from tunefleet.search.options import StudyOptions
from tunefleet.search.preflight import Prepared
from tunefleet.search.resources import Resources
from tunefleet.search.scheduler import Scheduler
from tunefleet.search.session import Session
from tunefleet.search.wandb_options import WandbOptions
from tunefleet.search.wandb_sync import END_SECONDS, STOP_SECONDS, LiveUpload
from tunefleet.store import Store, StoreError
from tunefleet.study import Study, lock_study, write_result, write_study, write_tables
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.evaluate import MODEL_FILE, result_files
from tunefleet.trainables.provenance import command_line, commit, machine_name, versions, versions_of_extras
from tunefleet.trainables.training import DamagedCheckpointError, read_checkpoint
from tunefleet.trainables.trial import TrialContext


@dataclass(frozen=True)
class Ready:
    """A study whose trials can start."""

    options: StudyOptions
    folder: Path  # absolute
    data: ImageData | None  # None: the space's runs have their own
    settings: DeviceSettings
    resources: Resources

    @property
    def store(self) -> Store:
        """Return what holds the study: its folder, or a URL."""
        return Store.of_study(self.options.storage, self.folder)

    @property
    def location(self) -> Path | str:
        """Return what names the study on a command line: its folder, or its URL."""
        return self.store.folder or self.store.location


def create(ready: Ready, prepared: Prepared | None) -> None:
    """Make a new study's folder and write its study.json."""
    options, source = ready.options, ready.options.space.source
    of_space: dict[str, Any] = {}
    if source and not source.is_built_in:
        write(source.files, ready.folder / "source")
        of_space = {"source": source.to_dict(), "network": options.space.traits}
    write_study(
        ready.folder,
        of_space
        | {
            "space": options.space.name,
            "published": options.space.published,
            "options": options.to_dict(),
            "rungs": list(options.rungs),
            "ranges": {} if options.points else options.searched.described(),
            "metric": dataclasses.asdict(options.compared),
            **_of_data(ready.data, prepared),
            "levers": dataclasses.asdict(ready.settings),
            "seed": options.seed,
            "commit": commit(),
            "versions": versions() | versions_of_extras(),
            "machine": machine_name(),
            "command": command_line(),
            "started_at": time.time(),
        },
    )


def _of_data(data: ImageData | None, prepared: Prepared | None) -> dict[str, Any]:
    """Return what study.json says of the images; of a training of its own, that there are none."""
    if data is None or prepared is None:
        none = {"data_sha256": "", "split_sha256": "", "train_count": 0, "validation_count": 0}
        return {"data": {"name": "own", "classes": []}, **none}
    return {
        "data": dataclasses.asdict(data),
        "data_sha256": data.sha256,
        "split_sha256": prepared.split_sha256,
        "train_count": prepared.train_count,
        "validation_count": prepared.validation_count,
    }


class OpenStudy:
    """A study that this process runs: it holds the lock until ``end``, or until its context is left.

    Args:
        folder: The study's.

    Raises:
        ValueError: Another process runs it, or its folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._lock, self._ending, self._begun = lock_study(folder), threading.Lock(), False
        try:
            self.study = Study(folder)
        except ValueError:
            self._lock.release()
            raise
        self._began = time.time()
        if torn := self.study.journal.drop_torn_line():
            print(f"reports.jsonl: dropped its last line, of which only {torn} bytes had been written")

    def __enter__(self) -> OpenStudy:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.end("stopped" if kind else "done")

    def begin(self, run: Mapping[str, Any]) -> None:
        """Record what differs in this run, and that the study is running."""
        with self._ending:
            self.study.journal.append({"run": {"at": self._began, **run}})
            self._begun = True
            write_result(self.study, "running", self.study.seconds)

    def end(self, status: str) -> bool:
        """Write the study's tables, status and seconds, and release its lock; only the first call does.

        Of a study that had ended earlier and has not begun again, nothing is written. Return whether it had
        begun.
        """
        with self._ending:
            try:
                if self._lock.is_locked and (self._begun or self.study.status == "running"):
                    seconds = round(self.study.seconds + time.time() - self._began, 3)
                    write_tables(self.study.folder, status=status, seconds=seconds)
            except OSError as error:
                if not is_full(error) or status == "done":
                    raise  # else result.json still says running, as after a kill, and a resume counts on
            finally:
                self._lock.release()
            return self._begun


def run(ready: Ready, session: Session, wandb: WandbOptions, changes: Mapping[str, Any]) -> int:
    """Run a study to its end, or until it is stopped, and print its results; return the exit code."""
    options, console = ready.options, session.console
    _print_start(ready, console)
    live_upload = LiveUpload(ready.folder, wandb)
    mirror = Mirror(ready.folder, ready.store, functools.partial(print_text, console))
    ray_watch = RayWatch()
    with OpenStudy(ready.folder) as study:

        def stop(progress: Progress | None, reason: str) -> int:
            study.study.journal.close()
            if progress:
                progress.close()
            return _end_early(ready, study, session, mirror, live_upload, reason)

        def watch() -> str:
            return mirror.lost or ray_watch()

        session.stops.change(functools.partial(stop, None), watch)
        with mirror.running():
            study.begin(run_facts(ready, wandb, changes, study.study))
            scheduler = scheduler_of(ready, study.study)
            if "trials" in changes:
                scheduler.search_is_over = False
            live_upload.start()
            if ready.options.searcher == "tpe":  # takes a second: now, not at the tenth trial
                threading.Thread(target=importlib.import_module, args=["hyperopt"], daemon=True).start()
            with Progress(scheduler, options, console, mirror.trouble) as progress:
                session.stops.change(functools.partial(stop, progress), watch)
                run_jobs(scheduler, context_of(ready), resources=ready.resources, on_step=progress.update)
            session.stops.change(lambda reason: None)  # what is left takes seconds, and is worth them
            try:
                if not scheduler.gave_up:
                    with mirror.paused():
                        _tidy(ready, study.study.metric, scheduler.trials)
            except StoreError as error:
                scheduler.gave_up = str(error)
            if scheduler.gave_up:
                return _end_early(ready, study, session, mirror, live_upload, scheduler.gave_up)
    code = session.finish(ready.folder, console)
    if scheduler.avoided:
        print_text(console, f"nodes excluded after repeated failures: {named(scheduler.avoided)}")
    session.stops.change(live_upload.give_up)
    say(live_upload.end(END_SECONDS), console)
    session.stops.change(lambda reason: mirror.give_up())
    left = mirror.finish()
    say(left, console)
    return code or int(bool(left))


def _print_start(ready: Ready, console: Console) -> None:
    options, on, device = ready.options, "", ready.settings.device
    trials, epochs = counted(options.trials or 0, "trial"), counted(options.epochs or 0, "epoch")
    if ready.data:
        on, device = f" on {ready.data.name}", f"{device} {ready.settings.precision}"
    at_once = f"{ready.resources.slots} at once, {device} -> {shown(ready.location)}"
    print_text(console, f"{on}: {trials} of up to {epochs}, {at_once}", options.space.name)


def run_facts(ready: Ready, wandb: WandbOptions, changes: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """Return what differs in a study's run from now on."""
    options = ready.options.to_dict()
    run = {
        "options": {name: options[name] for name in changes},
        "resources": dataclasses.asdict(ready.resources),
        "wandb": wandb.remembered(),
    }
    if dataclasses.asdict(ready.settings) != study.spec["levers"]:  # resumed on another device
        run["levers"] = dataclasses.asdict(ready.settings)
    return run


def scheduler_of(ready: Ready, study: Study) -> Scheduler:
    """Return the study's decisions as of the end of its journal; drop checkpoints and logs of no trial."""
    options = ready.options
    assert options.trials is not None
    assert options.pruner is not None
    scheduler = Scheduler(
        suggest=options.suggest,
        asha=Asha(options.rungs, options.eta),
        pruner=options.pruner,
        trials=options.trials,
        fixed=options.fixed_values(),
        final_seeds=options.final_seeds,
        journal=study.journal,
        max_failures=options.max_failures,
        seconds=options.time_budget,
        metric=study.metric,
    )
    try:
        scheduler.replay(study.events)
    except (KeyError, TypeError) as error:  # a journal of the old form has no checksums
        raise ValueError(f"{study.journal.file} does not fit study.json ({error!r}); restore both") from error
    checkpoints = ready.store.names("checkpoints")
    unfinished = {trial.trial_id for trial in scheduler.searched if trial.reports and not trial.status}
    scheduler.without_checkpoint = unfinished - {Path(name).stem for name in checkpoints}
    for name in [*checkpoints, *ready.store.names("logs")]:
        if Path(name).stem not in scheduler.trials:  # its start is lost; another trial will have its number
            ready.store.remove(name)
    return scheduler


def context_of(ready: Ready) -> TrialContext:
    """Return what the study's trials share."""
    for name in ("checkpoints", "best"):
        (ready.folder / name).mkdir(exist_ok=True)
    return TrialContext(
        space=ready.options.space,
        data=ready.data,
        settings=ready.settings,
        data_dir=Path(ready.options.data_dir),
        study_dir=ready.folder,
        store=ready.store,
        threads=ready.resources.threads,
        metric=ready.options.compared,
        leaves_chance_by=ready.options.space.leaves_chance_by,
        gpu_bytes=ready.resources.gpu_bytes,
    )


def _tidy(ready: Ready, metric: Metric, trials: dict[str, TrialRecord]) -> None:
    """Keep the winner's results and drop what only a resume would need."""
    store = ready.store
    store.fetch(store.names("best"), ready.folder)
    best = winner(trials, metric)
    keep_best(ready.folder, [trial for trial in trials.values() if best and trial.is_seed_of(best)])
    for name in ("checkpoints", "ray"):
        shutil.rmtree(ready.folder / name, ignore_errors=True)
    for folder in ("best", "checkpoints", "ray"):
        for name in store.names(folder):
            if not (ready.folder / name).exists():
                store.remove(name)


def keep_best(folder: Path, seeds: list[TrialRecord]) -> None:
    """Fill best/ from the winner's first finished seed.

    config.json, model.pt, predictions.parquet, misclassified.npz and first_layer.npy: the
    first layer's weights ``(out, in, k, k)`` or ``(out, in)``, of the head
    where the backbone is frozen, whose own first layer was not trained.
    """
    done = [trial for trial in seeds if trial.status == "done"]
    if not done:
        return
    best = folder / "best"
    for name in result_files():
        file = best / name
        of_seed = file.with_stem(f"{file.stem}-{done[0].trial_id}")
        if of_seed.exists():
            of_seed.replace(file)
        for others in best.glob(f"{file.stem}-*{file.suffix}"):
            others.unlink()
    _write_first_layer(best)
    (best / "config.json").write_text(json.dumps(done[0].config, indent=2) + "\n")  # last: it names the rest


def _write_first_layer(best: Path) -> None:
    """Write first_layer.npy; a damaged model.pt is removed, with a line that says so."""
    file = best / MODEL_FILE
    if not file.exists():  # an earlier version tested the seed
        return
    try:
        saved = read_checkpoint(file)
    except DamagedCheckpointError as error:
        file.unlink()
        print(f"best/ has no {MODEL_FILE}: {error}; test accuracies and predictions are whole")
        return
    trained = [
        tensor
        for name, tensor in saved.get("network", {}).items()  # of a training of its own, none that we know
        if isinstance(tensor, torch.Tensor) and not (saved["frozen"] and name.startswith("backbone."))
    ]
    if first := [tensor for tensor in trained if tensor.dim() >= 2]:
        np.save(best / "first_layer.npy", first[0].float().numpy())


def _end_early(
    ready: Ready, study: OpenStudy, session: Session, mirror: Mirror, live_upload: LiveUpload, reason: str
) -> int:
    """Leave a study so that it can be resumed, and print how; return the exit code."""
    if not study.end("stopped"):
        mirror.release()
        return tell_stopped(ready.folder, session, reason)  # its URL may not have it yet
    left = mirror.finish(STOP_SECONDS)
    tell_stopped(ready.folder if left and not mirror.lost else ready.location, session, reason)
    say(live_upload.end(STOP_SECONDS), session.console)
    say(left, session.console)
    return 3


def tell_stopped(location: Path | str, session: Session, reason: str) -> int:
    """Print that a study has stopped and how to resume it; return the exit code."""
    resume_by = shell(*session.resume, shown(session.location or location))
    if reason:
        print(f"error: {printable(reason)}; fix the cause, then resume with: {resume_by}", file=sys.stderr)
    else:
        print(f"\nstopped; nothing is lost. To resume: {resume_by}", file=sys.stderr)
    return 3
