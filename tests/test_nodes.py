"""Studies on a cluster of three nodes, all on this machine: what must hold before, what a lost one costs."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.object_store import object_store
from tests.three_nodes import three_nodes
from tunefleet.analysis.load import load
from tunefleet.journal import Journal
from tunefleet.search import nodes
from tunefleet.search.failures import IN_A_ROW, NodeFailures
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.provenance import code_sha256, commit, versions

CPU = DeviceSettings("cpu", "fp32", True, 2**20)
CUDA = DeviceSettings("cuda", "bf16", True, None)
NODE = nodes.Node("ab12", "worker-1", 4, 1)
STUDY = ("--space", "softmax", "--data", "digits", "--wandb", "off", "--final-seeds", 1)


def well(**other):
    """Returns the answer of a node on which all is well."""
    answer = {
        "versions": versions(),
        "code": code_sha256(),
        "gpus": 1,
        "free": 1e12,
        "storage": "",
        "weights": "",
    }
    return answer | {"lacks": [], "needs": 0} | other


@pytest.mark.parametrize(
    ("answer", "settings", "unseen", "needles"),
    [
        ({"versions": versions() | {"torch": "2.0.0"}}, CPU, False, ["torch 2.0.0, not", "constraints.txt"]),
        ({"code": "another"}, CPU, False, ["other code", "ray job submit"]),
        ({"storage": "No such file"}, CPU, False, ["--storage=/mnt", "No such file", "s3://"]),
        ({}, CPU, True, ["--storage=/mnt", "does not see what it wrote"]),
        (
            {"free": 5e9, "needs": 4e9},
            CPU,
            False,
            ["5.0 GB free, 4.0 GB of images to be sent", "larger disk"],
        ),
        ({"free": 1e6}, CPU, False, ["--data-dir", "0.0 GB free"]),
        ({"free": 0, "data_dir": "Permission denied"}, CPU, False, ["--data-dir", "Permission denied"]),
        ({"gpus": 0}, CUDA, False, ["offers 1 GPU to Ray, and torch sees 0", "--device cpu"]),
        ({"weights": "/w.pth"}, CPU, False, ["other weights under /w.pth"]),
    ],
)
def test_each_fault_of_a_node_has_its_remedy(answer, settings, unseen, needles):
    (problem,) = nodes._problems(NODE, well(**answer), settings, unseen, "/mnt")
    for needle in needles:
        assert needle in problem


def test_a_node_without_faults_has_no_problem():
    assert nodes._problems(NODE, well(), CUDA, False, "/mnt") == []
    assert nodes._problems(NODE, well(gpus=0), CPU, False, "/mnt") == []
    assert nodes._problems(NODE, {"failed": "is asleep"}, CPU, True, "/mnt") == ["is asleep"]


def test_a_file_comes_in_parts_and_is_there_once_it_is_whole(tmp_path):
    file, write = tmp_path / "new" / "images.npy", nodes.take._function
    for node in ("b", "a"):  # of a folder that two nodes share
        write(str(file), node, 0, b"abc", False)
    assert not file.exists()
    for node in ("a", "b"):
        write(str(file), node, 3, b"de", True)
        assert file.read_bytes() == b"abcde"
    assert list(file.parent.iterdir()) == [file]


def test_a_part_that_the_disk_refuses_leaves_nothing(tmp_path):
    nodes.take._function(str(tmp_path / "images.npy"), "a", 0, b"abc", False)
    with pytest.raises(TypeError):
        nodes.take._function(str(tmp_path / "images.npy"), "a", 3, None, True)
    assert not list(tmp_path.iterdir())


SEND = """
import sys
from pathlib import Path
import tunefleet.search, ray
from tunefleet.search import nodes

