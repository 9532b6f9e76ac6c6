"""How are CPUs and GPUs divided among trials?"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from tunefleet.cli import counted
from tunefleet.search.connection import TRIAL_SLOT, connect
from tunefleet.search.options import StudyOptions
from tunefleet.search.spaces import find_space
from tunefleet.trainables.device import CONTEXT_BYTES, Levers, choose, why_unusable
from tunefleet.trainables.host import cpu_count, free_bytes

NODE_SECONDS = 900.0  # an autoscaler's first node may take so long to come up
NODES_MAX = 1000  # of one kind: an autoscaler may have no limit


@dataclass(frozen=True)
class Machine:
    """What trials may use: of the cluster where there is one, else of this host."""

    cpus: float
    gpus: float = 0
    trial_slots: float | None = None  # that the cluster offers; None: our own cluster, as many as fit
    nodes: tuple[tuple[float, float], ...] = ()  # CPUs and GPUs of each; none: this host is all there is
    gpu_bytes: int | None = None  # free on the GPU that has least; None: there is none, or it is not known

    @property
    def sizes(self) -> tuple[tuple[float, float], ...]:
        """Returns CPUs and GPUs of each node, this host where there is no cluster."""
        return self.nodes or ((self.cpus, self.gpus),)


@dataclass(frozen=True)
class Resources:
    """What each trial gets, and how many run at once."""

    slots: int
    cpus_per_trial: float
    gpus_per_trial: float
    workers: int = 1  # that share a trial and its resources
    gpu_bytes: int | None = None  # of a GPU that trials share, what each may take; None: all

    @property
    def threads(self) -> int:
        """Returns the threads of one worker."""
        return max(1, int(self.cpus_per_trial / self.workers))

    @property
    def of_trial(self) -> dict[str, float]:
        """Returns the resources of one trial as Tune takes them."""
        return {"cpu": self.cpus_per_trial} | ({"gpu": self.gpus_per_trial} if self.gpus_per_trial else {})

    @property
    def of_worker(self) -> dict[str, float]:
        """Returns the resources of one worker as Train takes them."""
        of_worker = {"CPU": self.cpus_per_trial / self.workers}
        return of_worker | ({"GPU": self.gpus_per_trial / self.workers} if self.gpus_per_trial else {})


def machine(device: str = "auto") -> Machine:
    """Returns what there is to divide among trials; of an autoscaling cluster, what there may be.

    Args:
        device: ``--device``; with cpu there are no GPUs on this host.
    """
    if not os.environ.get("RAY_ADDRESS"):
        gpus = 0 if device == "cpu" else torch.cuda.device_count()
        return Machine(cpu_count(), gpus, gpu_bytes=free_bytes() if gpus else None)
    connect()
    sizes = _sizes(row["Resources"] for row in ray.nodes() if row["Alive"])
    if config := ray._private.state.state.get_cluster_config():  # None without an autoscaler (Ray 2.60)
        groups = [(group.resources, min(group.max_count, NODES_MAX)) for group in config.node_group_configs]
        may_be = _sizes(resources for resources, count in groups for _ in range(count))
        sizes = max(sizes, may_be, key=lambda nodes: sum(map(sum, nodes)))
    slots = ray.cluster_resources().get(TRIAL_SLOT, 0)
    return Machine(sum(cpus for cpus, _ in sizes), sum(gpus for _, gpus in sizes), slots, sizes)


def _sizes(nodes: Iterable[Mapping[str, float]]) -> tuple[tuple[float, float], ...]:
    """Returns CPUs and GPUs of the nodes that have any."""
    sizes = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
    return tuple(size for size in sizes if any(size))


def look_at_device(options: StudyOptions, there: Machine) -> tuple[Levers, Machine]:
    """Chooses how trials use their device: here, or on a node of the cluster, where they will run.

    Returns:
        The choice, and the machine with what is free on its GPUs.

    Raises:
        ValueError: The device is not there, or no node came up.
    """
    if not there.nodes:
        return choose(options.device, options.precision), there
    on_gpu = options.device == "cuda" or (options.device == "auto" and there.gpus > 0)
    if on_gpu and not there.gpus:
        raise ValueError("--device=cuda, but no node of the cluster has a GPU; give --device cpu")
    task: Any = ray.remote(_look).options(**({"num_gpus": 1} if on_gpu else {"num_cpus": 1}))
    try:
        levers, free = ray.get(
            task.remote("cuda" if on_gpu else options.device, options.precision), timeout=NODE_SECONDS
        )
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error.cause)) from error
    except ray.exceptions.GetTimeoutError as error:
        raise ValueError(
            f"no node with a free {'GPU' if on_gpu else 'CPU'} within {NODE_SECONDS / 60:.0f} min; "
            "ray status says what the cluster waits for"
        ) from error
    return levers, replace(there, gpu_bytes=free)


def _look(device: str, precision: str) -> tuple[Levers, int | None]:
    """Returns the levers of this process's device, and what is free on its GPU."""
    levers = choose(device, precision)
    return levers, torch.cuda.mem_get_info()[0] if levers.device == "cuda" else None


