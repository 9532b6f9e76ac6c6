"""W&B gets every row exactly once, whatever its server does: against a stand-in on loopback."""

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.made_study import spec, write_own_study
from tests.wandb_server import KEY, WandbServer
from tunefleet.journal import Journal
from tunefleet.search.run import main, parse
from tunefleet.search.wandb_options import WandbOptions, choose
from tunefleet.search.wandb_sync import (
    COLUMNS,
    LiveUpload,
    describe,
    legible,
    read_state,
    reason,
    runs_of,
    sweep_config,
)
from tunefleet.study import REPORTED, read_study, write_tables
from tunefleet.study import write_study as write_study_json

LONGEST_SECONDS = 15  # for a command to end, whatever the server does


SEED = {"architecture": "softmax", "epochs": 9, "lr": 0.1, "seed": 1, "refit": True}  # of the winner


def report(trial_id, epoch, value, **more):
    return {
        "trial_id": trial_id,
        "epoch": epoch,
        "train_loss": 1.5 / epoch,
        "train_accuracy": 0.3,
        "val_loss": 1.25 / epoch,
        "val_accuracy": value,
        "lr": 0.1,
        "epoch_seconds": 2.0,
        "finished_at": 1.7e9 + 3 * epoch,
        "diverged": False,
        "pid": 7,
        "node": "here",
        **more,
    }


STUDY_JSON = spec(
    space="softmax",
    rungs=[1, 3],
    options={"epochs": 9, "pruner": "promote", "points": None},
    ranges={"lr": {"low": 1e-4, "high": 0.1, "log": True}, "batch_size": {"values": [64, 128]}},
    data={"name": "digits", "classes": ["nought", "one"]},
    started_at=1.7e9,
)


def write_study(folder, status="done"):
    """A study of four trials: done, pruned at 1, diverged at 2, lost; one seed of the winner; 13 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "reports.jsonl")
    for k in range(4):
        config = {"architecture": "softmax", "epochs": 9, "lr": 0.1 * (k + 1), "seed": 0}
        journal.append({"trial_id": f"000{k}", "epoch": 0, "config": config})
    for epoch in range(1, 10):
        more = {"status": "done"} if epoch == 9 else {}
        journal.append(report("0000", epoch, 0.5 + 0.01 * epoch, **more))
    journal.append(report("0001", 1, 0.4))
    journal.append(report("0002", 1, 0.3))
    journal.append(report("0002", 2, float("nan"), status="diverged", val_loss=None))
    journal.append({"trial_id": "0003", "status": "error", "error": "lost"})
    journal.append({"trial_id": "final-1", "epoch": 0, "config": SEED})
    journal.append(report("final-1", 1, None, status="done", test_accuracy=0.75))
    (folder / "study.json").write_text(json.dumps(STUDY_JSON))
    write_tables(folder, status=status, seconds=9.0)
    return folder


def add_media(folder):
    """A figure, and three test images of which the last two were misclassified."""
    from PIL import Image

    (folder / "figures").mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "figures" / "curves.png")
    (folder / "best").mkdir()
    guesses = {"label": [0, 1, 0], "predicted": [0, 0, 1], "confidence": [0.9, 0.8, 0.7]}
    pd.DataFrame(guesses).to_parquet(folder / "best" / "predictions.parquet")
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    np.savez(folder / "best" / "misclassified.npz", index=np.array([1, 2]), images=images)


def write_state(folder, text):
    (folder / "wandb").mkdir()
    (folder / "wandb" / "state.json").write_text(text)


@pytest.fixture
def server():
    made = WandbServer()
    yield made
    made.close()


@pytest.fixture
def environment(server, tmp_path):
    """An environment of W&B's own for subprocesses: the stand-in's address, and nothing of the user's."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    mine |= {f"WANDB_{name}_DIR": str(tmp_path / "home" / name) for name in ("CONFIG", "CACHE", "DATA")}
    (tmp_path / "home").mkdir()
    return mine | {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": KEY,
        "WANDB_ERROR_REPORTING": "false",
        "NETRC": str(tmp_path / "home" / "netrc"),
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT / "src"),
    }


