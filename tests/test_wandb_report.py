"""The W&B Report is one that the library reads back, names the right runs, and fails in one line."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.made_study import EVIL, edit_events, write_own_study, write_study
from tunefleet.analysis.load import load
from tunefleet.analysis.wandb_report import build, main

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
    for line in (
        "65.43 \\u00b1 1.23 %: test accuracy, mean \\u00b1 sd of 2 fresh seeds",
        "54.38 to 76.48 %: 95 % interval",
        "12: trials:",
        "21: epochs spent, of 48 without pruning",
        "Best configuration, trial 0008: lr 0.03734, schedule cosine.",
    ):
        assert line in text


def test_an_own_training_has_panels_of_its_metric_and_none_of_images(tmp_path):
    folder = write_own_study(tmp_path / "own", ranges={"width": {"low": 1.0, "high": 9.0, "log": False}})
    assert main([str(folder)]) == 0
    report = loaded(folder / "wandb_report.json")
    assert report.title == "mine"
    trials, finals, study = grids(report)
    curve, pair, parallel, importance, scatter, _ = trials.panels
    assert [y.name for y in curve.y] == ["val_mse"]
    assert [y.name for y in pair.y] == ["train_mse", "val_mse"]
    assert [column.metric.name for column in parallel.columns] == ["width", "best_val_mse"]
    assert importance.with_respect_to == "best_val_mse"
    assert (scatter.x.name, scatter.y.name, scatter.log_x) == ("width", "best_val_mse", False)
    assert [panel.title for panel in finals.panels] == ["val_mse", "test_mse"]
    assert not {"misclassified", "figures/confusion"} & set(study.panels[0].media_keys)


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
    edit_events(folder, lambda event: None if event["trial_id"].startswith("final") else event)
    report = build([load(folder)], entity="", project="p", groups=["g"], linked=False)
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
    assert "pip install -c constraints.txt -e '.[reports]'" in error  # the package is on no index


class Server(BaseHTTPRequestHandler):
    """Answers what wandb 0.31 asks before it takes a report; keeps the reports."""

    reports: ClassVar[list[dict]] = []
    projects = ("p",)

    def log_message(self, *arguments):
        """Is silent."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"]).group(1)
        content = json.dumps({"data": self.answer(operation, request.get("variables") or {})}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, operation, variables):
        known = variables.get("projectName") in self.projects
        if operation.lower() == "upsertview":
            self.reports.append(variables)
            view = {"id": "VmlldzoxMjM=", "type": "runs", "name": variables["name"]}
            view |= {"displayName": variables["displayName"], "description": "", "spec": variables["spec"]}
            project = {"id": "1", "name": "p", "entityName": "me"}
            view |= {"project": project, "createdAt": None, "updatedAt": None, "previewUrl": None}
            return {"upsertView": {"view": view | {"user": None}, "inserted": True}}
        node = {
            "id": "1",
            "name": "p",
            "entityName": "me",
            "createdAt": "",
            "isBenchmark": False,
            "user": None,
        }
        page = {"endCursor": None, "hasNextPage": False}
        return {
            "viewer": {"id": "v", "entity": "me", "username": "me", "email": "", "flags": "{}"},
            "serverInfo": {"features": []},
            "project": {"internalId": "1"} if known else None,
            "models": {"edges": [{"node": node, "cursor": "1"}], "pageInfo": page},
        }


def run_save(folder, tmp_path, **environment):
    """Runs ``wandb_report.py --save`` as a user without a key, unless the environment has one."""
    nowhere = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    return subprocess.run(
        [sys.executable, SCRIPT, folder, "--save"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | nowhere | {"WANDB_ERROR_REPORTING": "false"} | environment,
    )


@pytest.mark.parametrize("project", ["p", "nosuch"])
def test_saving_sends_the_report_to_a_project_that_is_there(folder, tmp_path, project):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.reports.clear()
    url = f"http://127.0.0.1:{server.server_port}"
    done = run_save(
        folder, tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY="local-" + "a" * 40, WANDB_PROJECT=project
    )
    server.shutdown()
    server.server_close()
    if project == "nosuch":
        assert done.returncode == 2, done.stderr
        assert "'me/nosuch' not found" in done.stderr
        assert done.stderr.count("\n") == 1
        assert Server.reports == []
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("http")
    (report,) = Server.reports
    assert (report["entityName"], report["projectName"]) == ("me", "p")
    sets = [
        runs
        for block in json.loads(report["spec"])["blocks"]
        for runs in block.get("metadata", {}).get("runSets", [])
    ]
    assert [runs["filters"]["filters"][0]["value"] for runs in sets] == [folder.name] * 3
    assert {runs["project"]["name"] for runs in sets} == {"p"}


def test_saving_without_a_key_is_one_line(folder, tmp_path):
    done = run_save(folder, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --save: W&B cannot be used (No API key")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_saving_to_an_impossible_address_is_one_line(folder, tmp_path):
    done = run_save(folder, tmp_path, WANDB_BASE_URL="nonsense", WANDB_API_KEY="local-" + "a" * 40)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --save: W&B cannot be used (")
    assert "\\n" not in done.stderr
    assert done.stderr.count("\n") == 1
