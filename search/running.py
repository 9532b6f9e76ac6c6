"""What happens between Ray's start and a study's end? Checks, trials, and what is told of it.

Started by search/launch.py; imports torch, which that one does not.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray
from rich.console import Console

from tunefleet.cli import counted, printable, shell, shown
from tunefleet.search import preflight
from tunefleet.search.bad_nodes import named
from tunefleet.search.connection import RayWatch, connect
from tunefleet.search.engine import run_jobs
from tunefleet.search.launch import Script, read_images
from tunefleet.search.mirror import Mirror
from tunefleet.search.nodes import check_nodes
from tunefleet.search.options import StudyOptions
from tunefleet.search.printing import phase, print_text
from tunefleet.search.progress import Progress
from tunefleet.search.resources import (
    Machine,
    Resources,
    check_device,
    fit_memory,
    look_at_device,
    machine,
    plan,
    settle,
)
from tunefleet.search.study import Study
from tunefleet.search.wandb_options import WandbOptions
from tunefleet.search.wandb_sync import END_SECONDS, STOP_SECONDS, Sidecar
from tunefleet.store import StoreError
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.driver import hidden_by_environment
from tunefleet.trainables.levers import Levers

T = TypeVar("T")


def begin(
    options: StudyOptions,
    folder: Path,
    data: ImageData | None,
    script: Script,
    *,
    shared: str | None,
    dry_run: bool,
    wandb: WandbOptions,
) -> int:
    """Runs a new study, or forecasts it; returns the exit code.

    Args:
        options: What was asked for.
        folder: The study's, free.
        data: The decoded images; None: they are to be read once their size is settled.
        script: What has been started.
        shared: The place that all nodes of a cluster must see; None: none was given.
        dry_run: Forecast the study and write nothing.
        wandb: What is sent to W&B.

    Raises:
        ValueError: Something stands against it; nothing was written.
    """
    there, console = machine(options.device), script.console
    with phase(console, "looking at the device"):
        levers, there = look_at_device(options, there)
    if levers.device == "cpu" and options.device == "auto" and hidden_by_environment():
        print_standing("CUDA_VISIBLE_DEVICES hides every GPU: training on CPUs", console)
    options = settle(preflight.settle_image_size(options, levers, there), levers, there)
    resources = plan(options, levers, there)
    data = data or read_images(options, console)
    if there.nodes:
        check_nodes(options, shared, data, levers, console)
    prepared, resources = look_before(options, data, levers, there, resources, console, dry_run=dry_run)
    if not options.storage:
        preflight.check_disk(folder, *preflight.disk_needed(options, resources, prepared))
    if dry_run:
        return preflight.print_forecast(options, folder, resources, data, levers, prepared, console)
    start_ray(resources, levers.device, console)
    study = Study(folder.resolve(), options, data, levers)
    with script.stops.held(functools.partial(tell_stopped, study.place, script)):
        Study.create(folder, options, data, levers, prepared)
    return carry_out(study, resources, script, Sidecar(study.folder, wandb))


def look_before(
    options: StudyOptions,
    data: ImageData,
    levers: Levers,
    there: Machine,
    resources: Resources,
    console: Console,
    *,
    dry_run: bool = False,
) -> tuple[preflight.Prepared, Resources]:
    """Prepares what trials read, where they will run; returns what it found, and what GPUs have room for."""
    threads = resources.threads if dry_run else None
    elsewhere = bool(there.nodes) or levers.device == "cuda"
    if elsewhere:
        start_ray(resources, levers.device, console)
    with phase(console, "timing a sample" if dry_run else "preparing inputs") as progress:
        if elsewhere:  # in a process whose end gives the GPU's memory back
            prepared = on_a_node(resources, preflight.prepare)(options, data, levers, threads)
        else:
            prepared = preflight.prepare(options, data, levers, threads, progress)
    resources, line = fit_memory(resources, prepared.peak_bytes, prepared.gpu_bytes)
    print_standing(line, console)
    return prepared, resources


def go_on(study: Study, script: Script, wandb: WandbOptions, *, moved: bool = False) -> int:
    """Goes on with a study; returns the exit code.

    Args:
        study: What is known of it; its data as they lie now.
        script: What has been started.
        wandb: What is sent to W&B.
        moved: Whether the device was given anew.

    Raises:
        ValueError: It cannot go on on this machine.
    """
    options, console = study.options, script.console
    there = machine(options.device if moved else study.levers.device)
    if moved:
        before = study.levers
        study.levers, there = look_at_device(options, there)
        if study.levers != before:
            print_standing(
                f"trained on {before.device} {before.precision} so far, continues on {study.levers.device} "
                f"{study.levers.precision}: numbers may differ from those of one device",
                console,
            )
    check_device(study.levers, there)
    resources = plan(options, study.levers, there)
    if there.nodes:
        check_nodes(options, options.storage or str(study.folder.parent), study.data, study.levers, console)
    _, resources = look_before(options, study.data, study.levers, there, resources, console)
    start_ray(resources, study.levers.device, console)
    return carry_out(study, resources, script, Sidecar(study.folder, wandb))


def on_a_node(resources: Resources, function: Callable[..., T]) -> Callable[..., T]:
    """Returns a function that runs where trials will: in a process of its own, on a node of the cluster.

    The driver's node may have no GPU, and few CPUs to compute features with. Ray ends the process of a task
    that had a GPU (2.60), which gives its memory back.
    """
    share = resources.of_worker
    task = ray.remote(function).options(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0))

    def call(*arguments: Any) -> T:
        try:
            return ray.get(task.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from error
            raise

    return call


def start_ray(resources: Resources, device: str, console: Console) -> None:
    """Starts or joins Ray, before a study's folder is there: a failure leaves nothing behind."""
    with phase(console, "starting Ray"):
        connect(resources.slots if resources.workers > 1 else 0, device=device)


