"""What is searched, against the table of the course report."""

import json
import re

import pytest
from ray.tune.search.sample import Categorical

from tests.configs import make_config, make_options, own_arguments
from tunefleet.models.ranges import described
from tunefleet.models.spaces import SPACES, find_space
from tunefleet.search.asha import rung_epochs
from tunefleet.search.suggest import grid_values

# The report's thirteen architectures: weight_decay, momentum, batch_size, lr, hidden, kernel_size,
# optimizer, accuracy; a dash there is None here
PUBLISHED = {
    "softmax": (0, 0, 512, 0.01, None, None, "sgd", 0.4002),
    "twolayernn": (1e-4, None, 256, 1e-4, 250, None, "adam", 0.5102),
    "convnet": (0.01, 0.9, 512, 0.001, 50, 5, "sgd", 0.5836),
    "mymodel": (0.001, 0.98, 128, 0.001, 64, 5, "sgd", 0.76),
    "resnet_softmax": (1e-4, 0.99, 128, 0.001, None, None, "sgd", 0.5835),
    "resnet_twolayernn": (0.001, 0.7, 128, 0.03, 100, None, "sgd", 0.5858),
    "resnet_conv": (5e-4, 0.9, 128, 0.05, 150, 3, "sgd", 0.6820),
    "resnet_mymodel": (1e-4, 0.85, 128, 0.04, 128, 3, "sgd", 0.7917),
    "resnet_softmax_updatable": (0.001, 0, 128, 0.01, None, None, "sgd", 0.8296),
    "resnet_twolayernn_updatable": (0, 0.99, 128, 0.001, 150, None, "sgd", 0.8075),
    "resnet_conv_updatable": (0.001, 0.98, 128, 0.001, 64, 3, "sgd", 0.8091),
    "resnet_mymodel_updatable": (1e-4, 0.7, 128, 0.04, 128, 3, "sgd", 0.8007),
    "resnet_finetune": (0.001, 0, 128, 0.01, None, None, "sgd", 0.8312),
}
each_space = pytest.mark.parametrize("name", SPACES)


def fixed(name, **changes):
    return SPACES[name].fixed_values(
        **({"epochs": 9, "image_size": 32, "weights": "imagenet", "seed": 7} | changes)
    )


def test_there_is_a_space_for_each_architecture():
    assert set(SPACES) >= set(PUBLISHED)
    assert len(PUBLISHED) == 13


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_best_is_the_one_of_the_design(name):
    weight_decay, momentum, batch_size, lr, hidden, kernel_size, optimizer, accuracy = PUBLISHED[name]
    config = SPACES[name].config(fixed(name) | SPACES[name].start)
    assert (config.weight_decay, config.batch_size, config.lr) == (weight_decay, batch_size, lr)
    assert config.momentum == (0 if momentum is None else momentum)
    assert (config.model.get("hidden"), config.model.get("kernel_size")) == (hidden, kernel_size)
    assert config.optimizer == optimizer
    assert (config.schedule, config.label_smoothing) == ("cosine", 0)
    assert config.augment in ("none", "crop")  # spaces.py says why
    assert find_space(name).published == accuracy


@each_space
def test_published_best_has_a_value_inside_each_range_and_no_other(name):
    space = SPACES[name]
    assert set(space.start) == set(space.ranges)
    for key, domain in space.ranges.items():
        value = space.start[key]
        if isinstance(domain, Categorical):
            assert value in domain.categories
            assert type(value) in {type(category) for category in domain.categories}
        else:
            assert domain.lower <= value <= domain.upper


@each_space
def test_fixed_values_and_ranges_make_a_whole_config_without_overlap(name):
    space, given = SPACES[name], fixed(name)
    assert not set(given) & set(space.ranges)
    assert set(given) | set(space.ranges) == set(make_config(name).to_dict())
    assert space.config(given | space.start).to_dict() == given | space.start
    assert (given["architecture"], given["epochs"], given["image_size"], given["seed"]) == (name, 9, 32, 7)


@each_space
def test_only_an_architecture_with_a_backbone_gets_weights(name):
    assert fixed(name)["weights"] == ("imagenet" if name.startswith("resnet") else "none")


@each_space
def test_space_gives_the_model_the_arguments_it_takes_and_no_other(name):
    config = fixed(name) | dict(SPACES[name].start)
    given = [key for key in ("hidden", "kernel_size") if key in config]
    assert given == list(own_arguments(name))


@each_space
def test_every_value_of_every_range_builds_a_config(name):
    space = SPACES[name]
    base = fixed(name) | dict(space.start)
    for key, domain in space.ranges.items():
        values = grid_values(domain)
        assert len(values) == len(set(values)) >= 2
        for value in values:
            assert space.config(base | {key: value}).to_dict()[key] == value


@each_space
def test_defaults_of_a_space_make_a_study_with_rungs(name):
    space = SPACES[name]
    assert rung_epochs(1, 3, space.epochs)
    assert space.trials >= 9  # of fewer, ASHA with eta 3 promotes none twice
    assert 0 < space.gpus_per_trial <= 1


def test_misspelt_space_is_an_error_naming_the_nearest():
    with pytest.raises(
        ValueError, match=r"^--space=resnet_cnv is unknown; did you mean resnet_conv\? Choose from: softmax, "
    ):
        find_space("resnet_cnv")
    with pytest.raises(ValueError, match="--space=sofmax is unknown; did you mean softmax"):
        find_space("sofmax")


@pytest.mark.parametrize(("key", "value"), [("epochs", 0), ("image_size", -1), ("seed", -1)])
def test_impossible_value_of_a_study_is_an_error_before_it_starts(key, value):
    with pytest.raises(ValueError, match=f"^{key}={value} is not possible"):
        fixed("softmax", **{key: value})


def test_home_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"data": "~/pets.zip", "data_dir": "~/cache", "weights": "~/w.pth"}
    options = make_options("resnet_conv", image_size=32, **paths)
    found = [options.data, options.data_dir, options.weights]
    assert found == [str(tmp_path / name) for name in ("pets.zip", "cache", "w.pth")]
    assert options.fixed_values()["weights"] == options.weights


def test_fixed_values_are_sampled_no_more():
    options = make_options("convnet", image_size=32, fix={"hidden": 20, "label_smoothing": 0.1})
    assert options.fixed_values()["hidden"] == 20
    assert options.fixed_values()["label_smoothing"] == 0.1
    sampled = [options.suggest(k, []) for k in range(8)]
    assert all(set(values) == set(SPACES["convnet"].ranges) - {"hidden"} for values in sampled)
    assert sampled[0] == {k: v for k, v in SPACES["convnet"].start.items() if k != "hidden"}


def test_a_space_that_is_fixed_altogether_has_one_trial():
    options = make_options("softmax", fix=dict(SPACES["softmax"].start))
    assert [options.suggest(0, []), options.suggest(1, [])] == [{}, None]


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        ({"epochs": 3}, "--fix epochs is not possible; give --epochs"),
        ({"image_size": 64}, "give --image-size"),
        ({"refit": True}, "--fix refit is not possible"),
        ({"lr": -1.0}, "lr=-1.0 is not possible"),
    ],
)
def test_what_cannot_be_fixed(fix, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_options("convnet", fix=fix)


def test_ranges_are_described_in_plain_values():
    plain = described(SPACES["convnet"].ranges)
    assert plain["lr"] == {"low": 1e-3, "high": 3e-2, "log": True}
    assert plain["kernel_size"] == {"values": [5, 7]}
    assert json.loads(json.dumps(plain)) == plain
    assert list(plain) == list(SPACES["convnet"].ranges)
