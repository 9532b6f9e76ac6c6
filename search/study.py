"""How does a study live? Created in a folder of its own, run, stopped, resumed, finished.

Everything a study needs to go on stands in its folder: ``study.json`` (what was asked for and what
was chosen) and ``reports.jsonl`` (what happened). README.md, "A study folder", lists the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from search.asha import PRUNERS, Asha, rung_epochs
from search.collect import collect, read_study, write_study
from search.final import keep_best
from search.jobs import Jobs
from search.journal import Journal
from search.spaces import find_space, fixed_values
from search.suggest import SEARCHERS, PointSampler, Sampler, make_sampler
from trainables.config import check_integer, check_name, check_number
from trainables.data import DATA_DIR, ImageData
from trainables.inputs import Inputs
from trainables.levers import Levers
from trainables.trial import TrialContext

NOT_TO_FIX = {
    "architecture": "give --space",
    "refit": "the winner's seeds have it, and no trial",
    **{name: f"give --{name.replace('_', '-')}" for name in ("epochs", "image_size", "weights", "seed")},
}
PACKAGES = ("torch", "torchvision", "ray", "hyperopt", "numpy")  # a result may depend on these


@dataclass(frozen=True)
class StudyOptions:
    """What a person may ask of a study; the names are the flags of search/run.py.

    Fields marked *resume* may be changed when a study goes on: none of them changes a result.

    Raises:
        ValueError: A value is impossible.
    """

    space: str
    data: str = "cifar10"
    image_size: int = 32
    weights: str = "imagenet"  # of ResNet backbones
    trials: int | None = None  # None: the space's
    epochs: int | None = None  # None: the space's
    grace: int = 1
    eta: int = 3
    pruner: str | None = None  # None: promote, or stop where a trial has several workers
    searcher: str = "tpe"
    seed: int = 0
    final_seeds: int = 3
    device: str = "auto"
    precision: str = "auto"
    data_dir: str = str(DATA_DIR)  # resume
    concurrency: int | None = None  # resume; None: as many as CPUs or GPUs allow
    cpus_per_trial: float | None = None  # resume; None: 1, or a GPU's share of the CPUs
    gpus_per_trial: float | None = None  # resume; None: the space's where there are GPUs
    workers_per_trial: int | None = None  # None: the space's where there are as many GPUs, else 1
    max_failures: int = 3  # resume; lost workers per trial
    time_budget: float | None = None  # resume; seconds of search, None: no limit
    fix: dict[str, Any] | None = None  # config values that every trial has, instead of sampled ones
    points: list[dict[str, Any]] | None = None  # run these instead of sampling: config values per trial

    def __post_init__(self) -> None:
        space = find_space(self.space)
        if self.points:
            object.__setattr__(self, "trials", len(self.points))
        if self.trials is None:
            object.__setattr__(self, "trials", space.trials)
        if self.epochs is None:
            object.__setattr__(self, "epochs", space.epochs)
        if self.pruner is not None:
            check_name("--pruner", self.pruner, PRUNERS)
        if self.workers_per_trial is not None:
            check_integer("--workers-per-trial", self.workers_per_trial, 1)
        check_name("--searcher", self.searcher, SEARCHERS)
        for name, lowest in (
            ("trials", 1),
            ("epochs", 1),
            ("image_size", 1),
            ("seed", 0),
            ("final_seeds", 0),
        ):
            check_integer(flag(name), getattr(self, name), lowest)
        check_integer("--max-failures", self.max_failures, 0)
        if self.concurrency is not None:
            check_integer("--concurrency", self.concurrency, 1)
        for name in ("cpus_per_trial", "time_budget"):
            if getattr(self, name) is not None:
                check_number(flag(name), getattr(self, name), 0, float("inf"), low_allowed=False)
        if self.gpus_per_trial is not None:
            check_number("--gpus-per-trial", self.gpus_per_trial, 0, float("inf"))
        _ = self.rungs
        self._check_fix()

    def _check_fix(self) -> None:
        for name in self.fix or {}:
            if name in NOT_TO_FIX:
                raise ValueError(f"--fix {name} is not possible; {NOT_TO_FIX[name]}")
        self.fixed_values()

    @property
    def rungs(self) -> tuple[int, ...]:
        """Returns the epochs at which trials are compared; none without a pruner."""
        assert self.epochs is not None
        rungs = rung_epochs(self.grace, self.eta, self.epochs)
        return () if self.pruner == "none" else rungs

    def fixed_values(self) -> dict[str, Any]:
        """Returns every config value that is not sampled."""
        assert self.epochs is not None
        return fixed_values(
            self.space,
            epochs=self.epochs,
            image_size=self.image_size,
            weights=self.weights,
            seed=self.seed,
            fix=self.fix,
        )

    def sampler(self) -> Sampler:
        """Returns where the study's trials come from, at its beginning."""
        if self.points:
            return PointSampler(self.points)
        space = find_space(self.space, self.fix)
        if not space.ranges:  # all is fixed: one trial
            return PointSampler([{}])
        return make_sampler(self.searcher, space.ranges, dict(space.published), self.seed)


