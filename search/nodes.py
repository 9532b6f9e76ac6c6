"""What must be true on every node of a cluster before the first trial? Checks all nodes at once.

Each node says which versions and code it has, whether torch sees its GPUs, what its disk has left, and
whether it reads and writes the study's storage; what it lacks of images and weights is sent to it through
Ray's object store. All within a minute.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.table import Table

from tunefleet.cli import counted
from tunefleet.models.backbones import weights_file
from tunefleet.search.options import StudyOptions
from tunefleet.search.preflight import example
from tunefleet.store import BRIEF_SECONDS, Store
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.provenance import code_sha256, versions

ANSWER_SECONDS = 45.0  # for all nodes together; a dead one is known to Ray after a minute only
PART_BYTES = 64 * 2**20  # of a file that is sent at a time, so that no node has to hold the file in memory
FREE_MIN = 2 * 2**30  # bytes under --data-dir: prepared inputs of CIFAR-10 take half of it
MARK = ".tunefleet-node"  # files by which driver and nodes find out whether they share a folder


@dataclass(frozen=True)
class Node:
    """A node that trials may run on."""

    node_id: str
    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Question:
    """What each node has to check; plain values, so that a node with other code can read it."""

    store: Store  # where studies are kept
    mark: str  # the name of a file that the driver has written there
    data: Mapping[str, int]  # the decoded images' files and their bytes, by absolute path
    weights: tuple[str, str] | None  # a file and its sha256
    data_dir: str


def worker_nodes() -> list[Node]:
    """Return the live nodes of the connected cluster that have CPUs or GPUs to offer."""
    nodes = [
        Node(
            row["NodeID"],
            row["NodeManagerHostname"],
            row["Resources"].get("CPU", 0),
            row["Resources"].get("GPU", 0),
        )
        for row in ray.nodes()
        if row["Alive"]
    ]
    return sorted((node for node in nodes if node.cpus or node.gpus), key=lambda node: node.name)


def check_nodes(
    options: StudyOptions, location: str | None, data: ImageData, settings: DeviceSettings, console: Console
) -> None:
    """Print a table of the cluster's nodes; send images and weights to those that lack them.

    Args:
        options: The study's.
        location: Where studies are kept, as given; None: on the driver's disk.
        data: The decoded images, on the driver's disk.
        settings: What the trials will run on.
        console: Where to print.

    Raises:
        ValueError: Trials could not run on a node; one line that says which and what to do.
    """
    nodes = worker_nodes()
    here = ray.get_runtime_context().get_node_id()
    if [node.node_id for node in nodes] in ([], [here]):
        return
    if location is None:
        raise ValueError(
            f"the cluster has {len(nodes)} nodes, and studies/ is a folder of this one; give --storage with "
            "a folder that all nodes share, or s3://BUCKET/PREFIX"
        )
    question = _question(options, location, data)
    try:
        answers = _ask(nodes, question)
        missing = _written_by(nodes, question)
    finally:
        question.store.remove(question.mark)
    problems = [
        f"node {node.name}: {problem}"
        for node in nodes
        for problem in _problems(node, answers[node.node_id], settings, node.node_id in missing, location)
    ]
    _print(nodes, answers, console)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    _send([node for node in nodes if answers[node.node_id]["lacks"]], answers)


def _question(options: StudyOptions, location: str, data: ImageData) -> Question:
    store, mark = Store(location, patience=BRIEF_SECONDS).absolute(), f"{MARK}-{uuid.uuid4().hex}"
    store.write(b"driver", mark)
    files = {str(file): file.stat().st_size for file in sorted(Path(data.folder).iterdir())}
    config = example(options)
    weights = weights_file(config.model.get("backbone"), config.weights)
    return Question(
        store=store,
        mark=mark,
        data=files,
        weights=(str(weights), _sha256(weights)) if weights and weights.is_file() else None,
        data_dir=str(Path(options.data_dir).absolute()),
    )


def _ask(nodes: list[Node], question: Question) -> dict[str, dict[str, Any]]:
    """Return each node's answer by its id; ``{"failed": why}`` of one that gave none."""
    refs = {
        answer_question.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote(question): node
        for node in nodes
    }
    done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=ANSWER_SECONDS)
    answers: dict[str, dict[str, Any]] = {
        node.node_id: {"failed": f"gave no answer within {ANSWER_SECONDS:.0f} s; look at ray status"}
        for node in nodes
    }
    for ref in done:
        try:
            answers[refs[ref].node_id] = ray.get(ref)
        except Exception as error:  # noqa: BLE001  whatever a node's Python raises is what is wrong with it
            reason = str(error).strip().rpartition("\n")[2]
            answers[refs[ref].node_id] = {
                "failed": f"cannot run this code ({reason}); install it there, or start the study by "
                "ray job submit --working-dir src"
            }
    return answers


