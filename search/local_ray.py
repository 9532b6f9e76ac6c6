"""What does Ray start on this host for a study? What trials need, and workers that are soon ready.

Ray 2.60 knows no options for most of it, so some of its functions are replaced while it starts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray._private import services
from ray._private.node import Node
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

NODE_SECONDS = 30.0  # in which a raylet has to come up; Ray's own limit
POLL_SECONDS = 0.03
IDLE_SECONDS = 30.0  # that prestarted workers wait for trials; Ray's 1 s is over before there are any


def is_local() -> bool:
    """Returns whether a study has a Ray of its own, and joins no cluster."""
    return (os.environ.get("RAY_ADDRESS") or "local") == "local"


@contextlib.contextmanager
def lean(api_server: bool, imports: Sequence[str], meanwhile: Callable[[], None]) -> Iterator[None]:
    """Has a Ray that starts inside leave out what a study does not use, and come up sooner.

    There is no autoscaler, no monitor of logs that nobody reads, and no API server unless asked for:
    Ray waits for it, though it serves the dashboard only. Workers that Ray starts at once, one per
    CPU, wait for trials instead of being replaced.

    Args:
        api_server: Start that, too; Ray Train asks it for its groups.
        imports: Modules that those workers import while they wait.
        meanwhile: Called when only Ray's own processes have work left.
    """
    get_node = services.get_node

    def without_server(node: Any, **options: Any) -> None:
        node._webui_url = ""  # what Ray has without a dashboard

    def when_up(address: str, node_id: str) -> dict[str, Any]:
        """Looks more often than Ray, which tries again after a second."""
        meanwhile()
        client, end = GcsClient(address=address), time.monotonic() + NODE_SECONDS
        while time.monotonic() < end and node_id not in map(ray.NodeID.hex, client.get_all_node_info()):
            time.sleep(POLL_SECONDS)
        return get_node(address, node_id)

    variables = {"RAY_idle_worker_killing_time_threshold_ms": f"{1000 * IDLE_SECONDS:.0f}"}
    if imports:
        variables["RAY_preload_python_modules"] = ",".join(imports)
    with (
        environment(variables),
        _replaced(services, get_node=when_up),
        _replaced(Node, start_monitor=_nothing, start_log_monitor=_nothing),
        contextlib.nullcontext() if api_server else _replaced(Node, start_api_server=without_server),
    ):
        yield


@contextlib.contextmanager
def findable() -> Iterator[None]:
    """Lets the processes of a cluster that starts inside know its address.

    Train's actor that gives a stopped group's resources back asks the API server, and finds it by
    RAY_ADDRESS or by guessing among all clusters of the host, in vain where there are two (Ray 2.60).
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    with environment({"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": address}):
        yield


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Has environment variables inside; those that the user has set stay as they are."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name)


@contextlib.contextmanager
def _replaced(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Has functions of a class or a module replaced."""
    before = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def _nothing(node: Any) -> None:
    """Stands in for the start of a process."""
