"""How are CPUs and GPUs divided among trials?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from tunefleet.cli import counted
from tunefleet.host import cpu_count, free_bytes
from tunefleet.search.connection import TRIAL_SLOT, connect, is_local
from tunefleet.search.options import StudyOptions
from tunefleet.trainables.device import CONTEXT_BYTES, DeviceSettings, choose, why_unusable

NODE_SECONDS = 900.0  # an autoscaler's first node may take so long to come up
NODES_SECONDS = 5.0  # between looks at a cluster's nodes during a study
INPUTS_SHARE = 0.5  # of a GPU's free memory that the inputs of all trials on it may take
AHEAD = 2  # trials of a cluster that wait for more nodes: an autoscaler starts them


@dataclass(frozen=True)
class Machine:
    """What trials may use: of the cluster where there is one, else of this host."""

    cpus: float
    gpus: float = 0
    trial_slots: float | None = None  # that the cluster offers; None: our own cluster, as many as fit
    nodes: tuple[tuple[float, float], ...] = ()  # CPUs and GPUs of each; none: this host is all there is
    gpu_bytes: int | None = None  # free on the GPU that has least; None: there is none, or it is not known
    grows: bool = False  # an autoscaler may start more nodes

    @property
    def sizes(self) -> tuple[tuple[float, float], ...]:
        """Return CPUs and GPUs of each node, this host if there is no cluster."""
        return self.nodes or ((self.cpus, self.gpus),)


@dataclass(frozen=True)
class Resources:
    """What each trial gets, and how many run at once."""

    slots: int
    cpus_per_trial: float
    gpus_per_trial: float
    workers: int = 1  # that share a trial and its resources
    slots_max: int | None = None  # on a cluster slots follow its nodes, up to this; None: they are fixed
    ahead: int = 0  # trials beyond what fits that wait for nodes
    gpu_bytes: int | None = None  # of a GPU that trials share, what each may take; None: all

    @property
    def threads(self) -> int:
        """Return the threads of one worker."""
        return max(1, int(self.cpus_per_trial / self.workers))

    @property
    def of_worker(self) -> dict[str, float]:
        """Return the resources of one worker as Train takes them."""
        of_worker = {"CPU": self.cpus_per_trial / self.workers}
        return of_worker | ({"GPU": self.gpus_per_trial / self.workers} if self.gpus_per_trial else {})


def find_machine(device: str = "auto") -> Machine:
    """Return the CPUs, GPUs and nodes to divide among trials; of a cluster, those that are up.

    Args:
        device: ``--device``; with cpu there are no GPUs on this host.

    Raises:
        ValueError: No node came up.
    """
    if is_local():
        gpus = 0 if device == "cpu" else torch.cuda.device_count()
        return Machine(cpu_count(), gpus, gpu_bytes=free_bytes() if gpus else None)
    connect()
    grows = any("ray.io/node-group" in row.get("Labels", {}) for row in ray.nodes())  # ray up's or KubeRay's
    sizes = node_sizes()
    if grows and not any(gpus if device == "cuda" else cpus for cpus, gpus in sizes):
        _wait_for([{"GPU" if device == "cuda" else "CPU": 1}])
        sizes = node_sizes()
    slots = ray.cluster_resources().get(TRIAL_SLOT, 0)
    return Machine(sum(cpus for cpus, _ in sizes), sum(gpus for _, gpus in sizes), slots, sizes, grows=grows)


def node_sizes() -> tuple[tuple[float, float], ...]:
    """Return CPUs and GPUs of the cluster's live nodes that have any."""
    up = [row["Resources"] for row in ray.nodes() if row["Alive"]]
    return tuple(size for node in up if any(size := (node.get("CPU", 0), node.get("GPU", 0))))


def _wait_for(bundles: list[dict[str, float]]) -> None:
    """Wait until an autoscaler has started nodes with room for these, which it does for what waits."""
    group = placement_group(bundles)
    came = group.wait(NODE_SECONDS)
    remove_placement_group(group)
    if not came:
        raise _no_node("GPU" in bundles[0])


def _no_node(gpu: bool) -> ValueError:
    return ValueError(
        f"no node with a free {'GPU' if gpu else 'CPU'} within {NODE_SECONDS / 60:.0f} min; "
        "ray status says what the cluster waits for"
    )


def look_at_device(options: StudyOptions, machine: Machine) -> tuple[DeviceSettings, Machine]:
    """Choose how trials use their device: here, or on a node of the cluster, where they will run.

    Returns:
        The choice, and the machine with what is free on its GPUs.

    Raises:
        ValueError: The device is not there, or no node came up.
    """
    if not machine.nodes:
        return choose(options.device, options.precision), machine
    on_gpu = options.device == "cuda" or (options.device == "auto" and machine.gpus > 0)
    if on_gpu and not machine.gpus:
        raise ValueError("--device=cuda, but no node of the cluster has a GPU; give --device cpu")
    task: Any = ray.remote(_look).options(**({"num_gpus": 1} if on_gpu else {"num_cpus": 1}))
    try:
        settings, free = ray.get(
            task.remote("cuda" if on_gpu else options.device, options.precision), timeout=NODE_SECONDS
        )
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error.cause)) from error
    except ray.exceptions.GetTimeoutError as error:
        raise _no_node(on_gpu) from error
    return settings, replace(machine, gpu_bytes=free)