nodes.PART_BYTES = 1000
ray.init("local", num_cpus=1, include_dashboard=False)
(node,) = nodes.worker_nodes()
nodes._send([node], {node.node_id: {"lacks": sys.argv[1:]}})
"""


@pytest.mark.ray
def test_files_are_sent_in_parts(tmp_path):
    files = {tmp_path / "images.npy": bytes(range(256)) * 17, tmp_path / "empty": b""}
    for file, content in files.items():
        file.write_bytes(content)
    before = {file: file.stat().st_ino for file in files}
    subprocess.run([sys.executable, "-c", SEND, *map(str, files)], check=True, timeout=120)
    for file, content in files.items():
        assert file.read_bytes() == content
        assert file.stat().st_ino != before[file]
    assert sorted(tmp_path.iterdir()) == sorted(files)


@pytest.fixture(scope="module")
def bucket():
    with object_store() as url:
        yield url


@pytest.fixture(scope="module")
def cluster(bucket):
    """Three nodes, whose environment leads to the object store."""
    with three_nodes() as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", made.address)
        yield made


@pytest.mark.ray
def test_without_storage_several_nodes_are_refused_at_once(cluster, cli, tmp_path):
    began = time.monotonic()
    process = cli(*STUDY)
    assert process.wait(60) == 2
    error = process.stderr.read()
    assert time.monotonic() - began < 30
    assert error.startswith("error: the cluster has 2 nodes")
    assert "give --storage" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ray
def test_study_runs_on_both_nodes_and_outlives_one(cluster, bucket, cli, tmp_path):
    arguments = (*STUDY, "--study-dir", "lost", "--storage", f"{bucket}/all")
    process = cli(*arguments, "--trials", 6, "--epochs", 60, "--pruner", "none")
    journal = tmp_path / "lost" / "reports.jsonl"
    while not journal.exists() or len({e.get("pid") for e in Journal(journal).read()} - {None}) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    out, error = process.communicate(timeout=150)
    assert process.returncode == 0, error
    assert "free GB" in out
    events = Journal(journal).read()
    assert [event["lost"] for event in events if "lost" in event] == ["node"]
    study = load(f"{bucket}/all/lost")
    assert set(study.facts["statuses"]) <= {"done", "diverged"}
    assert study.facts["trials"] == 6
    assert study.test_accuracy is not None
    reported = [(event["trial_id"], event["epoch"]) for event in events if event.get("epoch")]
    assert len(reported) == len(set(reported))


BROKEN = """
import sys

if any("default_worker.py" in word for word in sys.orig_argv):
    from tunefleet.trainables.training import TrainingRun

    def epoch(self):
        raise RuntimeError("CUDA driver initialization failed")

    TrainingRun.epoch = epoch
"""


@pytest.mark.slow
@pytest.mark.ray
def test_node_that_fails_whatever_it_gets_gets_no_more(cluster, bucket, cli, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    path = f"{tmp_path}:{Path(__file__).parents[1] / 'src'}"
    broken = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": path})
    process = cli(
        *(*STUDY, "--study-dir", "broken", "--storage", f"{bucket}/all"),
        *("--trials", 12, "--epochs", 40, "--pruner", "none", "--searcher", "random"),
    )
    out, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (1, ""), out
    assert f"nodes excluded after repeated failures: {socket.gethostname()} ({broken.node_id})" in out
    facts = load(f"{bucket}/all/broken").facts
    statuses = facts["statuses"]
    seeds = len(facts["final"]["failed"])
    slow = facts["lost_workers"].get("worker", 0)  # to come up
    failed = statuses["error"] + seeds + slow
    assert IN_A_ROW <= failed <= IN_A_ROW + 2, out  # two may have been on their way
    assert sum(statuses.values()) == 12


def test_bad_nodes_are_those_that_failed_in_a_row_while_others_are_there():
    nodes = NodeFailures(alive=lambda: frozenset({"a", "b"}))
    for failed in (True, True, False, True, True):
        nodes.record("a", failed)
    assert nodes.excluded() == frozenset()
    nodes.record("a", True)
    assert nodes.excluded() == {"a"}
    for _ in range(IN_A_ROW):
        nodes.record("b", True)
    assert nodes.excluded() == frozenset()  # nothing would be left
    nodes.record("b", False)
    assert nodes.excluded() == {"a"}


def test_outside_a_checkout_the_commit_is_the_environments(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr("subprocess.run", no_git)
    monkeypatch.delenv("TUNEFLEET_COMMIT", raising=False)
    assert commit() is None
    monkeypatch.setenv("TUNEFLEET_COMMIT", "0123456789ab")
    assert commit() == "0123456789ab"
