"""Which hyperparameters are tried next."""

import json
import math

import numpy as np
import pytest
from ray import tune

from tunefleet.search.suggest import SEARCHERS, grid_values, make_sampler, plain

RANGES = {
    "lr": tune.loguniform(1e-4, 1e-1),
    "momentum": tune.choice([0.0, 0.5, 0.9]),
    "warmup_epochs": tune.uniform(0, 2),
    "hidden": tune.randint(8, 65),
    "augment": tune.choice(["none", "crop"]),
    "schedule": tune.choice(["constant", "cosine"]),
}
FIRST = {
    "lr": 0.0123,
    "momentum": 0.9,
    "warmup_epochs": 1.5,
    "hidden": 33,
    "augment": "none",
    "schedule": "cosine",
}
LR = {"lr": RANGES["lr"]}


def accuracy(point):
    """A quadratic of log lr, highest at 0.01."""
    return 1 - (math.log10(point["lr"]) + 2) ** 2 / 4


def suggestions(searcher, count, *, seed=0, first=FIRST, ranges=RANGES):
    """Returns the first points of a sampler that is told each one's value."""
    sampler = make_sampler(searcher, ranges, first, seed)
    points = []
    for number in range(count):
        points.append(sampler.suggest(f"{number:04d}"))
        sampler.observe(f"{number:04d}", accuracy(points[-1]))
    return points


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_first_point_comes_first_and_once(searcher):
    points = suggestions(searcher, 15)
    assert points[0] == FIRST
    assert FIRST not in points[1:]
    assert set(points[1]) == set(FIRST)


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_without_a_first_point_sampling_starts_at_once(searcher):
    assert set(suggestions(searcher, 1, first=None)[0]) == set(RANGES)


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_sampler_leaves_the_first_point_as_it_was(searcher):
    first = dict(FIRST)
    suggestions(searcher, 2, first=first)
    assert first == FIRST


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_same_seed_gives_the_same_points_and_another_seed_others(searcher):
    points = suggestions(searcher, 15)
    assert suggestions(searcher, 15) == points
    assert suggestions(searcher, 15, seed=1) != points


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_values_are_plain_python_types_inside_their_ranges(searcher):
    types = {
        "lr": float,
        "momentum": float,
        "warmup_epochs": float,
        "hidden": int,
        "augment": str,
        "schedule": str,
    }
    for point in suggestions(searcher, 15):
        assert {name: type(value) for name, value in point.items()} == types
        assert json.loads(json.dumps(point)) == point
        assert 1e-4 <= point["lr"] <= 1e-1
        assert 0 <= point["warmup_epochs"] <= 2
        assert 8 <= point["hidden"] <= 65


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_no_point_comes_twice(searcher):
    lrs = [point["lr"] for point in suggestions(searcher, 15)]
    assert len(set(lrs)) == 15


def test_tpe_suggests_nearer_the_optimum_than_random_after_30_observations():
    def median_distance(searcher):
        late = [
            point
            for seed in range(4)
            for point in suggestions(searcher, 50, seed=seed, ranges=LR, first=None)[30:]
        ]
        return np.median([abs(math.log10(point["lr"]) + 2) for point in late])

    # random: half of the decades -4 to -1 lie within 0.75 of -2
    assert median_distance("random") == pytest.approx(0.75, abs=0.2)
    assert median_distance("tpe") < 0.6


def tpe_points_after(told):
    """Suggests 12 points, tells of each as `told` says, and returns 5 more."""
    sampler = make_sampler("tpe", LR, None, 0)
    points = [sampler.suggest(str(number)) for number in range(12)]
    for number, point in enumerate(points):
        for value in told(accuracy(point)):
            sampler.observe(str(number), value)
    return [sampler.suggest(f"next {number}") for number in range(5)]


def test_tpe_believes_the_later_of_two_values_of_a_trial():
    once = tpe_points_after(lambda value: [value])
    assert tpe_points_after(lambda value: [0.5, value]) == once
    assert tpe_points_after(lambda value: [-value, value]) == once
    assert tpe_points_after(lambda value: [-value]) != once


