"""What does a lost worker mean? Its cause, and what follows for its trial, its node and its GPU.

- ``node``: the machine is gone, preempted or out of reach. Its trials continue elsewhere, however often.
- ``memory``: the node ran out of memory and the trial was alone on it. It gets one more try, then it has
  ended as out_of_memory.
- ``neighbour``: another trial may be the reason: for its node's lack of memory, or a CUDA error on its GPU a
  moment ago. The trial continues, uncharged.
- ``disk``: there is no room for its checkpoint. No trial could continue, so the study stops, resumable.
- ``store``: the object store did not take or give a file for minutes. The same.
- ``gpu``: a CUDA error has made the GPU unusable for the process, such as a device-side assert. Counts as a
  crash.
- ``graph``: its step cannot be captured as a CUDA graph, ``graph_memory``: for lack of memory. It continues
  without; of the first kind, all trials do.
- ``worker``: the process died otherwise. The trial continues, ``--max-failures`` times.

The texts are those of Ray 2.52 to 2.60.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tunefleet.files import says_full
from tunefleet.host import oom_kills
from tunefleet.store import StoreError

MEMORY = ("NODE_OUT_OF_MEMORY", "running low on memory")
NODE = (
    "its node has died",  # seen for a killed raylet, and a node that missed its heartbeats
    "node was terminated",
    "preempt",  # a spot node, drained before it went
    "drained",
    "ActorUnavailableError",  # the connection broke: seen for a machine that is gone at once
    "is temporarily unavailable",
    "NodeDiedError",
    "LocalRayletDiedError",
)
BY_CLASS = {  # names of our exceptions, as Ray's texts have them
    "CaptureMemoryError": "graph_memory",
    "CaptureError": "graph",
    "BrokenGpuError": "gpu",
}
SAME_EVENT_SECONDS = 10.0  # losses on one GPU within this time after a CUDA error have one reason
NODE_SECONDS = 5.0  # in which a node has to answer
IN_A_ROW = 3  # trials that fail on a node one after another


def cause_of(error: BaseException | None) -> str:
    """Return node, memory, disk, store, gpu, graph, graph_memory or worker."""
    text = f"{type(error).__name__}: {error}"
    for name, cause in BY_CLASS.items():
        if name in text:
            return cause
    if any(sign in text for sign in MEMORY):
        return "memory"
    if says_full(text):
        return "disk"
    if StoreError.__name__ in text:
        return "store"
    gone: Any = getattr(error, "preempted", False)
    return "node" if gone or any(sign in text for sign in NODE) else "worker"


def gpu_named(error: BaseException | None) -> str | None:
    """Return the GPU whose UUID one of our errors names."""
    found = (
        re.search(r"(GPU|MIG)-[0-9a-f][0-9a-f-]{7,}", str(error)) if "BrokenGpuError" in repr(error) else None
    )
    return found[0] if found else None


def node_named(error: BaseException | None) -> str | None:
    """Return the id of the node whose address Ray's error names, if only one node has it."""
    found = re.search(r"\bip[:=] ?([0-9a-fA-F.:]+)", str(error))
    nodes = [row["NodeID"] for row in ray.nodes() if found and row["NodeManagerAddress"] == found[1]]
    return nodes[0] if len(nodes) == 1 else None


def oom_kills_on(node_id: str) -> int | None:
    """Return how often a node's kernel has killed a process for lack of memory; None: it does not answer."""
    on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    count: Any = ray.remote(oom_kills).options(num_cpus=0, scheduling_strategy=on_node)
    try:
        return int(ray.get(count.remote(), timeout=NODE_SECONDS))
    except ray.exceptions.RayError:
        return None


def text_of(error: BaseException | None) -> str:
    """Return an error's text as the journal keeps it, without empty lines."""
    return "\n".join(line for line in str(error).splitlines() if line.strip())


def alive() -> frozenset[str]:
    """Return the ids of the nodes that trials may run on."""
    return frozenset(
        node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)
    )


