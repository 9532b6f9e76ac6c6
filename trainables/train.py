"""Train one configuration in this process, without Ray: prints, tracebacks and pdb work.

::

    tunefleet train convnet --data digits --lr 0.03 --epochs 5
    tunefleet train mine.py --width 64

Prints a line per epoch and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from tunefleet.cli import Parser, exit_code, rounded
from tunefleet.host import cpu_count
from tunefleet.metric import metric_of
from tunefleet.models.checks import check_integer
from tunefleet.models.space import FIELDS, PARSERS, Space
from tunefleet.models.spaces import default_image_size, find_space
from tunefleet.trainables.data import DATA_DIR
from tunefleet.trainables.device import choose, fitting
from tunefleet.trainables.own import OwnRun
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

OF_IMAGES = {"data": "cifar10", "precision": "auto"}  # options that only images have: their defaults


def parser() -> Parser:
    """Return the parser of what all spaces have; a builder's own arguments are flags, too."""
    parser = Parser(prog="tunefleet train", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--space", required=True, help="architecture, or a file with a Space; SPACE alone first"
    )
    for name, field in FIELDS.items():
        kind = str(field.type)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=PARSERS[kind], default=argparse.SUPPRESS, help=kind)
    parser.add_argument(
        "--data", default=argparse.SUPPRESS, help=f"as tunefleet search takes it ({OF_IMAGES['data']})"
    )
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="cache folder (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default=argparse.SUPPRESS, help="auto, fp32 or bf16")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="of the CPU (%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Train one configuration by hand; every field of TrainConfig is a flag."""
    words = sys.argv[1:] if arguments is None else arguments
    words = ["--space", *words] if words and not words[0].startswith("-") else words
    options, others = parser().parse_known_args(words)
    return exit_code(lambda: _traced(vars(options), others))


def _traced(options: dict[str, Any], others: list[str]) -> int:
    """Train; print the traceback of an error that comes from a person's code."""
    space = find_space(options.pop("space"))
    try:
        return train(space, options, others)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # which are one line elsewhere
        folder = space.source.folder if space.source else ""
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        if not folder or not any(file.is_relative_to(folder) for file in files):
            raise
        traceback.print_exc()
        return 1


def train(space: Space, options: dict[str, Any], others: list[str]) -> int:
    """Train a configuration and print its epochs; return the exit code: 1 where it diverges.

    Args:
        space: Whose configuration it is.
        options: The flags, and values of TrainConfig.
        others: Flags and values of the builder's own arguments.

    Raises:
        ValueError: It cannot be trained as asked.
    """
    if not space.trains_images and (wrong := OF_IMAGES.keys() & options.keys()):
        raise ValueError(f"--{min(wrong)} is for images, and {space.name} trains by itself; leave it out")
    names = ("data", "data_dir", "device", "precision", "threads")
    given = {name: options.pop(name, OF_IMAGES.get(name)) for name in names}
    check_integer("--threads", given["threads"], 1)
    torch.set_num_threads(given["threads"])
    options |= _own_values(space, others)
    for name in options:
        if name not in ("epochs", "seed"):
            space.check_known(name)
    values = {"epochs": space.epochs, **space.fixed, **space.start, **options}
    run, shown = _run(space, values, given)
    epochs = values["epochs"]
    for _ in range(epochs):
        with fitting(space.name):
            report = run.epoch()
        known = [name for name in shown if report.get(name) is not None]
        numbers = "  ".join(f"{name} {rounded(report[name])}" for name in known)
        print(f"epoch {report['epoch']}/{epochs}  {numbers}  {report['epoch_seconds']:.3g} s", flush=True)
        if report["diverged"]:
            print("diverged: the loss is not finite, or the accuracy that of chance; give a smaller --lr")
            return 1
    return 0


def _run(space: Space, values: dict[str, Any], given: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return what trains, and the names of the numbers to show."""
    device = choose(given["device"], given["precision"])
    if not space.trains_images:
        metric = metric_of(space.metric, space.mode)
        offered = {"device": device.device, "threads": given["threads"], "data_dir": given["data_dir"]}
        return OwnRun(space, {"seed": 0, **values}, metric, offered), [metric.name]
    weights = values.get("weights", "imagenet") if space.takes_weights else "none"
    size = default_image_size(space, weights, device.device)
    config = space.config({"weights": weights, "image_size": size, **values})
    data = prepare(given["data"], given["data_dir"], config.image_size)
    kind: Any = space.run or TrainingRun
    shown = "train_accuracy" if config.refit else space.metric
    with fitting(space.name):
        return kind(config, data, device, given["data_dir"]), ["train_loss", shown]


def _own_values(space: Space, words: list[str]) -> dict[str, Any]:
    """Return the values of flags such as ``--hidden 64`` or ``--hidden=64``, of the builder's own arguments.

    Raises:
        ValueError: A word is none.
    """
    values, left = {}, iter(words)
    for word in left:
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or (not equals and (text := next(left, "")) == ""):
            raise ValueError(f"{word} is no flag with a value; tunefleet train --help lists the flags")
        values[name] = space.parse(name, text)
    return values
