"""What a study's Ray shows to the network, and where its token is written: a cluster of this host."""

import os
from pathlib import Path

import psutil
import pytest

from search.connection import _token

pytestmark = pytest.mark.ray
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
DASHBOARD = 8265


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Starts what a study with groups of workers has: a dashboard, too."""
    import ray

    from search.connection import connect

    os.environ.pop("RAY_ADDRESS", None)
    connect(trial_slots=2)
    ray.get(ray.remote(lambda: 1).options(num_cpus=0).remote())
    yield Path(ray._private.worker._global_node.get_session_dir_path())
    ray.shutdown()


def processes():
    return {
        process.pid: process for process in (psutil.Process(), *psutil.Process().children(recursive=True))
    }


def test_nothing_but_the_dashboards_metrics_is_beyond_localhost():
    mine = processes()
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in mine:
            command = " ".join(mine[connection.pid].cmdline())
            metrics = "ray/dashboard/dashboard.py" in command and connection.laddr.port != DASHBOARD
            assert connection.laddr.ip in LOOPBACK or metrics, (connection.laddr, command)


def test_the_token_is_in_no_log_and_no_command_line(cluster):
    token = _token()
    assert len(token) > 20
    shared = Path.home() / ".ray/auth_token"
    assert not shared.exists() or shared.read_text().strip() != token
    for file in cluster.rglob("*"):
        if file.is_file():
            assert token.encode() not in file.read_bytes(), file
    for process in processes().values():
        assert token not in " ".join(process.cmdline())
