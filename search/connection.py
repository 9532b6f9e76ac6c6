"""How is Ray reached, which hands out CPUs and GPUs? Started on this host, or joined."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ray

from models import ARCHITECTURES
from search.options import StudyOptions
from search.spaces import find_space

TRIAL_SLOT = "trial_slot"  # a resource of the head node: one for each group of workers that fits


def connect_early(options: StudyOptions) -> None:
    """Starts or joins Ray for a study, and imports torch in the seconds for which this waits.

    Not where groups of workers may train a trial: how many will fit is a resource of the Ray to start.
    """
    workers = options.workers_per_trial
    if workers is None:  # as resources.settle() chooses, which needs torch to count GPUs
        workers = find_space(options.space).workers_per_trial if shutil.which("nvidia-smi") else 1
    if workers > 1:
        return
    # No modules of Ray: its own may not be imported by two threads at once.
    names = ["trainables.training", *(["torchvision"] if ARCHITECTURES[options.space].cut else [])]
    imports = threading.Thread(target=lambda: [importlib.import_module(name) for name in names])
    imports.start()
    try:
        connect()
    finally:
        imports.join()


def connect(trial_slots: int = 0) -> None:
    """Starts Ray on this host, or joins the cluster that RAY_ADDRESS names; silent.

    Args:
        trial_slots: How many groups of workers shall run at once; 0: trials have one worker each.

    Raises:
        ValueError: Ray did not start, or the cluster cannot be joined.
    """
    if ray.is_initialized():
        if not trial_slots or TRIAL_SLOT in ray.cluster_resources():
            return
        ray.shutdown()  # a cluster of our own, started for an earlier study
    # without an address ray.init would join whatever cluster this host happens to run
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    try:
        with _findable_cluster() if trial_slots and local else contextlib.nullcontext():
            ray.init(
                address=address,
                resources={TRIAL_SLOT: trial_slots} if trial_slots and local else None,
                include_dashboard=bool(trial_slots) if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray 2.60 raises ConnectionError, RuntimeError, and Exception itself
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"Ray did not start on this host ({reason}); wait until it has free CPUs and memory"
            if local
            else f"RAY_ADDRESS={address} cannot be joined ({reason}); start that cluster, give its token "
            "(RAY_AUTH_MODE=token, ~/.ray/auth_token), or unset RAY_ADDRESS to use this host"
        ) from error
    if local:  # it would scale a cluster, and takes a second to end when told to (2.60)
        node: Any = ray._private.worker._global_node
        node.kill_monitor()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # lost workers stand in reports.jsonl
    # what raylets say last, C++ stacks included, would go to our stdout whatever the level (2.60)
    ray._private.worker.print_to_stdstream = lambda *arguments, **options: None
    # ray.init puts a handler in place that prints a C++ stack and aborts (2.60); a SIGTERM, which a
    # cluster sends before it takes a node, shall be a Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def _findable_cluster() -> Iterator[None]:
    """Lets the processes of a cluster that starts inside know its address.

    Train's actor that gives a stopped group's resources back asks the dashboard, and finds it by
    RAY_ADDRESS or by guessing among all clusters of the host, in vain where there are two (Ray 2.60).
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    names = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name)
