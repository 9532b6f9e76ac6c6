"""What a worker's failures on a GPU cost a study: real ones, in workers of a Ray of our own."""

import os

import pytest

from tests.configs import make_options
from tests.gpu import DEVICE, ON_GPU, on_device
from tests.gpu.odd import TOO_WIDE, VICTIM, Asserting, Crowded, Synchronising
from tests.studies import digits_study
from tunefleet.journal import Journal
from tunefleet.search import engine
from tunefleet.search.resources import Resources
from tunefleet.study import read_study
from tunefleet.trainables.device import choose

pytestmark = [on_device, pytest.mark.ray]

LIMIT = 600 * 10**6  # bytes that torch's allocator may take in a worker
EPOCHS = 3
POINT = {"lr": 0.001, "weight_decay": 0.0, "batch_size": 64, "augment": "none", "hidden": 16}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    from tunefleet.search.connection import connect

    os.environ.pop("RAY_ADDRESS", None)
    connect(device=DEVICE)
    yield
    ray.shutdown()


@pytest.fixture
def study(tmp_path, data_dir, monkeypatch):
    """Runs three trials of a two-layer network one after another, by a class of worker."""

    def run(trial_class, hidden=(16, 16, 16)):
        monkeypatch.setattr(engine, "Trial", trial_class)
        options = make_options(
            "twolayernn",
            data="digits",
            data_dir=str(data_dir),
            image_size=32,
            epochs=EPOCHS,
            points=[POINT | {"hidden": width} for width in hidden],
            final_seeds=0,
            pruner="none",
            device=DEVICE,
        )
        resources = Resources(1, 1.0, float(ON_GPU), gpu_bytes=LIMIT if ON_GPU else None)
        folder = tmp_path / "study"
        with digits_study(folder, options, resources, choose(DEVICE)) as (jobs, context):
            engine.run_jobs(jobs, context, resources=resources, on_step=lambda: None)
        return folder, jobs, [e for e in Journal(folder / "reports.jsonl").read() if "trial_id" in e]

    return run


def pids(events):
    return list(dict.fromkeys(event["pid"] for event in events if "pid" in event))


def assert_all_trained(folder, events):
    assert read_study(folder)["statuses"] == {"done": 3}
    epochs = [(event["trial_id"], event["epoch"]) for event in events if event.get("epoch")]
    assert sorted(epochs) == [(f"{k:04d}", epoch) for k in range(3) for epoch in range(1, EPOCHS + 1)]


def test_a_trial_without_enough_memory_ends_with_one_line_and_its_worker_trains_the_next(study):
    folder, jobs, events = study(Crowded, hidden=(16, TOO_WIDE, 16))
    assert read_study(folder)["statuses"] == {"done": 2, "out_of_memory": 1}
    error = jobs.trials[VICTIM].error
    assert "\n" not in error
    assert f"out of memory with batch_size 64, hidden {TOO_WIDE}" in error
    assert not ON_GPU or "of the 0.6 GB that a trial may take" in error
    assert len(pids(events)) == 1
    print("\n" + error)


def test_a_device_side_assert_costs_a_worker_and_no_epoch(study):
    folder, _, events = study(Asserting)
    assert_all_trained(folder, events)
    (lost,) = [event for event in events if "lost" in event]
    assert (lost["trial_id"], lost["lost"]) == (VICTIM, "gpu")
    assert not ON_GPU or {event["gpu"] for event in events if "pid" in event} == {lost["gpu"]}
    assert len(pids(events)) == 2
    print("\n" + lost["error"].splitlines()[-1])


def test_a_step_that_cannot_be_captured_is_said_once_and_trains_eagerly(study):
    folder, jobs, events = study(Synchronising)
    assert_all_trained(folder, events)
    assert [event["lost"] for event in events if "lost" in event] == ["graph"]
    (note,) = jobs.notes
    assert note.endswith("all trials train eagerly from now on")
    assert len(pids(events)) == 1  # the first worker reported nothing
    print("\n" + note)
