"""Curves of studies and of tables: read, checked, written and read again."""

import json
import sys

import numpy as np
import pandas as pd
import pytest

from tests.made_study import write_study
from tunefleet.analysis.curves import COLUMNS, curves_of, read, table_of
from tunefleet.analysis.load import load
from tunefleet.analysis.replay import main as replay
from tunefleet.analysis.replay import pick, reports_of, scheduler_of
from tunefleet.analysis.simulate import simulate
from tunefleet.benchmarks.curves import main, new_options, parse, points, write_table
from tunefleet.search.run import main as run
from tunefleet.search.spaces import SPACES

OPTIONS = {"pruner": "none", "epochs": 4, "fix": None}


@pytest.fixture
def study(tmp_path):
    """Twelve trials of four epochs without pruner; trial 5 diverged at the last one."""
    return write_study(tmp_path / "made", rungs=())


def change(folder, **facts):
    file = folder / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def change_trials(folder, **columns):
    table = pd.read_csv(folder / "trials.csv", dtype={"trial_id": "str"})
    table.assign(**columns).to_csv(folder / "trials.csv", index=False)


def test_trials_of_one_seed_are_a_configuration_each(study):
    curves = read(str(study))
    assert curves.seeds == (0,)
    assert curves.accuracy.shape == (1, 12, 4)
    assert curves.accuracy[0, 3] == pytest.approx([0.3 + 0.24 * 3 / 12 + 0.05 * n for n in range(1, 5)])
    assert np.isnan(curves.accuracy[0]).sum(axis=1).tolist() == [0] * 5 + [1] + [0] * 6
    assert (curves.seconds == 1).all()


def test_trials_that_differ_in_their_seed_alone_are_one_configuration(study):
    pairs = np.arange(12) // 2
    change_trials(study, lr=0.1 / (pairs + 1), schedule="cosine", seed=np.arange(12) % 2)
    curves = read(str(study))
    assert curves.seeds == (0, 1)
    assert curves.accuracy.shape == (2, 6, 4)
    # trials 6 and 7 are configuration 3
    assert curves.accuracy[:, 3, 0] == pytest.approx([0.35 + 0.02 * 6, 0.35 + 0.02 * 7])
    assert np.isnan(curves.accuracy[1, 2, 3])  # trial 5


def test_a_choice_that_was_drawn_twice_is_two_configurations(study):
    change_trials(study, lr=0.1, schedule="cosine", hidden=np.nan)
    assert read(str(study)).accuracy.shape == (1, 12, 4)


def test_a_diverged_trial_has_no_value_at_its_last_epoch_though_it_reported_one(study):
    change_trials(study, status=["diverged" if k in (2, 5) else "done" for k in range(12)])
    curves = read(str(study))
    assert np.isnan(curves.accuracy[0, 2, 3])
    assert np.isnan(curves.loss[0, 2, 3])
    assert curves.accuracy[0, 2, 2] > 0


def test_a_failed_trial_is_lost_in_the_epoch_that_it_did_not_report(study):
    epochs = pd.read_parquet(study / "epochs.parquet")
    lost = ((epochs.trial_id == "0003") & (epochs.epoch > 2)) | (epochs.trial_id == "0004")
    epochs[~lost].to_parquet(study / "epochs.parquet")
    statuses = ["done"] * 3 + ["error", "out_of_memory", "diverged"] + ["done"] * 6
    change_trials(study, status=statuses, epochs=[4, 4, 4, 2, 0] + [4] * 7)
    curves = read(str(study))
    assert np.isfinite(curves.accuracy[0]).sum(axis=1).tolist() == [4, 4, 4, 2, 0, 3] + [4] * 6
    assert curves.seconds[0, 3, :3].tolist() == [1, 1, 0]
    assert curves.seconds[0, 4, 0] == 0


