"""A person's own training: what it reports, saves and tests."""

import io
import math
import threading

import numpy as np
import pytest
import torch
from ray import tune

from tunefleet import Space
from tunefleet.metric import Metric
from tunefleet.trainables.own import OwnRun

LOSS = Metric("val_loss", "min")
VALUES = {"architecture": "mine", "epochs": 3, "seed": 7, "refit": False, "lr": 0.1, "width": 8}


class Tiny:
    """Counts its epochs."""

    def __init__(self, config, *, seed, epochs, device):
        self.config, self.seed, self.total, self.device, self.done = config, seed, epochs, device, 0

    def epoch(self):
        self.done += 1
        return {"val_loss": torch.tensor(5.0 / self.done), "val_f1": np.float32(0.5), "steps": 10}

    def state_dict(self):
        return {"done": self.done, "weights": torch.ones(2)}

    def load_state_dict(self, state):
        self.done = state["done"]

    def test(self):
        return 1.25


def make(run=Tiny, metric=LOSS):
    space = Space(
        run=run, ranges={"lr": tune.uniform(0.0, 1.0)}, metric=metric.name, mode=metric.mode, name="mine"
    )
    return OwnRun(space, VALUES, metric, {"device": "cpu", "threads": 1, "data_dir": "data"})


def test_the_class_gets_its_values_and_the_keywords_that_it_names():
    run = make()
    assert run.run.config == {"lr": 0.1, "width": 8}
    assert (run.run.seed, run.run.total, run.run.device) == (7, 3, "cpu")


def test_epochs_are_counted_timed_and_made_plain_numbers():
    run = make()
    report = [run.epoch(), run.epoch()][1]
    assert (report["epoch"], report["val_loss"], report["val_f1"], report["steps"]) == (2, 2.5, 0.5, 10)
    assert [type(report[name]) for name in ("val_loss", "val_f1", "steps")] == [float, float, int]
    assert report["epoch_seconds"] >= 0
    assert report["diverged"] is False


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_diverged(value):
    class Diverges(Tiny):
        def epoch(self):
            return {"val_loss": value}

    assert make(Diverges).epoch()["diverged"] is True


def reports(found):
    class Reports(Tiny):
        def epoch(self):
            return found

    return Reports


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"Reports\.epoch\(\) returns a NoneType; return a dict of numbers"),
        ({"loss": 1.0}, r"Reports\.epoch\(\) reports no val_loss, which is the metric; it reports loss"),
        ({"val_loss": "low"}, r"reports val_loss='low' \(str\); report a number"),
        ({"val_loss": 1.0, "all": torch.ones(2)}, r"reports all=.* \(Tensor\); report a number"),
        ({"val_loss": 1.0, "epoch": 3}, "reports epoch, which the study itself sets; rename it"),
        ({"val_loss": 1.0, "test_loss": 1.0}, "reports test_loss, which the study itself sets; rename it"),
        ({"val_loss": True}, r"reports val_loss='True' \(bool\)"),
    ],
)
def test_what_is_no_report_is_one_line(found, message):
    with pytest.raises(ValueError, match=message) as error:
        make(reports(found)).epoch()
    assert "\n" not in str(error.value)


def test_a_checkpoint_continues_the_run():
    run, file = make(), io.BytesIO()
    run.epoch()
    run.save(file)
    again = make()
    file.seek(0)
    again.load(file)
    assert again.epochs_done == 1
    assert again.epoch()["val_loss"] == 2.5
    assert again.reports[0] == run.reports[0]


@pytest.mark.parametrize("value", [np.float64(0.5), object(), threading.Lock(), lambda: 0])
def test_a_state_that_cannot_be_read_back_is_one_line_that_names_it(value):
    class Saves(Tiny):
        def state_dict(self):
            return {"done": 1, "rng": value}

    with pytest.raises(
        ValueError, match=r"Saves\.state_dict\(\) has 'rng' \(\w+\), which cannot be read back"
    ):
        make(Saves).save(io.BytesIO())


def test_a_test_is_named_after_the_metric_and_may_be_left_out():
    assert make().test() == {"test_loss": 1.25}

    class Untested(Tiny):
        test = None

    assert make(Untested).test() == {}


def test_an_accuracy_in_percent_is_one_line_that_says_so():
    class Percent(Tiny):
        def epoch(self):
            return {"val_accuracy": 92.1}

        def test(self):
            return 91.0

    run = make(Percent, Metric("val_accuracy"))
    for call, value in ((run.epoch, r"epoch\(\) reports 92\.1"), (run.test, r"test\(\) returns 91")):
        with pytest.raises(ValueError, match=rf"^Percent\.{value}, and val_accuracy is a fraction of 0 to 1"):
            call()


def test_a_class_without_the_methods_is_one_line():
    class Half:
        def __init__(self, config):
            pass

        def epoch(self):
            return {}

    with pytest.raises(ValueError, match=r"Half has no state_dict\(\); see docs/own-training\.md"):
        make(Half)
