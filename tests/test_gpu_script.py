"""benchmarks/gpu.sh keeps its bounds and skips what is there: with studies that are only played."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import psutil
import pytest

from tests.configs import make_options
from tests.conftest import ROOT
from tunefleet.benchmarks import gpu
from tunefleet.models.spaces import SPACES

PLAYED = """
import json, os, pathlib, signal, sys, time
words = sys.argv[2:]
def given(flag):
    return words[words.index(flag) + 1] if flag in words else None
study = pathlib.Path(given("--resume") or given("--extend") or given("--study-dir"))
with open(os.environ["CALLS"], "a") as calls:
    print(*words, file=calls)
(study / "checkpoints").mkdir(parents=True, exist_ok=True)
(study / "checkpoints" / "0000.pt").write_bytes(bytes(1000))
(study / "best").mkdir(exist_ok=True)
for name, size in (("model.pt", 10), ("predictions.parquet", 10), ("first_layer.npy", 2 * 10**6)):
    (study / "best" / name).write_bytes(bytes(size))
space = study.name
from tests.made_study import spec, write_events
points = [{"lr": lr, "seed": 0} for lr in (0.1, 0.2, 0.4)]
options = {"epochs": 1, "pruner": "none", "points": points}
(study / "study.json").write_text(json.dumps(spec(space=space, options=options)))
def events(best):
    for k, point in enumerate(points):
        value = 0.95 if k == best else 0.9
        yield {"trial_id": f"000{k}", "epoch": 0, "config": point}
        yield {"trial_id": f"000{k}", "epoch": 1, "val_accuracy": value, "status": "done"}
