"""A study as a user sees it: run, stopped by Ctrl-C, resumed; each a process of its own."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests.compared import table
from tunefleet.study import Study, read_study, write_study

pytestmark = pytest.mark.ray

STUDY = ["--space", "softmax", "--data", "digits", "--trials", 12, "--epochs", 27, "--final-seeds", 1]
SECONDS = 90  # a study takes some 15 s on two free cores


def finish(process):
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def wait_for_lines(folder, count, process):
    """Waits until a study's journal has so many lines."""
    deadline = time.monotonic() + SECONDS
    file = folder / "reports.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_dir):
    """A study, left alone, and what it printed."""
    import subprocess
    import sys

    from tests.conftest import ROOT

    folder = tmp_path_factory.mktemp("undisturbed") / "study"
    command = [sys.executable, ROOT / "search" / "run.py", *STUDY, "--concurrency", 1]
    result = subprocess.run(
        [*map(str, command), "--study-dir", str(folder), "--data-dir", str(data_dir)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder, result


def test_study_prints_its_result_and_nothing_of_rays(undisturbed):
    _, result = undisturbed
    assert re.search(r"test_accuracy 0\.9\d\d\d", result.stdout)
    assert result.stderr == ""
    assert "Ray" not in result.stdout.replace("starting Ray\n", "")
    assert "Tune" not in result.stdout


def test_study_folder_holds_what_the_readme_says(undisturbed):
    folder, _ = undisturbed
    study = json.loads((folder / "result.json").read_text())
    assert study["status"] == "done"
    assert study["trials"] == 12
    assert study["epochs_spent"] == sum(int(row[2]) for row in table(folder)[1:])
    assert study["epochs_unpruned"] == 12 * 27
    assert len(study["final"]["test_accuracy"]["values"]) == 1
    assert 0 < study["busy_fraction"] <= 1
    names = {path.name for path in folder.iterdir()}
    locks = {".lock", ".collect.lock"}
    assert names == locks | {
        *("best", "epochs.parquet", "reports.jsonl", "result.json", "study.json", "trials.csv"),
    }
    best = {path.name for path in (folder / "best").iterdir()}
    assert best == {
        "config.json",
        "first_layer.npy",
        "misclassified.npz",
        "model.pt",
        "predictions.parquet",
    }


def test_a_signal_to_all_processes_of_a_study_stops_it_within_ten_seconds(cli, tmp_path):
    process = cli(*STUDY, "--trials", 4, "--study-dir", "study", "--pruner", "none")
    folder = tmp_path / "study"
    wait_for_lines(folder, 40, process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)  # as timeout, scancel and a container's stop do
    code, _, err = finish(process)
    assert time.monotonic() - began < 10
    assert code == 3, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].endswith("tunefleet resume study")
    assert read_study(folder)["status"] == "stopped"
    assert (folder / "trials.csv").exists()
    code, _, err = finish(cli("--resume", "study"))
    assert code == 0, err
    assert len(table(folder)) == 1 + 4


@pytest.mark.slow
def test_a_study_continues_on_another_device_and_keeps_that_it_did(cli, tmp_path):
    process = cli(*STUDY, "--study-dir", "study", "--pruner", "none", "--precision", "fp32")
    folder = tmp_path / "study"
    wait_for_lines(folder, 40, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C
    assert finish(process)[0] == 3
    spec = Study(folder).spec
    spec["levers"] |= {"device": "cuda", "micro_batch_bytes": None, "cuda_graph": True}  # as if on a GPU
    write_study(folder, spec | {"options": spec["options"] | {"device": "cuda"}})
    code, _, err = finish(cli("--resume", "study"))
    assert code == 2
    assert "trains on cuda, and there is no GPU" in err
    assert err.count("\n") == 1
    code, out, err = finish(cli("--resume", "study", "--device", "cpu"))
    assert code == 0, err
    assert "trained on cuda fp32 so far, continues on cpu fp32: numbers may differ" in " ".join(out.split())
    study = Study(folder)
    assert study.spec["levers"]["device"] == "cpu"
    assert [run.get("levers", {}).get("device") for run in study.runs] == [None, "cpu"]
    assert json.loads((folder / "study.json").read_text())["levers"]["device"] == "cuda"


@pytest.mark.slow
def test_the_images_may_be_elsewhere_when_a_study_is_resumed_from_elsewhere(cli, tmp_path, data_dir):
    images, rng = tmp_path / "images", np.random.default_rng(0)
    for k in range(60):
        (images / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + 127 * (k % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(images / "ab"[k % 2] / f"{k}.png")
    process = cli(*STUDY, "--data", "images", "--study-dir", "study", "--pruner", "none")
    wait_for_lines(tmp_path / "study", 30, process)
    process.send_signal(signal.SIGINT)
    finish(process)
    images.rename(tmp_path / "moved")
    code, _, err = finish(cli("--resume", "study"))
    assert (code, f"--data={images} does not exist" in err) == (2, True)
    code, _, err = finish(cli("--resume", "study", "--data", "digits"))
    assert (code, "is not what the study began with" in err) == (2, True)
    code, _, err = finish(cli("--resume", "study", "--data", "moved"))
    assert code in (0, 1), err
    assert read_study(tmp_path / "study")["options"]["data"] == str(tmp_path / "moved")


def test_two_drivers_of_one_study_are_refused(cli, tmp_path):
    first = cli(*STUDY, "--trials", 1000, "--study-dir", "study", "--pruner", "none", "--searcher", "random")
    wait_for_lines(tmp_path / "study", 5, first)
    code, _, err = finish(cli("--resume", "study"))
    assert code == 2
    assert "another process is running" in err
    first.send_signal(signal.SIGTERM)
    code, _, err = finish(first)
    assert code == 3, err
    assert "tunefleet resume study" in err


@pytest.mark.slow
def test_a_study_of_two_trials_continued_to_four_equals_one_of_four(cli, tmp_path):
    same = ("--epochs", 2, "--pruner", "stop", "--eta", 2, "--concurrency", 1, "--final-seeds", 0)
    for folder, trials in (("continued", 2), ("whole", 4)):
        code, _, err = finish(cli(*STUDY, *same, "--trials", trials, "--study-dir", folder))
        assert code == 0, err
    code, _, err = finish(cli("--resume", "continued", "--trials", 4))
    assert code == 0, err
    assert len(table(tmp_path / "whole")) == 1 + 4
    assert table(tmp_path / "continued") == table(tmp_path / "whole")
