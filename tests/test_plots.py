"""What each figure shows of a hand-made study: its data and its labels, not its pixels."""

import io
import warnings
from itertools import pairwise, product

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.text import Text

from tests.made_study import EVIL, change, edit_events, with_changes, write_own_study, write_study
from tunefleet.analysis import plots, stats
from tunefleet.analysis.load import load
from tunefleet.analysis.report import figures
from tunefleet.metric import Metric


@pytest.fixture
def study(tmp_path):
    """Twelve trials: 0, 4 and 8 saw four epochs, 5 diverged, the others one epoch; rung 1."""
    return load(write_study(tmp_path / "made"))


def points(axes):
    """Return what was plotted, line by line, as lists of (x, y)."""
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


def test_winner_and_its_seeds_look_different(study):
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


def test_rung_survival_counts_are_on_the_bars(study):
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
    axes = plots.lr_curves([with_changes(study, lr_curve=curve)]).axes[0]
    assert points(axes) == [[(0.01, 0.5), (0.1, 0.6)], [(1.0, 0.5)]]
    assert axes.lines[1].get_marker() == "x"
    assert axes.get_xscale() == "log"
    loss = with_changes(study, lr_curve=curve, metric=Metric("val_loss", "min"))
    axes = plots.lr_curves([loss]).axes[0]
    assert axes.get_ylabel() == "val_loss"
    assert points(axes)[1] == [(1.0, 0.6)]  # beside the worst


