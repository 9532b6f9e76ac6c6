"""From checked options to a finished study: what search/run.py and search/lr_study.py have in common.

What needs torch is imported when Ray has been told to start: that takes seconds, in which torch comes,
and a wrong argument waits for neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import ray
from rich.console import Console

from tunefleet.search.connection import RayWatch, connect_early
from tunefleet.search.folders import place_of, unfinished
from tunefleet.search.local_ray import is_local
from tunefleet.search.mirror import bring
from tunefleet.search.options import StudyOptions
from tunefleet.search.printing import phase, print_result, print_text
from tunefleet.search.spaces import default_image_size
from tunefleet.search.stopping import Stops
from tunefleet.search.wandb_options import choose as choose_wandb
from tunefleet.trainables.data import ImageData, check_sha256, prepare
from tunefleet.trainables.driver import may_be_used

SHUTDOWN_SECONDS = 4.0  # for Ray to end its processes; it takes 1


@dataclass(frozen=True)
class Script:
    """What a user has started, and a study speaks through."""

    console: Console
    resume: tuple[str, ...] = ("tunefleet", "resume")  # the command that continues a study
    finish: Callable[[Path, Console], int] = print_result  # tells of a finished study; returns the exit code
    place: Path | None = None  # what --resume continues; None: the study
    stops: Stops = field(default_factory=Stops)  # what a signal does


def start(
    options: StudyOptions,
    folder: Path | None,
    script: Script,
    *,
    dry_run: bool = False,
    wandb: Mapping[str, Any] | None = None,
    storage: str | None = None,
) -> int:
    """Begins a new study; returns the exit code.

    Args:
        options: What was asked for.
        folder: The study's, new or empty; None: one under studies/.
        script: What has been started.
        dry_run: Forecast the study and write nothing.
        wandb: The fields of WandbOptions that were given.
        storage: Where studies are kept: a folder, or an object store's URL, in which case the study's
            folder here is a copy. None: under studies/, or in ``folder``.

    Raises:
        ValueError: Something stands against it; nothing was written.
    """
    script.stops.change(script.stops.nothing_yet)  # an earlier study of this command had another answer
    shared = storage or (str(folder.absolute().parent) if folder else None)  # what nodes are asked to see
    wandb_options = choose_wandb(wandb or {})
    options, folder = place_of(options, folder, storage)
    data, on_cpus = None, is_local() and (options.device == "cpu" or not may_be_used())
    if on_cpus:  # else a GPU is asked first: it decides on the images' size
        size = options.image_size or default_image_size(options.space, options.weights, "cpu")
        options = dataclasses.replace(options, image_size=size)
        data = read_images(options, script.console)
    with contextlib.nullcontext() if on_cpus and dry_run else _ray_beside_torch(options, script):
        from tunefleet.search.running import begin

        return begin(options, folder, data, script, shared=shared, dry_run=dry_run, wandb=wandb_options)


def resume(
    place: Path | str,
    changes: dict[str, Any],
    script: Script,
    *,
    wandb: Mapping[str, Any] | None = None,
) -> int:
    """Goes on with a study; returns the exit code.

    Args:
        place: The study's folder, or its URL.
        changes: New values of options that change no result.
        script: What has been started.
        wandb: The fields of WandbOptions that were given; the others stay as they were.

    Raises:
        ValueError: There is no study, it is done, or it cannot go on as asked.
    """
    script.stops.change(script.stops.nothing_yet)
    folder = Path(os.path.realpath(bring(str(place))))
    options, content = unfinished(folder, changes)
    wandb_options = choose_wandb(wandb or {}, content.get("wandb"))
    data = read_images(options, script.console)
    version = content.get("data", {}).get("format_version", 1)  # of how images are decoded
    check_sha256(data, options.data, content["data_sha256"], version)
    with _ray_beside_torch(options, script):
        from tunefleet.search.running import go_on
        from tunefleet.search.study import Study
        from tunefleet.trainables.levers import Levers

        study = Study(folder, options, data, Levers(**content["levers"]))
        return go_on(study, script, wandb_options, moved="device" in changes)


def read_images(options: StudyOptions, console: Console) -> ImageData:
    """Returns a study's images, decoded now unless they are already.

    Raises:
        ValueError: They cannot be read.
    """
    assert options.image_size is not None
    with phase(console, f"reading {options.data}") as progress:
        data = prepare(options.data, Path(options.data_dir), options.image_size, progress)
    for note in data.notes:
        print_text(console, note)
    return data


@contextlib.contextmanager
def _ray_beside_torch(options: StudyOptions, script: Script) -> Iterator[None]:
    """Starts or joins Ray, and imports torch; a user's mistake inside leaves no Ray behind."""
    ours = not ray.is_initialized()
    try:
        with phase(script.console, "starting Ray"):
            connect_early(options)
        if ray.is_initialized():
            script.stops.change(script.stops.nothing_yet, RayWatch())
        yield
    except ValueError:
        if ours:
            script.stops.change(script.stops.nothing_yet)  # nobody watches a Ray that is to end
            ray.shutdown()
        raise


def leave(code: int) -> NoReturn:
    """Ends the process; Python's own end, which takes the modules of torch and Ray apart, costs 1.5 s.

    A Ray whose processes are gone may not answer; what is left of it ends with this process.
    """
    shutdown = threading.Thread(target=ray.shutdown, daemon=True)
    shutdown.start()
    shutdown.join(SHUTDOWN_SECONDS)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
