"""Measure how much of a device training uses: eager and captured steps, several trials at once, decoding.

::

    python -m tunefleet.benchmarks.gpu epoch --data cifar10-jpeg.tar.xz --weights resnet18-imagenet.pth
    python -m tunefleet.benchmarks.gpu decode share --data cifar10-jpeg.tar.xz

Each line is printed as soon as it is measured. benchmarks/gpu.sh calls it with time limits. It also
runs on a CPU, where nothing is captured.
"""

from __future__ import annotations

import os
import statistics
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tunefleet.cli import Parser, exit_code
from tunefleet.models.checks import check_integer
from tunefleet.models.space import TrainConfig
from tunefleet.models.spaces import SPACES, default_image_size
from tunefleet.search.options import StudyOptions
from tunefleet.search.preflight import example
from tunefleet.trainables.data import DATA_DIR, ImageData
from tunefleet.trainables.device import DeviceSettings, choose
from tunefleet.trainables.inputs import sample_inputs
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
PRODUCTS = 10  # matrix products of which the median counts
STEPS = {"small": (60, 350), "ResNet": (25, 60)}  # eager and captured, of an epoch; no more than the data has
REPEATS = 3  # epochs of which the median counts, after one untimed
FLOP_IMAGES = 16  # FLOPs are counted on
SHARED = ("softmax", "twolayernn", "convnet", "mymodel", "resnet_softmax", "resnet_twolayernn")
AT_ONCE = (1, 2, 4)  # trials on one device
WAIT_SECONDS = 120.0  # for another trial
SHARE_SECONDS = 1.0  # that each number of trials at once trains a space


@dataclass(frozen=True)
class Case:
    """What is timed: a space's published best, or its step at another batch or image size."""

    space: str
    batch_size: int | None = None
    image_size: int | None = None

    def config(self, weights: str, device: str) -> TrainConfig:
        """Return the trial, with the augmentation of its space."""
        space = SPACES[self.space]
        weights = weights if space.takes_weights else "none"
        size = self.image_size or default_image_size(space, weights, device)
        config = example(StudyOptions(space, weights=weights, image_size=size))
        return replace(config, batch_size=self.batch_size or config.batch_size)


CASES = [Case(space) for space in SPACES] + [
    Case("convnet", 128),
    *(Case("resnet_softmax_updatable", 128, size) for size in (32, 224)),  # 64 is its own
]


def timed_run(
    case: Case, data: ImageData, settings: DeviceSettings, data_dir: Path, weights: str
) -> TrainingRun:
    """Return a run on a sample of inputs, which are not cached; its epoch has STEPS."""
    config, space = case.config(weights, settings.device), SPACES[case.space]
    size = "ResNet" if space.takes_weights and not space.feature_cache else "small"
    steps = STEPS[size][settings.cuda_graph]
    inputs, _ = sample_inputs(config, data, settings, data_dir, steps * config.batch_size)
    whole = len(inputs.train_y) // config.batch_size * config.batch_size or len(inputs.train_y)
    inputs = replace(inputs, train_x=inputs.train_x[:whole], train_y=inputs.train_y[:whole])
    return TrainingRun(config, data, settings, data_dir, inputs=inputs)


