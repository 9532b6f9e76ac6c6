"""What happens between Ray's start and a study's end? Checks, trials, and what is told of it.

Started by search/launch.py; imports torch, which that one does not.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray
from rich.console import Console

from search import preflight
from search.bad_nodes import named
from search.connection import connect
from search.engine import run_jobs
from search.launch import Script
from search.mirror import Mirror
from search.nodes import check_nodes
from search.options import StudyOptions
from search.printing import shown
from search.progress import Progress
from search.resources import Machine, Resources, choose_levers, machine, plan, settle
from search.study import Study
from search.wandb_options import WandbOptions
from search.wandb_sidecar import END_SECONDS, STOP_SECONDS, Sidecar
from trainables.data import ImageData
from trainables.storage import StoreError

T = TypeVar("T")


class GaveUpError(Exception):
    """A study ended before its time, since what stopped its trials would stop the next ones."""


def begin(
    options: StudyOptions,
    folder: Path,
    data: ImageData,
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
        data: The decoded images.
        script: What has been started.
        shared: The place that all nodes of a cluster must see; None: none was given.
        dry_run: Forecast the study and write nothing.
        wandb: What is sent to W&B.

    Raises:
        ValueError: Something stands against it; nothing was written.
    """
    there, console = machine(), script.console
    with console.status("looking at the device"):
        levers = choose_levers(options, there)
    options = settle(options, levers, there)
    resources = plan(options, levers, there)
    if there.nodes:
        check_nodes(options, shared, data, levers, console)
    with console.status("preparing inputs"):
        threads = resources.threads if dry_run else None
        prepared = on_a_node(there, resources, preflight.prepare)(options, data, levers, threads)
    if not options.storage:
        preflight.check_disk(folder, prepared.checkpoint_bytes * (options.trials or 0))
    if dry_run:
        return preflight.print_forecast(options, folder, resources, data, levers, prepared, console)
    start_ray(resources, console)
    study = Study.create(folder, options, data, levers, prepared)
    return carry_out(study, resources, script, Sidecar(study.folder, wandb))


def go_on(study: Study, script: Script, wandb: WandbOptions) -> int:
    """Goes on with a study; returns the exit code.

    Args:
        study: What is known of it; its data as they lie now.
        script: What has been started.
        wandb: What is sent to W&B.

    Raises:
        ValueError: It cannot go on on this machine.
    """
    options, console = study.options, script.console
    there = machine()
    resources = plan(options, study.levers, there)
    if there.nodes:
        check_nodes(options, options.storage or str(study.folder.parent), study.data, study.levers, console)
    on_a_node(there, resources, preflight.prepare)(options, study.data, study.levers)
    start_ray(resources, console)
    return carry_out(study, resources, script, Sidecar(study.folder, wandb))


def on_a_node(there: Machine, resources: Resources, function: Callable[..., T]) -> Callable[..., T]:
    """Returns a function that runs where trials will: here, or on a node of the cluster.

    The driver's node may have no GPU, and few CPUs to compute features with.
    """
    if not there.nodes:
        return function
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


def start_ray(resources: Resources, console: Console) -> None:
    """Starts or joins Ray, before a study's folder is there: a failure leaves nothing behind."""
    with console.status("starting Ray"):
        connect(resources.slots if resources.workers > 1 else 0)


def carry_out(study: Study, resources: Resources, script: Script, sidecar: Sidecar) -> int:
    """Runs a study to its end or to a Ctrl-C, and prints what came of it."""
    options, console = study.options, script.console
    console.print(
        f"[bold]{options.space}[/] on {study.data.name}: {options.trials} trials of up to {options.epochs} "
        f"epochs, {resources.slots} at once, {study.levers.device} {study.levers.precision} "
        f"-> {shown(study.place)}",
        highlight=False,
        soft_wrap=True,
    )
    mirror = Mirror(study.folder, study.storage, functools.partial(print_standing, console=console))
    try:
        with mirror.running(), study.running(dataclasses.asdict(resources)):
            jobs = study.jobs()
            sidecar.start()
            with Progress(jobs, options, resources.slots, console, mirror.trouble) as progress:

                def on_step() -> None:
                    if mirror.lost:
                        jobs.gave_up = mirror.lost
                        raise GaveUpError(mirror.lost)
                    progress.update()

                run_jobs(jobs, study.context(resources.threads), resources=resources, on_step=on_step)
            if jobs.gave_up:
                raise GaveUpError(jobs.gave_up)
            with mirror.paused():
                study.tidy(jobs)
    except (KeyboardInterrupt, GaveUpError, StoreError) as end:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left takes a second or two
        left = mirror.finish(STOP_SECONDS)
        place = study.folder if left and not mirror.lost else study.place  # what is whole
        resume_by = f"python {script.name} --resume {shown(place)}"
        if not isinstance(end, KeyboardInterrupt):
            print(f"error: {end}. Mend it, then: {resume_by}", file=sys.stderr)
        else:
            print(f"\nstopped; nothing is lost. To go on: {resume_by}", file=sys.stderr)
        print_standing(sidecar.end(STOP_SECONDS), console)
        print_standing(left, console)
        return 3
    code = script.finish(study.folder, console)
    if jobs.avoided:
        print_standing(f"nodes that failed trials in a row and got no more: {named(jobs.avoided)}", console)
    print_standing(sidecar.end(END_SECONDS), console)
    left = mirror.finish()
    print_standing(left, console)
    return code or int(bool(left))


def print_standing(line: str, console: Console) -> None:
    """Prints how a study stands with W&B, where there is anything to say."""
    if line:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
