"""What does a free worker do next? The study's decisions, without Ray.

A *job* is a trial and the epoch it continues from. A free worker asks ``next_job`` and gets, in this order:
a trial that a crash interrupted, the best promotable trial, a new suggestion, and at the end the winner's
fresh seeds; every report comes back through ``report``, which returns whether to continue. This is ASHA's
own formulation (``get_job`` in Li et al. 2020). A paused trial is a checkpoint and nothing else: Tune's PAUSE
is not used (docs/decisions.md), and search/engine.py runs each job as a Tune trial of its own.

All state follows from the journal. ``replay`` feeds an old journal through the same code, so a
resumed study has the same rungs and the same running trials as the killed one.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from tunefleet.files import is_full
from tunefleet.journal import FINAL, Journal, TrialRecord, finite, winner
from tunefleet.metric import ACCURACY, Metric
from tunefleet.search.asha import Asha
from tunefleet.search.suggest import Observation
from tunefleet.store import OUT_OF_REACH

ALIKE = 3  # trials: where the first ones all fail in the same way, the next ones would, too


def failed_alike(trials: Collection[TrialRecord]) -> str:
    """Return why a study ends whose first trials all failed in the same way; nothing where they did not."""
    errors = [trial.error or "" for trial in trials if trial.status == "error"]
    reasons = {error.strip().rpartition("\n")[2] for error in errors}
    if len(errors) < ALIKE or len(reasons) > 1 or any(trial.reports for trial in trials):
        return ""
    return f"the first {len(errors)} trials all failed alike ({reasons.pop()})"


@dataclass(frozen=True)
class Job:
    """A trial to run on a worker, from its checkpoint where it has one."""

    trial_id: str
    config: dict[str, Any]
    reported: int  # epochs whose reports the study has
    final: bool  # ends with the test split
    eager: bool = False  # its steps are not to be captured as a CUDA graph


class Scheduler:
    """The state of one study.

    Args:
        suggest: Returns a new trial's sampled hyperparameters, given its number and what was observed of all
            earlier ones; None where there are no more.
        asha: The rungs.
        pruner: promote, stop or none.
        trials: How many trials the search may start.
        fixed: Config values that are not sampled.
        final_seeds: How many fresh seeds the winner is retrained on.
        max_failures: How often a trial's worker may be lost, lost nodes aside.
        journal: Where every event is written before it acts.
        seconds: Time budget of the search from now; None: no limit. Trials stop at their next report.
        metric: What trials are compared by.
        clock: Seconds, for the budget.
    """

    def __init__(
        self,
        *,
        suggest: Callable[[int, list[Observation]], dict[str, Any] | None],
        asha: Asha,
        pruner: str,
        trials: int,
        fixed: dict[str, Any],
        final_seeds: int,
        journal: Journal,
        max_failures: int,
        seconds: float | None = None,
        metric: Metric = ACCURACY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.suggest, self.asha, self.pruner = suggest, asha, pruner
        self.max_trials, self.fixed, self.final_seeds = trials, fixed, final_seeds
        self.journal, self.clock, self.metric = journal, clock, metric
        self.max_failures = max_failures
        self.losses: defaultdict[str, Counter[str]] = defaultdict(Counter)  # by trial and cause
        self.gave_up = ""  # why the study ends before its time
        self.avoided: frozenset[str] = frozenset()  # ids of nodes that failed whatever they got
        self.eager: set[str] = set()  # trials whose steps could not be captured as a CUDA graph
        self.all_eager = False  # no trial's can be
        self.phases: dict[str, str] = {}  # what trials do that is no epoch
        self.notes: deque[str] = deque()  # lines to print once
        self.best_yet: tuple[float, int, TrialRecord] | None = None  # best value, epoch and trial
        self.deadline = None if seconds is None else clock() + seconds
        self.trials: dict[str, TrialRecord] = {}
        self.searched: list[TrialRecord] = []  # of these, without the winner's seeds
        self.running: set[str] = set()
        self.starting: set[str] = set()  # of these, those that no worker has yet
        self.interrupted: deque[str] = deque()  # at work when the driver died; they go first
        self.without_checkpoint: set[str] = set()  # unfinished, whose epochs are to be trained again
        self.search_is_over = False
        self.finished = False

    def next_job(self) -> Job | None:
        """Return what a free worker should do; None: wait, or all is done (``finished``)."""
        job = None
        if not self.gave_up:
            with self._stopping_where_unwritable():
                job = self._next_job()
        if self.gave_up:
            self.finished = not self.running
        return job

    def _next_job(self) -> Job | None:
        if self.interrupted:
            return self._job(self.interrupted.popleft())
        if not self.search_is_over:
            job = self._next_search_job()
            if job or self.running:
                return job
            self.search_is_over = True
        return self._next_final_job()

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        """Record a worker's report; return whether the worker should continue this trial."""
        trial = self.trials[trial_id]
        self.starting.discard(trial_id)
        if "phase" in report:
            self.phases[trial_id] = report["phase"]
            if self.gave_up:
                self.running.discard(trial_id)
            return not self.gave_up
        if report.get("epoch", trial.epoch + 1) <= trial.epoch:
            return trial.status is None  # a restarted worker repeats what was decided already
        report = {key: finite(value) for key, value in report.items()}  # as a replay will read them
        continues = False
        with self._stopping_where_unwritable():
            self.journal.append({"trial_id": trial_id, **report})
            continues = self._apply(trial, report) and not (self._time_is_up() and not trial.is_final)
            self._consider_giving_up()
        if not continues or self.gave_up:
            self.running.discard(trial_id)
            return False
        return True

    def lose(self, trial_id: str, cause: str, error: str, gpu: str | None = None) -> None:
        """Record a worker lost by a cause of failures.py: requeue the trial, or fail it."""
        if cause == "disk":
            self._stop_as_full(error.strip().rpartition("\n")[2])
        elif cause == "store":
            self.gave_up = error.strip().rpartition("StoreError: ")[2]
        else:
            event = {"trial_id": trial_id, "lost": cause, "error": error} | ({"gpu": gpu} if gpu else {})
            with self._stopping_where_unwritable():
                self.journal.append(event)
        if self.gave_up:
            self.running.discard(trial_id)
            return
        known = self.all_eager  # another worker's step has failed in the same way a moment ago
        self._count_loss(trial_id, cause)
        lost = self.losses[trial_id]
        crashes = lost["worker"] + lost["memory"] + lost["gpu"]
        if cause in ("graph", "graph_memory") and not known:
            who = "all trials train" if self.all_eager else f"trial {trial_id} trains"
            self.notes.append(f"{error.strip().rpartition(chr(10))[2]}; {who} eagerly from now on")
        if lost["memory"] > 1:
            self.report(trial_id, {"status": "out_of_memory", "error": error})
        elif crashes > self.max_failures:
            text = f"its worker was lost {crashes} times, at last: {error}"
            self.report(trial_id, {"status": "error", "error": text})
        else:
            self.running.discard(trial_id)
            self.interrupted.append(trial_id)

    def _count_loss(self, trial_id: str, cause: str) -> None:
        self.losses[trial_id][cause] += 1
        self.all_eager |= cause == "graph"
        if cause == "graph_memory":
            self.eager.add(trial_id)

    def replay(self, events: list[dict[str, Any]]) -> None:
        """Go through an old journal's events as if they happened now, without writing them again."""
        for event in events:
            if "run" in event:
                if "trials" in event["run"].get("options", {}):  # a study that was finished is continued
                    self.search_is_over = False
                continue
            trial_id = event["trial_id"]
            if event.get("epoch") == 0:
                self._start_again(trial_id, event["config"])
            elif "promoted_from" in event:
                self.asha.promote(trial_id, event["promoted_from"])
                self.running.add(trial_id)
            elif "lost" in event:
                self._count_loss(trial_id, event["lost"])
            else:
                trial = self.trials[trial_id]
                if event.get("epoch", trial.epoch + 1) > trial.epoch and not self._apply(trial, event):
                    self.running.discard(trial_id)
        self.interrupted.extend(sorted(self.running))
        self.running.clear()

    def _start_again(self, trial_id: str, config: dict[str, Any]) -> None:
        self.search_is_over = trial_id.startswith(FINAL)
        if self.search_is_over:
            self.running = {running for running in self.running if self.trials[running].is_final}
        self._add(trial_id, config)
        self.running.add(trial_id)

    def _next_search_job(self) -> Job | None:
        if self._time_is_up():
            return None
        promotable = self.pruner == "promote" and self.asha.promotable(self._settled())
        if not promotable and len(self.searched) < self.max_trials:
            number = len(self.searched)
            sampled = self.suggest(number, [self._observed(trial) for trial in self.searched])
            if sampled is not None:
                return self._start(f"{number:04d}", self.fixed | sampled)
            self.max_trials = len(self.searched)  # a grid is exhausted
            promotable = self.pruner == "promote" and self.asha.promotable(self._settled())
        if not promotable:
            return None
        trial_id, rung = promotable
        self.journal.append({"trial_id": trial_id, "promoted_from": rung})
        self.asha.promote(trial_id, rung)
        return self._job(trial_id)

    def _settled(self) -> int:
        """Return the highest rung at which no trial can arrive any more; 0: none."""
        if len(self.searched) < self.max_trials:
            return 0
        return self.asha.settled(self.trials[trial_id].epoch for trial_id in self.running)

    def _next_final_job(self) -> Job | None:
        best = winner(self.trials, self.metric)
        finals = [trial for trial in self.trials.values() if trial.is_final]
        seeds = {trial.config["seed"] for trial in finals if best and trial.is_seed_of(best)}
        for k in range(1, self.final_seeds + 1):
            if best is None or best.config["seed"] + k in seeds:
                continue
            fresh = {"seed": best.config["seed"] + k, "refit": True}
            return self._start(f"{FINAL}{len(finals) + 1}", best.config | fresh)
        self.finished = not self.running
        return None

    def _start(self, trial_id: str, config: dict[str, Any]) -> Job:
        self.journal.append({"trial_id": trial_id, "epoch": 0, "config": config})
        self._add(trial_id, config)
        return self._job(trial_id)

    def _add(self, trial_id: str, config: dict[str, Any]) -> None:
        trial = self.trials[trial_id] = TrialRecord(trial_id, config)
        if not trial.is_final:
            self.searched.append(trial)

    def _job(self, trial_id: str) -> Job:
        trial = self.trials[trial_id]
        self.running.add(trial_id)
        self.starting.add(trial_id)
        self.without_checkpoint.discard(trial_id)
        self.phases.pop(trial_id, None)
        eager = self.all_eager or trial_id in self.eager
        return Job(trial_id, trial.config, trial.epoch, trial.is_final, eager)

    def _apply(self, trial: TrialRecord, report: dict[str, Any]) -> bool:
        """Update the rungs by a report; return whether the trial continues now."""
        trial.take(report)
        value, score = report.get(self.metric.name), self.metric.score
        is_better = not self.best_yet or score(value) > score(self.best_yet[0])
        if not trial.is_final and value is not None and is_better:
            self.best_yet = value, report["epoch"], trial
        if trial.is_final:
            return trial.status is None
        if trial.status not in (None, "done"):
            self.asha.record_failure(trial.trial_id, trial.epoch)
            return False
        self.asha.record(trial.trial_id, trial.epoch, self.metric.score(trial.value(self.metric)))
        return trial.status is None and self._continues(trial)

    def _continues(self, trial: TrialRecord) -> bool:
        if trial.epoch not in self.asha.rungs:
            return True
        if self.pruner == "stop":
            return self.asha.survives(trial.trial_id, trial.epoch)
        if self.asha.promotable(self._settled()) == (trial.trial_id, trial.epoch):
            self.asha.promote(trial.trial_id, trial.epoch)  # no pause, no reload
            return True
        return False

    def _consider_giving_up(self) -> None:
        if self.avoided:
            return
        if reason := failed_alike(self.trials.values()):
            self.gave_up = f"{reason}; their errors are in {self.journal.file.name}"

    @contextlib.contextmanager
    def _stopping_where_unwritable(self) -> Iterator[None]:
        """End the study where its journal cannot be written; what could not be written has not happened."""
        try:
            yield
        except OSError as error:
            if is_full(error):
                self._stop_as_full(str(error))
            elif error.errno in OUT_OF_REACH:
                self.gave_up = f"the study's folder cannot be used ({error})"
            else:
                raise

    def _stop_as_full(self, reason: str) -> None:
        self.gave_up = f"there is no room for the study ({reason})"

    def _time_is_up(self) -> bool:
        return self.deadline is not None and self.clock() >= self.deadline

    def _observed(self, trial: TrialRecord) -> Observation:
        value = trial.value(self.metric)
        score = None if value is None else self.metric.score(value)
        return Observation(trial.config, score, failed=trial.status not in (None, "done"))
