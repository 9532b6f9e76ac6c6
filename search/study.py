"""How does a study live? Created in a folder of its own, run, stopped, resumed, finished.

Everything a study needs to go on stands in its folder: ``study.json`` (what was asked for and what
was chosen) and ``reports.jsonl`` (what happened). README.md, "A study folder", lists the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from tunefleet.files import is_full
from tunefleet.search.asha import Asha
from tunefleet.search.collect import collect
from tunefleet.search.final import keep_best
from tunefleet.search.folders import check_free
from tunefleet.search.jobs import Jobs
from tunefleet.search.journal import Journal
from tunefleet.search.options import StudyOptions
from tunefleet.search.preflight import Prepared
from tunefleet.search.provenance import commit, machine_name, versions
from tunefleet.search.spaces import described, find_space
from tunefleet.search.study_file import lock_of, read_events, read_study, write_study
from tunefleet.store import Store
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.levers import Levers
from tunefleet.trainables.trial import TrialContext, checkpoint_name


@dataclass
class Study:
    """One study and its folder."""

    folder: Path
    options: StudyOptions
    data: ImageData
    levers: Levers
    _lock: FileLock | None = None
    _began: float = 0.0  # seconds since 1970
    _seconds_before: float = 0.0  # of earlier runs
    _ending: threading.Lock = field(default_factory=threading.Lock)

    @property
    def store(self) -> Store:
        """Return what holds the study: its folder, or a URL."""
        return Store.of_study(self.options.storage, self.folder)

    @property
    def place(self) -> Path | str:
        """Returns what names the study on a command line: its folder, or its URL."""
        return self.store.folder or self.store.place

    @classmethod
    def create(
        cls, folder: Path, options: StudyOptions, data: ImageData, levers: Levers, prepared: Prepared
    ) -> Study:
        """Makes a new study's folder and writes its study.json.

        Raises:
            ValueError: The folder holds something already; nothing is written.
        """
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        study = cls(folder.resolve(), options, data, levers)
        write_study(
            study.folder,
            {
                "space": options.space,
                "status": "running",
                "options": dataclasses.asdict(options),
                "rungs": list(options.rungs),
                "ranges": {} if options.points else described(find_space(options.space, options.fix).ranges),
                "data": dataclasses.asdict(data),
                "data_sha256": data.sha256,
                "split_sha256": prepared.split_sha256,
                "train_count": prepared.train_count,
                "validation_count": prepared.validation_count,
                "levers": levers.to_dict(),
                "seed": options.seed,
                "commit": commit(),
                "versions": versions(),
                "machine": machine_name(),
                "command": shlex.join(sys.argv),
                "started_at": time.time(),
                "seconds": 0.0,
            },
        )
        return study

    def jobs(self) -> Jobs:
        """Returns the study's decisions, standing where its journal ends."""
        options = self.options
        assert options.trials is not None
        assert options.pruner is not None
        journal = Journal(self.folder / "reports.jsonl")
        events = read_events(self.folder, read_study(self.folder))
        if torn := journal.mend():
            print(f"{journal.file.name}: dropped its last line, of which only {torn} bytes had been written")
        jobs = Jobs(
            sampler=options.sampler(),
            asha=Asha(options.rungs, options.eta),
            pruner=options.pruner,
            trials=options.trials,
            fixed=options.fixed_values(),
            final_seeds=options.final_seeds,
            journal=journal,
            max_failures=options.max_failures,
            seconds=options.time_budget,
        )
        try:
            jobs.replay(events)
        except (KeyError, TypeError) as error:  # a journal of the old form has no checksums
            raise ValueError(f"{journal.file} does not fit study.json ({error!r}); restore both") from error
        for name in self.store.names("checkpoints"):
            if Path(name).stem not in jobs.trials:  # its start is lost; another trial will have its number
                self.store.remove(name)
        return jobs

    def context(self, threads: int, gpu_bytes: int | None = None) -> TrialContext:
        """Returns what the study's trials share."""
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        (self.folder / "best").mkdir(exist_ok=True)
        return TrialContext(
            data=self.data,
            levers=self.levers,
            data_dir=Path(self.options.data_dir),
            study_dir=self.folder,
            store=self.store,
            threads=threads,
            leaves_chance_by=find_space(self.options.space).leaves_chance_by,
            gpu_bytes=gpu_bytes,
        )

    def begin(self, resources: dict[str, Any]) -> None:
        """Takes the study's lock and writes that it runs.

        Raises:
            ValueError: Another process runs the study.
        """
        self._lock = lock_of(self.folder)
        content = read_study(self.folder)
        self._began, self._seconds_before = time.time(), content["seconds"]
        lasting = {"data": self.options.data, "device": self.options.device}  # of a resume's options
        options = content["options"] | lasting
        content |= {"status": "running", "resources": resources, "options": options}
        if Levers(**content["levers"]) != self.levers:  # resumed on another device
            earlier = [
                *content.get("earlier_levers", []),
                {"until": self._seconds_before, "levers": content["levers"]},
            ]
            content |= {"levers": self.levers.to_dict(), "earlier_levers": earlier}
        write_study(self.folder, content)

    def end(self, status: str) -> None:
        """Writes the study's tables, status and seconds, and frees its lock; only the first call does."""
        with self._ending:
            if self._lock is None:
                return
            try:
                seconds = round(self._seconds_before + time.time() - self._began, 3)
                collect(self.folder, status=status, seconds=seconds)
            except OSError as error:
                if not is_full(error) or status == "done":
                    raise  # else study.json still says running, as after a kill, and a resume counts on
            finally:
                self._lock.release()
                self._lock = None

    @contextlib.contextmanager
    def running(self, resources: dict[str, Any]) -> Iterator[None]:
        """Begins the study, and ends it however what is inside ends."""
        self.begin(resources)
        status = "stopped"
        try:
            yield
            status = "done"
        finally:
            self.end(status)

    def tidy(self, jobs: Jobs) -> None:
        """Keeps the winner's results and drops what only a resume would need."""
        seeds = [checkpoint_name(trial.trial_id) for trial in jobs.trials.values() if trial.is_final]
        self.store.fetch([*seeds, *self.store.names("best")], self.folder)
        keep_best(self.folder, jobs.trials)
        for name in ("checkpoints", "ray"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for folder in ("best", "checkpoints", "ray"):
            for name in self.store.names(folder):
                if not (self.folder / name).exists():
                    self.store.remove(name)
