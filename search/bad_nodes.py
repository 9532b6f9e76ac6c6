"""Which nodes fail whatever trial they get? They get no more, while there are others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import ray

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