@ray.remote(num_cpus=0, max_retries=0)
def answer_question(question: Question) -> dict[str, Any]:
    """Return what this node has and sees."""
    answer: dict[str, Any] = {
        "versions": versions(),
        "code": code_sha256(),
        "gpus": torch.cuda.device_count(),
        "storage": "",
        "lacks": [],
        "needs": 0,
        "weights": "",
    }
    try:
        _leave_mark(question)
    except (OSError, ValueError) as error:
        answer["storage"] = str(error).partition("\n")[0]
    try:
        Path(question.data_dir).mkdir(parents=True, exist_ok=True)
        answer["free"] = shutil.disk_usage(question.data_dir).free
    except OSError as error:
        answer["free"], answer["data_dir"] = 0, str(error)
    for file, size in question.data.items():
        if not Path(file).exists() or Path(file).stat().st_size != size:
            answer["lacks"].append(file)
            answer["needs"] += size
    if question.weights:
        file, sha256 = question.weights
        if not Path(file).exists():
            answer["lacks"].append(file)
        elif _sha256(Path(file)) != sha256:
            answer["weights"] = file
    return answer


def _leave_mark(question: Question) -> None:
    if question.store.read(question.mark) is None:
        raise OSError("what the driver wrote there is not there")
    question.store.write(b"node", f"{question.mark}-{ray.get_runtime_context().get_node_id()}")


def _written_by(nodes: list[Node], question: Question) -> set[str]:
    """Return the ids of nodes whose mark the driver does not find, and remove the others'."""
    missing = set()
    for node in nodes:
        name = f"{question.mark}-{node.node_id}"
        if question.store.read(name) is None:
            missing.add(node.node_id)
        question.store.remove(name)
    return missing


def _problems(
    node: Node, answer: dict[str, Any], settings: DeviceSettings, unseen: bool, location: str
) -> list[str]:
    """Return why trials could not run on a node, each reason with its remedy."""
    if "failed" in answer:
        return [answer["failed"]]
    found = []
    ours = versions()
    differing = [
        f"{name} {answer['versions'][name]}, not {ours[name]}"
        for name in ours
        if answer["versions"].get(name) != ours[name]
    ]
    if differing:
        found.append(f"has {', '.join(differing)}; install the same with constraints.txt")
    if answer["code"] != code_sha256():
        found.append("has other code than the driver; copy it there, or ray job submit --working-dir src")
    if answer["storage"] or unseen:
        reason = answer["storage"] or "the driver does not see what it wrote"
        found.append(f"cannot use --storage={location} ({reason}); give one that all nodes share, or s3://…")
    if answer.get("data_dir") or answer["free"] < FREE_MIN + answer["needs"]:
        reason = answer.get("data_dir") or f"{answer['free'] / 1e9:.1f} GB free"
        reason += f", {answer['needs'] / 1e9:.1f} GB of images to be sent" if answer["needs"] else ""
        found.append(f"has no room under --data-dir ({reason}); give a folder on a larger disk")
    if settings.device == "cuda" and answer["gpus"] < node.gpus:
        found.append(
            f"offers {counted(node.gpus, 'GPU')} to Ray, and torch sees {answer['gpus']}; install a driver "
            "that fits torch's CUDA, or give --device cpu"
        )
    if answer["weights"]:
        found.append(f"has other weights under {answer['weights']}; remove them, and the driver's are sent")
    return found


def _send(nodes: list[Node], answers: dict[str, dict[str, Any]]) -> None:
    """Send the files that nodes lack, in parts, each once into the object store."""
    for file in sorted({file for node in nodes for file in answers[node.node_id]["lacks"]}):
        lacking = [node for node in nodes if file in answers[node.node_id]["lacks"]]
        size = Path(file).stat().st_size
        with Path(file).open("rb") as stream:
            for offset in range(0, max(size, 1), PART_BYTES):
                part = ray.put(stream.read(PART_BYTES))
                refs = {}
                for node in lacking:
                    here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
                    call = take.options(scheduling_strategy=here)
                    refs[call.remote(file, node.node_id, offset, part, offset + PART_BYTES >= size)] = node
                _await(refs)


def _await(refs: Mapping[ray.ObjectRef, Node]) -> None:
    for ref, node in refs.items():
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise ValueError(
                f"node {node.name} cannot take the images ({reason}); give another --data-dir"
            ) from error


@ray.remote(num_cpus=0)
def take(file: str, node_id: str, offset: int, part: bytes, is_last: bool) -> None:
    """Write a part of a file on this node; the file is there once its last part is."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{node_id}.tmp")  # nodes may share the folder
    try:
        with partial.open("r+b" if offset else "wb") as stream:
            stream.seek(offset)
            stream.write(part)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if is_last:
        partial.replace(path)


def _print(nodes: list[Node], answers: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table("node", "CPUs", "GPUs", "free GB", "torch", "lacks", box=None, pad_edge=False)
    for node in nodes:
        answer = answers[node.node_id]
        known = "failed" not in answer
        lacks = counted(len(answer["lacks"]), "file") if known and answer["lacks"] else "-"
        table.add_row(
            node.name,
            f"{node.cpus:g}",
            f"{node.gpus:g}",
            f"{answer['free'] / 1e9:.0f}" if known else "?",
            answer["versions"]["torch"] if known else "?",
            lacks,
        )
    console.print(table)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
