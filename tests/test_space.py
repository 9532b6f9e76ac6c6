"""What a Space accepts: its keys, values, first point and builder."""

import numpy as np
import pytest
from ray import tune
from torch import nn

from tunefleet import Space
from tunefleet.models.ranges import parse_range

LR = {"lr": tune.loguniform(1e-4, 1e-1)}


def build(num_classes, image_shape, width=8, rate: float | None = None, flags=(1, 2)):
    return nn.Linear(width, num_classes)


class Network(nn.Module):
    def __init__(self, num_classes, image_shape, *, depth: int, weights="none"):
        super().__init__()


class MyRun:
    pass


class OnImages:
    trains_images = True


def test_a_function_or_a_class_builds_and_names_its_own_arguments():
    assert list(Space(build, LR).arguments) == ["width", "rate", "flags"]
    space = Space(Network, LR | {"depth": tune.choice([1, 2])})
    assert (list(space.arguments), space.takes_weights, space.name) == (["depth"], True, "Network")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Space(), "needs build, which builds a network, or run"),
        (lambda: Space(3, LR), "build=3 cannot be called"),
        (lambda: Space(lambda a: a, LR), "first two arguments"),
        (lambda: Space(build, {"widht": tune.choice([1])}), "did you mean width"),
        (lambda: Space(build, {"momentun": tune.choice([0.1])}), "did you mean momentum"),
        (lambda: Space(build, {"epochs": tune.choice([1, 2])}), "epochs cannot be searched; give --epochs"),
        (lambda: Space(build, {"lr": 0.1}), "the range of lr cannot be searched"),
        (lambda: Space(build, {"lr": tune.randn()}), "the range of lr cannot be searched"),
        (lambda: Space(build, {"width": tune.choice([nn.ReLU])}), "is not a JSON value"),
        (lambda: Space(build, LR, fixed={"flags": nn.ReLU}), "fixed has flags, and .* is not a JSON value"),
        (lambda: Space(build, LR, fixed={"epochs": 3}), "epochs cannot be fixed; give --epochs"),
        (lambda: Space(lambda n, s, architecture=1: n, {}), "has the name of a column of the results"),
        (lambda: Space(lambda n, s, test_loss=1: n, {}), "has the name of a column of the results"),
        (
            lambda: Space(run=MyRun, ranges={"f1": LR["lr"]}, metric="f1", mode="max"),
            "f1 is the name of a col",
        ),
        (
            lambda: Space(build, LR, normalise="imagenett"),
            "normalise=imagenett is unknown; did you mean imag",
        ),
        (lambda: Space(build, LR, normalise=(0.5, 0.5)), "is not possible; give data, imagenet, a function"),
        (lambda: Space(build, {"width": tune.randint(3, 4)}), "it has one value; fix 3"),
        (lambda: Space(build, LR, fixed={"lr": 0.1}), "lr is in ranges and in fixed"),
        (lambda: Space(build, LR, first={}), "first lacks lr"),
        (lambda: Space(build, LR, first={"lr": 1.0}), "first has lr=1.0, which is not in its range"),
        (
            lambda: Space(build, LR, first={"lr": 0.1, "momentum": 0.9}),
            "first has momentum, which has no range",
        ),
        (lambda: Space(build, LR, fixed={"batch_size": -1}), "batch_size=-1 is not possible"),
        (lambda: Space(Network, LR), "needs depth, which has neither a range nor a default"),
        (lambda: Space(lambda n, s, lr=1: n, {}), "has the name of a hyperparameter of the training; rename"),
        (lambda: Space(lambda n, s, seconds=1: n, {}), "has the name of a column of the results; rename"),
        (lambda: Space(build, LR, metric="val_f1", mode="max"), "metric=val_f1 is unknown"),
        (lambda: Space(run=MyRun, ranges=LR, metric="f1"), "metric=f1 has no mode"),
        (lambda: Space(run=OnImages, ranges=LR), "run=OnImages needs build, too"),
        (
            lambda: Space(build, LR, run=MyRun, metric="val_loss"),
            "run=MyRun trains by itself; leave build out",
        ),
        (
            lambda: Space(run=MyRun, metric="val_loss", workers_per_trial=2),
            "workers_per_trial=2: MyRun trains alone",
        ),
        (lambda: Space(build, LR, metric="val_loss", mode="max"), "mode='max' is not that of val_loss"),
        (lambda: Space(build, LR, name="../x"), "is not possible; give letters, digits"),
        (lambda: Space(build, LR, trials=0), "trials=0 is not possible"),
    ],
)
def test_a_mistake_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_training_may_search_what_only_images_have_as_options():
    assert Space(run=MyRun, ranges={"weights": tune.uniform(0.0, 1.0)}, metric="val_loss").ranges


def test_without_a_first_point_the_middle_of_each_range_is_first():
    ranges = {
        "lr": tune.loguniform(1e-4, 1e-2),
        "momentum": tune.uniform(0.0, 0.9),
        "width": tune.choice([4, 8, 16]),
        "batch_size": tune.qrandint(32, 96, 32),
    }
    start = Space(build, ranges).start
    assert start == {"lr": pytest.approx(1e-3), "momentum": 0.45, "width": 8, "batch_size": 64}