def images_per_second(run: TrainingRun) -> float:
    """Return the speed of whole epochs without evaluation, including the copies at their beginning."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        run.train_epoch()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return len(run.inputs.train_y) / statistics.median(seconds[1:])


def peak_flops(settings: DeviceSettings) -> float:
    """Return FLOP/s of a square matrix product in the number type of the device settings."""
    side = MATRIX_SIDE[torch.device(settings.device).type]
    a, b = (torch.rand(side, side, device=settings.device).to(settings.dtype) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS + 1):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds[1:])


def flops_per_image(run: TrainingRun) -> float:
    """Return FLOPs of a forward and backward pass, 2 a multiply-add, as torch counts them."""
    count = min(FLOP_IMAGES, len(run.inputs.train_y))
    x, y = run.to_network(run.inputs.train_x[:count]), run.inputs.train_y[:count]
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(run.network(x.float()), y).backward()
    run.optimizer.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / count


def epoch_lines(
    data: ImageData, settings: DeviceSettings, data_dir: Path, weights: str, cases: list[Case]
) -> Iterator[str]:
    """Yield a line per case: images/s eager and captured, their ratio, and the share of the peak."""
    peak = peak_flops(settings)
    yield f"{torch.backends.cpu.get_cpu_capability() if settings.device == 'cpu' else _gpu()}"
    yield (
        f"{settings.device} {settings.precision}, torch {torch.__version__}, {data.name}; "
        f"peak {peak / 1e12:.1f} TFLOP/s of a {MATRIX_SIDE[settings.device]}³ product; "
        "2 FLOP a multiply-add; no evaluation"
    )
    heads = (("px", 4), ("batch", 6), ("MFLOP", 8), ("eager/s", 10), ("graph/s", 10), ("ratio", 7))
    yield f"{'space':28}" + "".join(
        f"{name:>{width}}" for name, width in (*heads, ("us/step", 9), ("of peak", 9))
    )
    for case in cases:
        run = timed_run(case, data, replace(settings, cuda_graph=False), data_dir, weights)
        config, flops = run.config, flops_per_image(run)
        speeds = [images_per_second(run)]
        if settings.cuda_graph:
            del run
            speeds.append(images_per_second(timed_run(case, data, settings, data_dir, weights)))
        eager, best = speeds[0], speeds[-1]
        captured = f"{best:10,.0f}{best / eager:7.2f}" if settings.cuda_graph else f"{'-':>10}{'-':>7}"
        yield (
            f"{case.space:28}{config.image_size:4}{config.batch_size:6}{flops / 1e6:8.1f}{eager:10,.0f}"
            f"{captured}{1e6 * config.batch_size / best:9,.0f}{best * flops / peak:9.2%}"
        )


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"


def share(
    rank: int,
    barrier: Any,
    speeds: Any,
    data: ImageData,
    settings: DeviceSettings,
    data_dir: Path,
    weights: str,
    spaces: list[str],
) -> None:
    """Run one of several trials on a device: train each space alone, in twos and in fours."""
    torch.set_num_threads(1)
    for at, space in enumerate(spaces):
        run = timed_run(Case(space), data, settings, data_dir, weights)
        for _ in range(2):  # the second epoch replays only
            run.train_epoch()[0].item()
        for k, count in enumerate(AT_ONCE):
            barrier.wait()
            if rank < count:
                began, images = time.perf_counter(), 0
                while (seconds := time.perf_counter() - began) < SHARE_SECONDS:
                    run.train_epoch()[0].item()
                    images += len(run.inputs.train_y)
                speeds[(at * len(AT_ONCE) + k) * max(AT_ONCE) + rank] = images / seconds
            barrier.wait()


def share_lines(
    data: ImageData, settings: DeviceSettings, data_dir: Path, weights: str, spaces: list[str]
) -> Iterator[str]:
    """Yield a line per small space: images/s of 1, 2 and 4 trials at once on one device, all together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(max(AT_ONCE), timeout=WAIT_SECONDS)
    speeds = context.Array("d", len(spaces) * len(AT_ONCE) * max(AT_ONCE))
    arguments = (barrier, speeds, data, settings, data_dir, weights, spaces)
    workers = [  # daemons, or they go on after a Ctrl-C
        context.Process(target=share, args=(rank, *arguments), daemon=True) for rank in range(max(AT_ONCE))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise ValueError("a trial failed; see its error above")
    how = "captured" if settings.cuda_graph else "eager"
    yield f"images/s of several trials at once on one device, {how}"
    yield f"{'space':28}" + "".join(f"{count:>10}" for count in AT_ONCE) + f"{'gain':>8}"
    for at, space in enumerate(spaces):
        sums = [
            sum(speeds[(at * len(AT_ONCE) + k) * max(AT_ONCE) :][: max(AT_ONCE)]) for k in range(len(AT_ONCE))
        ]
        yield (
            f"{space:28}"
            + "".join(f"{speed:10,.0f}" for speed in sums)
            + f"{sums[-1] / max(sums[0], 1):8.2f}"
        )


def decode_lines(source: str, data_dir: Path, *, unpack: bool) -> Iterator[str]:
    """Yield the seconds that decoding all images into an empty folder takes.

    Args:
        source: Of the images.
        data_dir: Where they are then cached.
        unpack: Of an archive, unpack it first, and decode from a folder into a temporary one.
    """
    if unpack and not Path(source).is_file():
        return
    with tempfile.TemporaryDirectory() as location:
        if unpack:
            with tarfile.open(source) as archive:
                archive.extractall(Path(location, "images"), filter="data")
            source, data_dir = str(Path(location, "images")), Path(location)
        began = time.perf_counter()
        data = prepare(source, data_dir)
        seconds = time.perf_counter() - began
        yield (
            f"decode {'a folder' if unpack else source}: {data.train_count + data.test_count:,} images in "
            f"{seconds:.1f} s, {len(os.sched_getaffinity(0))} CPUs"
        )


def _lines(what: str, options: Namespace) -> Iterator[str]:
    if what in ("decode", "decode-folder"):
        yield from decode_lines(options.data, options.data_dir, unpack=what == "decode-folder")
        return
    settings = choose(options.device, options.precision)
    spaces = options.spaces or list(SPACES)
    data, shared = prepare(options.data, options.data_dir), (options.data_dir, options.weights)
    if what == "epoch":
        yield from epoch_lines(data, settings, *shared, [case for case in CASES if case.space in spaces])
        return
    spaces = [space for space in SHARED if space in spaces]
    for graphs in (True, False) if settings.cuda_graph else (False,):
        yield from share_lines(data, replace(settings, cuda_graph=graphs), *shared, spaces)


def main(arguments: list[str] | None = None) -> int:
    """Print the measurements that were chosen, line by line."""
    parser = Parser(prog="python -m tunefleet.benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="+", choices=("decode", "epoch", "share", "decode-folder"))
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or a folder or archive of images")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="cache folder (%(default)s)")
    parser.add_argument("--weights", default="none", help="of ResNet backbones: imagenet, none or a path")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    parser.add_argument("--spaces", nargs="+", choices=list(SPACES), help="of epoch and share (default: all)")
    options = parser.parse_args(arguments)
    check_integer("--threads", options.threads, 1)
    torch.set_num_threads(options.threads)
    for what in options.what:
        for line in _lines(what, options):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
