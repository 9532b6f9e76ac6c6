"""What the scheduler makes of a lost worker, without Ray: the kernel's kills, GPUs and neighbours."""

from types import SimpleNamespace

import pytest

from tunefleet.search.engine import JobScheduler


class Jobs:
    """Notes what it is told."""

    def __init__(self):
        self.lost, self.notes = [], []

    def lose(self, trial_id, cause, error, gpu=None):
        self.lost.append((trial_id, cause, gpu))

    def report(self, trial_id, report):
        return True


@pytest.fixture
def kills(monkeypatch):
    counted = [5]  # of before the study
    monkeypatch.setattr("tunefleet.search.engine.oom_kills", lambda: counted[0])
    monkeypatch.setattr("tunefleet.search.engine._node_of", lambda trial: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return counted


@pytest.fixture
def scheduler(kills):
    return JobScheduler(Jobs(), None, {})


def trial(trial_id, worker="w1"):
    actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: worker))
    return SimpleNamespace(
        config={"trial_id": trial_id},
        temporary_state=SimpleNamespace(ray_actor=actor),
        pickled_error_file=None,
        error_file=None,
    )


def test_a_worker_that_the_kernel_killed_for_want_of_memory_is_no_crash(scheduler, kills):
    scheduler.on_trial_error(None, trial("0000"))
    kills[0] += 1
    scheduler.on_trial_error(None, trial("0001"))
    scheduler.on_trial_error(None, trial("0002"))
    causes = [cause for _, cause, _ in scheduler.jobs.lost]
    assert causes == ["worker", "memory", "worker"]


def test_a_lost_worker_names_the_gpu_of_its_last_report(scheduler):
    report = {"report": '{"epoch": 1, "gpu": "GPU-a"}'}
    scheduler.on_trial_result(None, trial("0000"), report)
    scheduler.on_trial_error(None, trial("0000"))
    scheduler.on_trial_error(None, trial("0001", worker="w2"))
    assert scheduler.jobs.lost == [("0000", "worker", "GPU-a"), ("0001", "worker", None)]