def test_grid_covers_every_combination_once_then_ends():
    ranges = {"momentum": tune.choice([0.0, 0.5, 0.9]), "lr": tune.loguniform(1e-4, 1e-1)}
    sampler = make_sampler("grid", ranges, None, 0)
    points = [sampler.suggest(str(number)) for number in range(3 * 4)]
    combinations = {(point["momentum"], round(math.log10(point["lr"]), 9)) for point in points}
    assert combinations == {(momentum, decade) for momentum in (0.0, 0.5, 0.9) for decade in (-4, -3, -2, -1)}
    assert sampler.suggest("12") is None
    assert sampler.suggest("13") is None


def test_grid_is_shuffled():
    ranges = {"hidden": tune.choice(list(range(20)))}
    order = [point["hidden"] for point in all_points(make_sampler("grid", ranges, None, 0))]
    assert order != sorted(order)
    assert sorted(order) == list(range(20))


def all_points(sampler):
    return list(iter(lambda: sampler.suggest("any"), None))


def test_first_point_on_the_grid_is_not_repeated():
    ranges = {"momentum": tune.choice([0.0, 0.9]), "augment": tune.choice(["none", "crop"])}
    points = all_points(make_sampler("grid", ranges, {"momentum": 0.9, "augment": "crop"}, 0))
    assert len(points) == 4
    assert points[0] == {"momentum": 0.9, "augment": "crop"}


def test_first_point_off_the_grid_is_added_to_it():
    points = all_points(make_sampler("grid", LR, {"lr": 0.0123}, 0))
    assert len(points) == 5
    assert points[0] == {"lr": 0.0123}


def test_grid_of_a_choice_has_all_its_values():
    assert grid_values(tune.choice(["sgd", "adam", None])) == ["sgd", "adam", None]


def test_grid_of_a_uniform_range_is_evenly_spaced_ends_included():
    assert grid_values(tune.uniform(0, 3)) == [0.0, 1.0, 2.0, 3.0]


def test_grid_of_a_log_range_is_evenly_spaced_in_decades_ends_included():
    values = grid_values(tune.loguniform(1e-4, 1e-1))
    assert values == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert (values[0], values[-1]) == (1e-4, 1e-1)  # exactly, or the ends would lie outside


def test_grid_of_integers_has_integers_once_each():
    assert grid_values(tune.randint(5, 6)) in ([5], [5, 6])
    assert all(type(value) is int for value in grid_values(tune.randint(0, 100)))
    assert len(grid_values(tune.randint(0, 100))) == 4


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        (tune.randint(0, 10), [0, 3, 6, 9]),
        (tune.lograndint(1, 1001), [1, 10, 100, 1000]),
        (tune.lograndint(1, 9), [1, 2, 4, 8]),
    ],
)
def test_grid_of_integers_stays_below_the_upper_end(domain, values):
    assert grid_values(domain) == values


@pytest.mark.parametrize(("searcher", "count"), [("tpe", 1), ("grid", 1)])
def test_study_that_searches_nothing_has_one_trial(searcher, count):
    assert len(all_points(make_sampler(searcher, {}, {}, 0))) == count


def test_unknown_searcher_is_an_error_naming_the_nearest():
    with pytest.raises(
        ValueError, match=r"^--searcher=rando is unknown; did you mean random\? Choose from: tpe, "
    ):
        make_sampler("rando", RANGES, None, 0)


@pytest.mark.parametrize(
    ("value", "kind"), [(np.float64(0.5), float), (np.int64(3), int), (np.bool_(True), bool)]
)
def test_plain_turns_numpy_values_into_python_ones(value, kind):
    assert type(plain(value)) is kind
    assert plain(value) == value


@pytest.mark.parametrize("value", [0.5, "cosine", None, True])
def test_plain_leaves_python_values_alone(value):
    assert plain(value) is value