@pytest.fixture
def sync(environment):
    """Runs ``tunefleet sync …`` and returns exit code, stdout, stderr and seconds."""

    def call(*arguments, **variables):
        began = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-m", "tunefleet", "sync", *map(str, arguments)],
            env={name: value for name, value in (environment | variables).items() if value is not None},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        seconds = time.monotonic() - began
        assert "Traceback" not in result.stderr, result.stderr
        return result.returncode, result.stdout, result.stderr, seconds

    return call


def expected_rows(folder):
    """epochs.parquet as rows by trial, None for NaN: what W&B has to have.

    Of what only some trials report, such as test_accuracy, the others' rows have nothing.
    """
    table = pd.read_parquet(io.BytesIO((folder / "epochs.parquet").read_bytes())).astype(object)
    table = table.where(table.notna(), None)
    return {
        trial_id: [
            {name: value for name, value in row.items() if name in COLUMNS or value is not None}
            for row in part.drop(columns="trial_id").to_dict("records")
        ]
        for trial_id, part in table.groupby("trial_id")
    }


def assert_all_there(server, folder, *, once=True):
    """Every row of epochs.parquet is on the server, in order, and came there once."""
    expected = expected_rows(folder)
    runs = {run.facts["displayName"]: run for run in server.runs.values()}
    for trial_id, rows in expected.items():
        assert runs[trial_id].rows == rows
        if once:
            assert runs[trial_id].rows_received == len(rows)
    trials = [run for run in runs.values() if run.facts["jobType"] != "study"]
    assert sum(len(run.history) for run in trials) == sum(map(len, expected.values()))


def assert_no_key(*folders):
    """No file below these folders contains the key, whole or in part."""
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                assert KEY[6:].encode() not in file.read_bytes(), file


