"""How is Ray reached, which hands out CPUs and GPUs? Started on this host, or joined."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import ray

from search.local_ray import cpu_count, findable, is_local, lean
from search.options import StudyOptions
from search.spaces import find_space
from trainables.driver import may_be_used

PROCESSES = ("gcs_server", "raylet")  # of a Ray on this host, without which there is none
WATCH_SECONDS = 1.0  # between looks at them
CLUSTER_WATCH_SECONDS = 5.0  # between looks at a joined cluster
CONNECT_SECONDS = 2.0
GONE_SECONDS = 45.0  # of silence, after which a cluster is gone; Ray waits 60
TRIAL_SLOT = "trial_slot"  # a resource of the head node: one for each group of workers that fits


def connect_early(options: StudyOptions) -> None:
    """Starts or joins Ray for a study, and imports torch in the seconds for which this waits.

    Not where groups of workers may train a trial: how many will fit is a resource of the Ray to start.
    """
    workers = options.workers_per_trial
    if workers is None:  # as resources.settle() chooses, which needs torch to count GPUs
        workers = find_space(options.space).workers_per_trial if may_be_used() else 1
    if workers > 1:
        return
    # No module of Ray: its own may not be imported by two threads at once.
    imports = threading.Thread(target=importlib.import_module, args=["trainables.training"])
    first = ["torch", "ray.tune"] if _on_all_cpus(options) else []
    try:
        connect(imports=first, meanwhile=imports.start, device=options.device)
    finally:
        if imports.ident:  # it was started
            imports.join()


def _on_all_cpus(options: StudyOptions) -> bool:
    """Returns whether there will be a trial on each CPU of this host, as far as that can be told early."""
    trials = options.concurrency or options.trials or 0
    return options.cpus_per_trial in (None, 1) and trials >= cpu_count() and not may_be_used()


def _gpu_count(device: str) -> int:
    """Returns how many GPUs of this host Ray may hand out: those that trials are planned on."""
    if device == "cpu" or not may_be_used():
        return 0
    import torch  # takes seconds, for which hosts without a GPU need not wait

    return torch.cuda.device_count()


def connect(
    trial_slots: int = 0,
    imports: Sequence[str] = (),
    meanwhile: Callable[[], None] = lambda: None,
    device: str = "auto",
) -> None:
    """Starts Ray on this host, or joins the cluster that RAY_ADDRESS names; silent.

    Args:
        trial_slots: How many groups of workers shall run at once; 0: trials have one worker each.
        imports: Modules that workers on this host import before they are given a trial.
        meanwhile: Called once, when nothing is left but to wait for Ray.
        device: ``--device``; with cpu a Ray of our own has no GPUs.

    Raises:
        ValueError: Ray did not start, or the cluster cannot be joined.
    """
    if ray.is_initialized():
        if not trial_slots or TRIAL_SLOT in ray.cluster_resources():
            return
        ray.shutdown()  # a cluster of our own, started for an earlier study
    # without an address ray.init would join whatever cluster this host happens to run
    local = is_local()
    address = "local" if local else os.environ["RAY_ADDRESS"]
    # one warning that Ray's SIGTERM handler is for the main thread; search/stopping.py has that signal
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            if local:
                stack.enter_context(lean(bool(trial_slots), imports, meanwhile))
            else:
                meanwhile()
            if local and trial_slots:
                stack.enter_context(findable())
            ray.init(
                address=address,
                num_cpus=cpu_count() if local else None,
                num_gpus=_gpu_count(device) if local else None,
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
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # lost workers stand in reports.jsonl
    # what raylets say last, C++ stacks included, would go to our stdout whatever the level (2.60)
    ray._private.worker.print_to_stdstream = lambda *arguments, **options: None


class RayWatch:
    """Says when the Ray that a study runs on is gone, before Ray itself ends this process for it (2.60).

    It does so 13 s after the end of a raylet and 60 s after that of the control server.
    """

    def __init__(self) -> None:
        self.processes = _children(PROCESSES) if is_local() else {}
        self.address = ray.get_runtime_context().gcs_address
        self.looked_at = self.reached_at = time.monotonic()

    def __call__(self) -> str:
        """Return why the study has to stop; nothing while all is well."""
        now = time.monotonic()
        if self.processes:
            if now - self.looked_at < WATCH_SECONDS:
                return ""
            self.looked_at = now
            gone = [name for pid, name in self.processes.items() if not _is_alive(pid)]
            return f"Ray's {gone[0]} has ended" if gone else ""
        if now - self.looked_at < CLUSTER_WATCH_SECONDS:
            return ""
        self.looked_at = now
        host, _, port = self.address.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), CONNECT_SECONDS):
            self.reached_at = now
        silent = now - self.reached_at
        return "" if silent < GONE_SECONDS else f"the cluster at {self.address} is silent for {silent:.0f} s"


def _children(names: Collection[str]) -> dict[int, str]:
    """Return this process's children of these names, by process id; none where there is no /proc."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = file.read_text().partition("(")[2].rpartition(") ")
            if name in names and int(rest.split()[1]) == os.getpid():
                found[int(file.parent.name)] = name
    return found


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False
