import itertools
import math
from types import SimpleNamespace

import pandas as pd
import pytest

from tests.configs import make_options
from tests.made_study import spec, write_events
from tunefleet.cli import rounded
from tunefleet.journal import TrialRecord
from tunefleet.metric import Metric
from tunefleet.models.spaces import SPACES
from tunefleet.search.lr_study import (
    best_lr,
    configuration,
    curve_of,
    curve_table,
    extended,
    extension,
    lr_curve,
    lr_grid,
    main,
    new_options,
    parse,
    points_of,
)
from tunefleet.study import Study, write_study


def trial(lr, seed, values, status=None):
    record = TrialRecord(f"{lr}-{seed}", {"lr": lr, "seed": seed})
    for epoch, value in enumerate(values, start=1):
        record.take({"epoch": epoch, "val_accuracy": value})
    record.status = status
    return record


def options_of(*arguments):
    return new_options(*parse([str(argument) for argument in arguments]))


def test_grid_spans_four_decades_around_the_middle():
    grid = lr_grid(1e-3)
    assert len(grid) == 12
    assert grid[0] == pytest.approx(1e-5)
    assert grid[-1] == pytest.approx(1e-1)
    ratios = [high / low for low, high in itertools.pairwise(grid)]
    assert ratios == pytest.approx([10 ** (4 / 11)] * 11, rel=0.01)


def test_points_are_every_lr_of_a_seed_nearest_first_then_the_next_seed():
    made = points_of({"lr": 0.1, "seed": 9, "hidden": 5}, [0.001, 0.01, 0.1, 10.0], [0, 1])
    assert [point["lr"] for point in made[:4]] == [0.1, 0.01, 0.001, 10.0]
    assert [point["seed"] for point in made] == [0] * 4 + [1] * 4
    assert {point["hidden"] for point in made} == {5}


def test_curve_is_over_the_seeds_that_went_furthest():
    trials = [
        trial(0.1, 0, [0.5, 0.7], "done"),
        trial(0.1, 1, [0.5, 0.8], "done"),
        trial(0.1, 2, [0.6]),  # paused at half time
        trial(0.01, 0, [0.3]),
        trial(0.01, 1, [0.4]),
        trial(1.0, 0, [None], "diverged"),
        trial(1.0, 1, [None], "diverged"),
        trial(1e-5, 0, [0.1]),
        trial(1e-5, 1, [0.12]),
    ]
    curve = lr_curve(trials, chance=0.15).set_index("lr")
    assert list(curve.index) == [1e-5, 0.01, 0.1, 1.0]
    assert list(curve.verdict) == ["at chance", "pruned", "done", "diverged"]
    assert curve.loc[0.1, "mean"] == pytest.approx(0.75)
    assert curve.loc[0.1, "sd"] == pytest.approx(0.0707107)
    assert (curve.loc[0.1, "n"], curve.loc[0.1, "seeds"], curve.loc[0.1, "epochs"]) == (2, 3, 2)
    # Student's t for 1 degree of freedom at 97.5 % is 12.706
    assert curve.loc[0.01, "high"] - 0.35 == pytest.approx(12.706 * 0.0707107 / math.sqrt(2), abs=1e-3)
    assert math.isnan(curve.loc[1.0, "mean"])
    assert best_lr(curve.reset_index()) == 0.1


def test_the_best_lr_of_a_loss_is_the_lowest_and_has_no_chance():
    loss = Metric("val_loss", "min")
    trials = [TrialRecord(f"{k}", {"lr": lr, "seed": 0}) for k, lr in enumerate((0.01, 0.1, 1.0))]
    for record, value in zip(trials, (2.5, 1.5, 2.0), strict=True):
        record.take({"epoch": 1, "val_loss": value, "status": "done"})
    spec = {"data": {"classes": []}, "validation_count": 0}  # of a training of its own
    study = SimpleNamespace(metric=loss, spec=spec, records=dict(enumerate(trials)))
    curve = curve_of(study)
    assert list(curve["mean"]) == [2.5, 1.5, 2.0]
    assert set(curve.verdict) == {"done"}
    assert best_lr(curve, loss) == 0.1


def test_close_values_are_told_apart_and_only_1_reads_1():
    trials = [trial(lr, 0, [value], "done") for lr, value in ((0.01231, 0.99998), (0.01234, 1.0))]
    lrs, means, *_ = curve_table(lr_curve(trials, 0.1), 0.01234).columns
    assert list(lrs.cells) == ["0.01231", "0.01234"]
    assert list(means.cells) == ["0.99998", "1.0000"]
    assert [rounded(value) for value in (0.0, 0.00004, 0.12344)] == ["0.0000", "0.00004", "0.1234"]
    assert [rounded(value, "g") for value in (0.99996, 1.0, 1e-6)] == ["0.99996", "1", "1e-06"]


def test_best_is_none_where_nothing_saw_all_epochs():
    assert best_lr(lr_curve([trial(0.1, 0, [None], "diverged")], 0.1)) is None


def test_extension_goes_beyond_the_edge_in_the_grids_ratio():
    assert extended([0.01, 0.1, 1.0], 1.0) == pytest.approx([10, 100, 1000])
    assert extended([0.01, 0.1, 1.0], 0.01) == pytest.approx([0.001, 0.0001, 0.00001])
    with pytest.raises(ValueError, match="lies inside"):
        extended([0.01, 0.1, 1.0], 0.1)