RESUMABLE = ("data_dir", "concurrency", "cpus_per_trial", "gpus_per_trial", "max_failures", "time_budget")


def flag(name: str) -> str:
    """Returns a field's flag: ``final_seeds`` -> ``--final-seeds``."""
    return f"--{name.replace('_', '-')}"


@dataclass
class Study:
    """One study and its folder."""

    folder: Path
    options: StudyOptions
    data: ImageData
    levers: Levers

    @classmethod
    def create(
        cls, folder: Path, options: StudyOptions, data: ImageData, levers: Levers, inputs: Inputs
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
                "data": dataclasses.asdict(data),
                "data_sha256": data.sha256,
                "split_sha256": inputs.split_sha256,
                "train_count": len(inputs.train_y),
                "validation_count": len(inputs.val_y),
                "levers": levers.to_dict(),
                "seed": options.seed,
                "commit": commit(),
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
                | {"python": platform.python_version()},
                "machine": machine_name(),
                "command": shlex.join(sys.argv),
                "started_at": time.time(),
                "seconds": 0.0,
            },
        )
        return study

    @classmethod
    def open(cls, folder: Path, changes: dict[str, Any]) -> Study:
        """Opens a study to go on with it, in the way it was chosen to run.

        Args:
            folder: The study's.
            changes: New values of options in RESUMABLE.

        Raises:
            ValueError: No study, a finished one, or a change of what makes its results.
        """
        folder = Path(folder).resolve()
        content = read_study(folder)
        fixed = [flag(name) for name in changes if name not in RESUMABLE]
        if fixed:
            allowed = ", ".join(flag(name) for name in RESUMABLE)
            raise ValueError(f"{', '.join(fixed)} cannot change when a study is resumed; what can: {allowed}")
        if content["status"] == "done":
            raise ValueError(f"{folder} is done; there is nothing to resume")
        options = StudyOptions(**(content["options"] | changes))
        data = ImageData.from_dict(content["data"])
        return cls(folder, options, data, Levers(**content["levers"]))

    def jobs(self) -> Jobs:
        """Returns the study's decisions, standing where its journal ends."""
        options = self.options
        assert options.trials is not None
        assert options.pruner is not None
        journal = Journal(self.folder / "reports.jsonl")
        events = journal.read()
        journal.mend()
        jobs = Jobs(
            sampler=options.sampler(),
            asha=Asha(options.rungs, options.eta),
            pruner=options.pruner,
            trials=options.trials,
            fixed=options.fixed_values(),
            final_seeds=options.final_seeds,
            journal=journal,
            seconds=options.time_budget,
        )
        jobs.replay(events)
        return jobs

    def context(self, threads: int) -> TrialContext:
        """Returns what the study's trials share."""
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        (self.folder / "best").mkdir(exist_ok=True)
        return TrialContext(
            data=self.data,
            levers=self.levers,
            data_dir=Path(self.options.data_dir),
            study_dir=self.folder,
            threads=threads,
            leaves_chance_by=find_space(self.options.space).leaves_chance_by,
        )

    @contextlib.contextmanager
    def running(self, resources: dict[str, Any]) -> Iterator[None]:
        """Holds the study's lock, keeps its status and seconds, and collects it however it ends.

        Raises:
            ValueError: Another process runs the study.
        """
        lock = FileLock(self.folder / ".lock")  # the system frees it when the process dies
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process is running {self.folder}; wait for it or stop it") from None
        content = read_study(self.folder)
        began, before = time.time(), content["seconds"]
        write_study(self.folder, content | {"status": "running", "resources": resources})
        status = "stopped"
        try:
            yield
            status = "done"
        finally:
            content = read_study(self.folder)
            seconds = round(before + time.time() - began, 3)
            write_study(self.folder, content | {"status": status, "seconds": seconds})
            collect(self.folder)
            lock.release()

    def tidy(self, jobs: Jobs) -> None:
        """Keeps the winner's results and drops what only a resume would need."""
        keep_best(self.folder, jobs.trials)
        for name in ("checkpoints", "ray"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raises ValueError where a new study's folder holds something already."""
    if (folder / "study.json").exists():
        raise ValueError(
            f"--study-dir={folder} holds another study; give a new folder, or go on with --resume {folder}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--study-dir={folder} is no empty folder; give a new one")


def commit() -> str | None:
    """Returns the commit of this code, with -dirty where files differ; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def machine_name() -> str:
    """Returns what a study's times are to be read with: its GPUs, or its CPUs."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    names = re.findall(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return f"{cpu_count()} CPUs, {names[0] if names else platform.processor() or platform.machine()}"


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def default_folder(space: str, data: str) -> Path:
    """Returns a new folder's name under studies/: space, data and time."""
    name = f"{space}-{Path(data).name.split('.')[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, again = Path("studies") / name, 2
    while folder.exists():
        folder, again = Path("studies") / f"{name}-{again}", again + 1
    return folder


def cpu_count() -> int:
    """Returns the CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