def carry_out(study: Study, resources: Resources, script: Script, sidecar: Sidecar) -> int:
    """Runs a study to its end, or until it is stopped, and prints what came of it."""
    options, console = study.options, script.console
    trials, epochs = counted(options.trials or 0, "trial"), counted(options.epochs or 0, "epoch")
    print_text(
        console,
        f" on {study.data.name}: {trials} of up to {epochs}, {resources.slots} at once, "
        f"{study.levers.device} {study.levers.precision} -> {shown(study.place)}",
        options.space,
    )
    mirror = Mirror(study.folder, study.store, functools.partial(print_standing, console=console))
    with mirror.running(), study.running(dataclasses.asdict(resources)):
        jobs = study.jobs()
        sidecar.start()
        with Progress(jobs, options, resources.slots, console, mirror.trouble) as progress:

            def stop(reason: str) -> int:
                jobs.journal.close()
                progress.close()
                return end_early(study, script, mirror, sidecar, reason)

            ray_watch = RayWatch()
            script.stops.change(stop, lambda: mirror.lost or ray_watch())
            run_jobs(
                jobs,
                study.context(resources.threads, resources.gpu_bytes),
                resources=resources,
                on_step=progress.update,
            )
        script.stops.change(lambda reason: None)  # what is left takes seconds, and is worth them
        try:
            if not jobs.gave_up:
                with mirror.paused():
                    study.tidy(jobs)
        except StoreError as error:
            jobs.gave_up = str(error)
        if jobs.gave_up:
            return end_early(study, script, mirror, sidecar, jobs.gave_up)
    code = script.finish(study.folder, console)
    if jobs.avoided:
        print_standing(f"nodes that failed trials in a row and got no more: {named(jobs.avoided)}", console)
    script.stops.change(sidecar.give_up)
    print_standing(sidecar.end(END_SECONDS), console)
    left = mirror.finish()
    print_standing(left, console)
    return code or int(bool(left))


def end_early(study: Study, script: Script, mirror: Mirror, sidecar: Sidecar, reason: str) -> int:
    """Leaves a study so that it can be resumed, and says how; returns the exit code."""
    study.end("stopped")
    left = mirror.finish(STOP_SECONDS)
    tell_stopped(study.folder if left and not mirror.lost else study.place, script, reason)
    print_standing(sidecar.end(STOP_SECONDS), script.console)
    print_standing(left, script.console)
    return 3


def tell_stopped(place: Path | str, script: Script, reason: str) -> int:
    """Prints that a study has stopped and how to resume it from a place; returns the exit code."""
    resume_by = shell(*script.resume, shown(script.place or place))
    if reason:
        print(f"error: {printable(reason)}; fix the cause, then resume with: {resume_by}", file=sys.stderr)
    else:
        print(f"\nstopped; nothing is lost. To resume: {resume_by}", file=sys.stderr)
    return 3


def print_standing(line: str, console: Console) -> None:
    """Prints how a study stands with W&B, where there is anything to say."""
    if line:
        print_text(console, line)
