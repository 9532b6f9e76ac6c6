"""What a lost worker means for its trial, its GPU and its neighbours, without Ray."""

import json
from types import SimpleNamespace

import pytest
from ray.exceptions import OutOfMemoryError

from tests.test_scheduler import make_jobs
from tunefleet.search import engine
from tunefleet.search.engine import TuneScheduler, Workers

EPOCH = {"epoch": 1, "val_accuracy": 0.5, "diverged": False, "epoch_seconds": 1.0}
OUT = OutOfMemoryError("2 worker(s) were killed due to the node running low on memory. Node (ID: n1)")
DIED = RuntimeError("The actor died")


@pytest.fixture
def kills(monkeypatch):
    counted = [5]  # of before the study
    monkeypatch.setattr("tunefleet.search.engine.oom_kills", lambda: counted[0])
    monkeypatch.setattr("tunefleet.search.engine.node_named", lambda error: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return counted


@pytest.fixture
def workers(kills, tmp_path):
    """Gives the workers of a study of eight trials, none of which is ever pruned."""

    def make(slots=2, **options):
        jobs = make_jobs(tmp_path / "reports.jsonl", pruner="none", trials=8, **options)
        return Workers(jobs, lambda: slots, None)

    return make


def start(workers, **location):
    """Starts the next job, as Tune does; returns its trial's id."""
    job = workers.next_job()
    workers.locations[job.trial_id] = {"node_id": "n1"} | location
    return job.trial_id


def lose(workers, trial_id, error=DIED):
    workers.lose(trial_id, error)
    workers.end(trial_id)


def report(workers, trial_id, epoch=1):
    continues = workers.report(trial_id, EPOCH | {"epoch": epoch})
    if not continues:
        workers.end(trial_id)
    return continues


def lost(workers):
    events = workers.jobs.journal.read()
    return [(event["trial_id"], event["lost"]) for event in events if "lost" in event]


def test_a_worker_that_the_kernel_killed_for_lack_of_memory_is_no_crash(workers, kills):
    workers = workers(slots=1)
    for killed in (0, 1, 0):
        kills[0] += killed
        lose(workers, start(workers))
        workers.memory.suspects.clear()
    assert [cause for _, cause in lost(workers)] == ["worker", "memory", "worker"]


def test_a_node_of_a_cluster_is_asked_whether_its_kernel_killed(workers, monkeypatch):
    counted = {"n1": 7, "n2": 7, "gone": None}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("tunefleet.search.engine.oom_kills_on", lambda node_id: counted[node_id])
    workers = workers(slots=1)
    for node_id, before in (("n1", 6), ("n1", 7), ("n2", 7), ("gone", 0), (None, 0)):
        lose(workers, start(workers, node_id=node_id, oom_kills=before))
        workers.memory.suspects.clear()
    assert [cause for _, cause in lost(workers)] == ["memory", "worker", "worker", "worker", "worker"]


def test_a_lost_worker_names_the_gpu_of_its_place_or_of_its_last_report(workers):
    workers = workers()
    first, second = start(workers, gpu="GPU-a"), start(workers)
    workers.report(second, EPOCH | {"gpu": "GPU-b"})
    lose(workers, first)
    lose(workers, second)
    events = [event for event in workers.jobs.journal.read() if "lost" in event]
    assert [event["gpu"] for event in events] == ["GPU-a", "GPU-b"]


def both_end_fit(workers, small, large):
    workers.lose_all(OUT)
    workers.start_round()


def one_is_lost_and_the_other_ends_fit(workers, small, large):
    lose(workers, large, OUT)
    both_end_fit(workers, small, large)


def both_are_lost(workers, small, large):
    lose(workers, large, OUT)
    assert workers.next_job() is None  # the other one is still at work
    lose(workers, small, OUT)


def only_the_small_one_is_lost(workers, small, large):
    lose(workers, small, OUT)
    assert workers.next_job() is None
    assert not report(workers, large)  # it has to yield


@pytest.mark.parametrize(
    "kill", [both_end_fit, one_is_lost_and_the_other_ends_fit, both_are_lost, only_the_small_one_is_lost]
)
def test_a_small_neighbour_is_never_charged_and_the_large_trial_is_found_alone(workers, kill):
    """Ray kills either of the two, or both; only trial 0001 needs too much."""
    workers = workers()
    small, large = start(workers), start(workers)
    kill(workers, small, large)
    alone = []
    while workers.memory.suspects:
        alone.append(start(workers))
        assert workers.next_job() is None  # one at a time
        if alone[-1] == large:
            lose(workers, large, OUT)
        else:
            report(workers, small)
    assert set(alone) == {small, large}
    assert alone.count(large) == 2
    assert workers.jobs.trials[large].status == "out_of_memory"
    assert workers.jobs.losses[small]["memory"] == 0
    assert [cause for trial_id, cause in lost(workers) if trial_id == small].count("memory") == 0
    assert start(workers)
    assert start(workers)  # two at a time again


def test_workers_that_wait_do_not_keep_a_suspect_from_its_turn(workers):
    workers = workers(slots=3)
    first, second, third = (start(workers) for _ in range(3))
    lose(workers, first, OUT)
    for trial_id, tune_id in ((second, "a"), (third, "b")):
        assert not report(workers, trial_id)  # it has to yield
        workers.free += 1  # as Tune's end of a job does
        if trial_id == second:
            assert workers.next_job() is None  # the third one is still at work
            assert workers.wait(tune_id)
    assert workers.next_job().trial_id in (first, second, third)
    assert workers.next_job() is None  # one at a time


def test_a_waiting_worker_is_called_for_the_next_job_and_let_go_in_the_end(workers, monkeypatch):
    workers, now, ready = workers(slots=2), [0.0], []
    job = workers.jobs.next_job()
    monkeypatch.setattr(workers.jobs, "next_job", lambda: ready.pop() if ready else None)
    monkeypatch.setattr("tunefleet.search.engine.time.monotonic", lambda: now[0])
    assert not workers.wait("new")  # no worker has ended a job
    workers.free = 1
    assert workers.wait("a")
    assert not workers.wait("b")  # it was the only one
    assert workers.keep_waiting("a")
    ready.append(job)
    assert not workers.keep_waiting("a")
    assert workers.next_job() == job
    workers.end(job.trial_id)
    workers.free = 1
    assert workers.wait("c")
    now[0] = engine.WAIT_MAX + 1
    assert not workers.keep_waiting("c")
    assert not workers.wait("d")  # its place is free for another study, or for a smaller cluster


def test_a_suspect_that_continues_alone_is_not_stopped_when_it_is_the_last(workers):
    workers = workers()
    first, second = start(workers), start(workers)
    workers.lose_all(OUT)
    workers.start_round()
    assert start(workers) == first
    assert not report(workers, first)
    assert start(workers) == second
    assert report(workers, second)
    assert workers.next_job().trial_id == first


def test_a_neighbour_on_another_node_is_no_suspect(workers):
    workers = workers()
    first, second = start(workers), start(workers, node_id="n2")
    lose(workers, first, OUT)
    assert lost(workers) == [(first, "memory")]
    assert workers.memory.suspects == {first}
    assert second in workers.at_work


def test_a_round_ends_when_epochs_are_short_and_nothing_is_lost_by_it(workers, monkeypatch):
    monkeypatch.setattr(engine, "ROUND", 2)
    workers = workers()
    first, second = start(workers), start(workers)
    workers.report(first, EPOCH | {"epoch_seconds": 60.0})  # an idle worker would wait longer than one starts
    assert report(workers, first, 2)
    workers._seconds.clear()
    workers.end(first)
    assert workers.next_job() is None
    assert workers.round_is_over
    assert not report(workers, second)
    workers.jobs.running.discard(first)
    workers.jobs.interrupted.append(first)
    workers.start_round()
    assert not workers.round_is_over
    assert [workers.next_job().trial_id for _ in range(2)] == [second, first]


def test_tunes_results_and_errors_reach_the_study(workers, tmp_path):
    workers = workers()
    job = workers.next_job()
    scheduler = TuneScheduler(workers, {})
    (tmp_path / "error").write_text("The actor died")
    trial = SimpleNamespace(
        config={"trial_id": job.trial_id}, pickled_error_file=None, error_file=str(tmp_path / "error")
    )
    location = {"node_id": "n1", "pid": 7}
    assert scheduler.on_trial_result(None, trial, {"location": json.dumps(location)}) == "CONTINUE"
    assert workers.locations[job.trial_id] == location
    assert scheduler.on_trial_result(None, trial, {"report": json.dumps(EPOCH)}) == "CONTINUE"
    scheduler.on_trial_error(None, trial)
    assert lost(workers) == [(job.trial_id, "worker")]