def test_everything_but_lr_is_the_published_best():
    options = options_of("--space", "twolayernn", "--lrs", 0.1, 0.001, "--seeds", 2, "--epochs", 9)
    assert options.trials == 4
    assert {point["lr"] for point in options.points} == {0.1, 0.001}
    for point in options.points:
        assert (point["optimizer"], point["hidden"], point["batch_size"]) == ("adam", 250, 256)
    assert options.rungs == (5,)
    assert options.final_seeds == 0


def make_study(folder, status="done", **options):
    """A study of softmax whose only trial has lr 0.02."""
    best = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.5, "batch_size": 64, "schedule": "cosine"}
    shared = {"data": "digits", "image_size": 32, "weights": "none", "epochs": 1, "pruner": "promote"}
    write_study(folder, spec(space="softmax", rungs=[], options=shared | options))
    events = [
        {"trial_id": "0000", "epoch": 0, "config": best | {"architecture": "softmax", "seed": 0}},
        {"trial_id": "0000", "epoch": 1, "val_accuracy": 0.9, "status": "done"},
    ]
    write_events(folder, events, status)
    return best


def test_configuration_and_data_come_from_a_study(tmp_path):
    best = make_study(tmp_path)
    options = options_of("--space", "softmax", "--from", tmp_path)
    assert options.data == "digits"
    assert options.points[0] == best | {"seed": 0, "lr": pytest.approx(0.02, rel=0.6)}
    with pytest.raises(ValueError, match="is a study of softmax"):
        options_of("--space", "convnet", "--from", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        ([], "give --space"),
        (["--space", "sofmax"], "did you mean softmax?"),
        (["--space", "softmax", "--seeds", 0], "--seeds=0"),
        (["--space", "softmax", "--lrs", 0.1, -1], "--lrs=-1"),
        (["--space", "softmax", "--from", "nowhere"], "holds no study"),
        (["--extend", "nowhere"], "holds no study"),
        (["--resume", "nowhere"], "holds no study"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, needle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert needle in err
    assert list(tmp_path.iterdir()) == []


def test_what_was_searched_by_range_alone_is_kept(tmp_path):
    best = dict(SPACES["softmax"].start) | {"label_smoothing": 0.2, "schedule": "cosine", "seed": 0}
    ranges = {"label_smoothing": {"low": 0.0, "high": 0.3, "log": False}}
    options = make_options("softmax", pruner="none").to_dict()
    write_study(tmp_path, spec(space="softmax", ranges=ranges, options=options))
    write_events(
        tmp_path,
        [
            {"trial_id": "0000", "epoch": 0, "config": best},
            {"trial_id": "0000", "epoch": 1, "val_accuracy": 0.5, "status": "done"},
        ],
    )
    config, _ = configuration(SPACES["softmax"], tmp_path)
    assert config["label_smoothing"] == 0.2


@pytest.mark.parametrize(
    ("status", "points"), [("stopped", [{"lr": 0.02, "seed": 0}]), ("done", None), ("done", [])]
)
def test_what_is_no_finished_learning_rate_study_is_not_extended(tmp_path, status, points):
    make_study(tmp_path, status, points=points)
    with pytest.raises(ValueError, match="no finished learning-rate study"):
        extension(tmp_path)


def test_extension_adds_points_beyond_the_edge_for_every_seed(tmp_path):
    make_study(tmp_path, points=[{"lr": 0.02, "seed": 0}])
    points = extension(tmp_path)
    assert points[0] == {"lr": 0.02, "seed": 0}
    assert [point["seed"] for point in points] == [0] * 4


def test_a_study_that_cannot_continue_is_left_as_it_was(tmp_path, capsys):
    options = make_options("softmax", data="nowhere", image_size=32, pruner="promote").to_dict()
    make_study(tmp_path, **options | {"points": [{"lr": 0.02, "seed": 0}], "trials": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert main(["--extend", str(tmp_path)]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if "lock" not in file.name} == before


@pytest.mark.ray
@pytest.mark.slow
def test_study_at_the_edge_warns_and_extends(data_dir, tmp_path, monkeypatch, capsys):
    """Too small lrs: the best is at the upper edge; --extend adds three values there and resumes."""
    import ray

    monkeypatch.chdir(tmp_path)
    common = ["--data-dir", str(data_dir), "--concurrency", "2"]
    study = ["--space", "softmax", "--data", "digits", "--epochs", "4", "--seeds", "2", "--study-dir", "s"]
    try:
        assert main([*study, "--lrs", "1e-7", "1e-5", "1e-3", *common]) == 0
        out = capsys.readouterr().out
        assert "edge" in out
        assert "--extend s" in out
        curve = pd.read_csv(tmp_path / "s" / "lr_curve.csv").set_index("lr")
        assert curve.done[1e-3] == 2  # both seeds of the best
        assert curve.done.sum() == 3  # and half of the six trials in all
        assert main(["--extend", "s", *common]) == 0
    finally:
        ray.shutdown()
    curve = (tmp_path / "s" / "lr_curve.csv").read_text().splitlines()
    assert [float(row.split(",")[0]) for row in curve[1:]] == [1e-7, 1e-5, 1e-3, 0.1, 10.0, 1000.0]
    assert len(Study(tmp_path / "s").spec["options"]["points"]) == 12
