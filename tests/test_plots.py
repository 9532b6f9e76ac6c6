"""What each figure shows of a hand-made study: its data and its labels, not its pixels."""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import plots
from analysis.compared import compare
from analysis.load import load
from tests.made_study import EVIL, write_study


@pytest.fixture
def study(tmp_path):
    """Twelve trials: 0, 4 and 8 saw four epochs, 5 diverged, the others one epoch; rung 1."""
    return load(write_study(tmp_path / "made"))


def points(axes):
    """Returns what was plotted, line by line, as lists of (x, y)."""
    return [list(zip(*(np.round(part, 6) for part in line.get_data()), strict=True)) for line in axes.lines]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    "draw",
    [
        plots.winner_curves,
        plots.all_curves,
        plots.best_so_far,
        plots.rung_survival,
        plots.hyperparameters,
        plots.confusion,
    ],
)
def test_every_axis_names_its_quantity(study, draw):
    shown = [axes for axes in draw(study).axes if axes.get_visible()]
    assert all(axes.get_xlabel() for axes in shown)
    assert shown[0].get_ylabel()


def test_winner_and_its_seeds_are_told_apart(study):
    figure = plots.winner_curves(study)
    _, accuracy = figure.axes
    seed_1, seed_2, training, validation = points(accuracy)
    assert seed_1 == seed_2 == training == [(n, round(0.4 + 0.01 * n, 6)) for n in range(1, 5)]
    assert validation == [(n, round(0.3 + 0.24 * 8 / 12 + 0.05 * n, 6)) for n in range(1, 5)]
    assert legend(figure) == ["its fresh seeds, training", "winner, training", "winner, validation"]


def test_pruned_and_diverged_trials_look_different(study):
    figure = plots.all_curves(study)
    assert legend(figure) == ["pruned (8)", "all epochs (3)"]  # of the diverged one there is nothing to draw
    pruned, whole = figure.axes[0].lines[:2]
    assert (len(pruned.get_xdata()), len(whole.get_xdata())) == (8, 12)
    assert pruned.get_color() != whole.get_color()


def test_rung_survival_counts_stand_on_the_bars(study):
    axes = plots.rung_survival(study).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [12, 3]
    assert [text.get_text() for text in axes.texts] == ["12", "3"]


def test_lr_is_on_a_log_axis_and_the_best_quarter_is_marked(study):
    lr, schedule = plots.hyperparameters(study).axes
    assert (lr.get_xscale(), schedule.get_xscale()) == ("log", "linear")
    others, best = lr.lines
    assert (len(others.get_xdata()), len(best.get_xdata())) == (8, 3)  # a quarter of the 11 that have a value
    assert min(best.get_ydata()) > max(others.get_ydata())
    assert [text.get_text() for text in schedule.get_xticklabels()] == ["constant", "cosine"]


def test_parallel_lines_end_at_val_accuracy(study):
    axes = plots.parallel_coordinates(study).axes[0]
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names == ["lr", "schedule", "val_accuracy"]
    ends = sorted(path.vertices[-1, 1] for drawn in axes.collections for path in drawn.get_paths())
    assert len(ends) == 11
    assert (ends[0], ends[-1]) == (0, 1)
    assert {"35.0%", "57.0%"} <= {text.get_text() for text in axes.texts}  # trials 0 and 11 at epoch 1


def test_confusion_names_rows_and_counts(study):
    axes = plots.confusion(study).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["1", "1", "2", "2"]
    assert [text.get_text() for text in axes.get_yticklabels()] == [plots._short(EVIL), "dog"]


def test_diverged_lr_is_a_cross_below_the_curve(study):
    curve = pd.DataFrame(
        {
            "lr": [0.01, 0.1, 1.0],
            "seeds": 3,
            "mean": [0.5, 0.6, np.nan],
            "low": [0.4, 0.55, np.nan],
            "high": [0.6, 0.65, np.nan],
            "verdict": ["done", "best", "diverged"],
        }
    )
    axes = plots.lr_curves([replace(study, lr_curve=curve)]).axes[0]
    assert points(axes) == [[(0.01, 0.5), (0.1, 0.6)], [(1.0, 0.5)]]
    assert axes.lines[1].get_marker() == "x"
    assert axes.get_xscale() == "log"


def test_interval_of_equal_regrets_is_drawn_in_spite_of_rounding():
    found = np.full((1, 1, 5, 4), 0.1)
    table = compare(found, ["ray_asha"], np.random.default_rng(0)).assign(family="softmax", workers=1)
    table["regret_low"] = table.regret + 1e-17 + np.spacing(0.1)
    plots.schedulers(table).savefig(io.BytesIO())


def test_schedulers_are_told_apart_and_drawn_at_epochs_and_regret():
    found = np.random.default_rng(0).uniform(0.1, 0.2, (3, 2, 20, 4))
    found[..., 0] = np.array([300, 180, 170])[:, None, None]
    names = ["ray_asha", "promote", "top_4"]
    table = compare(found, names, np.random.default_rng(0))
    rows = [
        table.assign(family=family, workers=workers) for family in ("softmax", "$x$") for workers in (1, 8)
    ]
    figure = plots.schedulers(pd.concat(rows))
    assert [axes.get_title() for axes in figure.axes] == [
        "softmax, 1 at once",
        "softmax, 8 at once",
        r"\$x\$, 1 at once",
        r"\$x\$, 8 at once",
    ]
    assert legend(figure) == names
    assert all(axes.get_xlabel() and axes.get_xscale() == "log" for axes in figure.axes)
    assert "regret" in figure.axes[0].get_ylabel()
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    drawn = {(line.get_marker(), line.get_markerfacecolor() == "none"): line for line in lines}
    assert len(drawn) == 6
    promote = drawn["o", False]
    assert promote.get_xdata()[0] == 180
    assert promote.get_ydata()[0] == pytest.approx(found[1, :, :, 2].mean())
    assert drawn["o", True].get_ydata()[0] == pytest.approx(found[1, :, :, 3].mean())
    figure.savefig(io.BytesIO())