def read_raw(file):
    """Yields the records of a .wandb file: 7 bytes of header, then LevelDB's log in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, offset, buffer = file.read_bytes(), 7, b""
    while offset + 7 <= len(content):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        checksum, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        data = content[offset + 7 : offset + 7 + length]
        assert len(data) == length, "torn"
        assert zlib.crc32(bytes([kind]) + data) & 0xFFFFFFFF == checksum
        offset, buffer = offset + 7 + length, buffer + data
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            yield record
            buffer = b""


def offline_rows(folder):
    """What the offline runs of a study hold, by trial."""
    found = {}
    for file in folder.glob("wandb/offline-run-*/run-*.wandb"):
        name, rows, ended = None, [], False
        for record in read_raw(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                name = record.run.display_name
            elif kind == "history":
                items = {
                    i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
                }
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
            ended = ended or kind == "exit"
        assert ended, file
        assert name not in found, "written twice"
        found[name] = rows
    return found


def test_rows_have_the_columns_of_epochs_parquet():
    assert ["trial_id", *COLUMNS] == list(REPORTED)


def test_sync_brings_rows_config_group_and_summary(server, sync, tmp_path):
    folder = write_study(tmp_path / "study")
    add_media(folder)
    code, out, err, _ = sync(folder, "--wandb-project", "mine", "--wandb-tags", "a", "b")
    assert (code, err) == (0, "")
    assert out == "all 6 runs are in me/mine, group study\n"
    assert_all_there(server, folder)
    runs = {run.facts["displayName"]: run for run in server.runs.values()}
    statuses = {name: run.summary["status"] for name, run in runs.items()}
    assert statuses == {
        "0000": "done",
        "0001": "pruned",
        "0002": "diverged",
        "0003": "error",
        "final-1": "done",
        "study": "done",
    }
    assert runs["0001"].summary["pruned_at_epoch"] == 1
    assert runs["0003"].summary["error"] == "lost"
    assert runs["0000"].summary["best_val_accuracy"] == pytest.approx(0.59)
    assert runs["final-1"].summary["test_accuracy"] == 0.75
    assert {name: run.exit_code for name, run in runs.items()} == dict.fromkeys(runs, 0) | {"0003": 1}
    config = json.loads(runs["0002"].config)
    assert config["lr"]["value"] == pytest.approx(0.3)
    facts = runs["0000"].facts
    assert (facts["groupName"], facts["jobType"], facts["tags"]) == ("study", "trial", ["a", "b"])
    assert (runs["final-1"].facts["jobType"], runs["study"].facts["jobType"]) == ("final", "study")
    study = runs["study"]
    assert study.summary["best_trial"] == "0000"
    assert study.summary["test_accuracy"] == 0.75
    assert study.rows[0]["misclassified"]["captions"] == [
        "one, predicted nought with 0.80",
        "nought, predicted one with 0.70",
    ]
    assert sum(name.startswith("media/images/") for name in study.files) == 3
    assert_no_key(folder, tmp_path / "home")


def test_sync_twice_asks_and_sends_nothing_even_when_it_forgot(server, sync, tmp_path):
    folder = write_study(tmp_path / "study")
    add_media(folder)
    assert sync(folder)[0] == 0
    for forget in (lambda: None, (folder / "wandb" / "state.json").unlink):
        forget()
        server.requests.clear()
        code, out, _, _ = sync(folder)
        assert (code, out) == (0, "all 6 runs are in me/tunefleet, group study\n")
        assert "Runs" in server.requests
        assert "UpsertBucket" not in server.requests
    assert_all_there(server, folder)


def test_runs_that_the_server_has_forgotten_are_sent_again(server, sync, tmp_path):
    folder = write_study(tmp_path / "study")
    assert sync(folder, "--wandb-sweep")[0] == 0
    for name in ("0001", "final-1"):
        (run,) = (run for run in server.runs.values() if run.facts["displayName"] == name)
        del server.runs[run.name]
    code, out, _, _ = sync(folder, "--wandb-sweep")
    assert (code, out) == (0, "all 6 runs are in me/tunefleet, group study\n")
    assert_all_there(server, folder)
    assert len(server.sweeps) == 2  # the old one was made of runs that are gone


def test_sync_that_cannot_ask_does_not_say_that_all_is_there(server, sync, tmp_path):
    folder = write_study(tmp_path / "study")
    assert sync(folder)[0] == 0
    server.fault = "500"
    code, out, err, _ = sync(folder)
    assert (code, out) == (1, "")
    assert err == "error: 6 of 6 runs are not synced (the server answers with an error)\n"
    server.fault = "ok"
    assert sync(folder)[0] == 0
    assert_all_there(server, folder)


def test_offline_runs_hold_the_rows_of_epochs_parquet(sync, tmp_path):
    folder = write_study(tmp_path / "study")
    code, out, err, _ = sync(folder, "--offline", WANDB_API_KEY=None)
    assert (code, err) == (0, "")
    assert out == "6 runs written offline, none of them uploaded\n"
    rows = offline_rows(folder)
    assert {name: found for name, found in rows.items() if found} == expected_rows(folder)
    assert set(rows) == {"0000", "0001", "0002", "0003", "final-1", "study"}
    files = sorted(folder.rglob("*.wandb"))
    before = [file.stat().st_mtime for file in files]
    assert sync(folder, "--offline", WANDB_API_KEY=None)[0] == 0
    assert [file.stat().st_mtime for file in files] == before


def test_torn_offline_run_is_written_anew_and_offline_then_sync_uploads_all(server, sync, tmp_path):
    folder = write_study(tmp_path / "study")
    assert sync(folder, "--offline")[0] == 0
    state = json.loads((folder / "wandb" / "state.json").read_text())
    del state["runs"]["0000"]  # as after a kill before the file was whole
    (folder / "wandb" / "state.json").write_text(json.dumps(state))
    (torn,) = folder.glob("wandb/offline-run-*-0000/*.wandb")
    torn.write_bytes(torn.read_bytes()[:7])  # by a copy that was cut off, or the first edition
    killed = folder / "wandb" / "tmp" / "wandb" / "offline-run-20260101_000000-x-0001"
    killed.mkdir(parents=True)
    (killed / "run-x-0001.wandb").write_bytes(b":W&B")
    assert sync(folder, "--offline")[0] == 0
    assert not (folder / "wandb" / "tmp").exists()
    rows = offline_rows(folder)
    assert {name: found for name, found in rows.items() if found} == expected_rows(folder)
    assert sync(folder)[0] == 0
    assert_all_there(server, folder)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "refuses the key: chosen"),
        ("429", "limits the rate of requests"),
        ("500", "answers with an error"),
        ("portal", "a web page answers"),
        ("hang", "does not answer"),
        ("refused", "cannot be reached"),
        ("plain", "does not speak TLS"),
    ],
)
def test_faulty_server_is_one_line_soon_and_a_later_sync_brings_all(server, sync, tmp_path, fault, words):
    folder = write_study(tmp_path / "study")
    address = {}
    if fault == "refused":
        closed = WandbServer()
        closed.close()
        address = {"WANDB_BASE_URL": closed.url}
    elif fault == "plain":
        address = {"WANDB_BASE_URL": server.url.replace("http:", "https:")}
    else:
        server.fault = fault
    code, out, err, seconds = sync(folder, **address)
    assert (code, out) == (1, "")
    assert err.startswith("error: 6 of 6 runs are not synced (")
    assert words in err
    assert err.count("\n") == 1
    assert seconds < LONGEST_SECONDS
    server.fault = "ok"
    assert sync(folder)[0] == 0
    assert_all_there(server, folder)
    assert_no_key(folder, tmp_path / "home")


@pytest.mark.parametrize(("rows", "fault"), [(1, "dead"), (12, "dead"), (5, "hang"), (10, "500"), (1, "401")])
def test_death_in_mid_sync_then_sync_again_brings_each_row_once(server, sync, tmp_path, rows, fault):
    folder = write_study(tmp_path / "study")
    server.fail_after, server.late_fault = rows, fault
    code, _, err, seconds = sync(folder)
    assert code == 1
    assert "runs are not synced (" in err
    assert seconds < LONGEST_SECONDS
    server.fail_after = None
    assert sync(folder)[0] == 0
    assert_all_there(server, folder)


def test_figures_added_later_are_sent_and_rows_are_not_sent_again(server, sync, tmp_path):
    folder = write_study(tmp_path / "study")
    assert sync(folder)[0] == 0
    add_media(folder)
    assert sync(folder)[0] == 0
    assert_all_there(server, folder)
    (study,) = (run for run in server.runs.values() if run.facts["jobType"] == "study")
    assert "figures/curves" in study.rows[-1]


def test_killed_sync_then_sync_again_brings_each_row_once(server, environment, sync, tmp_path):
    folder = write_study(tmp_path / "study")
    server.seconds = 0.05
    process = subprocess.Popen([sys.executable, "-m", "tunefleet", "sync", str(folder)], env=environment)
    while sum(run.rows_received for run in server.runs.values()) < 9:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sync(folder)[0] == 0
    assert_all_there(server, folder)


def test_following_outlives_the_servers_death_and_brings_each_row_once(server, environment, tmp_path):
    whole = write_study(tmp_path / "whole")
    events = Journal(whole / "reports.jsonl").read()
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.json").write_text(
        json.dumps(STUDY_JSON | {"status": "running", "wandb": {"mode": "online"}})
    )
    hurried = (
        "import tunefleet.search.wandb_sync as w; w.OPEN_RUNS, w.POLL_SECONDS, w.RETRY_SECONDS = 2, 0.1, 0.5"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{hurried}; w.main([{str(folder)!r}, '--follow'])"],
        env=environment,
        stdin=subprocess.PIPE,
    )
    for number, event in enumerate(events):
        Journal(folder / "reports.jsonl").append(event)
        time.sleep(0.4)
        server.fault = "dead" if 8 <= number < 11 else "ok"
    write_tables(folder, status="done", seconds=9.0)
    process.stdin.close()
    assert process.wait(LONGEST_SECONDS) == 0
    assert_all_there(server, folder, once=False)  # a row whose answer was lost is sent again, in its place
    state = json.loads((folder / "wandb" / "state.json").read_text())
    assert state["runs"].keys() == {"0000", "0001", "0002", "0003", "final-1", "study"}


@pytest.mark.parametrize("tested", [True, False])
def test_an_own_training_has_rows_and_summaries_of_its_metric(tmp_path, tested):
    folder = write_own_study(tmp_path / "own", tested=tested)
    runs = {run.key: run for run in runs_of(folder)}
    row = {"epoch": 4, "epoch_seconds": 1.0, "finished_at": 84.0}
    assert runs["0008"].rows[-1] == row | {"val_mse": 34.0, "train_mse": 0.25, "grad_norm": 2}
    assert list(runs["0008"].rows[-1])[:3] == list(row)
    assert runs["0008"].summary == {"status": "done", "epochs": 4, "best_val_mse": 34.0}
    assert runs["0005"].summary["best_val_mse"] is None  # diverged in its first epoch
    assert runs["final-1"].summary.get("test_mse") == (35.44 if tested else None)
    study = runs["study"].summary
    assert (study["best_trial"], study["val_mse"], study["seeds"]) == ("0008", 34.0, 2)
    key, mean = ("test_mse", 34.57) if tested else ("final_val_mse", 35.0)
    assert study[key] == pytest.approx(mean)
    assert study[f"{key}_low"] < mean < study[f"{key}_high"]
    assert sweep_config(read_study(folder), "x")["metric"] == {"name": "val_mse", "goal": "minimize"}


def test_a_sweep_of_given_points_has_their_values():
    points = [{"lr": 0.1}, {"lr": 0.01, "augment": "crop"}]
    study = {"ranges": {}, "options": {"points": points}}
    config = sweep_config(study, "a name")
    assert config["metric"] == {"name": "val_accuracy", "goal": "maximize"}
    parameters = config["parameters"]
    assert parameters == {"lr": {"values": [0.01, 0.1]}, "augment": {"values": ["crop"]}}


def test_sweep_is_made_once_with_the_trials_as_prior_runs(server, sync, tmp_path):
    folder = write_study(tmp_path / "study")
    assert sync(folder, "--wandb-sweep")[0] == 0
    assert sync(folder, "--wandb-sweep")[0] == 0
    (sweep,) = server.sweeps
    names = [part["name"] for part in json.loads(sweep["priorRunsFilters"])["$or"]]
    assert len(names) == 4
    assert set(names) < set(server.runs)
    assert "log_uniform_values" in sweep["config"]
    assert json.loads((folder / "wandb" / "state.json").read_text())["sweep"] == "sweep1"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ('a "b" #?:ü 中', 'a "b" #?:ü 中'),
        ("two\nlines $(x)\t%s and no \udcff UTF-8", "two lines $(x) %s and no \ufffd UTF-8"),  # a byte 0xff
    ],
)
def test_hostile_name_of_a_study_is_only_a_group(server, sync, tmp_path, name, group):
    folder = write_study(tmp_path / "study")
    add_media(folder)
    location = tmp_path / "it's <script>alert(1)</script>".replace("/", "")
    location.mkdir()
    folder = folder.rename(location / name)
    study = read_study(folder)
    options = study["options"] | {"data": "/data/\udcfe\n"}
    write_study_json(
        folder, study | {"options": options, "data": {"name": "d", "classes": ["a\nb", "[\udcfd] $1 %"]}}
    )
    code, out, err, _ = sync(folder)
    assert (code, err) == (0, "")
    assert out == f"all 6 runs are in me/tunefleet, group {group}\n"
    assert_all_there(server, folder)
    assert {run.facts["groupName"] for run in server.runs.values()} == {group}
    assert all(name.replace("-", "").isalnum() for name in server.runs)
    (study,) = (run for run in server.runs.values() if run.facts["jobType"] == "study")
    assert study.rows[0]["misclassified"]["captions"][0] == "[\ufffd] $1 %, predicted a b with 0.80"
    assert sync(folder, "--offline")[0] == 0
    assert offline_rows(folder)["final-1"]


def test_long_name_is_cut_to_what_wandb_takes():
    assert legible("long" * 60) == "long" * 32


def test_working_directory_that_is_no_utf_8_stops_no_sync(server, environment, tmp_path):
    folder = write_study(tmp_path / "study")
    (here := tmp_path / "no \udcff UTF-8").mkdir()
    command = [sys.executable, "-m", "tunefleet", "sync", str(folder)]
    result = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert_all_there(server, folder)


def test_studies_of_one_name_do_not_meet(tmp_path):
    first, second = write_study(tmp_path / "a" / "study"), write_study(tmp_path / "b" / "study")
    write_study_json(second, read_study(second) | {"started_at": 5.0})
    assert not {run.run_id for run in runs_of(first)} & {run.run_id for run in runs_of(second)}


@pytest.mark.parametrize(
    ("prepare", "needles"),
    [
        (lambda folder: (folder / "study.json").unlink(), ["holds no study"]),
        (lambda folder: (folder / "reports.jsonl").write_text("{\n{}\n"), ["line 1 is damaged"]),
        (lambda folder: write_state(folder, "{"), ["state.json is damaged", "remove it"]),
        (lambda folder: write_state(folder, "[]"), ["state.json is damaged", "remove it"]),
    ],
)
def test_damaged_study_is_one_line_and_sends_nothing(server, sync, tmp_path, prepare, needles):
    folder = write_study(tmp_path / "study")
    prepare(folder)
    code, _, err, _ = sync(folder)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(needle in err for needle in needles)
    assert server.requests == []


@pytest.fixture
def small_disk(tmp_path):
    """Puts a disk of some KiB in place of a folder, full or read-only; returns what does so."""
    mounted = []

    def mount(folder, options):
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small disk needs root, and mount")
        mounted.append(folder)
        with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(1024))

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("how", [(), ("--offline",)])
def test_full_disk_under_wandb_is_one_line_and_a_later_sync_brings_all(
    server, sync, tmp_path, small_disk, how
):
    folder = write_study(tmp_path / "study")
    small_disk(folder / "wandb", "size=64k")
    code, out, err, _ = sync(folder, *how)
    assert (code, out) == (1, "")
    assert "there is no room under wandb/" in err
    assert err.count("\n") == 1
    (folder / "wandb" / "ballast").unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=64m", folder / "wandb"], check=True)
    assert sync(folder, *how)[0] == 0


def test_full_disk_without_a_folder_for_wandb_is_one_line(server, sync, tmp_path, small_disk):
    (disk := tmp_path / "disk").mkdir()
    small_disk(disk, "size=256k")
    (disk / "ballast").unlink()
    folder = write_study(disk / "study")
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(1024))
    for k in range(1000):  # the rest of its inodes
        try:
            (disk / f"{k}").mkdir()
        except OSError:
            break
    code, out, err, _ = sync(folder)
    assert (code, out) == (1, "")
    assert "there is no room under wandb/" in err
    assert err.count("\n") == 1


def test_read_only_folder_under_wandb_is_one_line(server, sync, tmp_path, small_disk):
    folder = write_study(tmp_path / "study")
    small_disk(folder / "wandb", "size=64k,ro")
    code, _, err, _ = sync(folder)
    assert code == 2
    assert err == f"error: Read-only file system: {folder / 'wandb' / '.lock'}\n"
    assert server.requests == []


def test_study_goes_on_where_wandb_cannot_have_a_folder(tmp_path):
    folder = write_study(tmp_path / "study")
    (folder / "wandb").write_text("a file of the user's")
    live_upload = LiveUpload(folder, choose({"mode": "offline"}))
    live_upload.start()
    assert live_upload.process is None
    assert live_upload.end(1.0).startswith("W&B: ")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (KEY + "\n", "blanks or line ends"),
        ("secret key " * 5, "blanks or line ends"),
        ("secret", "only 6 characters"),
        ("sécrèt" * 10, "other characters"),
        ("", None),
        (KEY, None),
        (KEY.removeprefix("local-"), None),
        ("e30.e30.c2ln", None),
    ],
)
def test_impossible_key_is_refused_before_anything_and_not_shown(key, words):
    if words is None:
        choose({"mode": "online" if key else "offline", "key": key or None})
        return
    with pytest.raises(ValueError, match=f"WANDB_API_KEY holds no W&B key: it has {words}") as caught:
        choose({"mode": "online", "key": key})
    assert key.strip() not in str(caught.value)
    choose({"mode": "off", "key": key})


@pytest.mark.parametrize(
    ("url", "example"),
    [
        ("api.wandb.ai", "https://api.wandb.ai"),
        ("https://wandb.ai", "https://api.wandb.ai"),
        ("wandb.example.org:8080", "https://wandb.example.org:8080"),
        ("ftp://wandb.example.org", "https://wandb.example.org"),
        ("http://two words", "https://twowords"),
        ("https://host:port", "https://host:port"),
        ("http://wandb.example.org/path", None),
        ("https://api.wandb.ai", None),
    ],
)
def test_address_that_is_no_servers_is_refused_before_anything(monkeypatch, url, example):
    monkeypatch.setenv("WANDB_BASE_URL", url)
    if example is None:
        assert choose({"mode": "online", "key": KEY}).mode == "online"
        return
    for mode in ("online", "offline"):
        with pytest.raises(ValueError, match="is no address of a W&B server") as caught:
            choose({"mode": mode, "key": KEY})
        assert str(caught.value).endswith(f"; give for example {example}")
    choose({"mode": "off", "key": KEY})


def test_wrong_address_or_key_is_one_line_and_no_study_begins(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in (("WANDB_BASE_URL", "wandb.example.org"), ("WANDB_API_KEY", "abc\n")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert main(["--space", "softmax", "--data", "digits", "--wandb", "online"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {name}")
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_sync_without_a_key_says_what_to_do(sync, tmp_path):
    code, _, err, _ = sync(write_study(tmp_path / "study"), WANDB_API_KEY=None)
    assert code == 2
    assert "wandb login" in err
    assert err.count("\n") == 1


def test_key_in_netrc_counts_for_its_server_only(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose({}).mode == "offline"
    (tmp_path / "netrc").write_text(f"machine wandb.example.org login user password {KEY}\n")
    assert choose({}).mode == "online"
    monkeypatch.delenv("WANDB_BASE_URL")
    assert choose({}).mode == "offline"
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password short\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ValueError, match="netrc holds no W&B key: it has only 5 characters"):
        choose({})
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / "netrc").write_text(f"machine wandb.example.org login user password {KEY}\n")
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert choose({}).mode == "online"


def test_flags_win_over_memory_and_memory_over_variables(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "variable")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    memory = {"mode": "off", "project": "memory", "entity": "team", "tags": ["c"]}
    options = choose({"project": "flag"})
    assert (options.mode, options.project, options.tags) == ("offline", "flag", ("a", "b"))
    options = choose({"entity": "flag"}, memory)
    assert options == WandbOptions("off", "memory", "flag", tags=("c",))


@pytest.mark.parametrize(
    "given",
    [
        *({"project": "a/b"}, {"project": ""}, {"tags": ["x" * 65]}, {"group": "g" * 129}),
        *({"project": "a\nb"}, {"entity": "\udcff"}, {"group": "a\nb"}, {"tags": ["a\nb"]}),
    ],
)
def test_what_wandb_would_refuse_is_refused_first(given):
    with pytest.raises(ValueError, match="--wandb-"):
        choose({"mode": "offline", **given})


def test_key_is_not_in_what_is_shown_or_kept():
    options = choose({"mode": "online", "key": KEY})
    assert KEY not in repr(options)
    assert KEY not in json.dumps(options.remembered())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("returned error 403: {}", "may not write there"),
        ("returned error 404: {}", "does not have it"),
        (
            "Failed to verify credentials with https://w: tls: failed to verify certificate: x509: signed",
            "trusted",
        ),
        (
            "Failed to verify credentials with https://w: dial tcp: lookup w: no such host",
            "name is not known",
        ),
        (f"Failed to verify credentials with https://w: no {KEY}", "refuses the key: no …"),
        ("returned error 401: {}", "refuses the key"),
        ("write /s/wandb/run-x.wandb: no space left on device", "no room under wandb/"),
    ],
)
def test_reason_says_what_stands_against_it(text, words):
    assert words in reason(text, KEY)


def test_what_changed_since_counts_as_missing(tmp_path):
    folder = write_study(tmp_path / "study")
    options = choose({"mode": "online", "key": KEY})
    state = read_state(folder, options) | {"runs": {run.key: run.record for run in runs_of(folder)}}
    assert describe(folder, options, state)[1] is False
    Journal(folder / "reports.jsonl").append(report("0001", 2, 0.5))
    assert describe(folder, options, state) == ("1 of 6 runs is not synced", True)


STUDY = ["--space", "softmax", "--data", "digits", "--device", "cpu"]
SECONDS = 150  # a study takes some 15 s on two free cores


@pytest.fixture
def ray_dir(environment, monkeypatch):
    """Where Ray keeps its session and logs; W&B's environment is that of the stand-in."""
    for name, value in environment.items():
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # short: it holds sockets
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.mark.ray
def test_server_that_dies_in_mid_study_leaves_the_study_whole(server, cli, ray_dir, sync, tmp_path):
    server.fail_after = 2
    few = ["--trials", 3, "--epochs", 2, "--final-seeds", 1, "--wandb", "online"]
    out, err = (process := cli(*STUDY, *few, "--study-dir", "study")).communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, "")
    folder = tmp_path / "study"
    assert json.loads((folder / "result.json").read_text())["status"] == "done"
    last = out.strip().splitlines()[-1]
    assert "runs are not synced (" in last
    assert last.endswith("; to upload: tunefleet sync study")
    assert sum(len(run.history) for run in server.runs.values()) >= 2
    logs = list(ray_dir.rglob("*.log"))
    assert logs
    assert_no_key(tmp_path, ray_dir)
    server.fail_after = None
    assert sync(folder)[0] == 0
    assert_all_there(server, folder)


@pytest.mark.ray
def test_ctrl_c_beside_a_hanging_server_stops_within_ten_seconds(server, cli, ray_dir, tmp_path):
    process = cli(*STUDY, "--trials", 12, "--epochs", 200, "--pruner", "none", "--study-dir", "study")
    file = tmp_path / "study" / "reports.jsonl"
    deadline = time.monotonic() + SECONDS
    while not any(run.rows_received for run in server.runs.values()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert file.exists()
    server.fault = "hang"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert time.monotonic() - began < 10
    assert process.returncode == 3
    assert err.strip().splitlines()[-1].endswith("tunefleet resume study")
    assert "runs are not synced (given up after 3 s)" in out


def test_key_is_taken_out_of_the_drivers_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    flags, _ = parse(["--space", "softmax"])
    assert flags.wandb == {"key": KEY}
    assert "WANDB_API_KEY" not in os.environ


def test_online_without_a_key_is_one_line_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["--space", "softmax", "--data", "digits", "--wandb", "online"]) == 2
    err = capsys.readouterr().err
    assert "wandb login" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
