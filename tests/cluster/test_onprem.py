"""Does cluster/onprem.yaml, unchanged, make a cluster of three machines, and does a study use all of it?"""

import csv
import json
import os
import shutil
import subprocess

import pytest

from tests.cluster.lab import Lab, until, why_not
from tests.cluster.test_files import load
from tests.test_outside import write_strangers_files

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
FILE = "cluster/onprem.yaml"
V1 = {"RAY_UP_enable_autoscaler_v2": "0"}
PROVIDER = load("onprem.yaml")["provider"]
HEAD, WORKERS = PROVIDER["head_ip"], PROVIDER["worker_ips"]
SUBMIT = (
    *("ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", "src", "--"),
    *("python", "-m", "tunefleet"),
)
OWN = "/run/tunefleet"  # a folder that each machine has for itself


def test_a_study_runs_on_two_workers_by_ssh():
    with Lab("10.77.0.1/16") as lab:
        for address in (HEAD, *WORKERS):
            lab.boot(address)
        lab.run("ray", "up", "-y", FILE, env=V1, timeout=120)
        lab.start("ray", "dashboard", FILE, env=V1)
        cpus = os.cpu_count()  # of each machine: they all see the host's

        def all_joined():
            status = lab.run("ray", "exec", FILE, "ray status", env=V1, timeout=60)
            return f"/{2 * cpus}.0 CPU" in status and "/16.0 trial_slot" in status

        until(all_joined, 120, every=3)
        printed = lab.run(
            *(*SUBMIT, "search", "softmax", "--data", "digits", "--storage", lab.shared),
            *("--data-dir", OWN),
            *("--trials", 8, "--epochs", 9, "--final-seeds", 1, "--cpus-per-trial", cpus),  # one per worker
            timeout=180,
        )
        assert "softmax on digits: 8 trials of up to 9 epochs, 2 at once" in printed
        (study,) = lab.shared.iterdir()
        with (study / "trials.csv").open() as file:
            trials = list(csv.DictReader(file))
        assert len(trials) == 8
        assert {trial["status"] for trial in trials} <= {"done", "pruned", "diverged"}
        assert {trial["node"] for trial in trials} == {f"node-{ip.replace('.', '-')}" for ip in WORKERS}
        assert json.loads((study / "result.json").read_text())["status"] == "done"
        _search_a_strangers_network(lab, cpus)
        for address in WORKERS:  # the head decoded them, and its /run is not theirs
            assert "data.json" in lab.ssh(address, f"ls {OWN}/decoded/*"), "no images were sent"
        for address in (HEAD, *WORKERS):
            home = lab.home(address)
            assert (home / "pip.log").read_text() == f"{home}/tunefleet: install -q -c constraints.txt -e .\n"
            assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
        lab.run("ray", "down", "-y", FILE, env=V1, timeout=90)
        assert not lab.processes(HEAD, "raylet"), "ray down left Ray on the head"


def _search_a_strangers_network(lab: Lab, cpus: int) -> None:
    """mine.py and its neighbour, which no worker has: searched, killed, resumed, and its winner used."""
    given, studies = write_strangers_files(lab.shared / "given"), lab.shared / "studies"
    lab.ssh(HEAD, f"cp -r {given} /run/mine")
    shutil.move(given / "photos", lab.laptop / "photos")
    shutil.rmtree(given)
    search = lab.start(
        *(*SUBMIT, "search", "/run/mine/mine.py", "--data", "/run/mine/photos", "--storage", studies),
        *("--data-dir", OWN, "--trials", 4, "--epochs", 3, "--final-seeds", 1, "--cpus-per-trial", cpus),
        *("--wandb", "offline"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )

    def has_reported():
        assert search.poll() is None
        return any(b"epoch_seconds" in file.read_bytes() for file in studies.glob("*/reports.jsonl"))

    until(has_reported, 120)
    lab.ssh(HEAD, "pkill -KILL -f '[t]unefleet search'")  # it sees that machine's processes only
    assert search.wait(60) != 0
    (study,) = studies.iterdir()
    assert not (study / "trials.csv").exists()
    lab.ssh(HEAD, "rm /run/mine/*.py")  # the study has a copy
    printed = lab.run(*SUBMIT, "resume", study, "--data-dir", OWN, timeout=180)
    assert "test_accuracy" in printed
    with (study / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert {row["status"] for row in rows} <= {"done", "pruned", "diverged"}
    assert list((study / "wandb").glob("offline-run-*"))
    here = ("python", "-m", "tunefleet")
    assert "report.html" in lab.run(*here, "report", study, timeout=90)
    table = lab.run(
        *here, "predict", study, lab.laptop / "photos", "--data-dir", lab.laptop / "data", timeout=90
    )
    assert len(table.splitlines()) == 1 + 300
    exported = lab.run(*here, "export", study, lab.laptop / "mine.pt2", timeout=90)
    assert "probabilities (N, 2)" in exported
