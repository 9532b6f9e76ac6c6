"""The W&B Report is one that the library reads back, names the right runs, and fails in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.load import load
from analysis.wandb_report import build, main
from tests.made_study import EVIL, write_study

pytest.importorskip("wandb_workspaces.reports.v2")
from wandb_workspaces.reports.v2 import interface, internal

SCRIPT = Path(__file__).parents[1] / "analysis" / "wandb_report.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return write_study(tmp_path / 'it\'s "a" study')


def loaded(file):
    """Returns the report in a file, as the library reads it."""
    return interface.Report._from_model(internal.ReportViewspec.model_validate_json(file.read_text()))


def grids(report):
    return [block for block in report.blocks if isinstance(block, interface.PanelGrid)]


def chosen(grid):
    """Returns the values that a grid's runs are chosen by."""
    return {item["key"]["name"]: item["value"] for item in grid.runsets[0]._to_model().filters["filters"]}


def test_report_is_read_back_with_its_runs_and_panels(folder, capsys):
    assert main([str(folder)]) == 0
    file = folder / "wandb_report.json"
    assert capsys.readouterr().out == f"{file}\n"
    report = loaded(file)
    assert report.title == f"convnet on {EVIL}"
    assert (report.project, report.entity) == ("tunefleet", "")
    trials, finals, study = grids(report)
    for grid, job_type in ((trials, "trial"), (finals, "final"), (study, "study")):
        assert chosen(grid) == {"group": folder.name, "jobType": job_type}
    kinds = [type(panel).__name__ for panel in trials.panels]
    assert kinds == [
        *("LinePlot", "LinePlot", "ParallelCoordinatesPlot", "ParameterImportancePlot"),
        *("ScatterPlot", "RunComparer"),
    ]
    curve, _, parallel, importance, scatter, _ = trials.panels
    assert (curve.x.name, [y.name for y in curve.y]) == ("epoch", ["val_accuracy"])
    assert [(c.metric.name, c.log) for c in parallel.columns] == [
        *(("lr", True), ("schedule", False), ("best_val_accuracy", None))
    ]
    assert importance.with_respect_to == "best_val_accuracy"
    assert (scatter.x.name, scatter.y.name, scatter.log_x) == ("lr", "best_val_accuracy", True)
    assert "misclassified" in study.panels[0].media_keys


def test_headline_says_what_was_found_and_what_it_cost(folder):
    assert main([str(folder)]) == 0
    text = json.dumps(json.loads((folder / "wandb_report.json").read_text())["spec"]["blocks"])
    for told in (
        "65.43 \\u00b1 1.23 %: test accuracy, mean \\u00b1 sd of 2 fresh seeds",
        "54.00 to 76.00 %: 95 % interval",
        "12: trials:",
        "21: epochs spent, of 48 without pruning",
        "Best configuration, trial 0008: lr 0.01235, schedule cosine.",
    ):
        assert told in text


def test_each_study_is_a_section_with_its_group(folder, tmp_path):
    other = write_study(tmp_path / "other")
    out = tmp_path / "out"
    both = [str(folder), str(other)]
    assert main([*both, "--out", str(out), "--group", "one", "two", "--project", "p", "--entity", "e"]) == 0
    report = loaded(out / "wandb_report.json")
    assert sum(isinstance(block, interface.H2) for block in report.blocks) == 2
    assert [chosen(grid)["group"] for grid in grids(report)] == ["one"] * 3 + ["two"] * 3
    assert (report.project, report.entity) == ("p", "e")


def test_study_without_fresh_seeds_has_no_panels_for_them(folder):
    told = json.loads((folder / "study.json").read_text()) | {"final": None, "best": None}
    (folder / "study.json").write_text(json.dumps(told))
    study = load(folder)
    study = type(study)(**{**vars(study), "finals": study.finals.head(0)})
    report = build([study], entity="", project="p", groups=["g"], linked=False)
    assert [chosen(grid)["jobType"] for grid in grids(report)] == ["trial", "study"]


def test_wrong_number_of_groups_is_one_line(folder, capsys):
    assert main([str(folder), "--group", "a", "b"]) == 2
    assert capsys.readouterr().err == "error: --group names 2 groups for 1 studies; give one each\n"


@pytest.mark.parametrize("more", [[], ["--save"]])
def test_missing_package_is_one_line(folder, more, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert main([str(folder), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'tunefleet[reports]'" in error


def test_saving_without_a_key_is_one_line(folder, tmp_path):
    secrets = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, "--save"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | secrets,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --save: W&B cannot be used (No API key")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
