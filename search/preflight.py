"""What will a study take, in time and on disk? Measured in seconds, before the first trial."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import tarfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray.tune.search.sample import Categorical, Integer
from rich.console import Console
from torch import nn

from tunefleet.cli import clock, counted, megabytes, printable, shown
from tunefleet.host import cpu_count
from tunefleet.models.space import FIELDS, TrainConfig
from tunefleet.models.spaces import default_image_size
from tunefleet.search.asha import expected_epochs
from tunefleet.search.display import print_text
from tunefleet.search.options import StudyOptions
from tunefleet.search.resources import INPUTS_SHARE, Machine, Resources
from tunefleet.search.suggest import suggest
from tunefleet.trainables.archives import DAMAGE
from tunefleet.trainables.data import BUILT_IN, ImageData, Progress
from tunefleet.trainables.device import DeviceSettings, fitting, free_memory, is_out_of_memory
from tunefleet.trainables.graph import WARM_UP_STEPS, CaptureError, CaptureMemoryError
from tunefleet.trainables.inputs import (
    build_model,
    is_prepared,
    kind_of,
    load_inputs,
    sample_inputs,
    split_counts,
)
from tunefleet.trainables.own_images import OwnImages
from tunefleet.trainables.training import TrainingRun

SAMPLED_CONFIGS = 1000  # whose checkpoints' mean is forecast
SAMPLED_NETWORKS = 50  # that are built for it, at most
MEASURED_STEPS = {"cpu": 10, "cuda": 100}  # optimizer steps that forecast an epoch
PEAK_BATCHES = 2 * WARM_UP_STEPS + 5  # halves of a batch: some steps are captured, and one is short
SIZES = (128, 64, 32)  # pixels a side that a GPU's memory decides between
BUILT_IN_IMAGES = {"cifar10": 60_000, "digits": 1797}
SAMPLED_MEMBERS = 1000  # of an archive, to estimate how many it holds
SMALLER = "--fix smaller sizes"  # what to do where a network does not fit into memory
START_SECONDS = 8  # Ray, its first workers and its end, on two cores


def settle_image_size(
    options: StudyOptions, settings: DeviceSettings, machine: Machine, source: str | OwnImages
) -> StudyOptions:
    """Return the options with an image size: as given, or the space's best that there is room for.

    Each trial on a GPU has the inputs there; together they may take half of what is free, and the disk has
    to hold them.
    """
    if options.image_size is not None:
        return options
    wanted = default_image_size(options.space, options.weights, settings.device)
    if settings.device == "cuda" and wanted > SIZES[-1]:
        count = source.count if isinstance(source, OwnImages) else count_images(source)
        share = options.gpus_per_trial or options.space.gpus_per_trial
        trials = max(1, int(1 / share))
        on_gpu = math.inf if machine.gpu_bytes is None else machine.gpu_bytes * INPUTS_SHARE / trials
        room = min(_free(Path(options.data_dir)), on_gpu)
        sizes = (wanted, *(size for size in SIZES if size < wanted))
        fitting = (s for s in sizes if count * input_bytes(options, s, settings) <= room)
        wanted = next(fitting, SIZES[-1])
    return replace(options, image_size=wanted)


def input_bytes(options: StudyOptions, image_size: int, settings: DeviceSettings) -> int:
    """Return what one image takes on the device: as features of a frozen backbone, or as uint8 pixels."""
    if not options.space.feature_cache:
        return 3 * image_size**2
    shape = (3, image_size, image_size)
    model = options.space.network(2, shape, example(replace(options, image_size=image_size, weights="none")))
    with torch.inference_mode():
        features: torch.Tensor = model.backbone.eval()(torch.zeros(1, *shape))
    return features.numel() * settings.dtype.itemsize


def inputs_bytes(options: StudyOptions, data: ImageData, settings: DeviceSettings) -> int:
    """Return what the inputs of one of the study's trials take, at most."""
    config, pixels = example(options), math.prod(data.image_shape)
    augments = getattr(options.searched.ranges.get("augment"), "categories", [config.augment])
    kinds = {kind_of(replace(config, augment=augment), data) for augment in augments}
    sizes = {"images": pixels, "normalised": pixels * settings.dtype.itemsize}
    if "features" in kinds:
        sizes["features"] = input_bytes(options, config.image_size, settings)
    return data.train_count * max(sizes[kind] for kind in kinds)


def count_images(source: str) -> int:
    """Return about how many images a source holds, without reading all of it; 0 where that cannot be read."""
    with contextlib.suppress(*DAMAGE):  # an error where the images are read
        return _count_images(source)
    return 0


