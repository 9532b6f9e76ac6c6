"""Which nodes and GPUs fail whatever trial they get?

Such a node gets no more, while there are others. Which GPU a trial gets is Ray's choice, so of a GPU the user
is told.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import ray

SAME_EVENT_SECONDS = 10.0  # in which losses on one GPU after a CUDA error have one reason
IN_A_ROW = 3  # trials that fail on a node one after another


def alive() -> frozenset[str]:
    """Returns the ids of the nodes that trials may run on."""
    return frozenset(
        node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)
    )


def named(node_ids: frozenset[str]) -> str:
    """Returns nodes as a user knows them: host names, each with its id."""
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    return ", ".join(sorted(f"{hosts.get(node_id, 'gone')} ({node_id})" for node_id in node_ids))


class BadNodes:
    """Counts the failures of each node.

    Args:
        alive: Returns the ids of the nodes there are.
    """

    def __init__(self, alive: Callable[[], frozenset[str]] = alive) -> None:
        self.alive = alive
        self.failures: Counter[str] = Counter()  # in a row

    def tell(self, node_id: str, failed: bool) -> None:
        """Takes in what became of a trial on a node, or of an epoch of one."""
        if failed:
            self.failures[node_id] += 1
        else:
            self.failures.pop(node_id, None)

    def avoided(self) -> frozenset[str]:
        """Returns the ids of the nodes that get no more trials; none where no other is left."""
        bad = frozenset(node_id for node_id, count in self.failures.items() if count >= IN_A_ROW)
        return bad if bad and self.alive() - bad else frozenset()


class GpuLosses:
    """Counts the workers lost on each GPU.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.in_a_row: Counter[str] = Counter()
        self.seen: set[str] = set()
        self._failed_at: dict[str, float] = {}  # when a CUDA error was last seen on a GPU

    def succeed(self, gpu: str) -> None:
        """Takes in that a trial has trained on a GPU."""
        self.seen.add(gpu)
        self.in_a_row.pop(gpu, None)

    def lose(self, gpu: str, cause: str) -> tuple[str, str]:
        """Takes in that a worker was lost on a GPU.

        Args:
            gpu: Its UUID.
            cause: gpu or worker.

        Returns:
            The cause, ``neighbour`` where a moment ago a CUDA error took another worker of this GPU; and a
            line for the user, or nothing.
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
