"""What a study's Ray shows to the network, and where its token is written: a cluster of this host."""

import os
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.ray
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
# Ray's own node-to-node ports, each of which asks for the token (SECURITY.md): servers, and every process
# that tasks, objects and metrics are asked of
NODE_TO_NODE = {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE"}
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


def test_only_rays_own_ports_are_beyond_localhost():
    mine, beyond = processes(), set()
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid not in mine:
            continue
        assert connection.laddr.port not in (DASHBOARD, 10001) or connection.laddr.ip in LOOPBACK
        if connection.laddr.ip not in LOOPBACK:
            beyond.add((connection.pid, mine[connection.pid].name()))
    others = {(pid, name) for pid, name in beyond if name not in NODE_TO_NODE}
    for pid, _ in others - {(os.getpid(), psutil.Process().name())}:  # the driver serves its objects
        command = " ".join(mine[pid].cmdline())  # the dashboard serves its metrics
        assert "ray/dashboard/dashboard.py" in command
    assert {name for _, name in beyond} & NODE_TO_NODE


def test_the_token_is_in_no_log_and_no_command_line(cluster):
    token = (Path.home() / ".ray/auth_token").read_text().strip()
    assert len(token) > 20
    for file in cluster.rglob("*"):
        if file.is_file():
            assert token.encode() not in file.read_bytes(), file
    for process in processes().values():
        assert token not in " ".join(process.cmdline())
