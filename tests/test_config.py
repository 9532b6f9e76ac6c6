"""Which values a trial accepts, and what it says of the others."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from tests.configs import make_config
from tunefleet.models.checks import nearest
from tunefleet.models.space import FIELDS

INTEGER = "give an integer of at least {}"
IMPOSSIBLE = [
    *[("epochs", value, INTEGER.format(1)) for value in (0, -1, 1.0, "9", None, True, math.nan)],
    *[("batch_size", value, INTEGER.format(1)) for value in (0, 12.5, "128")],
    *[("image_size", value, INTEGER.format(1)) for value in (0, 32.0, None)],
    *[("seed", value, INTEGER.format(0)) for value in (-1, 0.5, None)],
    *[("lr", value, "give a number above 0") for value in (0, -0.1, math.nan, math.inf, "0.1", None, True)],
    *[("weight_decay", value, "give a number at least 0") for value in (-1e-9, math.nan, math.inf, None)],
    *[
        ("momentum", value, "give a number at least 0 and at most 1")
        for value in (-0.1, 1.01, math.nan, None)
    ],
    *[("label_smoothing", value, "give a number at least 0 and at most 1") for value in (-0.1, 1.1, "0")],
    *[("warmup_epochs", value, "give a number at least 0 and at most 10") for value in (-1, 10.5, math.inf)],
    *[(name, value, "give True or False") for name in ("nesterov", "refit") for value in (1, 0, None, "yes")],
]


@pytest.mark.parametrize(("name", "value", "allowed"), IMPOSSIBLE)
def test_impossible_value_is_one_line_naming_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=rf"^{name}=.* is not possible; {re.escape(allowed)}$") as error:
        make_config("softmax", **{name: value})
    message = str(error.value)
    assert str(value) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 1, "batch_size": 1, "image_size": 1, "seed": 0},
        {"lr": 1e-12, "weight_decay": 0, "momentum": 0, "label_smoothing": 0, "warmup_epochs": 0},
        {"lr": 10, "momentum": 1, "label_smoothing": 1, "warmup_epochs": 10, "epochs": 10},
        {"lr": np.float64(0.1), "batch_size": np.int64(64)},
        {"nesterov": True, "momentum": 0.9},
    ],
)
def test_values_at_the_ends_of_what_is_allowed_are_possible(values):
    config = make_config("softmax", **values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("optimizer", "adamm", "adam"),
        ("schedule", "cosin", "cosine"),
    ],
)
def test_unknown_name_is_one_line_naming_the_nearest_and_all(name, value, meant):
    with pytest.raises(
        ValueError, match=rf"^{name}={value} is unknown; did you mean {meant}\? Choose from: .*,"
    ) as error:
        make_config("softmax", **{name: value})
    assert "\n" not in str(error.value)


def test_name_like_no_other_is_answered_with_all_names():
    with pytest.raises(ValueError, match=r"^optimizer=zzz is unknown; Choose from: sgd, adam, adamw$"):
        make_config("softmax", optimizer="zzz")
    assert nearest("zzz", ["a", "b"]) == "; Choose from: a, b"


@pytest.mark.parametrize("values", [{"momentum": 0.0}, {"momentum": 0.9, "optimizer": "adam"}])
def test_nesterov_needs_sgd_with_momentum(values):
    with pytest.raises(ValueError, match=r"^nesterov=True needs optimizer=sgd and a momentum above 0$"):
        make_config("softmax", nesterov=True, **values)


@pytest.mark.parametrize(
    ("key", "meant"), [("leraning_rate", None), ("momentm", "momentum"), ("batchsize", "batch_size")]
)
def test_misspelt_key_is_an_error_naming_the_nearest(key, meant):
    meant = rf"; did you mean {meant}\?" if meant else ".*"
    with pytest.raises(ValueError, match=rf"^{key} is no hyperparameter{meant} Choose from: epochs, "):
        make_config("softmax", **{key: 0.1})


def test_config_survives_a_round_trip_through_json():
    config = make_config(
        "resnet_conv", lr=0.0123, hidden=64, kernel_size=3, augment="crop_flip", weights="imagenet", seed=3
    )
    assert config.space.config(config.to_dict()) == config
    assert config.space.config(json.loads(json.dumps(config.to_dict()))) == config
    assert (config.to_dict()["architecture"], config.to_dict()["hidden"]) == ("resnet_conv", 64)


def test_dict_of_a_config_names_every_field_and_argument():
    assert list(make_config("softmax").to_dict()) == ["architecture", *FIELDS]
    assert list(make_config("convnet").to_dict()) == ["architecture", *FIELDS, "hidden", "kernel_size"]


def test_configs_of_the_first_edition_are_read():
    """They had hidden and kernel_size whatever the architecture, null where it takes none."""
    assert make_config("softmax", hidden=None, kernel_size=None) == make_config("softmax")
    assert make_config("mymodel", hidden=None, kernel_size=3).model == {"hidden": 64, "kernel_size": 3}


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config("softmax").lr = 0.1
