"""How do a study's decisions reach Ray Tune? One job is one Tune trial on a reused worker.

Tune does what it is good at: starting workers, placing them on CPUs, GPUs and nodes, noticing when one
is lost. It is told what to do by two thin adapters around ``Jobs``. Two traps of Ray 2.60 stand
behind their form (NOTES.md, "Workers"):

- With ``reuse_actors`` Tune gives a just-freed worker to a pending trial whose own worker is still
  starting, and kills that one: short trials then all run on one worker. So each trial is offered
  once, and the searcher offers another as soon as a worker is free.
- A custom searcher gets one pending trial, so workers start one after another, unless
  ``TUNE_MAX_PENDING_TRIALS_PG`` says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune import tune as tune_run
from ray.tune.execution import tune_controller
from ray.tune.execution.class_cache import _ActorClassCache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tunefleet.search.bad_nodes import BadNodes, GpuLosses
from tunefleet.search.connection import TRIAL_SLOT
from tunefleet.search.faults import cause_of, gpu_named, told
from tunefleet.search.jobs import Jobs
from tunefleet.search.local_ray import is_local
from tunefleet.search.resources import Resources
from tunefleet.trainables.ddp import drive
from tunefleet.trainables.host import oom_kills
from tunefleet.trainables.trial import Trial, TrialContext


class JobSearcher(Searcher):
    """Asks for a job whenever a slot is free, and never for more."""

    def __init__(self, jobs: Jobs, slots: int) -> None:
        super().__init__()
        self.jobs, self.slots = jobs, slots
        self.live: dict[str, str] = {}  # pending or running: Tune's trial id -> ours

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Returns the next job as Tune's config; None: not now."""
        if len(self.live) >= self.slots:
            return None
        job = self.jobs.next_job()
        if job is None:
            return Searcher.FINISHED if self.jobs.finished else None  # type: ignore[return-value]  # a str, says Ray
        self.live[trial_id] = job.trial_id
        return dataclasses.asdict(job)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Frees the slot; what follows from an error was decided in ``JobScheduler.on_trial_error``."""
        self.live.pop(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Writes nothing: reports.jsonl is what a study resumes from."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Is never called."""
        raise NotImplementedError("studies resume from reports.jsonl")


