"""Run a study's jobs on Ray Tune: one job is one Tune trial on a reused worker.

Tune starts workers, places them on CPUs, GPUs and nodes, and notices when one is lost. What they do is
decided by ``Scheduler``, to which a searcher and a scheduler pass everything on. Each trial is offered once,
and only while a slot is free (docs/decisions.md). Two more traps of Ray 2.60:

- Of workers without a trial ``reuse_actors`` keeps one and ends the others; a new one takes seconds to start.
  So a worker that is free waits in a trial of Tune's that does nothing, for ``WAIT_MAX`` seconds.
- ``fit()`` keeps every trial and goes over all of them, and it ends where Ray kills a worker for lack of
  memory. So a study is several rounds of ``fit()``; between them there is only what ``Scheduler`` knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ray import cloudpickle, tune
from ray.exceptions import OutOfMemoryError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tunefleet.host import oom_kills
from tunefleet.search.connection import TRIAL_SLOT, is_local
from tunefleet.search.failures import (
    GpuFailures,
    MemoryFailures,
    NodeFailures,
    cause_of,
    gpu_named,
    node_named,
    oom_kills_on,
    text_of,
)
from tunefleet.search.resources import Resources, Slots
from tunefleet.search.scheduler import Job, Scheduler
from tunefleet.trainables.ddp import drive
from tunefleet.trainables.trial import Trial, TrialContext

ROUND = 1000  # jobs of one fit()
START_SECONDS = 3.0  # that a worker takes to start, about
WAIT_MAX = 30.0  # seconds that a worker waits for a job
RECENT = 20  # epochs that must all be shorter than that for a round to end
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")


class Workers:
    """Where each trial is at work, and what its reports and its loss mean. Outlives the rounds.

    ``slots`` returns how many trials may be at work; ``nodes`` excludes nodes that fail (None: none is
    excluded).
    """

    def __init__(self, jobs: Scheduler, slots: Callable[[], int], nodes: NodeFailures | None) -> None:
        self.jobs, self._slots, self.nodes = jobs, slots, nodes
        self.gpus, self.memory = GpuFailures(), MemoryFailures()
        self._kills = {"": oom_kills()}  # by node, "" being this host: kills by the kernel for lack of memory
        self._seconds: deque[float] = deque(maxlen=RECENT)  # of the latest epochs
        self.start_round()

    def start_round(self) -> None:
        """Queue what has not ended: nothing is at work any more."""
        for trial_id in sorted(self.jobs.running):
            self._queue(trial_id)
        self.at_work: set[str] = set()  # pending trials included
        self.locations: dict[str, dict[str, Any]] = {}  # by trial: node_id, worker_id, actor_id, pid, gpu
        self.given, self.round_is_over = 0, False
        self.free = 0  # workers that have just ended a job
        self.waiting: dict[str, float] = {}  # until when, by Tune's id of the trial that waits
        self.reserved: Job | None = None  # for the next of those that stops

    @property
    def is_over(self) -> bool:
        """Return whether this round gets no more jobs."""
        return self.jobs.finished or self.round_is_over

    def next_job(self) -> Job | None:
        """Return what a free slot should do; None: nothing now."""
        job, self.reserved = self.reserved or self._draw_job(), None
        if job:
            self.free -= bool(self.free)
        return job

    def wait(self, tune_id: str) -> bool:
        """Return whether a worker is free and is kept until there is a job."""
        if not self.free:
            return False
        self.free -= 1
        self.given += 1
        self.waiting[tune_id] = time.monotonic() + WAIT_MAX
        return True

    def keep_waiting(self, tune_id: str) -> bool:
        """Return whether there is still no job for a waiting worker."""
        waits_until = self.waiting.pop(tune_id)  # its slot counts as free
        self.reserved = self.reserved or self._draw_job()
        self.free += bool(self.reserved)
        if self.reserved or self.is_over or time.monotonic() > waits_until:
            return False
        self.waiting[tune_id] = waits_until
        return True

    def _draw_job(self) -> Job | None:
        if self.given >= ROUND and all(seconds < START_SECONDS for seconds in self._seconds):
            self.round_is_over = True
        slots = self._slots()
        is_full = len(self.at_work) + len(self.waiting) >= slots
        if self.round_is_over or is_full or (self.memory.suspects and self.at_work):
            return None
        job = self.jobs.next_job()
        if job:
            self.given += 1
            self.memory.start(job.trial_id)
            self.at_work.add(job.trial_id)
        return job

    def locate(self, trial_id: str, location: dict[str, Any]) -> None:
        """Record which worker has a trial."""
        self.locations[trial_id] = location
        self.jobs.starting.discard(trial_id)

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        """Record a report; return whether the worker continues with this trial."""
        location = self.locations.setdefault(trial_id, {})
        self._record_node(location.get("node_id"), failed=report.get("status") == "error")
        if "gpu" in report:
            location["gpu"] = report["gpu"]
            self.gpus.succeed(report["gpu"])
        if not self.jobs.report(trial_id, report):
            self.memory.clear(trial_id)
            return False
        if "phase" in report:
            return True
        self._seconds.append(report.get("epoch_seconds", 0.0))
        if self.memory.has_to_yield(trial_id) or self.round_is_over:
            self._queue(trial_id)
            return False
        return True

    def lose(self, trial_id: str, error: Exception) -> None:
        """Record that a trial's worker is lost."""
        location, cause = self.locations.get(trial_id, {}), cause_of(error)
        if cause == "worker" and self._has_killed(location):
            cause = "memory"
        if cause == "worker":
            self._record_node(location.get("node_id") or node_named(error), failed=True)
        gpu = gpu_named(error) or location.get("gpu")
        if gpu and cause in ("gpu", "worker"):
            cause, note = self.gpus.lose(gpu, cause)
            self.jobs.notes.extend([note] if note else [])
        if cause == "memory":
            cause = self.memory.lose({trial_id, *self._beside(location.get("node_id"))})
        self._lose(trial_id, cause, error, gpu)

    def lose_all(self, error: OutOfMemoryError) -> None:
        """Record that a round has ended because a node ran out of memory."""
        nodes = {location.get("node_id") for location in self.locations.values()}
        named = next((node_id for node_id in nodes if node_id and node_id in str(error)), None)
        lost = sorted(self._beside(named) or self.locations or self.at_work)
        cause = self.memory.lose(lost)
        for trial_id in lost:
            self._lose(trial_id, cause, error)

    def end(self, trial_id: str) -> None:
        """Record that a job has left its slot."""
        self.at_work.discard(trial_id)
        self.locations.pop(trial_id, None)

    def _lose(self, trial_id: str, cause: str, error: Exception, gpu: str | None = None) -> None:
        self.jobs.lose(trial_id, cause, text_of(error), gpu)
        if trial_id not in self.jobs.interrupted:
            self.memory.clear(trial_id)

    def _queue(self, trial_id: str) -> None:
        self.jobs.running.discard(trial_id)
        queue = self.jobs.interrupted
        (queue.appendleft if trial_id in self.memory.suspects else queue.append)(trial_id)

    def _beside(self, node_id: str | None) -> list[str]:
        return [
            trial_id for trial_id, location in self.locations.items() if location.get("node_id") == node_id
        ]

    def _has_killed(self, location: dict[str, Any]) -> bool:
        """Return whether a worker's node has killed a process for lack of memory, which Ray does not say."""
        node_id = "" if is_local() else location.get("node_id")
        now = oom_kills_on(node_id) if node_id else oom_kills()
        if node_id is None or now is None:
            return False
        known = max(location.get("oom_kills", 0), self._kills.get(node_id, 0))
        self._kills[node_id] = now
        return now > known

    def _record_node(self, node_id: str | None, failed: bool) -> None:
        if self.nodes and node_id:
            self.nodes.record(node_id, failed)
            self.jobs.avoided = self.nodes.excluded()