def drawn(figure):
    """Draw a figure, so that its ticks are there; a warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="svg")
    return figure


def labelled(axis):
    """Return (value, label) of the ticks that are seen."""
    low, high = sorted(axis.get_view_interval())
    ticks = [(tick.get_loc(), tick.label1.get_text()) for tick in axis.get_major_ticks()]
    return [(location, label) for location, label in ticks if low <= location <= high and label]


@pytest.mark.parametrize(
    ("low", "high"), [(0.2, 0.3), (0.0, 1.0), (0.1, 0.106), (0.99981, 0.99984), (0.5, 0.5)]
)
def test_every_percent_label_is_the_value_of_its_tick(tmp_path, low, high):
    folder = write_study(tmp_path / "made")
    rng = np.random.default_rng(0)

    def edit(event):
        drawn = {name: rng.uniform(low, high) for name in ("train_accuracy", "val_accuracy")}
        return event | {name: value for name, value in drawn.items() if event.get(name) is not None}

    edit_events(folder, edit)
    study = load(folder)
    curve = pd.DataFrame({"lr": [0.01, 0.1], "seeds": 3, "mean": [low, high], "low": low, "high": high})
    for figure in (
        *figures(study).values(),
        plots.lr_curves([with_changes(study, lr_curve=curve.assign(verdict="done"))]),
    ):
        for axes in (axes for axes in drawn(figure).axes if axes.get_visible()):
            for axis in (axes.xaxis, axes.yaxis):
                found = [(location, label) for location, label in labelled(axis) if label.endswith("%")]
                assert len({label for _, label in found}) == len(found)
                for location, label in found:
                    assert float(label.removesuffix("%")) == pytest.approx(100 * location, abs=1e-9)


def test_the_ends_of_parallel_coordinates_differ_where_their_values_do(study):
    epochs = study.epochs.assign(val_accuracy=[0.97021 + 0.00001 * k for k in range(len(study.epochs))])
    axes = plots.parallel_coordinates(with_changes(study, epochs=epochs)).axes[0]
    ends = [text.get_text() for text in axes.texts if text.get_text().endswith("%")]
    assert len(set(ends)) == len(ends) == 2


def test_one_epoch_has_whole_ticks_and_its_points_are_seen(tmp_path):
    study = load(write_study(tmp_path / "made", trials=9, epochs=1, rungs=()))
    for figure in (plots.winner_curves(study), plots.all_curves(study), plots.best_so_far(study)):
        for location, label in labelled(drawn(figure).axes[0].xaxis):
            assert location == int(location) == int(label)
    assert {line.get_marker() for axes in plots.winner_curves(study).axes for line in axes.lines} == {"."}


@pytest.mark.parametrize("seconds", [(300, 310), (0.0, 5), (40, 90_000), (5e5, 2e6)])
def test_seconds_have_ticks_with_their_own_values(study, seconds):
    studies = [with_changes(study, facts=study.facts | {"seconds": s}) for s in seconds]
    found = labelled(drawn(plots.accuracy_against_seconds(studies)).axes[0].xaxis)
    assert len(found) >= 2
    assert all(float(label.replace(",", "")) == pytest.approx(location) for location, label in found)


def test_of_many_studies_those_are_named_unless_another_is_faster_and_better(study):
    final = study.facts["final"]
    studies = [
        with_changes(
            study,
            facts=study.facts
            | {"space": f"s{k}", "seconds": 100.0 * (k + 1)}
            | {"final": final | {"test_accuracy": final["test_accuracy"] | {"mean": mean}}},
        )
        for k, mean in enumerate([0.5, 0.4, 0.6, 0.55] + [0.1] * 26)
    ]
    texts = plots.accuracy_against_seconds(studies).axes[0].texts
    assert [text.get_text() for text in texts] == ["s0", "s2"]
    assert len(plots.accuracy_against_seconds(studies[:4]).axes[0].texts) == 4


def test_no_two_of_25_learning_rate_studies_look_alike(study):
    curve = pd.DataFrame({"lr": [0.01, 0.1], "seeds": 1, "mean": 0.5, "low": np.nan, "high": np.nan})
    studies = [with_changes(study, lr_curve=curve.assign(verdict="done"))] * 25
    figure = drawn(plots.lr_curves(studies))
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 25
    assert legend(figure)[0].endswith("(1 seed)")
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


NAMES = (
    "$a_b$",
    r"\$x",
    "100 %",
    "[bold]",
    "line\nbreak",
    "caf\udce9",
    "猫",
    "ไทย",
    "🐱",
    "_x",
    "^",
    "a" * 90,
    "\u202eevil",
)


def test_names_of_all_kinds_are_drawn_without_a_warning_and_stay_apart(tmp_path):
    study = load(write_study(tmp_path / "made", classes=NAMES))
    for figure in figures(study).values():
        drawn(figure)
    shown = [label.get_text() for label in plots.confusion(study).axes[0].get_yticklabels()]
    assert len(set(shown)) == len(NAMES)
    assert max(map(len, shown)) <= 20
    assert shown[0] == r"\$a_b\$"  # matplotlib draws $a_b$
    assert {r"line\nbreak", r"caf\xe9", "100 %", "[bold]"} <= set(shown)


def test_names_that_begin_alike_are_distinct_by_their_number():
    names = ["Passer domesticus female", "Passer domesticus male", "Passer montanus"]
    assert plots._shorts(names) == ["Passer domesti… #0", "Passer domesti… #1", "Passer montanus"]


def test_a_character_without_a_font_is_drawn_as_its_number_and_with_one_as_itself(tmp_path):
    character = "\U0001f9ff"  # in no font that matplotlib brings
    assert plots._short(f"a {character}") == r"a \U0001f9ff"
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 500), (500, 500), (500, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "nazar"])
    font.setupCharacterMap({ord(character): "nazar"})
    font.setupGlyf({".notdef": pen.glyph(), "nazar": pen.glyph()})
    font.setupHorizontalMetrics(dict.fromkeys((".notdef", "nazar"), (600, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Nazar", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWeightClass=400)
    font.setupPost()
    font.save(tmp_path / "nazar.ttf")
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "nazar.ttf")
    try:
        style = plots.style(["a", character])
        assert style["font.family"] == ["DejaVu Sans", "Nazar"]
        assert plots.style(["a"])["font.family"] == ["DejaVu Sans"]
        with mpl.rc_context(style):
            assert plots._short(f"a {character}") == f"a {character}"
            figure, axes = plots._axes()
            axes.set_xlabel(character)
            drawn(figure)
    finally:
        font_manager.fontManager.ttflist[:] = before


MANY_RANGES = {
    f"hyperparameter_{k}": [
        {"low": 1e-4, "high": 0.1, "log": True},
        {"low": 0.0, "high": 1.0, "log": False},
        {"values": [2**n for n in range(40)]},
        {"values": ["constant", "cosine", "exponential decay", "one cycle"]},
    ][k % 4]
    for k in range(20)
}


@pytest.mark.parametrize(
    "size",
    [
        {"classes": tuple(f"class {k}" for k in range(1000))},
        {"classes": tuple(f"class {k}" for k in range(40))},
        {"ranges": MANY_RANGES},
        {"trials": 30, "epochs": 300, "rungs": (1, 2, 4, 8, 16, 32, 64, 128, 256), "eta": 2},
        {"trials": 2000, "rungs": (1,)},
        {"trials": 1, "epochs": 1, "rungs": ()},
    ],
    ids=["1,000 classes", "40 classes", "20 hyperparameters", "300 epochs", "2,000 trials", "1 trial"],
)
def test_large_studies_have_figures_of_a_page_whose_ticks_do_not_overlap(tmp_path, size):
    study = load(write_study(tmp_path / "made", **size))
    with mpl.rc_context(plots.style([])):
        for name, figure in figures(study).items():
            drawn(figure)
            width, height = figure.get_size_inches()
            assert width <= 11, name
            assert height <= 30, name
            for axes, axis in product(figure.axes, ("xaxis", "yaxis")):
                boxes = [
                    label.get_window_extent()
                    for label in getattr(axes, axis).get_ticklabels()
                    if label.get_text() and label.get_rotation() in (0, 90) and axes.get_visible()
                ]
                seen = [box for box in boxes if box.y1 > 0 and box.x1 > 0]
                crowded = sum(a.overlaps(b) for a, b in pairwise(seen))
                assert not crowded, f"{name}: {crowded} tick labels overlap"
            letters = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
            assert min(letters) >= 6, name


def test_a_thousand_classes_show_the_worst_and_every_confusion(tmp_path):
    study = load(write_study(tmp_path / "made", classes=tuple(f"class {k}" for k in range(1000))))
    matrix = plots.confusion(study).axes[0].images[0].get_array()
    assert matrix.shape == (plots.CELLS, plots.CELLS)  # cells of 5 × 5
    assert matrix[0, 0] == 6 / 8
    assert (
        matrix[0, 1] == matrix[-1, 0] == 1 / 8
    )  # class 4 said to be 5, class 999 to be 0: seen in spite of 5 × 5
    assert [text.get_text() for text in plots.class_accuracy(study).axes[1].get_yticklabels()] == [
        f"class {k}" for k in range(plots.WORST)
    ]
    pairs = plots.confused_pairs(study).axes[0]
    assert pairs.get_yticklabels()[0].get_text() == "class 0 → class 1"


def test_few_classes_need_no_list_of_confusions(study):
    assert plots.confused_pairs(study) is None


def test_best_so_far_is_a_few_steps_of_many_reports(tmp_path):
    study = load(write_study(tmp_path / "made", trials=2000))
    axes = plots.best_so_far(study).axes[0]
    steps = axes.lines[1].get_ydata()
    assert len(steps) < len(study.epochs) / 2
    assert (np.diff(steps) >= 0).all()
    assert steps[-1] == stats.best_so_far(study.epochs).best.iloc[-1]


def test_millions_of_epochs_are_read_at_their_ticks(study):
    epochs = pd.concat([study.epochs] * 10_000, ignore_index=True)
    axes = drawn(plots.best_so_far(with_changes(study, epochs=epochs))).axes[0]
    assert axes.xaxis.get_offset_text().get_text() == ""
    assert {label[-1] for location, label in labelled(axes.xaxis) if location} == {"k"}


def test_val_accuracies_of_exactly_0_are_drawn(tmp_path):
    folder = write_study(tmp_path / "made")
    edit_events(folder, lambda event: event | ({"val_accuracy": 0.0} if event["epoch"] else {}))
    study = load(folder)
    assert len(stats.comparable(study)) == 12
    assert [line.get_ydata().tolist() for line in plots.best_so_far(study).axes[0].lines[:1]] == [[0.0] * 21]
    for figure in figures(study).values():
        drawn(figure)


@pytest.fixture
def own(tmp_path):
    """The same study of a loss: trial 8 ends at 34; trials 1 and 3 are at 1e29 and 1e27."""
    folder = write_own_study(tmp_path / "own")
    huge = {"0001": 1e29, "0003": 1e27}
    edit_events(
        folder,
        lambda e: e | ({"val_mse": huge[e["trial_id"]]} if e["epoch"] and e["trial_id"] in huge else {}),
    )
    return load(folder)


def test_a_loss_has_plain_numbers_and_huge_values_are_at_the_edge(own):
    for draw in (plots.all_curves, plots.best_so_far, plots.hyperparameters):
        axes = drawn(draw(own)).axes[0]
        assert axes.get_ylabel() == "val_mse"
        assert axes.get_ylim()[1] < 100
        assert not any(label.endswith("%") for _, label in labelled(axes.yaxis))
        assert axes.get_title(loc="right") == "2 values far above, drawn beyond the dotted line"


def test_a_loss_falls_as_the_best_is_found(own):
    best = plots.best_so_far(own).axes[0].lines[1]
    assert (np.diff(best.get_ydata()) <= 0).all()
    assert best.get_ydata()[-1] == 34.0


def test_the_best_quarter_of_a_loss_is_the_lowest(own):
    others, best = plots.hyperparameters(own).axes[0].lines[:2]
    assert max(best.get_ydata()) < min(others.get_ydata())
    texts = [text.get_text() for text in plots.parallel_coordinates(own).axes[0].texts]
    assert texts[-3:] == ["43", "65", "beyond"]  # trials 11 and 0 at epoch 1


def test_winner_of_an_own_training_is_drawn_by_what_it_reports(own):
    (axes,) = plots.winner_curves(own).axes
    seed_1, _, training, validation = points(axes)
    assert seed_1 == [(n, 36.0) for n in range(1, 5)]
    assert training == [(n, round(1 / n, 6)) for n in range(1, 5)]
    assert validation == [(n, 54.0 - 5 * n) for n in range(1, 5)]
    assert axes.get_ylabel() == "mse"
    labels = [line.get_label() for line in axes.lines]
    assert [label for label in labels if label[0] != "_"] == [
        *("its fresh seeds", "winner, training", "winner, validation")
    ]


def test_another_metric_of_images_is_drawn_beside_loss_and_accuracy(tmp_path):
    folder = write_study(tmp_path / "made")
    change(folder, metric={"name": "val_macro_f1", "mode": "max"})
    edit_events(folder, lambda e: e | ({"val_macro_f1": e["val_accuracy"]} if e["epoch"] else {}))
    shown = [axes for axes in drawn(plots.winner_curves(load(folder))).axes if axes.get_visible()]
    assert [axes.get_ylabel() for axes in shown] == ["loss", "accuracy", "macro_f1"]


def test_losses_over_many_orders_of_magnitude_are_on_a_log_axis(tmp_path):
    folder = write_own_study(tmp_path / "own")

    def edit(event):
        value = event.get("val_mse")
        return event if value is None else event | {"val_mse": 10.0 ** -(value / 20)}

    edit_events(folder, edit)
    study = load(folder)
    for figure in figures(study).values():
        drawn(figure)
    edit_events(folder, lambda e: e | ({"val_mse": e["val_mse"] ** 3} if e.get("val_mse") else {}))
    assert plots.all_curves(load(folder)).axes[0].get_yscale() == "log"
    by_epochs, by_seconds = drawn(plots.best_so_far(load(folder))).axes
    assert labelled(by_epochs.yaxis)
    assert not any(tick.label1.get_visible() for tick in by_seconds.yaxis.get_major_ticks())
    for figure in figures(load(folder)).values():
        drawn(figure)


@pytest.mark.parametrize("name", ["reward", "$x$", "größe", "val_" + "long_" * 20])
@pytest.mark.parametrize("value", [0.0, -1e29, 1e29, 1e-300, 1.5e308, 7])
def test_a_metric_of_any_name_and_value_is_drawn(tmp_path, name, value):
    folder = write_own_study(tmp_path / "own", Metric(name, "max"))
    edit_events(
        folder, lambda e: e | ({name: value} if e.get(name) and e["trial_id"] in ("0001", "0004") else {})
    )
    for figure in figures(load(folder)).values():
        drawn(figure)