@pytest.mark.parametrize("rungs", [(1,), (1, 2)])
def test_a_pruned_study_is_one_line_that_says_how_to_record_one(tmp_path, rungs, capsys):
    folder = write_study(tmp_path / "pruned", rungs=rungs)
    assert replay([str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "was pruned (--pruner promote)" in err
    assert "--pruner none" in err


def test_a_study_that_is_not_done_has_no_curves_and_its_table_is_not_written(study, tmp_path):
    change(study, status="stopped")
    with pytest.raises(ValueError, match=r"is not done; resume it: tunefleet resume"):
        read(str(study))
    with pytest.raises(ValueError, match="is not done"):
        write_table(study, tmp_path / "out.csv")
    assert not list(tmp_path.glob("out*"))


def rows(*ends, epochs=3):
    """Returns a table of a configuration per end: the number of epochs that it has."""
    return pd.DataFrame(
        [(k, 0, n, 0.1 * n, 1.0, 1.0) for k, end in enumerate(ends) for n in range(1, end + 1)],
        columns=list(COLUMNS),
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (rows(), "^made has no curves; record one: .*--pruner none"),
        (rows(3, 2), "^made: configuration 1, seed 0 has 2 of 3 epochs and did not diverge; record one"),
        (rows(3, 3).drop(index=1), "^made: configuration 0, seed 0 lacks an epoch"),
        (pd.concat([rows(3), rows(3)]), "^made: configuration 0, seed 0 lacks an epoch"),
        (rows(3, 3).replace({"epoch_seconds": {1.0: np.nan}}), "lacks seconds"),
        (rows(3, 3).assign(seed=[0, 0, 0, 1, 1, 1]), "configuration 0, seed 1 has 0 of 3 epochs"),
        (rows(3, 3).assign(val_accuracy=[0.1, 0.2, np.nan] * 2), "every configuration diverged"),
        (rows(3, 3).assign(val_accuracy=[0.1, np.nan, 0.2] * 2), "lacks an epoch"),
    ],
)
def test_what_cannot_be_replayed_is_named(table, message):
    with pytest.raises(ValueError, match=message):
        curves_of("made", table)


def test_a_file_that_is_no_table_of_curves_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("trial_id,lr\n1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv is no table of curves \(there is no column conf"):
        read(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("")
    for place in ("b.csv", "none.csv"):
        with pytest.raises(ValueError, match=f"{place} is no table of curves"):
            read(str(tmp_path / place))


def test_points_are_the_published_best_then_random_ones_each_with_every_seed():
    made = points("twolayernn", None, count=4, seed=7, seeds=2)
    assert [point["seed"] for point in made] == [7, 8] * 4
    assert made[0] == {**SPACES["twolayernn"].published, "seed": 7}
    configurations = [{**point, "seed": 0} for point in made]
    assert configurations[::2] == configurations[1::2]
    assert len({point["lr"] for point in made}) == 4
    assert made == points("twolayernn", None, count=4, seed=7, seeds=2)
    fixed = points("convnet", {"hidden": 16, "kernel_size": 3}, count=2, seed=0, seeds=1)
    assert all("hidden" not in point and "lr" in point for point in fixed)
    with pytest.raises(ValueError, match="leaves nothing to sample"):
        points("softmax", dict.fromkeys(SPACES["softmax"].ranges, 0.1), count=2, seed=0, seeds=1)


def options_of(*arguments):
    return new_options(*parse([*map(str, arguments), "--out", "out.csv"]))


def test_recording_is_a_study_without_pruner_and_final_seeds():
    options = options_of("--space", "softmax", "--trials", 5, "--epochs", 3, "--seed", 4, "--fix", "lr=0.1")
    assert (options.pruner, options.rungs, options.final_seeds) == ("none", (), 0)
    assert (options.trials, options.epochs, options.fix) == (10, 3, {"lr": 0.1})
    assert {point["seed"] for point in options.points} == {4, 5}
    assert options_of("--space", "twolayernn").trials == 2 * SPACES["twolayernn"].trials


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--out", "x.csv"], "give --space"),
        (["--out", "x.csv", "--space", "sofmax"], "did you mean softmax?"),
        (["--out", "x.csv", "--space", "softmax", "--seeds", "0"], "--seeds=0"),
        (["--out", "x.csv", "--space", "softmax", "--trials", "0"], "--trials=0"),
        (["--out", "x.txt", "--space", "softmax"], "--out=x.txt is not possible"),
        (["--out", "none/x.csv", "--space", "softmax"], "--out=none/x.csv is not possible"),
        (["--out", "x.csv", "--resume", "nowhere"], "holds no study"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, needle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert needle in err
    assert list(tmp_path.iterdir()) == []


def test_a_study_of_another_script_is_not_gone_on_with(study, tmp_path, capsys):
    change(study, options=OPTIONS | {"points": None})
    assert main(["--resume", str(study), "--out", str(tmp_path / "x.csv")]) == 2
    assert "is a study of another script" in capsys.readouterr().err


@pytest.fixture(scope="module")
def recorded(data_dir, tmp_path_factory):
    """Records six configurations with two seeds over four epochs, then runs the same search with promote."""
    import ray

    folder = tmp_path_factory.mktemp("recorded")
    common = ["--space", "softmax", "--data", "digits", "--trials", "6", "--epochs", "4", "--seed", "3"]
    common += ["--data-dir", str(data_dir)]
    search = ["--searcher", "random", "--pruner", "promote", "--concurrency", "1", "--final-seeds", "0"]
    try:
        out = ["--study-dir", str(folder / "s"), "--out", str(folder / "c.csv"), "--concurrency", "2"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["benchmarks/curves.py", *common, *out])
            assert main([*common, *out]) == 0
        assert run([*common, *search, "--study-dir", str(folder / "p"), "--wandb", "off"]) == 0
    finally:
        ray.shutdown()
    return folder


@pytest.mark.ray
def test_recorded_table_says_what_the_study_does(recorded):
    file, study = recorded / "c.csv", recorded / "s"
    table, exact = pd.read_csv(file), table_of(load(study))
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 6 * 2 * 4
    pd.testing.assert_frame_equal(table, exact, check_dtype=False, rtol=1e-3)
    assert read(str(recorded / "c.csv")).accuracy == pytest.approx(
        read(str(recorded / "s")).accuracy, abs=1e-5
    )
    told = json.loads((recorded / "c.json").read_text())
    assert told["command"].startswith(
        "python -m tunefleet.benchmarks.curves --space softmax --data digits --trials 6"
    )
    assert told["configurations"][0] == dict(SPACES["softmax"].published)
    assert len(told["configurations"]) == 6
    assert (told["data"], told["epochs"], told["seeds"]) == ("digits", 4, [3, 4])
    assert {"commit", "machine", "data_sha256"} <= told.keys()
    assert told["ranges"]["lr"] == {"low": 1e-4, "high": 0.1, "log": True}


@pytest.mark.ray
def test_table_is_written_again_from_the_finished_study(recorded, tmp_path):
    assert main(["--resume", str(recorded / "s"), "--out", str(tmp_path / "again.csv")]) == 0
    assert (tmp_path / "again.csv").read_text() == (recorded / "c.csv").read_text()


@pytest.mark.ray
def test_a_real_search_spends_what_its_replay_does(recorded):
    """The same configurations in the same order, one worker: trial by trial the same epochs, and winner."""
    curves, real = read(str(recorded / "s")), load(recorded / "p")
    reports, seconds = reports_of(curves, 0)
    order = list(range(6))
    seen, _ = simulate(scheduler_of("promote")(order, (1, 3), 3, 4), reports, seconds, workers=1)
    assert seen.tolist() == real.trials.epochs.tolist()
    assert 6 < sum(seen) < 6 * 4
    assert f"{pick(seen, reports, order):04d}" == real.facts["best"]["trial_id"]
