"""How does a Ray worker run a trial? One epoch per step(), a checkpoint before each report.

The worker outlives its trials (``reuse_actors``): torch is imported, the device initialised and the
data opened once per worker. A promotion is a new Tune trial that goes on from the checkpoint of the
old one, so a trial of ours may be several of Tune's (search/jobs.py says why).
"""

from __future__ import annotations

import os
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from trainables.config import TrainConfig
from trainables.data import ImageData
from trainables.evaluate import evaluate_test
from trainables.levers import Levers
from trainables.training import DamagedCheckpointError, TrainingRun


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a study share; none of it changes a result but data and levers."""

    data: ImageData
    levers: Levers
    data_dir: Path
    study_dir: Path
    threads: int  # of the CPU, per trial
    leaves_chance_by: int | None

    def checkpoint(self, trial_id: str) -> Path:
        """Returns where a trial's checkpoint lies."""
        return self.study_dir / "checkpoints" / f"{trial_id}.pt"


class Trial(tune.Trainable):
    """Runs jobs ``{"trial_id", "config", "reported", "final"}`` one after another.

    ``reported`` is the number of epochs whose reports have reached the study already; ``final`` says
    that the trial ends with the test split.
    """

    def setup(self, config: dict[str, Any], context: TrialContext | None = None) -> None:
        """Starts or resumes the job; Tune calls it once per worker."""
        assert context is not None
        self.context = context
        torch.set_num_threads(context.threads)  # Ray sets OMP_NUM_THREADS=1 for 0 to 1 CPUs (2.60)
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Starts or resumes the next job on this worker."""
        self._start(new_config)
        return True

    def _start(self, job: dict[str, Any]) -> None:
        self.job = job
        self.run: TrainingRun | None = None  # built in step(), where its failure is the trial's result

    def step(self) -> dict[str, Any]:
        """Returns the report of one epoch; a failure of the trial is a report too."""
        try:
            report = self._epoch()
        except torch.OutOfMemoryError:
            report = {"status": "out_of_memory", "error": traceback.format_exc()}
        except Exception:  # noqa: BLE001  A bug in one trial must not end the study; it is recorded whole.
            report = {"status": "error", "error": traceback.format_exc()}
        report |= {"pid": os.getpid(), "node": socket.gethostname()}
        return {"report": report}  # without Tune's "done", which would pass the study's scheduler by

    def _epoch(self) -> dict[str, Any]:
        if self.run is None:
            self.run = self._resumed()
        run, trial_id = self.run, self.job["trial_id"]
        # A kill between the checkpoint and its report leaves a report to deliver, not to repeat.
        if run.epochs_done <= self.job["reported"]:
            run.epoch()
            run.save(self.context.checkpoint(trial_id))
        self.job["reported"] = run.epochs_done
        report = dict(run.report)
        if report["diverged"] or run.epochs_done == run.config.epochs:
            report["status"] = "diverged" if report["diverged"] else "done"
            if self.job["final"]:  # a diverged seed, too: a mean without it would flatter
                folder = self.context.study_dir / "best"
                report["test_accuracy"] = evaluate_test(run, folder / f"predictions-{trial_id}.parquet")
        return report

    def _resumed(self) -> TrainingRun:
        context, config = self.context, TrainConfig.from_dict(self.job["config"])

        def begin() -> TrainingRun:
            return TrainingRun(
                config, context.data, context.levers, context.data_dir, context.leaves_chance_by
            )

        run, checkpoint = begin(), context.checkpoint(self.job["trial_id"])
        if checkpoint.exists():
            try:
                run.load(checkpoint)
            except DamagedCheckpointError:
                run = begin()  # the same seed gives the same epochs again
        return run
