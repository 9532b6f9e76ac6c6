"""How does a Ray worker run a trial? One epoch per step(), a checkpoint before each report.

The worker outlives its trials (``reuse_actors``): torch is imported, the device initialised and the
data opened once per worker. A promotion is a new Tune trial that continues from the checkpoint of the
old one, so a trial of ours may be several of Tune's (search/scheduler.py says why).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from tunefleet.files import is_full
from tunefleet.host import oom_kills
from tunefleet.metric import ACCURACY, Metric
from tunefleet.models.space import Space
from tunefleet.printed import Printed
from tunefleet.store import Store, StoreError
from tunefleet.trainables import device
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.evaluate import evaluate_test, model_file, result_files
from tunefleet.trainables.graph import CaptureError
from tunefleet.trainables.group import Group
from tunefleet.trainables.own import OwnRun
from tunefleet.trainables.training import ALONE, DamagedCheckpointError, TrainingRun


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a study share; none of it changes a result but data and device settings."""

    space: Space
    data: ImageData | None  # None: the space's runs have their own
    settings: DeviceSettings
    data_dir: Path
    study_dir: Path  # the driver's
    store: Store  # what the study's nodes share
    threads: int  # of the CPU, per trial
    leaves_chance_by: int | None
    metric: Metric = ACCURACY
    gpu_bytes: int | None = None  # of a GPU that several trials share: what one may take; None: all


def checkpoint_name(trial_id: str) -> str:
    """Return where in a study a trial's checkpoint lies."""
    return f"checkpoints/{trial_id}.pt"


class JobRun:
    """A job at work: ``{"trial_id", "config", "reported", "final", "eager"}``.

    ``reported`` is the number of epochs whose reports have reached the study already; ``final`` says
    that the trial ends with the test split, ``eager`` that its steps are not to be captured.
    """

    def __init__(self, job: dict[str, Any], context: TrialContext, group: Group = ALONE) -> None:
        self.job, self.context, self.group = job, context, group
        self.announced = False  # that the test split comes next
        self.run, checkpoint = self._new_run(), context.store.read(checkpoint_name(job["trial_id"]))
        if checkpoint is not None:
            try:
                self.run.load(io.BytesIO(checkpoint))
            except DamagedCheckpointError:
                self.run = self._new_run()
        # Of a missing, damaged or older one the same seed trains the same epochs again.
        self.reported: int = min(job["reported"], self.run.epochs_done)

    def report(self) -> dict[str, Any]:
        """Train an epoch, unless one waits to be reported, and return its report.

        Before the test split is evaluated, which may take minutes, comes ``{"phase": "testing"}``.
        """
        run, trial_id, context = self.run, self.job["trial_id"], self.context
        # A kill after a checkpoint leaves reports to deliver, not epochs to repeat: one of a plain trial,
        # more of a group, whose reports wait for Train to collect them.
        if run.epochs_done <= self.reported:
            ends = self._ends(run.epoch())
            if self.group.rank == 0 and (self.job["final"] or not ends):  # nobody reads the others' last
                checkpoint = io.BytesIO()
                run.save(checkpoint)
                context.store.write(checkpoint.getbuffer(), checkpoint_name(trial_id))
        report = run.reports[self.reported] | whereabouts(context)
        ends = self._ends(report)
        if ends and self.job["final"] and not self.announced:
            self.announced = True
            return {"phase": "testing"} | whereabouts(context)
        self.reported += 1
        if ends:
            report["status"] = "diverged" if report["diverged"] else "done"
            if self.job["final"] and self.group.rank == 0:  # diverged, too: a mean without it would flatter
                report |= self._test()
        return report

    def _test(self) -> dict[str, Any]:
        """Return what the trained run gives on the test split, and whether it has one; keep its state."""
        tag = f"-{self.job['trial_id']}"
        if isinstance(self.run, OwnRun):
            found, stream = self.run.test(), io.BytesIO()
            torch.save(self.run.trained_state(), stream)
            self.context.store.write(stream.getbuffer(), f"best/{model_file(tag)}")
            return {"tested": bool(found), **found}
        with tempfile.TemporaryDirectory() as folder:
            found = evaluate_test(self.run, Path(folder), tag)
            for name in result_files(tag):
                self.context.store.write(Path(folder, name).read_bytes(), f"best/{name}")
        return found

    def _ends(self, report: dict[str, Any]) -> bool:
        """Return whether a report is the trial's last."""
        return bool(report["diverged"]) or report["epoch"] == self.job["config"]["epochs"]

    def _new_run(self) -> TrainingRun | OwnRun:
        context, space, values = self.context, self.context.space, self.job["config"]
        if not space.trains_images:
            device_name = context.settings.device
            offered = {"device": device_name, "threads": context.threads, "data_dir": context.data_dir}
            return OwnRun(space, values, context.metric, offered)
        settings = context.settings
        if self.job["eager"]:
            settings = dataclasses.replace(settings, cuda_graph=False)
        kind = space.run or TrainingRun
        assert context.data is not None
        run: TrainingRun = kind(
            space.config(values),
            context.data,
            settings,
            context.data_dir,
            context.leaves_chance_by,
            self.group,
        )
        return run


