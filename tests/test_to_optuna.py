"""What optuna loads back is the study: numbers, states, values, ranges, and no trial twice."""

import json

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from analysis.load import load
from analysis.report import main
from tests.made_study import write_study


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
    told = json.loads((folder / "study.json").read_text()) | {"ranges": {}}
    (folder / "study.json").write_text(json.dumps(told))
    assert main([str(folder), "--optuna", url]) == 0
    trials = load(folder).trials
    lr = optuna.load_study(study_name="a study", storage=url).trials[0].distributions["lr"]
    assert (lr.low, lr.high, lr.log) == (trials.lr.min(), trials.lr.max(), True)


@pytest.mark.parametrize("bad", ["nonsense", "sqlite:////no/such/folder/x.db", "nosuch://a/b"])
def test_bad_url_is_one_line(folder, bad, capsys):
    assert main([str(folder), "--optuna", bad]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --optuna={bad} cannot be opened")
    assert error.count("\n") == 1


def test_missing_trial_is_an_error_and_shifts_no_number(folder, url, capsys):
    pd.read_csv(folder / "trials.csv", dtype=str).drop(3).to_csv(folder / "trials.csv", index=False)
    assert main([str(folder), "--optuna", url]) == 2
    assert "lacks trial 0003" in capsys.readouterr().err
