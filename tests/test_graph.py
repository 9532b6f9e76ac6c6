"""Do replayed steps train as eager ones do? Here with a stand-in for CUDA; tests/gpu has the real thing."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests.configs import make_config
from tests.test_training import FP32, SMALL, assert_same, data, without_times  # noqa: F401  a fixture
from tunefleet.trainables.graph import WARM_UP_STEPS, CaptureError, StepGraph
from tunefleet.trainables.group import Group
from tunefleet.trainables.training import TrainingRun

GRAPHED = dataclasses.replace(FP32, cuda_graph=True, micro_batch_bytes=None)
CASES = {
    "short last batch": {"architecture": "twolayernn", "batch_size": 20, "hidden": 4},
    "a last batch with one image more": {"architecture": "softmax", "batch_size": 71},
    "dropout and crops": {
        "architecture": "mymodel",
        "batch_size": 8,
        "augment": "crop_flip",
        "optimizer": "adam",
        **SMALL,
    },
    "momentum and warm-up": {
        "architecture": "softmax",
        "batch_size": 12,
        "momentum": 0.9,
        "warmup_epochs": 0.5,
        "schedule": "cosine",
    },
}


@pytest.fixture
def replays(monkeypatch):
    """Replaces CUDA: capturing executes nothing, a replay runs the step; returns what was done."""
    done = []

    def warm_up(graph, train_step):
        done.append("warm-up")
        graph._one_step(train_step)
        graph.warm_up_steps += 1

    def capture(graph, train_step):
        done.append("capture")

        def replay():
            done.append("replay")
            graph._one_step(train_step)

        return SimpleNamespace(replay=replay)

    monkeypatch.setattr(StepGraph, "_warm_up", warm_up)
    monkeypatch.setattr(StepGraph, "_capture", capture)
    return done


@pytest.fixture
def make(data, tmp_path):  # noqa: F811
    def make_run(values, *, eager=False, settings=GRAPHED, **others):
        run = TrainingRun(
            make_config(**({"epochs": 3, "seed": 1} | values)), data, settings, tmp_path, **others
        )
        if eager:
            run._graph_of_epoch = lambda sizes: None
        return run

    return make_run


@pytest.mark.parametrize("case", CASES)
def test_replayed_epochs_equal_eager_ones(make, replays, case):
    eager, graphed = make(CASES[case], eager=True), make(CASES[case])
    for _ in range(3):
        torch.manual_seed(7)  # dropout's generator is the process's
        expected = without_times(eager.epoch())
        torch.manual_seed(7)
        assert without_times(graphed.epoch()) == expected
    assert_same(graphed.state_dict(), eager.state_dict())


def test_the_first_steps_are_eager_and_the_rest_replays(make, replays):
    run = make(CASES["momentum and warm-up"])  # 72 images: 6 steps an epoch
    run.train_epoch()
    assert replays == ["warm-up"] * WARM_UP_STEPS + ["capture"] + ["replay"] * 3
    del replays[:]
    run.train_epoch()
    assert replays == ["replay"] * 6


def test_a_resumed_run_warms_up_again_and_equals_the_uninterrupted_one(make, replays, tmp_path):
    whole = make(CASES["momentum and warm-up"])
    whole.epoch()
    whole.save(tmp_path / "checkpoint.pt")
    expected = without_times(whole.epoch())
    resumed = make(CASES["momentum and warm-up"])
    resumed.load(tmp_path / "checkpoint.pt")
    del replays[:]
    assert without_times(resumed.epoch()) == expected
    assert replays[0] == "warm-up"


def test_a_run_that_goes_back_captures_again(make, replays, tmp_path):
    run = make(CASES["momentum and warm-up"])
    run.epoch()
    run.save(tmp_path / "checkpoint.pt")
    expected = without_times(run.epoch())
    del replays[:]
    run.load(tmp_path / "checkpoint.pt")
    assert without_times(run.epoch()) == expected
    assert replays[: WARM_UP_STEPS + 1] == ["warm-up"] * WARM_UP_STEPS + ["capture"]


def test_several_workers_of_one_trial_run_eagerly(make, replays):
    run = make({"architecture": "softmax", "batch_size": 8})
    run.group = Group(rank=0, size=2)
    assert run._graph_of_epoch([8, 8]) is None


def test_a_batch_that_holds_all_images_and_more_runs_eagerly(make, replays):
    make({"architecture": "softmax", "batch_size": 100}).train_epoch()
    assert replays == []


def test_a_failed_capture_is_an_error_of_its_own(make, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: _Failing())
    monkeypatch.setattr(TrainingRun, "train_step", _raise("operation not permitted when stream is capturing"))
    monkeypatch.setattr("tunefleet.trainables.graph.WARM_UP_STEPS", 0)
    with pytest.raises(CaptureError, match="cannot be captured as a CUDA graph \\(operation not permitted"):
        make({"architecture": "softmax", "batch_size": 8}).train_epoch()


def _raise(text):
    def function(*_):
        raise RuntimeError(text)

    return function


class _Failing:
    """A capture, whose end raises an error of its own once something inside has failed."""

    def __enter__(self):
        return None

    def __exit__(self, *error):
        raise RuntimeError("operation failed due to a previous error during capture")