def set_up_worker(context: TrialContext) -> None:
    """Divide this process's node and GPU as planned."""
    torch.set_num_threads(context.threads)  # Ray sets OMP_NUM_THREADS=1 for 0 to 1 CPUs (2.60)
    if context.settings.device == "cuda":
        device.gpu_id()
        if context.gpu_bytes is not None:
            device.limit_memory(context.gpu_bytes)


def failure_report(
    error: Exception, job: dict[str, Any], context: TrialContext, printed: Printed
) -> dict[str, Any]:
    """Return the report of a trial that ends by an exception; it names the trial's log, where there is one.

    Raises:
        BrokenGpuError: The exception has left this process's GPU unusable. The trial is not at its end: it
            continues with another worker.
        CaptureError: Likewise, and eagerly.
        OSError: The disk is full, or the store out of reach, which is no trial's fault.
    """
    if is_full(error) or isinstance(error, StoreError | CaptureError):
        raise error
    if device.is_out_of_memory(error):
        report = {"status": "out_of_memory", "error": _memory_line(error, job, context)}
    elif context.settings.device == "cuda" and not device.is_usable():
        reason = str(error).partition("\n")[0]
        raise device.BrokenGpuError(
            f"{device.gpu_id()} cannot be used any more by this process ({reason})"
        ) from error
    else:
        report = {"status": "error", "error": "".join(traceback.format_exception(error))}
    if log := printed.save(context.store, job["trial_id"]):  # first: a study compares the last lines
        report["error"] = f"what it printed is in {log}\n{report['error']}"
    return report | whereabouts(context)


def _memory_line(error: Exception, job: dict[str, Any], context: TrialContext) -> str:
    """Return the error of a trial that ran out of memory: what it used, the limit, and options to change."""
    names = ("batch_size", *context.space.arguments, "image_size")
    sizes = {name: job["config"].get(name) for name in names}
    which = ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)
    reason = str(error).partition(" If reserved but")[0].partition("\n")[0]
    if context.settings.device != "cuda":
        remedy = "give fewer trials at once by --concurrency, or --fix smaller values"
        return f"out of memory with {which} ({reason}); {remedy}"
    total = torch.cuda.get_device_properties(0).total_memory
    limit = total if context.gpu_bytes is None else context.gpu_bytes
    held = torch.cuda.max_memory_allocated()
    return (
        f"out of memory with {which}: it held {held / 1e9:.1f} GB of the {limit / 1e9:.1f} GB that a trial "
        f"may take of the GPU's {total / 1e9:.1f} and asked for more ({reason}); give a larger "
        "--gpus-per-trial, or --fix smaller values"
    )


def whereabouts(context: TrialContext) -> dict[str, Any]:
    """Return the process, node and GPU that a report comes from."""
    location = {"pid": os.getpid(), "node": socket.gethostname()}
    return location | ({"gpu": device.gpu_id()} if context.settings.device == "cuda" else {})


def worker_location() -> dict[str, Any]:
    """Return Ray's ids of this process, its node, and how many processes the node killed for lack of memory.

    A job's first result, before anything can go wrong.
    """
    if not ray.is_initialized():
        return {}
    worker = ray.get_runtime_context()
    return {
        "node_id": worker.get_node_id(),
        "worker_id": worker.get_worker_id(),
        "actor_id": worker.get_actor_id(),
        "pid": os.getpid(),
        "oom_kills": oom_kills(),
    }


class Trial(tune.Trainable):
    """Runs jobs one after another, each on one worker."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.printed = Printed()
        with self.printed.recording():  # the context is unpickled, which imports the person's code
            super().__init__(*arguments, **keywords)

    def setup(self, config: dict[str, Any], context: TrialContext | None = None) -> None:
        """Start or resumes the job; Tune calls it once per worker."""
        assert context is not None
        self.context = context
        set_up_worker(context)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start or resume the next job on this worker."""
        self.job = new_config
        self.located = False  # whether the study knows where the job is
        self.run: JobRun | None = None  # built in step(), where its failure is the trial's result
        if self.context.settings.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return True

    def step(self) -> dict[str, Any]:
        """Return where the job runs, then the report of one epoch; a failure of the trial is a report too."""
        if self.job["trial_id"] is None:  # there is no job for this worker yet
            time.sleep(0.05)
            return {"waiting": True}
        if not self.located:
            self.located = True
            gpu_id = {"gpu": device.gpu_id()} if self.context.settings.device == "cuda" else {}
            return {"location": json.dumps(worker_location() | gpu_id)}
        failed = False
        try:
            with self.printed.recording():
                self.run = self.run or JobRun(self.job, self.context)
                report = self.run.report()
        except Exception as error:  # noqa: BLE001  one trial's bug must not end the study; it is recorded
            report, failed = failure_report(error, self.job, self.context, self.printed), True
        finally:
            if self.printed.text:
                self.printed.save(self.context.store, self.job["trial_id"])
        if failed:
            self.run = None
            device.free_memory()
        # As text: Tune (2.60) keeps statistics of every number, 50 kB a trial. Without Tune's "done",
        # with which the result would not reach the study's scheduler.
        return {"report": json.dumps(report)}