def check_device(levers: Levers, there: Machine) -> None:
    """Raises ValueError where a study's device is not there."""
    if levers.device == "cuda" and not there.gpus:
        why = None if there.nodes else why_unusable()
        raise ValueError(
            f"the study trains on {levers.device}, and there is no GPU{f': {why}' if why else ''}; resume it "
            "where there is one, or give --device cpu (numbers may then differ)"
        )


def settle(options: StudyOptions, levers: Levers, there: Machine) -> StudyOptions:
    """Returns the options with what depends on the machine: workers per trial, and with them the pruner."""
    workers = options.workers_per_trial
    if workers is None:
        wanted = find_space(options.space).workers_per_trial
        workers = wanted if levers.device == "cuda" and there.gpus >= wanted else 1
    pruner = options.pruner or ("stop" if workers > 1 else "promote")  # a group is costly to start again
    return replace(options, workers_per_trial=workers, pruner=pruner)


def plan(options: StudyOptions, levers: Levers, there: Machine) -> Resources:
    """Divides CPUs and GPUs among trials.

    Raises:
        ValueError: They do not suffice; shows the arithmetic.
    """
    cpus, gpus, workers = there.cpus, there.gpus, options.workers_per_trial or 1
    gpus_per_trial = options.gpus_per_trial
    if gpus_per_trial is None:
        share = 1 if workers > 1 else find_space(options.space).gpus_per_trial
        gpus_per_trial = workers * share if levers.device == "cuda" else 0.0
    if gpus_per_trial > gpus:
        raise ValueError(
            f"--gpus-per-trial={gpus_per_trial:g}, but there are {counted(gpus, 'GPU')}; "
            + (f"give at most {gpus:g}" if gpus else "leave it out to train on CPUs")
        )
    if gpus_per_trial > 1 and gpus_per_trial != int(gpus_per_trial):
        raise ValueError(f"--gpus-per-trial={gpus_per_trial:g}: above 1 Ray takes whole GPUs only")
    if gpus_per_trial % workers and workers > 1:
        raise ValueError(
            f"--gpus-per-trial={gpus_per_trial:g} among --workers-per-trial={workers}: each worker takes "
            f"whole GPUs; give a multiple of {workers}"
        )
    cpus_per_trial = options.cpus_per_trial
    if cpus_per_trial is None:
        cpus_per_trial = float(workers)
        if gpus_per_trial and options.concurrency and len(there.sizes) == 1:
            cpus_per_trial = max(cpus_per_trial, cpus // options.concurrency)
        elif gpus_per_trial:
            shares = [c // fit for c, g in there.sizes if (fit := _by_gpu(g, gpus_per_trial / workers)) >= 1]
            cpus_per_trial = max(cpus_per_trial, workers * min(shares, default=0.0))
    fits = _fitting(there, cpus_per_trial / workers, gpus_per_trial / workers) // workers
    slots = options.concurrency or fits
    if fits < 1 or slots > fits:
        asked = f"{slots} × " if options.concurrency else ""
        need = asked + counted(cpus_per_trial, "CPU")
        need += f" and {asked}{counted(gpus_per_trial, 'GPU')}" if gpus_per_trial else ""
        need += f" ({workers} workers each)" if workers > 1 else ""
        remedy = f"give --concurrency of at most {fits}, or a smaller --cpus-per-trial"
        if not fits:
            remedy = f"give --cpus-per-trial of at most {cpus:g}"
            if options.cpus_per_trial is None and workers > 1:
                remedy = f"give --workers-per-trial of at most {int(cpus)}"
            if len(there.sizes) > 1:
                need += " on one node" if workers == 1 else ""
                remedy = "; ".join(map(_named, sorted(set(there.sizes))))
                remedy = f"the nodes have {remedy}: give --cpus-per-trial and --gpus-per-trial that fit"
        raise ValueError(f"trials need {need}, but there are {_named((cpus, gpus))}; {remedy}")
    if workers > 1 and there.trial_slots is not None:
        if there.trial_slots < 1:
            raise ValueError(
                f"--workers-per-trial={workers} needs the resource {TRIAL_SLOT}, and there is none; start "
                f"""the head with ray start --head --resources='{{"{TRIAL_SLOT}": {fits}}}'"""
            )
        slots = min(slots, int(there.trial_slots))
    assert options.trials is not None
    slots = min(slots, max(options.trials, options.final_seeds))
    return Resources(slots, cpus_per_trial, gpus_per_trial, workers)


def fit_memory(resources: Resources, peak_bytes: int | None, free: int | None) -> tuple[Resources, str]:
    """Returns the resources with as many trials on each GPU as its memory holds, and a line where fewer.

    Args:
        resources: As planned.
        peak_bytes: What the largest trial of the ranges takes in torch's allocator; None: more than it has.
        free: Bytes of a GPU that is to be shared, as a process sees them that is on it; None: not known.
    """
    share = resources.gpus_per_trial / resources.workers
    if not share > 0 or free is None:
        return resources, ""
    at_once, room = max(1, int(1 / share)), free + CONTEXT_BYTES
    holds = at_once if peak_bytes is None else max(1, room // (peak_bytes + CONTEXT_BYTES))
    needed = "more than a GPU has" if peak_bytes is None else f"{peak_bytes / 1e9:.1f} GB"
    line = ""
    if peak_bytes is None or peak_bytes > free:
        line = (
            f"the largest trials of the ranges need {needed}, and {free / 1e9:.1f} GB are free: they will "
            "end as out_of_memory"
        )
    elif holds < at_once:
        line = (
            f"the largest trials of the ranges need {needed} each, and {free / 1e9:.1f} GB of a GPU are "
            f"free: {holds} at once on it, not {at_once}"
        )
        slots = max(1, resources.slots * holds // at_once)
        resources = replace(resources, slots=slots, gpus_per_trial=resources.workers / holds)
        at_once = holds
    if at_once == 1:
        return resources, line
    return replace(resources, gpu_bytes=room // at_once - CONTEXT_BYTES), line


def _by_gpu(gpus: float, of_worker: float) -> float:
    """Returns how many workers a node's GPUs hold; Ray gives whole ones, or shares of one."""
    if not of_worker:
        return math.inf
    return gpus // of_worker if of_worker >= 1 else gpus * (1 // of_worker)


def _named(size: tuple[float, float]) -> str:
    return f"{counted(size[0], 'CPU')} and {counted(size[1], 'GPU')}"


def _fitting(there: Machine, cpus: float, gpus: float) -> int:
    """Returns how many workers of so many CPUs and GPUs the nodes hold, none of which is divided."""
    return sum(int(min(math.floor(c / cpus + 1e-9), _by_gpu(g, gpus))) for c, g in there.sizes)
