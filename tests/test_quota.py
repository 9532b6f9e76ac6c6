"""A study in a cgroup of half a CPU, as a small container has; needs root and cgroups that can be made."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

V1, V2 = Path("/sys/fs/cgroup/cpu/tunefleet-test"), Path("/sys/fs/cgroup/tunefleet-test")


@pytest.fixture
def half_a_cpu():
    """Makes a cgroup with a quota of 0.5 CPU; returns its list of processes."""
    first = V1.parent.is_dir()
    folder = V1 if first else V2
    try:
        folder.mkdir(exist_ok=True)
        name, quota = ("cpu.cfs_quota_us", "50000") if first else ("cpu.max", "50000 100000")
        (folder / name).write_text(quota)
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield folder / "cgroup.procs"
    deadline = time.monotonic() + 20  # until Ray's last processes have ended
    while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    folder.rmdir()


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_ends_with_half_a_cpu(half_a_cpu, tmp_path, data_dir):
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "search/run.py", "--space", "softmax", "--data", "digits"),
            *("--trials", "2", "--epochs", "2", "--final-seeds", "1", "--wandb", "off"),
            *("--study-dir", "study", "--data-dir", data_dir),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: half_a_cpu.write_text(str(os.getpid())),
    )
    assert done.returncode == 0, done.stderr
    assert "2 trials of up to 2 epochs, 1 at once" in " ".join(done.stdout.split())
