"""The numbers of a report, on tables small enough to work them out by hand."""

import math

import numpy as np
import pandas as pd
import pytest

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
    top,
)


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
    assert [choice_index(choices, value) for value in (0, 1e-5, "cosine", "False")] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="none of the choices"):
        choice_index(choices, 0.3)
