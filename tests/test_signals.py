"""Signals at a study's start and end, and the end of Ray's processes under it; in between: test_resume.py."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from tunefleet.search.session import NOTHING_WRITTEN

STUDY = ("--space", "softmax", "--data", "digits", "--trials", "8", "--epochs", "27", "--concurrency", "1")
STUDY = (*STUDY, "--final-seeds", "1", "--study-dir", "study")
SECONDS = 10.0  # from a signal to the end
RAY_SECONDS = 15.0  # from the end of Ray's processes


def wait_for_reports(process, folder, count=3):
    """Waits until a study's trials train."""
    journal = folder / "study" / "reports.jsonl"
    for _ in range(1200):
        if journal.exists() and journal.read_bytes().count(b"val_accuracy") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("no report")


def ended(process, seconds):
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < seconds, err
    return process.returncode, err


def test_a_signal_while_modules_are_imported_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "search" / "run.py", "--space", "softmax", "--data", "digits"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(0.4)
    process.send_signal(signal.SIGTERM)
    assert ended(process, 5.0) == (3, NOTHING_WRITTEN + "\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_the_end_of_rays_processes_stops_a_study_resumable(cli, tmp_path, name):
    process = cli(*STUDY, "--wandb", "off")
    wait_for_reports(process, tmp_path)
    (child,) = (child for child in psutil.Process(process.pid).children() if child.name() == name)
    child.kill()
    code, err = ended(process, RAY_SECONDS)
    assert code == 3
    assert f"error: Ray's {name} has ended; fix the cause, then resume with: tunefleet resume study" in err


@pytest.mark.ray
def test_a_ctrl_c_while_wandb_is_waited_for_keeps_the_studys_result(cli, tmp_path, listener, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{listener}")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    waits = "import tunefleet.search.execution as execution; execution.END_SECONDS = 100"
    process = cli(*STUDY[:4], "--trials", "1", "--epochs", "1", *STUDY[8:], "--wandb", "online", before=waits)
    for text in iter(process.stdout.readline, ""):
        if "-> study" in text and "unpruned" in text:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < SECONDS
    assert process.returncode == 0, err
    assert "tunefleet sync study" in out
    assert "nothing was written" not in err