class JobScheduler(FIFOScheduler):
    """Hands reports to the study and stops a trial where the study says so.

    Args:
        jobs: The study's decisions.
        nodes: Which nodes fail whatever they get; None: where trials run is not Tune's to say.
        share: A trial's resources, for the placement of trials that avoid a node.
    """

    def __init__(self, jobs: Jobs, nodes: BadNodes | None, share: dict[str, float]) -> None:
        super().__init__()
        self.jobs, self.nodes, self.share = jobs, nodes, share
        self.gpus = GpuLosses()
        self._kills = oom_kills()  # by the kernel, for want of memory; of this host
        self._gpu_of: dict[str, str] = {}  # a worker's GPU, as its reports name it
        self._not_offered: deque[TuneTrial] = deque()

    def on_trial_add(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        """Queues a new trial."""
        if self.nodes and (avoided := self.nodes.avoided()):
            elsewhere = [{"ray.io/node-id": f"!in({','.join(sorted(avoided))})"}]
            trial.update_resources(tune.PlacementGroupFactory([self.share], bundle_label_selector=elsewhere))
        self._not_offered.append(trial)

    def choose_trial_to_run(self, tune_controller: TuneController) -> TuneTrial | None:
        """Offers each trial once."""
        return self._not_offered.popleft() if self._not_offered else None

    def on_trial_result(
        self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        """Records the report; STOP ends the job, be it paused, pruned or done."""
        report = json.loads(result["report"])
        self._tell_of(result.get("node_id"), failed=report.get("status") == "error")
        if "gpu" in report:
            self._gpu_of[_worker_of(trial)] = report["gpu"]
            self.gpus.succeed(report["gpu"])
        goes_on = self.jobs.report(trial.config["trial_id"], report)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        """Tells the study that a worker is gone, which then makes another job of its trial."""
        error = _error_of(trial)
        cause = cause_of(error)
        if cause == "worker" and is_local() and oom_kills() > self._kills:  # Ray was not the one to kill it
            cause, self._kills = "memory", oom_kills()
        if cause == "worker":
            self._tell_of(_node_of(trial), failed=True)
        gpu = gpu_named(error) or self._gpu_of.pop(_worker_of(trial), None)
        if gpu and cause in ("gpu", "worker"):
            cause, note = self.gpus.lose(gpu, cause)
            self.jobs.notes.extend([note] if note else [])
        self.jobs.lose(trial.config["trial_id"], cause, told(error), gpu)

    def _tell_of(self, node_id: str | None, failed: bool) -> None:
        if self.nodes and node_id:
            self.nodes.tell(node_id, failed)
            self.jobs.avoided = self.nodes.avoided()


def _worker_of(trial: TuneTrial) -> str:
    """Returns what names the worker that a trial is on; nothing where it has none yet."""
    actor = trial.temporary_state.ray_actor
    return actor._actor_id.hex() if actor else ""


def _node_of(trial: TuneTrial) -> str | None:
    """Returns the id of the node that a trial's worker was on; None: it had none yet."""
    actor = trial.temporary_state.ray_actor
    found = ray._private.state.actors(actor._actor_id.hex()) if actor else {}
    return found.get("Address", {}).get("NodeID") or None


def _error_of(trial: TuneTrial) -> Exception:
    """Returns what ended a trial; Tune (2.60) has it in files of this node, its getters look elsewhere."""
    if trial.pickled_error_file:
        error: Exception = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        return error
    return RuntimeError(Path(trial.error_file).read_text() if trial.error_file else "Tune says nothing of it")


class ActorManager(RayActorManager):
    """Takes a worker that Ray ended for want of memory as lost; of Ray's own (2.60) the whole run dies."""

    def _actor_task_failed(self, tracked_actor_task: TrackedActorTask, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        super()._actor_task_failed(tracked_actor_task, exception)


class ActorClasses(_ActorClassCache):
    """Leaves out Tune's runtime environment in a Ray of our own, whose workers have the driver's variables.

    With one, no worker that Ray has started before is taken for a trial (2.60).
    """

    def get(self, trainable_cls: type) -> Any:
        """Returns the actor class of a trainable."""
        if is_local() and trainable_cls not in self._cache:
            self._cache[trainable_cls] = ray.remote(trainable_cls)
        return super().get(trainable_cls)


class Controller(TuneController):
    """Forgets trials that have ended; Ray's own (2.60) keeps them all, and goes over them."""

    def on_step_end(self) -> None:
        """Forgets all that have ended but the newest: without any, Tune reads its own files at the end."""
        super().on_step_end()
        for trial in [trial for trial in self._trials[:-1] if trial.is_finished()]:
            self._trials.remove(trial)
            self._live_trials.discard(trial)  # Tune leaves those with an error there
            self._stopped_trials.discard(trial)
            self._failed_trials.discard(trial)
            self._trials_to_cache.discard(trial)
            self._trial_metadata.pop(trial.trial_id, None)


class StepCallback(TrialProgressCallback):
    """Calls a function at each turn of Tune's loop, about ten times a second or more.

    It stands in for Tune's own report of progress (2.60), which keeps every trial and its last result.
    """

    def __init__(self, on_step: Any) -> None:
        super().__init__()
        self.on_step = on_step

    def log_result(self, trial: TuneTrial, result: dict[str, Any], error: bool = False) -> None:
        """Prints nothing, and keeps nothing."""

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Prints nothing, and keeps nothing."""

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Passes the turn on."""
        self.on_step()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks; a live display cannot be


def run_jobs(jobs: Jobs, context: TrialContext, *, resources: Resources, on_step: Any) -> None:
    """Runs all jobs of a study on the connected Ray cluster; returns when none is left.

    Args:
        jobs: The study's decisions.
        context: What its trials share.
        resources: How many trials run at once, and what each gets.
        on_step: Called without arguments at each turn of the loop.
    """
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(resources.slots)
    tune_controller.RayActorManager = ActorManager  # type: ignore[misc]
    tune_controller._ActorClassCache = ActorClasses  # type: ignore[misc]
    tune_run.TuneController = Controller  # type: ignore[misc]
    if resources.workers == 1:
        trainable = tune.with_resources(tune.with_parameters(Trial, context=context), resources.of_trial)
    else:
        group = tune.with_parameters(
            drive, context=context, workers=resources.workers, resources=resources.of_worker
        )
        trainable = tune.with_resources(group, {TRIAL_SLOT: 1})
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=JobSearcher(jobs, resources.slots),
            scheduler=JobScheduler(jobs, BadNodes() if resources.workers == 1 else None, resources.of_worker),
            num_samples=-1,  # until the searcher says FINISHED
            reuse_actors=resources.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(context.study_dir),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),  # a lost trial is another job: Jobs.lose
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their own
            callbacks=[StepCallback(on_step)],
        ),
    )
    try:
        tuner.fit()
    except Exception:  # at the end Tune asks workers that may be gone, and reads what it could not write
        if not (jobs.gave_up or jobs.finished):
            raise