def _look(device: str, precision: str) -> tuple[DeviceSettings, int | None]:
    """Return the settings of this process's device, and what is free on its GPU."""
    settings = choose(device, precision)
    return settings, torch.cuda.mem_get_info()[0] if settings.device == "cuda" else None


def check_device(settings: DeviceSettings, machine: Machine) -> None:
    """Raise ValueError if a study's device is not there."""
    if settings.device == "cuda" and not machine.gpus:
        why = None if machine.nodes else why_unusable()
        raise ValueError(
            f"the study trains on {settings.device}, and there is no GPU{f': {why}' if why else ''}; resume "
            "it where there is one, or give --device cpu (numbers may then differ)"
        )


def settle(options: StudyOptions, settings: DeviceSettings, machine: Machine) -> StudyOptions:
    """Return the options with what depends on the machine: workers per trial, and with them the pruner."""
    workers = options.workers_per_trial
    if workers is None:
        wanted = options.space.workers_per_trial
        workers = wanted if settings.device == "cuda" and machine.gpus >= wanted else 1
    pruner = options.pruner or ("stop" if workers > 1 else "promote")  # a group is costly to start again
    return replace(options, workers_per_trial=workers, pruner=pruner)


def plan(options: StudyOptions, settings: DeviceSettings, machine: Machine) -> Resources:
    """Divide CPUs and GPUs among trials.

    Raises:
        ValueError: They do not suffice; shows the arithmetic.
    """
    workers, gpus_per_trial = options.workers_per_trial or 1, options.gpus_per_trial
    if gpus_per_trial is None:
        share = 1 if workers > 1 else options.space.gpus_per_trial
        gpus_per_trial = workers * share if settings.device == "cuda" else 0.0
    if machine.grows:
        machine = _grown(machine, workers, options.cpus_per_trial or workers, gpus_per_trial)
    _check_gpus(gpus_per_trial, workers, machine.gpus)
    cpus_per_trial = options.cpus_per_trial or _cpus_per_trial(options, machine, gpus_per_trial)
    fits = _fitting(machine.sizes, cpus_per_trial / workers, gpus_per_trial / workers) // workers
    if fits < 1 or ((options.concurrency or 0) > fits and not machine.nodes):
        raise ValueError(_too_little(options, machine, fits, cpus_per_trial, gpus_per_trial))
    assert options.trials is not None
    most = max(options.trials, options.final_seeds)
    if workers > 1 and machine.trial_slots is not None:
        if machine.trial_slots < 1:
            raise ValueError(
                f"--workers-per-trial={workers} needs the resource {TRIAL_SLOT}, and there is none; start "
                f"""the head with ray start --head --resources='{{"{TRIAL_SLOT}": {fits}}}', or Ray with """
                f"""ray.init(resources={{"{TRIAL_SLOT}": {fits}}})"""
            )
        most = min(most, int(machine.trial_slots))
    resources = Resources(min(options.concurrency or fits, most), cpus_per_trial, gpus_per_trial, workers)
    if not machine.nodes or (options.concurrency and workers == 1):
        return resources  # trials that do not fit yet wait, each for a node
    if workers > 1:  # a group that does not fit fails after a minute (Ray 2.60)
        return replace(resources, slots=min(resources.slots, fits), slots_max=resources.slots)
    return replace(resources, slots_max=most, ahead=AHEAD if machine.grows else 0)


def _check_gpus(gpus_per_trial: float, workers: int, gpus: float) -> None:
    """Raise ValueError for a share of GPUs that cannot be had."""
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


