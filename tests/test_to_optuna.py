"""What optuna loads back is the study: numbers, states, values, ranges, and no trial twice."""

import sqlite3
from contextlib import closing

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from tests.made_study import change, edit_events, write_own_study, write_study
from tunefleet.analysis import to_optuna
from tunefleet.analysis.load import load
from tunefleet.analysis.report import main


@pytest.fixture
def folder(tmp_path):
    return write_study(tmp_path / "a study")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'x.db'}"


def test_optuna_loads_the_same_numbers(folder, url):
    assert main([str(folder), "--optuna", url]) == 0
    study, ours = optuna.load_study(study_name="a study", storage=url), load(folder)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.user_attrs["test_accuracy"]["mean"] == 0.6543
    assert [trial.number for trial in study.trials] == list(range(12))
    states = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "diverged": TrialState.FAIL}
    for trial, row in zip(study.trials, ours.trials.to_dict("records"), strict=True):
        assert trial.state == states[row["status"]]
        assert trial.user_attrs["status"] == row["status"]
        assert trial.params == {"lr": row["lr"], "schedule": row["schedule"]}
        assert trial.value == (None if row["status"] == "diverged" else row["val_accuracy"])
        rows = ours.epochs[ours.epochs.trial_id == row["trial_id"]].dropna(subset="val_accuracy")
        assert trial.intermediate_values == dict(zip(rows.epoch, rows.val_accuracy, strict=True))
        assert (trial.datetime_complete - trial.datetime_start).total_seconds() == row["seconds"]
    assert study.best_trial.number == 8  # of the four that are done, the one with the highest accuracy
    lr, schedule = (study.trials[0].distributions[name] for name in ("lr", "schedule"))
    assert (lr.low, lr.high, lr.log) == (1e-4, 0.1, True)
    assert schedule.choices == ("constant", "cosine")


@pytest.mark.parametrize("tested", [True, False])
def test_a_loss_is_minimised_and_its_values_are_those_of_the_study(tmp_path, url, tested):
    folder = write_own_study(tmp_path / "own", tested=tested)
    at = ("0003", 1)
    edit_events(folder, lambda e: e | ({"val_mse": 1e29} if (e["trial_id"], e["epoch"]) == at else {}))
    assert main([str(folder), "--optuna", url]) == 0
    study = optuna.load_study(study_name="own", storage=url)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert (study.best_trial.number, study.best_value) == (8, 34.0)
    assert study.trials[3].value == 1e29
    assert study.trials[8].intermediate_values == {1: 49.0, 2: 44.0, 3: 39.0, 4: 34.0}
    assert study.user_attrs["metric"] == "val_mse"
    name, mean = ("test_mse", 34.57) if tested else ("val_mse", 35.0)
    assert study.user_attrs[name]["mean"] == pytest.approx(mean)


def test_lists_and_null_among_choices_are_exported(tmp_path, url):
    ranges = {"layers": {"values": [[64], [64, 32]]}, "dropout": {"values": [None, 0.5]}}
    folder = write_own_study(tmp_path / "own", ranges=ranges)
    assert main([str(folder), "--optuna", url]) == 0
    trials = optuna.load_study(study_name="own", storage=url).trials
    assert {trial.params["layers"] for trial in trials} == {"[64]", "[64, 32]"}
    assert {trial.params.get("dropout") for trial in trials} == {None, 0.5}


def test_exporting_twice_adds_nothing(folder, url, capsys):
    for said in ("added to", "is already in"):
        assert main([str(folder), "--optuna", url]) == 0
        assert said in capsys.readouterr().out
    assert len(optuna.load_study(study_name="a study", storage=url).trials) == 12