def named(node_ids: frozenset[str]) -> str:
    """Return nodes as a user knows them: host names, each with its id."""
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    return ", ".join(sorted(f"{hosts.get(node_id, 'gone')} ({node_id})" for node_id in node_ids))


class NodeFailures:
    """Exclude nodes that fail whatever trial they get, while there are others.

    ``alive`` returns the ids of all nodes that are up.
    """

    def __init__(self, alive: Callable[[], frozenset[str]] = alive) -> None:
        self.alive = alive
        self.in_a_row: Counter[str] = Counter()

    def record(self, node_id: str, failed: bool) -> None:
        """Record how an epoch, or a trial, ended on a node."""
        if failed:
            self.in_a_row[node_id] += 1
        else:
            self.in_a_row.pop(node_id, None)

    def excluded(self) -> frozenset[str]:
        """Return the ids of the nodes that get no more trials; none if no other node is left."""
        bad = frozenset(node_id for node_id, count in self.in_a_row.items() if count >= IN_A_ROW)
        return bad if bad and self.alive() - bad else frozenset()


class GpuFailures:
    """Count the workers lost on each GPU. Ray chooses a trial's GPU, so a bad one is only reported."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.in_a_row: Counter[str] = Counter()
        self.seen: set[str] = set()
        self._failed_at: dict[str, float] = {}  # when a CUDA error was last seen on a GPU

    def succeed(self, gpu: str) -> None:
        """Record that a trial has trained on a GPU."""
        self.seen.add(gpu)
        self.in_a_row.pop(gpu, None)

    def lose(self, gpu: str, cause: str) -> tuple[str, str]:
        """Record that a worker was lost on a GPU; return the cause and a line to print.

        ``cause`` is ``gpu`` or ``worker``. The one returned is ``neighbour`` if a CUDA error took another
        worker of this GPU a moment ago; the line may be empty.
        """
        self.seen.add(gpu)
        now, before = self.clock(), self._failed_at.get(gpu)
        if before is not None and now - before < SAME_EVENT_SECONDS:
            return "neighbour", ""
        if cause == "gpu":
            self._failed_at[gpu] = now
        self.in_a_row[gpu] += 1
        if self.in_a_row[gpu] != IN_A_ROW:
            return cause, ""
        others = ",".join(sorted(self.seen - {gpu}))
        remedy = f"CUDA_VISIBLE_DEVICES={others}" if others else "no other GPU has been used: --device cpu"
        return cause, f"{IN_A_ROW} workers in a row were lost on {gpu}; to resume without it: {remedy}"


class MemoryFailures:
    """Find the trial for which a node has too little memory.

    Ray (2.60) kills the workers that started last, several at once, whatever each of them holds. So no trial
    is charged if several shared the node: they become suspects, which continue one at a time until each has
    reported an epoch, or one runs out of memory alone.
    """

    def __init__(self) -> None:
        self.suspects: set[str] = set()
        self.alone = ""  # the suspect whose turn it is

    def lose(self, trial_ids: Collection[str]) -> str:
        """Record that the node of these trials ran out of memory; return the cause of their losses."""
        if self.alone in trial_ids or (len(trial_ids) == 1 and not self.suspects):
            self.suspects = set(trial_ids)
            return "memory"
        self.suspects |= set(trial_ids)  # one after another of the same event, too
        return "neighbour"

    def start(self, trial_id: str) -> None:
        """Record that a trial starts; while there are suspects, no other is at work."""
        self.alone = trial_id if self.suspects else ""

    def has_to_yield(self, trial_id: str) -> bool:
        """Record a trial's report; return whether it continues later."""
        if not self.suspects:
            return False
        if trial_id == self.alone:
            self.clear(trial_id)
        return bool(self.suspects) or trial_id != self.alone

    def clear(self, trial_id: str) -> None:
        """Record that a trial is no suspect any more."""
        self.suspects.discard(trial_id)