def _count_images(source: str) -> int:
    path = Path(source).expanduser()
    if source in BUILT_IN or path.is_dir():
        return BUILT_IN_IMAGES.get(source) or sum(len(files) for _, _, files in os.walk(path))
    if zipfile.is_zipfile(path):
        return len(zipfile.ZipFile(path).infolist())
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        members = sum(1 for _ in itertools.islice(tar, SAMPLED_MEMBERS))
        return members if members < SAMPLED_MEMBERS else members * path.stat().st_size // file.tell()


def example(options: StudyOptions) -> TrainConfig:
    """Return the study's first trial: what preflight builds and times."""
    first = options.points[0] if options.points else options.searched.start
    return options.space.config({**options.fixed_values(), **first})


def check_network(options: StudyOptions, data: ImageData) -> None:
    """Build the first trial's network, so that what does not fit is an error before Ray starts.

    Raises:
        ValueError: The builder refuses a value, the image size or the weights.
    """
    with fitting(options.space.name, SMALLER):
        build_model(example(options), data)


@dataclass(frozen=True)
class Prepared:
    """What is known of a study when its first trial was built once."""

    split_sha256: str
    train_count: int
    validation_count: int
    mean_checkpoint: int  # bytes; of the configs that the study may sample
    largest_checkpoint: int
    epoch_seconds: float | None  # of the first trial on one worker; None: not measured
    preparing_seconds: float = 0.0  # that inputs will take which a forecast left out
    peak_bytes: int | None = None  # of a GPU, of the largest trial; None: on a CPU, or it did not fit
    gpu_bytes: int | None = None  # free on the GPU before
    model_bytes: int = 0  # of the largest network, backbone included: what is kept of a seed
    input_bytes: int = 0  # of the first trial's inputs that are to be written under --data-dir