def _cpus_per_trial(options: StudyOptions, machine: Machine, gpus: float) -> float:
    """Return one for each worker, or a GPU's share of its node's CPUs."""
    workers = options.workers_per_trial or 1
    if gpus and options.concurrency and len(machine.sizes) == 1 and not machine.grows:
        return max(float(workers), machine.cpus // options.concurrency)
    shares = [c // fit for c, g in machine.sizes if gpus and (fit := _by_gpu(g, gpus / workers)) >= 1]
    return max(float(workers), workers * min(shares, default=0.0))


def _grown(machine: Machine, workers: int, cpus: float, gpus: float) -> Machine:
    """Return the cluster once a trial fits, for which an autoscaler may have to start nodes."""
    if _fitting(machine.sizes, cpus / workers, gpus / workers) >= workers:
        return machine
    bundle = {"CPU": cpus / workers} | ({"GPU": gpus / workers} if gpus else {})
    _wait_for([bundle] * workers)
    return replace(find_machine(), gpu_bytes=machine.gpu_bytes)


def _too_little(options: StudyOptions, machine: Machine, fits: int, cpus: float, gpus: float) -> str:
    """Return the arithmetic of trials that need more CPUs or GPUs than there are."""
    workers = options.workers_per_trial or 1
    times = f"{options.concurrency} × " if options.concurrency else ""
    need = times + counted(cpus, "CPU")
    need += f" and {times}{counted(gpus, 'GPU')}" if gpus else ""
    need += f" ({workers} workers each)" if workers > 1 else ""
    remedy = f"give --concurrency of at most {fits}, or a smaller --cpus-per-trial"
    if not fits:
        remedy = f"give --cpus-per-trial of at most {machine.cpus:g}"
        if options.cpus_per_trial is None and workers > 1:
            remedy = f"give --workers-per-trial of at most {int(machine.cpus)}"
        if len(machine.sizes) > 1:
            need += " on one node" if workers == 1 else ""
            remedy = "; ".join(map(_named, sorted(set(machine.sizes))))
            remedy = f"the nodes have {remedy}: give --cpus-per-trial and --gpus-per-trial that fit"
    return f"trials need {need}, but there are {_named((machine.cpus, machine.gpus))}; {remedy}"


def waiting(options: StudyOptions, resources: Resources) -> str:
    """Return a line about trials that were asked for and wait for nodes; nothing if there are none."""
    if is_local() or not options.concurrency:
        return ""
    fits = fitting(resources)
    if options.concurrency <= fits:
        return ""
    return (
        f"--concurrency={options.concurrency}, and the nodes that are up have room for "
        f"{counted(fits, 'trial')}: the others wait for nodes"
    )


def fitting(resources: Resources) -> int:
    """Return how many trials fit on the cluster's nodes as they are now."""
    share = resources.cpus_per_trial / resources.workers, resources.gpus_per_trial / resources.workers
    return _fitting(node_sizes(), *share) // resources.workers


class Slots:
    """How many trials may be at work: planned once on a host, following the nodes on a cluster."""

    def __init__(self, resources: Resources) -> None:
        self.resources, self.slots = resources, resources.slots
        self._looked_at = -math.inf

    def __call__(self) -> int:
        """Return their number now; at least one."""
        most = self.resources.slots_max
        if most is not None and time.monotonic() - self._looked_at >= NODES_SECONDS:
            self._looked_at = time.monotonic()
            self.slots = max(1, min(most, fitting(self.resources) + self.resources.ahead))
        return self.slots


def place_inputs(
    settings: DeviceSettings, resources: Resources, input_bytes: int, free: int | None
) -> tuple[DeviceSettings, str]:
    """Return the settings with the inputs on the GPU or on the host, and a line where on the host.

    ``input_bytes`` are those of one trial, ``free`` those of a GPU, None where not known.
    """
    at_once = _at_once(resources)
    if settings.device != "cuda" or free is None or at_once * input_bytes <= INPUTS_SHARE * free:
        return settings, ""
    return replace(settings, inputs_on_device=False), (
        f"inputs take {input_bytes / 1e9:.1f} GB for each of {counted(at_once, 'trial')} on a GPU with "
        f"{free / 1e9:.1f} GB free: they stay on the host, and batches are copied"
    )


def _at_once(resources: Resources) -> int:
    """Return how many trials share a GPU."""
    share = resources.gpus_per_trial / resources.workers
    return max(1, int(1 / share)) if share > 0 else 1


def fit_memory(resources: Resources, peak_bytes: int | None, free: int | None) -> tuple[Resources, str]:
    """Return the resources with as many trials on each GPU as its memory holds, and a line where fewer.

    ``peak_bytes`` is what the largest trial of the ranges takes in torch's allocator, None: more than it has;
    ``free`` is what a process sees free on a GPU that is to be shared, None: not known.
    """
    if not resources.gpus_per_trial > 0 or free is None:
        return resources, ""
    at_once, room = _at_once(resources), free + CONTEXT_BYTES
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
    """Return how many workers a node's GPUs hold; Ray gives whole ones, or shares of one."""
    if not of_worker:
        return math.inf
    return gpus // of_worker if of_worker >= 1 else gpus * (1 // of_worker)


def _named(size: tuple[float, float]) -> str:
    return f"{counted(size[0], 'CPU')} and {counted(size[1], 'GPU')}"


def _fitting(sizes: tuple[tuple[float, float], ...], cpus: float, gpus: float) -> int:
    """Return how many workers of so many CPUs and GPUs the nodes hold, none of which is divided."""
    return sum(int(min(math.floor(c / cpus + 1e-9), _by_gpu(g, gpus))) for c, g in sizes)
