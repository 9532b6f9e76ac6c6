"""Time an epoch of ours beside the obvious training loop's.

Prints, per architecture, seconds per epoch of TrainingRun.train_epoch and of the obvious loop (below,
ObviousRun), timed in turn (A B B A …), and the ratio; writes nothing but the caches under --data-dir::

    python -m tunefleet.benchmarks.epoch --data digits softmax
    python -m tunefleet.benchmarks.epoch --data cifar10 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tunefleet.benchmarks.families import FIX
from tunefleet.benchmarks.obvious import obvious_network, obvious_optimizer
from tunefleet.cli import Parser, exit_code
from tunefleet.models.checks import check_integer, check_name
from tunefleet.models.space import TrainConfig
from tunefleet.models.spaces import SPACES
from tunefleet.trainables.data import DATA_DIR, ImageData, load_split, split_validation
from tunefleet.trainables.device import DeviceSettings, choose
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

BATCHES = {  # of an epoch that are timed; None: all
    "softmax": None,
    "twolayernn": None,
    "convnet": 4,
    "mymodel": 12,
    "resnet_softmax_updatable": 8,
}


class ObviousRun:
    """The training loop one writes first: fp32, NCHW, whole batches, Conv → ReLU → MaxPool.

    It starts from the weights of ``like`` and reads its images in the same order.
    """

    def __init__(self, like: TrainingRun, images: Tensor, y: Tensor) -> None:
        self.config, self.device = like.config, like.device
        self.images, self.y = images.to(self.device), y.to(self.device)
        mean_std = (like.pipeline.mean, like.pipeline.std)
        self.mean, self.std = (torch.tensor(x, device=self.device).view(1, 3, 1, 1) for x in mean_std)
        self.network = obvious_network(like.config, len(like.data.classes)).to(self.device)
        ours = [*like.model.parameters(), *like.model.buffers()]
        for mine, theirs in zip([*self.network.parameters(), *self.network.buffers()], ours, strict=True):
            mine.data.copy_(theirs)
        self.optimizer = obvious_optimizer(self.config, self.network)
        self.generator = torch.Generator().manual_seed(self.config.seed)

    def train_epoch(self) -> tuple[Tensor, Tensor]:
        """Return summed loss and number of correct predictions, like TrainingRun's."""
        self.network.train()
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        order = torch.randperm(len(self.y), generator=self.generator).to(self.device)
        for batch in order.split(self.config.batch_size):
            x = (self.images[batch].float() / 255 - self.mean) / self.std
            y = self.y[batch]
            logits = self.network(x)
            loss = F.cross_entropy(logits, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.detach() * len(batch)
            correct += (logits.argmax(1) == y).sum()
        return loss_sum, correct


def published(architecture: str, *, weights: str) -> TrainConfig:
    """Return the published best of an architecture, without what only one arm has."""
    space = SPACES[architecture].fixing(FIX)
    fixed = space.fixed_values(epochs=1, image_size=32, weights=weights, seed=0)
    return space.config(fixed | space.start)


def both_runs(
    name: str, data: ImageData, settings: DeviceSettings, options: argparse.Namespace
) -> tuple[TrainingRun, ObviousRun]:
    """Build both arms over the same images, a random part of the training split or all of it."""
    config = published(name, weights=options.weights)
    ours = TrainingRun(config, data, settings, options.data_dir)
    images, labels = load_split(data, "train")
    train, _ = split_validation(labels)
    wanted = (BATCHES[name] or len(train)) * config.batch_size
    if wanted < len(train):
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:wanted]
        train, whole = train[chosen.numpy()], ours.inputs.train_x
        x = whole[chosen]
        if x.dim() == 4 and whole.is_contiguous(memory_format=torch.channels_last):
            x = x.to(memory_format=torch.channels_last)
        ours.inputs = replace(ours.inputs, train_x=x, train_y=ours.inputs.train_y[chosen])
    return ours, ObviousRun(ours, torch.from_numpy(images[train]), torch.from_numpy(labels[train]))


def seconds_line(name: str, data: ImageData, settings: DeviceSettings, options: argparse.Namespace) -> str:
    """Return one row: seconds of both arms, and the median of the pairs' ratios."""
    arms = both_runs(name, data, settings, options)
    seconds: tuple[list[float], list[float]] = ([], [])
    losses = [0.0, 0.0]
    for turn in range(options.repeat + 1):
        for k in (0, 1) if turn % 2 == 0 else (1, 0):
            began = time.perf_counter()
            losses[k] = arms[k].train_epoch()[0].item()  # waits for the device
            seconds[k].append(time.perf_counter() - began)
    ours, obvious = (times[1:] for times in seconds)  # the first turn warms caches and allocators
    ratios = [theirs / mine for mine, theirs in zip(ours, obvious, strict=True)]
    count = len(arms[0].inputs.train_y)
    scale = len(split_validation(load_split(data, "train")[1])[0]) / count
    mine, theirs = statistics.median(ours), statistics.median(obvious)
    return (
        f"{name:26}{count:7}{arms[0].micro_batch:7}{mine:9.2f}{theirs:9.2f}"
        f"{scale * mine:9.1f}{scale * theirs:9.1f}"
        f"{statistics.median(ratios):8.2f}  {min(ratios):.2f}..{max(ratios):.2f}"
        f"   {losses[0] / count:.4f} {losses[1] / count:.4f}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked options.

    Raises:
        ValueError: One is impossible.
    """
    parser = Parser(prog="python -m tunefleet.benchmarks.epoch", description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="*", metavar="ARCH", help=f"of: {', '.join(BATCHES)}")
    parser.add_argument("--data", default="cifar10", help="cifar10, digits, or an image folder or archive")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="cache folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="pairs timed, after one untimed (%(default)s)")
    parser.add_argument("--weights", default="none", help="of ResNets: imagenet, none or a path")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="auto", help="of ours: auto, fp32 or bf16")
    options = parser.parse_args(arguments)
    options.architectures = options.architectures or list(BATCHES)
    for name in options.architectures:
        check_name("ARCH", name, BATCHES)
    check_integer("--threads", options.threads, 1)
    check_integer("--repeat", options.repeat, 1)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Time both arms of every named architecture."""
    options = parse(arguments)
    data = prepare(options.data, options.data_dir)
    if data.image_shape != (3, 32, 32):
        raise ValueError(f"--data={options.data} has images {data.image_shape}; give one of 3×32×32")
    settings = choose(options.device, options.precision)
    torch.set_num_threads(options.threads)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {options.threads} thread(s), data {data.name}")
    print(f"settings {asdict(settings)}")
    print(f"\n{'':40}{'s measured':>18}{'s per whole epoch':>18}{'obvious / ours':>16}   train_loss")
    arms = f"{'ours':>9}{'obvious':>9}" * 2
    print(f"{'architecture':26}{'images':>7}{'micro':>7}{arms}{'ratio':>8}  range")
    for name in options.architectures:
        print(seconds_line(name, data, settings, options), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