def test_open_builders_take_any_key():
    space = Space(lambda num_classes, image_shape, **own: own, {"anything": tune.choice([1, 2])})
    assert space.config({"anything": 2}).model == {"anything": 2}
    assert space.network(2, (3, 8, 8), space.config({"anything": 2, "lr": 0.1})) == {"anything": 2}


def test_own_values_are_flat_outside_a_config():
    config = Space(build, LR).config({"lr": 0.1, "width": 3})
    assert config.model == {"width": 3, "rate": None}
    assert config.to_dict()["width"] == 3


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("width", "16", 16),
        ("rate", "0.5", 0.5),
        ("flags", "[1, 2]", [1, 2]),
        ("lr", "1e-3", 0.001),
        ("nesterov", "true", True),
    ],
)
def test_texts_become_values_of_their_types(name, text, value):
    assert Space(build, LR).parse(name, text) == value


@pytest.mark.parametrize(
    ("name", "text"), [("width", "wide"), ("lr", "x"), ("nesterov", "1"), ("widht", "3")]
)
def test_texts_that_are_no_values_are_one_line(name, text):
    with pytest.raises(ValueError, match=r"is not possible; .* is a value of type|is no hyperparameter"):
        Space(build, LR).parse(name, text)


def test_fixed_values_leave_the_others_searched():
    space = Space(build, LR | {"width": tune.choice([4, 8])}).fixing({"width": 5})
    assert (list(space.ranges), space.fixed, list(space.start)) == (["lr"], {"width": 5}, ["lr"])


@pytest.mark.parametrize(
    ("before", "text", "first"),
    [
        ({"fixed": {"width": 4}}, "choice(2, 4, 6, 8)", 4),  # kept
        ({"fixed": {"width": 4}}, "choice(5, 6, 7)", 6),
        ({"ranges": {"width": tune.choice([4, 8])}, "first": {"width": 8}}, "randint(5, 12)", 8),
        ({"ranges": {"width": tune.choice([4, 8])}, "first": {"width": 8}}, "randint(20, 31)", 25),
        ({}, "choice(3, 5, 9)", 5),  # neither fixed nor searched
    ],
)
def test_another_range_keeps_a_first_value_inside_and_begins_in_its_middle_else(before, text, first):
    space = Space(build, **before).ranging({"width": parse_range(text)})
    assert (space.start, space.fixed, list(space.ranges)) == ({"width": first}, {}, ["width"])


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ("loguniform(1e-5, 1e-2)", {"low": 1e-5, "high": 1e-2, "log": True}),
        ("tune.uniform(0, 1)", {"low": 0.0, "high": 1.0, "log": False}),
        ("choice(64, 128)", {"values": [64, 128]}),
        ("choice(['a', 'b'])", {"values": ["a", "b"]}),
        ("qrandint(32, 96, 32)", {"low": 32, "high": 96, "log": False, "step": 32.0}),
        ("lograndint(1, 100)", {"low": 1, "high": 99, "log": True}),
    ],
)
def test_ranges_are_read_from_text(text, described):
    assert Space(build, {"width": parse_range(text)}, first=None).described()["width"] == described


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "normal(0, 1)",
        "choice()",
        "quniform(0, 1, 0)",
        "uniform(0, 1e999)",
        "uniform(1)",
        "uniform(x, y)",
        "__import__('os').system('x')",
    ],
)
def test_text_that_is_no_range_is_one_line_and_runs_nothing(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_range(text)


def test_values_are_those_that_a_journal_gives_back():
    space = Space(
        build,
        {"lr": tune.choice(np.array([0.1, 0.2])), "width": tune.randint(np.int64(4), np.int64(9))},
        first={"lr": np.float64(0.1), "width": np.int64(5)},
        fixed={"momentum": np.float64(0.9), "flags": (3, 4)},
        normalise=[[0.5] * 3, [0.25] * 3],
    )
    assert space.normalise == ((0.5,) * 3, (0.25,) * 3)
    described = {"lr": {"values": [0.1, 0.2]}, "width": {"low": 4, "high": 8, "log": False}}
    for value, plain in [
        (space.described(), described),
        (space.start, {"lr": 0.1, "width": 5}),
        (space.fixed, {"momentum": 0.9, "flags": [3, 4]}),
    ]:
        assert repr(value) == repr(plain)  # no numpy, no tuple


def test_none_is_a_value():
    space = Space(lambda n, s, width=8: n, {"width": tune.choice([None, 4])})
    assert space.config({"width": None}).model == {"width": None}


def test_ranges_have_the_type_of_their_argument():
    space = Space(build, LR | {"rate": tune.uniform(0.0, 0.5)})
    for text in ("choice(8, 16.0)", "uniform(8, 16)", "choice('a')", "choice(True)"):
        with pytest.raises(ValueError, match=r"^width=.* is not possible; width is a value of type int"):
            space.ranging({"width": parse_range(text)})
    assert space.ranging({"width": parse_range("choice(8, 16)")}).start["width"] == 8
    by_default = Space(lambda n, s, dropout=0: n, {"dropout": tune.uniform(0.0, 0.5)})
    assert by_default.ranging({"dropout": parse_range("uniform(0.1, 0.3)")}).start == {"dropout": 0.25}
    assert by_default.parse("dropout", "0.1") == 0.1