def prepare(
    options: StudyOptions,
    data: ImageData,
    settings: DeviceSettings,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Build the first trial with all cores, which prepares the inputs that the trials share.

    Args:
        options: The study's.
        data: The decoded images.
        settings: How trials use their device.
        threads: Forecast: measure an epoch on so many, on a sample of images whose inputs are kept nowhere;
            None: prepare all inputs, and measure no epoch.
        progress: Called with what is done, images prepared and images in all.

    Raises:
        ValueError: Weights, sizes or data do not fit the architecture, or the network not into memory.
    """
    torch.set_num_threads(cpu_count())
    config, data_dir = example(options), Path(options.data_dir)
    gpu_bytes = torch.cuda.mem_get_info()[0] if settings.device == "cuda" else None
    train_count, val_count, split = split_counts(data)
    left, seconds, unwritten = 0.0, None, 0
    with fitting(options.space.name, SMALLER):
        if not is_prepared(config, data, settings, data_dir):
            unwritten = inputs_bytes(options, data, settings)
        if threads is None:
            if unwritten > (free := _free(data_dir)):
                raise ValueError(
                    f"inputs under --data-dir={printable(str(data_dir))} need {megabytes(unwritten)}, and "
                    f"{megabytes(free)} are free; give --data-dir on a larger disk, or a smaller --image-size"
                )
            load_inputs(config, data, settings, data_dir, progress=progress)
            run = TrainingRun(config, data, settings, data_dir)
        else:
            count = MEASURED_STEPS[settings.device] * config.batch_size
            inputs, left = sample_inputs(config, data, settings, data_dir, count)
            run = TrainingRun(config, data, settings, data_dir, inputs=inputs)
            seconds = _measure(run, threads, train_count + val_count)
    del run
    mean_checkpoint, largest_checkpoint = checkpoint_sizes(options, data)
    peak = None
    if settings.device == "cuda":
        peak = largest_peak(options, data, settings, sampled=threads is not None)
    sizes = (mean_checkpoint, largest_checkpoint)
    whole, _ = _sizes(largest(options, data), data, head=False)
    counts = (split, train_count, val_count)
    return Prepared(*counts, *sizes, seconds, left, peak, gpu_bytes, whole, unwritten)


def largest_peak(
    options: StudyOptions,
    data: ImageData,
    settings: DeviceSettings,
    *,
    sampled: bool,
    config: TrainConfig | None = None,
) -> int | None:
    """Return the bytes that torch's allocator takes for the ranges' largest trial; None: too many.

    Args:
        options: The study's.
        data: The decoded images.
        settings: How trials use their device.
        sampled: Forecast: prepare the inputs of a sample, and add what the others would take.
        config: Of another trial than the largest.
    """
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    config, data_dir, others = config or largest(options, data), Path(options.data_dir), 0
    count = PEAK_BATCHES * config.batch_size // 2  # full batches and a short one
    try:
        sample = sample_inputs(config, data, settings, data_dir, count)[0] if sampled else None
        run = TrainingRun(config, data, settings, data_dir, inputs=sample)
        inputs = run.inputs
        if sampled:
            images = sum(split_counts(data)[:2]) - len(inputs.train_y) - len(inputs.val_y)
            others = images * inputs.train_x[0].nbytes * settings.inputs_on_device
        run.inputs = replace(inputs, train_x=inputs.train_x[:count], train_y=inputs.train_y[:count])
        run.train_epoch()
        run.evaluate(inputs.val_x, inputs.val_y)
        torch.cuda.synchronize()
    except CaptureMemoryError:
        return None
    except CaptureError:  # its trials will train eagerly
        pass
    except Exception as error:
        if is_out_of_memory(error):
            return None
        if config == (first := example(options)):
            raise
        return largest_peak(options, data, settings, sampled=sampled, config=first)
    return torch.cuda.max_memory_reserved() + others


def buildable(options: StudyOptions, values: dict[str, Any], data: ImageData) -> TrainConfig | None:
    """Return the config of a trial; None: it is impossible, which is to be that trial's error."""
    try:
        config = options.space.config(values)
        _sizes(config, data, head=False)
    except Exception:  # noqa: BLE001  whatever a person's code raises
        return None
    return config


def largest(options: StudyOptions, data: ImageData) -> TrainConfig:
    """Return the config of a study that takes most memory: the highest of every number, augmented images.

    Where that cannot be built, it is the first trial's.
    """
    config = example(options).to_dict()
    for name, domain in () if options.points else options.searched.ranges.items():
        if isinstance(domain, Categorical):
            numbers = all(isinstance(value, int | float) for value in domain.categories)
            config[name] = max(domain.categories) if numbers else domain.categories[-1]
        elif isinstance(domain, Integer):
            config[name] = domain.upper - 1
    return buildable(options, config, data) or example(options)


def checkpoint_bytes(config: TrainConfig, data: ImageData) -> int:
    """Return what the tensors of a config's checkpoint take, once the optimizer has its state."""
    kept, trained = _sizes(config, data, head=kind_of(config, data) == "features")
    values = 2 if config.optimizer in ("adam", "adamw") else int(config.momentum > 0)  # per parameter
    return kept + values * trained


def _sizes(config: TrainConfig, data: ImageData, *, head: bool) -> tuple[int, int]:
    """Return the bytes of a network's tensors and of its trained parameters, of its head alone or of all."""
    config = replace(config, weights="none")
    key = json.dumps([config.space.name, len(data.classes), config.image_size, dict(config.model)])
    if key not in _known_sizes:
        model = build_model(config, data)
        named_head = getattr(model, "head", None)
        parts: list[nn.Module] = [model, *([named_head] if isinstance(named_head, nn.Module) else [])]
        _known_sizes[key] = [
            (
                sum(tensor.nbytes for tensor in part.state_dict().values()),
                sum(p.nbytes for p in part.parameters() if p.requires_grad),
            )
            for part in parts
        ]
    return _known_sizes[key][int(head)]


_known_sizes: dict[str, list[tuple[int, int]]] = {}


def checkpoint_sizes(options: StudyOptions, data: ImageData) -> tuple[int, int]:
    """Return the bytes of a checkpoint of this study: the mean over sampled configs, and the largest."""
    searched, base = options.searched, example(options).to_dict()
    sampled = options.points or [
        suggest("random", searched.ranges, None, 0, k, []) or {} for k in range(SAMPLED_CONFIGS)
    ]
    sizes = [checkpoint_bytes(largest(options, data), data)]
    networks: set[str] = set()
    for values in sampled:
        networks.add(json.dumps({name: value for name, value in values.items() if name not in FIELDS}))
        if len(networks) > SAMPLED_NETWORKS:
            break
        if config := buildable(options, base | values, data):
            sizes.append(checkpoint_bytes(config, data))
    mean = sum(sizes[1:] or sizes) / max(len(sizes) - 1, 1)  # the largest is not sampled
    return round(mean), max(sizes)


def _measure(run: TrainingRun, threads: int, images: int) -> float:
    """Return the seconds of an epoch of so many images, from one of a few steps."""
    torch.set_num_threads(threads)
    run.train_epoch()  # warms caches and lazy initialisation
    report = run.epoch()
    return float(report["epoch_seconds"] * images / (len(run.inputs.train_y) + len(run.inputs.val_y)))


def forecast(options: StudyOptions, resources: Resources, prepared: Prepared | None) -> dict[str, float]:
    """Return what the study will take.

    Returns:
        epochs (of the search, in expectation) and final_epochs; of images also seconds and disk_bytes.
    """
    assert options.trials is not None
    assert options.epochs is not None
    assert options.pruner is not None
    epochs = expected_epochs(options.trials, options.rungs, options.eta, options.epochs, options.pruner)
    found: dict[str, float] = {"epochs": epochs, "final_epochs": options.final_seeds * options.epochs}
    if prepared and prepared.epoch_seconds is not None:
        waves = math.ceil(options.final_seeds / resources.slots) * options.epochs
        trained = prepared.epoch_seconds * (epochs / resources.slots + waves)
        found["seconds"] = START_SECONDS + prepared.preparing_seconds + trained
        found["disk_bytes"] = disk_needed(options, resources, prepared)[0]
    return found


def disk_needed(options: StudyOptions, resources: Resources, prepared: Prepared) -> tuple[int, int]:
    """Return the bytes of checkpoints and networks that the study will have at once: about, and at most."""
    assert options.trials is not None
    # a seed's stays to the end, and one is written beside the old
    at_once = options.final_seeds + max(resources.slots, resources.slots_max or 0)
    mean, largest = prepared.mean_checkpoint, prepared.largest_checkpoint
    always = largest * at_once + options.final_seeds * prepared.model_bytes
    return mean * options.trials + always, largest * options.trials + always


def check_disk(folder: Path, needed: int, most: int) -> None:
    """Raise ValueError where a study's folder has not the space that its checkpoints need."""
    if needed > (free := _free(folder)):
        raise ValueError(
            f"checkpoints in {folder} need about {megabytes(needed)} (at most {megabytes(most)}), and "
            f"{megabytes(free)} are free; give --study-dir on a larger disk, or fewer --trials"
        )


def _free(folder: Path) -> int:
    """Return the free bytes of a folder's disk, which may not be there yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def print_forecast(
    options: StudyOptions,
    folder: Path,
    resources: Resources,
    data: ImageData | None,
    settings: DeviceSettings,
    prepared: Prepared | None,
    console: Console,
) -> int:
    """Print what --dry-run promises; return 0."""
    assert options.trials is not None
    assert options.epochs is not None
    expected = forecast(options, resources, prepared)
    gpus = f" and {resources.gpus_per_trial:g} GPU" if resources.gpus_per_trial else ""
    lines = [
        f"space      {options.space.name}" + (f": {options.space.summary}" if options.space.summary else ""),
        f"trials     {options.trials}, {resources.slots} at once, each {resources.cpus_per_trial:g} CPU{gpus}"
        + (f", {settings.precision}" if data else ""),
        f"epochs     {expected['epochs']} expected ({options.trials * options.epochs} unpruned), "
        f"rungs {list(options.rungs)}, {options.pruner}",
        f"final      {counted(options.final_seeds, 'seed')}, "
        f"{counted(int(expected['final_epochs']), 'epoch')}",
        f"folder     {shown(folder)}, not written",
    ]
    if data and prepared:
        lines.insert(
            1,
            f"data       {data.name}, {prepared.train_count} train, {prepared.validation_count} validation, "
            f"{data.test_count} test images, {options.image_size} pixels a side",
        )
        lines[-1:-1] = _costs(options, resources, prepared, data)
    for text in lines:
        print_text(console, text)
    return 0


def _costs(options: StudyOptions, resources: Resources, prepared: Prepared, data: ImageData) -> list[str]:
    """Return the lines about a study's time and disk."""
    images = math.prod(data.image_shape) * (data.train_count + data.test_count)
    needed, most = disk_needed(options, resources, prepared)
    lines = [
        f"time       about {clock(forecast(options, resources, prepared)['seconds'])}, from "
        f"{prepared.epoch_seconds:.3g} s an epoch of the first trial",
        f"disk       about {megabytes(needed)} of checkpoints while it runs, at most {megabytes(most)}",
        f"           {megabytes(images)} of decoded images under --data-dir, which are there now",
    ]
    if prepared.input_bytes:
        lines.append(f"           {megabytes(prepared.input_bytes)} of inputs under --data-dir, once")
    if prepared.preparing_seconds >= 1:
        once = clock(prepared.preparing_seconds)
        lines.insert(1, f"           {once} of it once, for inputs that are then kept")
    return lines
