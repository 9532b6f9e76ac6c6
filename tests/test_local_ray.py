"""Ray as a study starts it on one host."""

import json
import os
import subprocess
import sys

import pytest
from ray._private import services
from ray._private.node import Node

from tunefleet.search import local_ray
from tunefleet.search.connection import _on_all_cpus
from tunefleet.search.engine import ActorClasses
from tunefleet.search.options import StudyOptions

VARIABLE = "RAY_preload_python_modules"
START = """
import json, os, sys
from tunefleet.search.connection import connect
meant = []
connect(imports=["colorsys"], meanwhile=lambda: meant.append(1))
import psutil, ray
from ray.tune.execution.class_cache import _ActorClassCache
from tunefleet.search.engine import ActorClasses

class Trial:
    def who(self):
        return os.getpid(), "colorsys" in sys.modules

there = [process.pid for process in psutil.Process().children(recursive=True)]
taken, started = (cache.get(Trial).remote() for cache in (ActorClasses(), _ActorClassCache()))
commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
print(json.dumps({
    "there": there,
    "taken": ray.get(taken.who.remote()),
    "started": ray.get(started.who.remote()),
    "meant": meant,
    "left": [name for name in os.environ if name in (
        "RAY_preload_python_modules", "RAY_idle_worker_killing_time_threshold_ms")],
    "commands": commands,
}))
"""


@pytest.mark.ray
def test_trials_get_workers_that_ray_has_started_before():
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    found = json.loads(done.stdout)
    assert found["taken"][0] in found["there"]
    assert found["started"][0] not in found["there"]  # Tune's own way
    assert found["taken"][1]
    assert found["meant"] == [1]
    assert found["left"] == []
    for unused in ("monitor.py", "dashboard/dashboard.py"):
        assert not [command for command in found["commands"] if unused in command]


def test_workers_import_early_only_where_each_cpu_will_have_a_trial(monkeypatch):
    monkeypatch.setattr("tunefleet.search.connection.cpu_count", lambda: 4)
    monkeypatch.setattr("tunefleet.search.connection.may_be_used", lambda: False)
    assert _on_all_cpus(StudyOptions("softmax", trials=8))
    assert _on_all_cpus(StudyOptions("softmax", trials=8, concurrency=4))
    assert not _on_all_cpus(StudyOptions("softmax", trials=3))
    assert not _on_all_cpus(StudyOptions("softmax", trials=8, concurrency=2))
    assert not _on_all_cpus(StudyOptions("softmax", trials=8, cpus_per_trial=2))
    monkeypatch.setattr("tunefleet.search.connection.may_be_used", lambda: True)
    assert not _on_all_cpus(StudyOptions("softmax", trials=8))


@pytest.mark.parametrize(("address", "local"), [(None, True), ("", True), ("local", True), ("auto", False)])
def test_a_study_joins_a_cluster_only_where_it_is_told_to(monkeypatch, address, local):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert local_ray.is_local() is local


@pytest.mark.parametrize("address", [None, "auto"])
def test_only_workers_of_other_hosts_are_given_the_drivers_variables(monkeypatch, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret")
    given = ActorClasses().get(type("Trial", (), {}))._default_options.get("runtime_env")
    assert given == ({"env_vars": given["env_vars"] | {"AWS_SESSION_TOKEN": "secret"}} if address else None)


def test_what_was_replaced_comes_back(monkeypatch):
    monkeypatch.setenv(VARIABLE, "mine")  # a user's own stays
    before = _replaceable()
    with local_ray.lean(False, ["torch"], lambda: None):
        assert os.environ[VARIABLE] == "mine"
        assert all(now is not then for now, then in zip(_replaceable(), before, strict=True))
    assert os.environ[VARIABLE] == "mine"
    assert _replaceable() == before


def _replaceable():
    return services.get_node, Node.start_monitor, Node.start_log_monitor, Node.start_api_server
