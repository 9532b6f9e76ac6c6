"""Groups of workers on Ray Train: none outlives its trial, none waits for ever, none is lost for good."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass

import psutil
import pytest

from tests.configs import make_options
from tests.studies import digits_study
from tunefleet.journal import Journal, records
from tunefleet.search.connection import connect
from tunefleet.search.engine import run_jobs
from tunefleet.search.resources import Resources
from tunefleet.study import read_study
from tunefleet.trainables.device import choose
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WORKERS = 2
SLOTS = 2  # groups of two workers of half a CPU each: all that two CPUs hold
GONE_WITHIN = 10  # seconds after a trial is pruned
CONFIG = {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.0, "batch_size": 100, "schedule": "constant"}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    connect(trial_slots=SLOTS)
    yield
    ray.shutdown()


@pytest.fixture
def study(tmp_path, data_dir):
    """Makes and runs softmax studies of digits, two workers to a trial."""

    def run(points, on_step=lambda jobs: None, slots=SLOTS, **options):
        options = make_options(
            "softmax",
            data="digits",
            image_size=32,
            data_dir=str(data_dir),
            points=points,
            workers_per_trial=WORKERS,
            cpus_per_trial=1.0,
            final_seeds=0,
            **options,
        )
        resources = Resources(slots, 1.0, 0.0, WORKERS)
        with digits_study(tmp_path / "study", options, resources) as (jobs, context):
            run_jobs(jobs, context, resources=resources, on_step=lambda: on_step(jobs))
        return tmp_path / "study"

    return run


def groups() -> frozenset[str]:
    """Returns the ids of the placement groups that hold the CPUs of a group of workers."""
    from ray.util import placement_group_table

    return frozenset(
        name
        for name, row in placement_group_table().items()
        if row["state"] == "CREATED" and any("CPU" in bundle for bundle in row["bundles"].values())
    )


def worker_pids() -> frozenset[int]:
    """Returns the processes of groups' workers, of this test's cluster."""
    pids = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if "RayTrainWorker" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                pids.add(child.pid)
    return frozenset(pids)


@dataclass(frozen=True)
class Snapshot:
    seconds: float
    groups: frozenset[str]
    pids: frozenset[int]
    running: frozenset[str]


class Watch:
    """Looks at the cluster twice a second."""

    def __init__(self):
        self.seen: list[Snapshot] = []

    def __call__(self, jobs):
        now = time.monotonic()
        if not self.seen or now - self.seen[-1].seconds > 0.5:
            self.seen.append(Snapshot(now, groups(), worker_pids(), frozenset(jobs.running)))


def test_pruned_groups_are_gone_at_once_and_more_trials_than_fit_all_run(study):
    watch = Watch()
    points = [CONFIG | {"lr": lr} for lr in (0.01, 1e-5, 0.02, 2e-5)]
    folder = study(points, watch, epochs=2, eta=2)
    trials = records(Journal(folder / "reports.jsonl").read())
    assert read_study(folder)["options"]["pruner"] == "stop"
    assert [trial.epoch for trial in trials.values()] in ([2, 1, 2, 1], [2, 2, 2, 1])  # by order of arrival
    assert any(len(shot.groups) == SLOTS for shot in watch.seen)  # the cluster was full
    assert any(len(shot.pids) == SLOTS * WORKERS for shot in watch.seen)
    for now in watch.seen:
        lately = [shot.running for shot in watch.seen if 0 <= now.seconds - shot.seconds <= GONE_WITHIN]
        trials_lately = len(frozenset.union(*lately))
        assert len(now.groups) <= trials_lately
        assert len(now.pids) <= trials_lately * WORKERS
    ended = time.monotonic()
    while groups() or worker_pids():
        assert time.monotonic() - ended < GONE_WITHIN
        time.sleep(0.2)


def test_killed_worker_costs_nothing_that_was_reported_and_a_failing_trial_is_not_tried_again(
    study, data_dir
):
    killed = []

    def kill_once(jobs):
        if killed or not jobs.trials or jobs.trials["0000"].epoch < 1:
            return
        rank_0 = jobs.trials["0000"].reports[1]["pid"]
        (victim,) = worker_pids() - {rank_0}
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)

    points = [CONFIG, CONFIG | {"seed": 2**70}]  # more than torch takes
    folder = study(points, kill_once, slots=1, epochs=40, pruner="none")
    events = Journal(folder / "reports.jsonl").read()
    trial, failing = records(events).values()
    assert (trial.status, failing.status) == ("done", "error")
    assert "Traceback" in failing.error
    of_failing = [event for event in events if event.get("trial_id") == failing.trial_id]
    assert len(of_failing) == 2  # start and end
    assert list(trial.reports) == list(range(1, 41))
    pids = [trial.reports[epoch]["pid"] for epoch in trial.reports]
    assert len(set(pids)) == 2  # rank 0 of the first group and of the second
    options = make_options("softmax", epochs=40, image_size=32)
    config = options.space.config(options.fixed_values() | CONFIG)
    alone = TrainingRun(config, prepare("digits", data_dir), choose("cpu", "fp32"), data_dir)
    for epoch in trial.reports:
        expected = alone.epoch()
        assert trial.reports[epoch]["train_accuracy"] == pytest.approx(expected["train_accuracy"], abs=0.002)
        assert trial.reports[epoch]["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