class JobSearcher(Searcher):
    """Ask for a job whenever a slot is free."""

    def __init__(self, workers: Workers, reuses: bool) -> None:
        super().__init__()
        self.workers, self.reuses = workers, reuses
        self.trial_ids: dict[str, str] = {}  # Tune's: ours

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the next job as Tune's config; None: not now."""
        job = self.workers.next_job()
        if job is None and self.workers.is_over:
            return Searcher.FINISHED  # type: ignore[return-value]  # a str, says Ray
        if job is None:
            return {"trial_id": None} if self.reuses and self.workers.wait(trial_id) else None
        self.trial_ids[trial_id] = job.trial_id
        return dataclasses.asdict(job)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Free the slot; what follows from an error was decided in ``TuneScheduler.on_trial_error``."""
        if trial_id not in self.trial_ids:
            self.workers.waiting.pop(trial_id, None)  # where its worker was lost
            return
        self.workers.end(self.trial_ids.pop(trial_id))
        self.workers.free += not error

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: reports.jsonl is what a study resumes from."""
        Path(checkpoint_path).touch()


class TuneScheduler(FIFOScheduler):
    """Pass reports and losses on, and stop a trial when the study does; ``share`` is a trial's resources."""

    def __init__(self, workers: Workers, share: dict[str, float]) -> None:
        super().__init__()
        self.workers, self.share = workers, share
        self._not_offered: deque[TuneTrial] = deque()

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Queue a new trial."""
        nodes = self.workers.nodes
        if nodes and (avoided := nodes.excluded()):
            elsewhere = [{"ray.io/node-id": f"!in({','.join(sorted(avoided))})"}]
            trial.update_resources(tune.PlacementGroupFactory([self.share], bundle_label_selector=elsewhere))
        self._not_offered.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Offer each trial once."""
        return self._not_offered.popleft() if self._not_offered else None

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Record a report; STOP ends the job, whether it is paused, pruned or done."""
        trial_id = trial.config["trial_id"]
        if trial_id is None:
            continues = self.workers.keep_waiting(trial.trial_id)
        elif "location" in result:
            self.workers.locate(trial_id, json.loads(result["location"]))
            continues = True
        else:
            continues = self.workers.report(trial_id, json.loads(result["report"]))
        return TrialScheduler.CONTINUE if continues else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Record that a trial's worker is lost; the study then makes another job of the trial."""
        if trial_id := trial.config["trial_id"]:
            self.workers.lose(trial_id, _error_of(trial))


