"""How do several workers train one trial? A Ray Train group inside a Tune trial, DDP inside the group.

The Tune trial is a driver that takes a ``trial_slot`` and no CPU; the group's workers take the CPUs
and GPUs. There are as many slots as groups fit, so drivers can never fill a cluster on which their
workers then find no place. Rank 0 writes the checkpoint before each report, as trainables/trial.py
does, so a trial may continue with one worker or with several. A group costs nine processes and 20
seconds to start (Ray 2.60): a trial of one worker is never made of it.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import torch
import torch.distributed as dist
from ray import train, tune
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback

from tunefleet.printed import Printed
from tunefleet.trainables.group import Group
from tunefleet.trainables.trial import (
    JobRun,
    TrialContext,
    failure_report,
    set_up_worker,
    worker_location,
)

CONTROLLER_FAILURES = 3  # Ray's default is to try for ever


def drive(job: dict[str, Any], *, context: TrialContext, workers: int, resources: dict[str, float]) -> None:
    """Run a job on a group of workers; a Tune trial.

    Args:
        job: As ``Trial`` takes it.
        context: What the study's trials share.
        workers: Of the group.
        resources: Of one worker, ``{"CPU", "GPU"}``.

    Raises:
        TrainingFailedError: A worker was lost. The study continues the trial with another group.
    """
    tune.report({"location": json.dumps(worker_location())})
    own_fault = _failure_name(job["trial_id"])
    context.store.remove(own_fault)  # of an earlier attempt
    trainer = TorchTrainer(
        _train,
        train_loop_config={"job": job, "context": context},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"{job['trial_id']}-{uuid.uuid4().hex}",  # Train would resume an equal name
            storage_path=f"{context.store.location}/ray/groups",
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]  # Ray 2.60 types the old API
            failure_config=FailureConfig(  # type: ignore[call-arg]  # the same
                max_failures=0, controller_failure_limit=CONTROLLER_FAILURES
            ),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        report = context.store.read(own_fault)
        if report is None:
            raise
        tune.report({"report": report.decode()})


def _train(arguments: dict[str, Any]) -> None:
    """Train as one worker of a group; rank 0's reports reach Tune, and what it prints is logged."""
    job, context = arguments["job"], arguments["context"]
    if context.settings.device == "cuda":
        torch.cuda.set_device(get_device())
    set_up_worker(context)
    group, printed = Group.current(), Printed()
    try:
        with printed.recording():
            run = JobRun(job, context, group)
        while True:
            with printed.recording():
                report = run.report()
            if printed.text and group.rank == 0:
                printed.save(context.store, job["trial_id"])
            train.report({"report": json.dumps(report)})
            if "status" in report:
                return
    except Exception as error:
        if not _is_lost_partner(error):
            report = failure_report(error, job, context, printed)  # or it raises what is no trial's fault
            context.store.write(json.dumps(report).encode(), _failure_name(job["trial_id"]))
        raise


def _is_lost_partner(error: Exception) -> bool:
    """Return whether a collective failed because another worker is gone; gloo has no class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _failure_name(trial_id: str) -> str:
    return f"checkpoints/{trial_id}.failure"
