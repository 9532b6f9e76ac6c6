"""The numbers of a report, on tables small enough to work them out by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from tests.made_study import MSE
from tunefleet.analysis.stats import (
    best_so_far,
    boundary_share,
    choice_index,
    class_accuracy,
    confused_pairs,
    confusion,
    importance,
    largest_of_blocks,
    rung_survival,
    span,
    top,
)
from tunefleet.metric import ACCURACY, Metric


def reports(*rows):
    return pd.DataFrame(rows, columns=["trial_id", "epoch", "val_accuracy", "epoch_seconds", "finished_at"])


def test_best_so_far_follows_the_clock_and_not_the_table():
    table = best_so_far(
        reports(
            ("0000", 1, 0.3, 2.0, 102.0),
            ("0000", 2, 0.5, 2.0, 106.0),
            ("0001", 1, 0.4, 3.0, 103.0),
            ("0002", 1, None, 1.0, 107.0),  # diverged
            ("0003", 1, 0.45, 1.0, 110.0),
        )
    )
    assert table.epochs.tolist() == [1, 2, 3, 4, 5]
    assert table.seconds.tolist() == [2, 3, 6, 7, 10]
    assert table.best.tolist() == [0.3, 0.4, 0.5, 0.5, 0.5]


def test_best_so_far_is_the_lowest_of_a_loss():
    table = reports(
        ("0000", 1, 6e29, 2.0, 102.0),
        ("0001", 1, 30.0, 2.0, 103.0),
        ("0002", 1, None, 1.0, 104.0),
        ("0001", 2, 31.0, 2.0, 105.0),
        ("0001", 3, 17.0, 2.0, 107.0),
    ).rename(columns={"val_accuracy": "val_mse"})
    found = best_so_far(table, MSE)
    assert found.value.tolist()[3:] == [31.0, 17.0]
    assert found.best.tolist() == [6e29, 30.0, 30.0, 30.0, 17.0]


def test_an_axis_shows_what_a_huge_value_would_hide_and_draws_that_at_the_edge():
    values = [17.0, 20.0, 30.0, 37.0, None, 6e29, 9e27, math.inf]
    seen = span(values, MSE)
    assert (seen.low, seen.high, seen.log, seen.beyond) == (17.0, 37.0, False, 2)
    assert seen.edge == pytest.approx(37 + 0.08 * 20)
    assert seen.border == pytest.approx(37 + 0.04 * 20)
    assert seen.drawn([17.0, 6e29, 37.0]).tolist() == [17.0, seen.edge, 37.0]
    assert math.isnan(seen.drawn([math.nan])[0])
    high = span([-1e29, 90.0, 100.0, 80.0], Metric("reward", "max"))
    assert (high.low, high.high, high.beyond) == (80.0, 100.0, 1)
    assert high.edge == pytest.approx(80 - 0.08 * 20)
    assert high.border == pytest.approx(80 - 0.04 * 20)


def test_a_loss_over_several_orders_of_magnitude_is_on_a_log_axis():
    seen = span([2.3, 1.0, 0.1, 0.001, 0.002], MSE)
    assert (seen.low, seen.high, seen.log, seen.beyond) == (0.001, 2.3, True, 0)
    assert not span([0.0, 1.0, 2.3], MSE).log  # 0 has no logarithm
    assert not span([0.001, 1.0, 2.3], Metric("reward", "max")).log


@pytest.mark.parametrize(
    "values", [[], [None], [5.0], [0.0, 0.0, 0.0], [0.0, 1.0], [1.7e308, -1.7e308], [-3.0]]
)
def test_an_axis_of_any_values_has_its_ends(values):
    seen = span(values, MSE)
    assert seen.low <= seen.high
    assert not values or values == [None] or seen.edge > seen.high


def test_an_axis_of_fractions_shows_everything():
    assert span([0.0, 0.5, 1.0], ACCURACY).drawn([0.0, 1.0, -5.0]).tolist() == [0.0, 1.0, -5.0]


def test_rung_survival_counts_the_trials_that_came_so_far():
    trials = pd.DataFrame({"epochs": [1, 1, 1, 3, 3, 9, 0]})
    assert rung_survival(trials, [1, 3], 9).to_dict() == {1: 6, 3: 3, 9: 1}


def test_boundary_share_is_of_the_logarithm_where_the_range_is():
    values = pd.Series([1e-4, 1.2e-4, 1e-2, 0.09])
    assert boundary_share(values, 1e-4, 1e-1, log=True) == {"low": 0.5, "high": 0.25}
    assert boundary_share(values, 1e-4, 1e-1, log=False) == {"low": 0.75, "high": 0.0}
    assert boundary_share(pd.Series([0.05]), 1e-4, 1e-1, log=True) == {"low": 0.0, "high": 0.0}


def test_top_is_a_quarter_and_at_least_one():
    table = pd.DataFrame({"val_accuracy": [0.1, 0.9, 0.5, 0.8, 0.2, 0.3, 0.7, 0.6]})
    assert top(table).val_accuracy.tolist() == [0.9, 0.8]
    assert top(table.head(1)).val_accuracy.tolist() == [0.1]
    assert top(table.rename(columns={"val_accuracy": "val_mse"}), MSE).val_mse.tolist() == [0.1, 0.2]


def test_importance_finds_what_decides():
    rng = np.random.default_rng(1)
    lr = 10 ** rng.uniform(-4, -1, 60)
    table = pd.DataFrame(
        {
            "lr": lr,
            "momentum": rng.choice([0.0, 0.9], 60),
            "schedule": rng.choice(["constant", "cosine"], 60),
            "val_accuracy": 0.9 - 0.1 * (np.log10(lr) + 2) ** 2,
        }
    )
    ranges = {
        "momentum": {"values": [0.0, 0.9]},
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "schedule": {"values": ["constant", "cosine"]},
    }
    found = importance(table, ranges)
    assert found.name.iloc[0] == "lr"
    assert found["mean"].iloc[0] > 0.8
    assert found["mean"].sum() == pytest.approx(1)
    assert (found.sd >= 0).all()
    assert importance(table, ranges).equals(found)


def test_importance_is_not_that_of_one_huge_loss():
    rng = np.random.default_rng(1)
    lr = 10 ** rng.uniform(-4, -1, 60)
    losses = 1 + (np.log10(lr) + 2) ** 2
    losses[7] = 1e29
    table = pd.DataFrame({"momentum": rng.uniform(0, 1, 60), "lr": lr, "val_mse": losses})
    ranges = {
        "momentum": {"low": 0.0, "high": 1.0, "log": False},
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
    }
    found = importance(table, ranges, MSE)
    assert found.name.iloc[0] == "lr"
    assert found["mean"].iloc[0] > 0.8


def test_importance_of_few_or_equal_trials_is_left_out():
    table = pd.DataFrame({"lr": [0.1] * 20, "val_accuracy": [0.5] * 20})
    ranges = {"lr": {"low": 1e-4, "high": 1.0, "log": True}}
    assert importance(table, ranges) is None
    assert importance(table.head(3), ranges) is None
    assert importance(table, {}) is None


def test_confusion_has_the_truth_in_rows():
    predictions = pd.DataFrame({"label": [0, 0, 0, 1, 2], "predicted": [0, 0, 1, 1, 0]})
    counts = confusion(predictions, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    table = class_accuracy(counts)
    assert table.images.tolist() == [3, 1, 1, 0]
    assert table.accuracy.tolist()[:3] == [pytest.approx(2 / 3), 1.0, 0.0]
    assert math.isnan(table.accuracy[3])
    # Wilson, n = 3, k = 2, z = 1.95996
    assert (table.low[0], table.high[0]) == (pytest.approx(0.2077, abs=1e-4), pytest.approx(0.9385, abs=1e-4))


def test_confused_pairs_are_ordered_by_how_often():
    pairs = confused_pairs(np.array([[9, 1, 0], [0, 5, 3], [0, 0, 7]]))
    assert pairs.to_dict("list") == {"label": [1, 0], "predicted": [2, 1], "images": [3, 1]}


def test_blocks_keep_their_largest_cell_and_cover_a_side_that_does_not_divide():
    matrix = np.zeros((5, 5))
    matrix[0, 1], matrix[4, 0], matrix[4, 4] = 0.3, 0.2, 0.9
    assert largest_of_blocks(matrix, 3).tolist() == [[0.3, 0, 0], [0, 0, 0], [0.2, 0, 0.9]]
    assert largest_of_blocks(matrix, 5).tolist() == matrix.tolist()


def test_choices_are_found_as_a_csv_file_writes_them():
    choices = [0.0, 1e-05, "cosine", False]
    assert choice_index([2, None], math.nan) == 1  # beside numbers, null is NaN in a table
    assert [choice_index(choices, value) for value in (0, 1e-5, "cosine", "False")] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="none of the choices"):
        choice_index(choices, 0.3)