def _error_of(trial: TuneTrial) -> Exception:
    """Return what ended a trial; Tune (2.60) has it in files of this node, its getters look elsewhere."""
    if trial.pickled_error_file:
        error: Exception = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        return error
    return RuntimeError(Path(trial.error_file).read_text() if trial.error_file else "Tune gives no reason")


class StepCallback(tune.Callback):
    """Call a function at each turn of Tune's loop, about ten times a second or more.

    In the first turn of a round Tune (2.60) copies credentials of object stores from the environment into its
    workers', and Ray's agent writes that to a log that everybody can read. Workers of a Ray of our own have
    the driver's environment anyway, so they are hidden for that turn.
    """

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step = on_step
        self._hidden: dict[str, str] = {}

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Hide credentials from Tune in the first turn."""
        if iteration == 0 and is_local():
            self._hidden = {name: os.environ.pop(name) for name in CREDENTIALS if name in os.environ}

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Pass the turn on."""
        self.restore()
        self.on_step()

    def restore(self) -> None:
        """Put the credentials back."""
        os.environ.update(self._hidden)
        self._hidden = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks; a live display cannot be


class WithoutRaylets:
    """Standard output without the pages that a thread of Ray's prints about each lost worker (2.60).

    What matters of them is in reports.jsonl.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text, unless it is from a thread of Ray's."""
        ours = not threading.current_thread().name.startswith("ray_")
        return self.stream.write(text) if ours else len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_jobs(
    jobs: Scheduler, context: TrialContext, *, resources: Resources, on_step: Callable[[], None]
) -> None:
    """Run all jobs of a study on the connected Ray; return when none is left.

    ``on_step`` is called at each turn of the loop.
    """
    if resources.workers == 1:
        share = tune.PlacementGroupFactory([resources.of_worker])
        trainable = tune.with_resources(tune.with_parameters(Trial, context=context), share)
    else:
        group = tune.with_parameters(
            drive, context=context, workers=resources.workers, resources=resources.of_worker
        )
        trainable = tune.with_resources(group, {TRIAL_SLOT: 1})
    workers = Workers(jobs, Slots(resources), NodeFailures() if resources.workers == 1 else None)
    step = StepCallback(on_step)
    while not (jobs.finished or jobs.gave_up):
        try:
            with contextlib.redirect_stdout(WithoutRaylets(sys.stdout)):
                _round(trainable, workers, resources, context.study_dir, step).fit()
        except (
            Exception
        ) as error:  # at the end Tune asks workers that may be gone, reads what it could not write
            if memory := _out_of_memory(error):
                workers.lose_all(memory)
            elif not (jobs.gave_up or jobs.finished):
                raise
        finally:
            step.restore()
        workers.start_round()


def _round(
    trainable: Any, workers: Workers, resources: Resources, folder: Path, step: StepCallback
) -> tune.Tuner:
    """Return one round of a study as Tune runs it."""
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=JobSearcher(workers, reuses=resources.workers == 1),
            scheduler=TuneScheduler(workers, resources.of_worker),
            num_samples=-1,  # until the searcher says FINISHED
            reuse_actors=resources.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),  # a lost trial is another job: Scheduler.lose
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their own
            callbacks=[step],
        ),
    )


def _out_of_memory(error: BaseException | None) -> OutOfMemoryError | None:
    """Return Ray's error of a killed worker among an exception's causes; Tune (2.60) does not expect it."""
    while error and not isinstance(error, OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OutOfMemoryError) else None
