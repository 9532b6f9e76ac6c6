"""What a study's Ray shows to the network, and where its token is written: a Ray of this host."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, ray_logs

pytestmark = pytest.mark.ray
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
DASHBOARD = 8265
# With groups of workers, for which there is a dashboard, too; lives until its stdin is closed
START = """
from tunefleet.search.connection import _token, connect
import ray
connect(trial_slots=2)
ray.get(ray.remote(lambda: 1).options(num_cpus=0).remote())
print(_token(), flush=True)
input()
"""


@pytest.fixture(scope="module")
def cluster():
    """Starts Ray as a study does; yields its process, its folder and its token."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", START], env=unset, cwd=ROOT, **pipes)
    token = process.stdout.readline().strip()
    yield process, ray_logs(psutil.Process(process.pid)).parent, token
    process.communicate("\n", timeout=60)


def processes(cluster):
    driver = psutil.Process(cluster[0].pid)
    return {process.pid: process for process in (driver, *driver.children(recursive=True))}


def test_nothing_but_the_dashboards_metrics_is_beyond_localhost(cluster):
    mine, seen = processes(cluster), 0
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in mine:
            seen += 1
            command = " ".join(mine[connection.pid].cmdline())
            metrics = "ray/dashboard/dashboard.py" in command and connection.laddr.port != DASHBOARD
            assert connection.laddr.ip in LOOPBACK or metrics, (connection.laddr, command)
    assert seen > 4


def test_the_token_is_in_no_log_and_no_command_line(cluster):
    _, folder, token = cluster
    assert len(token) > 20
    shared = Path.home() / ".ray/auth_token"
    assert not shared.exists() or shared.read_text().strip() != token
    for file in folder.rglob("*"):
        if file.is_file():
            assert token.encode() not in file.read_bytes(), file
    for process in processes(cluster).values():
        assert token not in " ".join(process.cmdline())