def test_another_study_of_that_name_is_left_alone(folder, url, capsys):
    optuna.create_study(study_name="a study", storage=url).add_trial(optuna.trial.create_trial(value=1.0))
    assert main([str(folder), "--optuna", url]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "optuna delete-study" in error
    assert len(optuna.load_study(study_name="a study", storage=url).trials) == 1


def test_study_without_ranges_gets_those_of_its_values(folder, url):
    change(folder, ranges={})
    assert main([str(folder), "--optuna", url]) == 0
    trials = load(folder).trials
    lr = optuna.load_study(study_name="a study", storage=url).trials[0].distributions["lr"]
    assert (lr.low, lr.high, lr.log) == (trials.lr.min(), trials.lr.max(), True)


@pytest.mark.parametrize("bad", ["nonsense", "sqlite:////no/such/folder/x.db", "nosuch://a/b"])
def test_bad_url_is_one_line(folder, bad, capsys):
    assert main([str(folder), "--optuna", bad]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --optuna={bad} cannot be used")
    assert error.count("\n") == 1


def test_missing_trial_is_an_error_and_shifts_no_number(folder, url, capsys):
    edit_events(folder, lambda event: None if event["trial_id"] == "0003" else event)
    assert main([str(folder), "--optuna", url]) == 2
    assert "lacks trial 0003" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tables", [["customers"], ["trials", "studies"], ["trials", "studies", "version_info"]], ids=str
)
def test_a_database_of_another_program_is_refused_unchanged(folder, tmp_path, url, tables, capsys):
    with closing(sqlite3.connect(tmp_path / "x.db")) as database, database:
        for table in tables:
            database.execute(f"create table {table} (name text)")
    before = (tmp_path / "x.db").read_bytes()
    assert main([str(folder), "--optuna", url]) == 2
    error = capsys.readouterr().err
    assert "holds another program's tables" in error
    assert error.count("\n") == 1
    assert (tmp_path / "x.db").read_bytes() == before


@pytest.mark.parametrize("revision", ["v2.4.0.a", "v99.0.0.a"], ids=["older", "newer"])
def test_a_database_of_another_version_of_optuna_is_refused_unchanged(
    folder, tmp_path, url, revision, capsys
):
    assert main([str(folder), "--optuna", url]) == 0
    with closing(sqlite3.connect(tmp_path / "x.db")) as database, database:
        database.execute("update alembic_version set version_num = ?", [revision])
    before = (tmp_path / "x.db").read_bytes()
    assert main([str(folder), "--optuna", url]) == 2
    error = capsys.readouterr().err
    assert "is of another version of optuna" in error
    assert error.count("\n") == 1
    assert (tmp_path / "x.db").read_bytes() == before


def test_a_file_that_is_no_database_is_refused_unchanged(folder, tmp_path, url, capsys):
    (tmp_path / "x.db").write_bytes(b"notes" * 100)
    assert main([str(folder), "--optuna", url]) == 2
    assert "file is not a database" in capsys.readouterr().err
    assert (tmp_path / "x.db").read_bytes() == b"notes" * 100


def test_a_password_is_not_shown(folder, capsys):
    assert main([str(folder), "--optuna", "nosuch://me:secret@host/x"]) == 2
    error = capsys.readouterr().err
    assert "secret" not in error
    assert "nosuch://me:***@host/x" in error


def test_a_path_with_braces_is_a_path(folder, tmp_path):
    assert main([str(folder), "--optuna", f"sqlite:///{tmp_path / '{x}.db'}"]) == 0
    assert (tmp_path / "{x}.db").exists()


def test_an_export_that_fails_leaves_no_half_of_a_study(folder, url, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(optuna.study.Study, "add_trials", fail)
    assert main([str(folder), "--optuna", url]) == 3
    assert optuna.get_all_study_names(url) == []


def test_more_than_ten_thousand_trials_keep_their_numbers(folder):
    study = load(folder)
    rows = pd.concat([study.trials] * 834, ignore_index=True).head(10_001)
    rows["trial_id"] = [f"{k:04d}" for k in range(len(rows))]
    object.__setattr__(study, "trials", rows.sort_values("trial_id"))  # as text, 10000 before 1001
    trials = to_optuna.frozen_trials(study)
    assert [trial.params["lr"] for trial in trials] == rows.lr.tolist()
