"""What will a study take, in time and on disk? Measured in seconds, before the first trial."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from models import ARCHITECTURES
from search.asha import expected_epochs
from search.local_ray import cpu_count
from search.options import StudyOptions
from search.printing import clock, shown
from search.resources import Resources
from search.spaces import find_space
from trainables.config import TrainConfig
from trainables.data import ImageData
from trainables.levers import Levers
from trainables.training import TrainingRun

OPTIMIZER_VALUES = {"sgd": 1, "adam": 2, "adamw": 2}  # kept per parameter, at most
MEASURED_STEPS = 10  # optimizer steps that forecast an epoch
START_SECONDS = 8  # Ray, its first workers and its end, on two cores


def example(options: StudyOptions) -> TrainConfig:
    """Returns the space's published best as a config of this study: what preflight builds and times."""
    first = options.points[0] if options.points else find_space(options.space, options.fix).published
    return TrainConfig.from_dict({**options.fixed_values(), **first})


@dataclass(frozen=True)
class Prepared:
    """What is known of a study when its published best was built once."""

    split_sha256: str
    train_count: int
    validation_count: int
    checkpoint_bytes: int  # of one trial
    epoch_seconds: float | None  # of the published best on one worker; None: not measured


def prepare(options: StudyOptions, data: ImageData, levers: Levers, threads: int | None = None) -> Prepared:
    """Builds the published best with all cores, which prepares the inputs that the trials share.

    Args:
        options: The study's.
        data: The decoded images.
        levers: How trials use their device.
        threads: Measure an epoch on so many; None: do not.

    Raises:
        ValueError: Weights, sizes or data do not fit the architecture, or the network not into memory.
    """
    torch.set_num_threads(cpu_count())
    try:
        run = TrainingRun(example(options), data, levers, Path(options.data_dir))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(f"{options.space} does not fit into memory here; --fix smaller sizes") from error
    seconds = None if threads is None else _measure(run, threads)
    inputs = run.inputs
    return Prepared(
        inputs.split_sha256, len(inputs.train_y), len(inputs.val_y), checkpoint_bytes(run), seconds
    )


def checkpoint_bytes(run: TrainingRun) -> int:
    """Returns what the tensors of a checkpoint take, once the optimizer has its state."""
    network = sum(tensor.nbytes for tensor in run.network.state_dict().values())
    return network + OPTIMIZER_VALUES[run.config.optimizer] * sum(p.nbytes for p in run.trained)


def _measure(run: TrainingRun, threads: int) -> float:
    """Returns the seconds of an epoch, from a few steps."""
    torch.set_num_threads(threads)
    batch, whole = run.config.batch_size, run.inputs
    count = min(len(whole.train_y), MEASURED_STEPS * batch)
    val_count = min(len(whole.val_y), count)
    run.inputs = replace(
        whole,
        train_x=whole.train_x[:count],
        train_y=whole.train_y[:count],
        val_x=whole.val_x[:val_count],
        val_y=whole.val_y[:val_count],
    )
    run.train_epoch()  # warms caches and lazy initialisation
    report = run.epoch()
    run.inputs = whole
    images = len(whole.train_y) + len(whole.val_y)
    return float(report["epoch_seconds"] * images / (count + val_count))


def forecast(options: StudyOptions, resources: Resources, prepared: Prepared) -> dict[str, float]:
    """Returns what the study will take.

    Returns:
        epochs (of the search, in expectation), final_epochs, seconds, and checkpoint_bytes in all.
    """
    assert options.trials is not None
    assert options.epochs is not None
    assert prepared.epoch_seconds is not None
    epochs = expected_epochs(options.trials, options.rungs, options.eta, options.epochs)
    waves = math.ceil(options.final_seeds / resources.slots) * options.epochs
    return {
        "epochs": epochs,
        "final_epochs": options.final_seeds * options.epochs,
        "seconds": START_SECONDS + prepared.epoch_seconds * (epochs / resources.slots + waves),
        "checkpoint_bytes": prepared.checkpoint_bytes * (options.trials + options.final_seeds),
    }


def check_disk(folder: Path, needed: int) -> None:
    """Raises ValueError where a study's folder has not the space that its checkpoints need."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"checkpoints in {folder} need up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "give --study-dir on a larger disk, or fewer --trials"
        )


def print_forecast(
    options: StudyOptions,
    folder: Path,
    resources: Resources,
    data: ImageData,
    levers: Levers,
    prepared: Prepared,
    console: Console,
) -> int:
    """Prints what --dry-run promises; returns 0."""
    facts = forecast(options, resources, prepared)
    gpus = f" and {resources.gpus_per_trial:g} GPU" if resources.gpus_per_trial else ""
    lines = [
        f"space      {options.space}: {ARCHITECTURES[options.space].summary}",
        f"data       {data.name}, {prepared.train_count} train, {prepared.validation_count} validation, "
        f"{data.test_count} test images",
        f"trials     {options.trials}, {resources.slots} at once, each {resources.cpus_per_trial:g} CPU{gpus}"
        f", {levers.precision}",
        f"epochs     {facts['epochs']} expected ({(options.trials or 0) * (options.epochs or 0)} unpruned), "
        f"rungs {list(options.rungs)}, {options.pruner}",
        f"final      {options.final_seeds} seeds, {facts['final_epochs']} epochs",
        f"time       about {clock(facts['seconds'])}, from {prepared.epoch_seconds:.2f} s an epoch "
        "of the published best",
        f"disk       up to {facts['checkpoint_bytes'] / 1e6:.0f} MB of checkpoints while it runs",
        f"folder     {shown(folder)}, not written",
    ]
    for text in lines:
        console.print(text, highlight=False, soft_wrap=True)
    return 0