write_events(study, [], "running")
if space in os.environ.get("SLOW", "").split():
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(3)
(study / "lr_curve.csv").write_text("lr\\n")
write_events(study, list(events(1 if "--extend" in words else 2)))
print("test_accuracy 0.5")
"""


@pytest.fixture
def script(tmp_path):
    """Run the script with studies that are only played; returns its process, and the calls of studies."""
    play, python = tmp_path / "play.py", tmp_path / "python"
    play.write_text(PLAYED)
    python.write_text(
        f"#!/bin/sh\nreal={sys.executable}\n"
        f'case "$1" in search/*) exec $real {play} "$@";; esac\nexec $real "$@"\n'
    )
    python.chmod(0o755)
    calls = tmp_path / "calls"

    def run(*parts, out="out", results="none", **variables):
        calls.write_text("")
        places = {"OUT": out, "RESULTS": results, "WORK": f"work-{out}"}
        done = subprocess.run(
            ["bash", "benchmarks/gpu.sh", *parts],
            cwd=ROOT,
            env=os.environ
            | {name: str(tmp_path / location) for name, location in places.items()}
            | {"PYTHON": str(python), "CALLS": str(calls), "DEVICE": "cpu", "STOP_SECONDS": "1", "LANES": "2"}
            | {"DATA": "digits", "WEIGHTS": "none", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
            | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, calls.read_text().splitlines()

    return run


def studies_in(archive):
    with tarfile.open(archive) as tar:
        return {
            name: tar.extractfile(name).read() for name in tar.getnames() if name.endswith("result.json")
        }, {name.rpartition("/")[2] for name in tar.getnames()}


def test_rows_stop_at_their_bound_and_the_next_run_skips_what_is_there_and_resumes(script, tmp_path):
    began = time.monotonic()
    bounds = {"BOUND": "20", "STOP_SECONDS": "5"}
    done, calls = script("rows", ROWS="softmax convnet twolayernn", SLOW="convnet", **bounds)
    assert time.monotonic() - began < 40
    assert done.returncode == 1, done.stderr
    assert len(calls) == 3
    studies, names = studies_in(tmp_path / "out" / "studies.tar.xz")
    statuses = {name.split("/")[1]: json.loads(text)["status"] for name, text in studies.items()}
    assert statuses == {"softmax": "done", "twolayernn": "done", "convnet": "running"}
    assert names == {"study.json", "result.json", "reports.jsonl", "lr_curve.csv"}
    assert studies_in(tmp_path / "out" / "best.tar.xz")[1] == {"predictions.parquet"}
    assert "rows: convnet ended with 3" in (tmp_path / "out" / "log.txt").read_text()
    done, calls = script("rows", out="next", results="out", ROWS="softmax convnet twolayernn")
    assert done.returncode == 0, done.stdout + done.stderr
    (call,) = calls
    assert call.startswith("--resume ")
    assert call.split()[1].endswith("/rows/convnet")
    log = (tmp_path / "next" / "log.txt").read_text()
    assert "rows: softmax is there" in log
    assert "rows: convnet ended with 3" in log  # the earlier run's lines stay
    files = list((tmp_path / "next").iterdir())
    assert {file.name for file in files} == {"log.txt", "tables.txt", "studies.tar.xz", "best.tar.xz"}
    assert "| softmax |" in (tmp_path / "next" / "tables.txt").read_text()


def test_a_best_lr_at_an_edge_is_extended_once_by_the_next_run(script, tmp_path):
    spaces = {"ROWS": "resnet_finetune"}
    _, calls = script("lr", **spaces)
    assert "--lrs 3e-4 1e-3 3e-3 1e-2 3e-2 1e-1 3e-1" in calls[0]
    assert "--from" not in calls[0]
    _, calls = script("lr", out="second", results="out", **spaces)
    assert [call.split()[0] for call in calls] == ["--extend"]
    _, calls = script("lr", out="third", results="second", **spaces)
    assert calls == []


def test_a_learning_rate_study_starts_from_the_row_of_its_space(script):
    _, calls = script("rows", "lr", ROWS="resnet_finetune")
    assert "--from" in calls[1]


def test_every_row_is_a_command_that_could_run(script):
    """Each flag and value is parsed as search/run.py would."""
    from tunefleet.search.options import parsed
    from tunefleet.search.run import parse

    _, calls = script("rows", LANES="4")
    assert len(calls) == len(SPACES)
    for call in calls:
        flags, options = parse(call.split())
        study = make_options(flags.space, **parsed(options, SPACES[flags.space]))
        assert study.epochs <= SPACES[flags.space].epochs


def test_a_measurement_is_taken_again_at_another_commit(script, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "share.txt").write_text("complete 0123456789ab\n")
    done, _ = script("share", results="old", BOUND="1")
    assert "share: is there" not in done.stdout
    assert done.returncode == 1  # it was stopped at its bound
    commit = done.stdout.splitlines()[0].split(" at commit ")[1].partition(",")[0]
    (tmp_path / "old" / "share.txt").write_text(f"complete {commit}\n")
    done, _ = script("share", results="old", out="again")
    assert "share: is there" in done.stdout


def test_trials_that_share_a_device_end_with_their_measurement(data_dir):
    command = ["share", "--data", "digits", "--data-dir", data_dir, "--device", "cpu", "--weights", "none"]
    measurement = subprocess.Popen(
        [sys.executable, "-m", "tunefleet.benchmarks.gpu", *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def trials():
        children = psutil.Process(measurement.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    while len(started := trials()) < max(gpu.AT_ONCE):
        assert measurement.poll() is None
        time.sleep(0.1)
    measurement.send_signal(signal.SIGINT)
    assert measurement.wait(30) == 3
    assert psutil.wait_procs(started, 10)[1] == []


def test_an_unknown_part_is_refused(script):
    done, _ = script("row")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no part row")


def test_speed_and_share_of_the_peak_are_lines_as_they_are_measured(data_dir, capsys, monkeypatch):
    monkeypatch.setitem(gpu.STEPS, "small", (2, 2))
    monkeypatch.setitem(gpu.MATRIX_SIDE, "cpu", 64)
    base = ["--data", "digits", "--data-dir", str(data_dir), "--device", "cpu", "--spaces", "softmax"]
    assert gpu.main(["decode", "epoch", *base]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("decode digits: 1,797 images in ")
    assert lines[-1].split()[:3] == ["softmax", "32", "512"]
    assert lines[-1].endswith("%")
