"""What may the command line of a study say? The flags that search/run.py shares with its companions."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tunefleet.cli import Parser
from tunefleet.search.asha import PRUNERS
from tunefleet.search.options import StudyOptions, flag
from tunefleet.search.suggest import SEARCHERS
from tunefleet.search.wandb_options import take_flags
from tunefleet.trainables.config import FIELD_TYPES, PRECISIONS, TrainConfig, nearest

HELP = {
    "data": "cifar10, digits, or a folder or archive of images CLASS/FILE, with or without train/ and test/",
    "data_dir": "where downloads, decoded images and features are cached",
    "image_size": "pixels a side; larger or mixed images are resized once (default: 32, or with trained "
    "weights what the space is best at on the device)",
    "weights": "of ResNet backbones: imagenet, none, or a path to a torchvision ResNet-18 state_dict",
    "trials": "how many configurations to try (default: the space's)",
    "epochs": "of a trial that is never pruned, and the schedule's horizon (default: the space's)",
    "grace": "epochs before the first comparison",
    "eta": "one of eta trials goes on at each rung",
    "pruner": "promote pauses trials at rungs and lets the best go on; stop decides as they arrive "
    "(default: promote, or stop where a trial has several workers)",
    "searcher": "where configurations come from, after the published best",
    "concurrency": "trials at once (default: as many as CPUs or GPUs allow)",
    "cpus_per_trial": "CPUs of a trial, and its threads (default: 1, or a GPU's share)",
    "gpus_per_trial": "GPUs of a trial, fractions allowed (default: the space's where there are any)",
    "workers_per_trial": "processes that train a trial together (DDP) and share its CPUs and GPUs "
    "(default: 1)",
    "time_budget": "seconds of search, after which only the winner is retrained (default: no limit)",
    "seed": "of the sampling, and of each trial's initialisation and order",
    "final_seeds": "fresh seeds on which the winner is retrained and tested",
    "device": "auto, cpu or cuda; on resume the device to continue on",
    "precision": "auto chooses what the device is known to gain by",
    "fix": "values of TrainConfig that every trial has, instead of sampled ones: hidden=32 augment=crop",
    "max_failures": "how often a trial's worker may die; a lost node does not count",
}
CHOICES = {"pruner": PRUNERS, "searcher": SEARCHERS, "precision": PRECISIONS}
TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}


def study_parser(program: str, description: str, space_help: str = "architecture") -> Parser:
    """Returns a parser with the flags of every study: --space, --study-dir, --dry-run and --resume."""
    parser = Parser(prog=program, description=description)
    parser.add_argument("--space", help=space_help)
    parser.add_argument(
        "--study-dir", type=_folder, help="the study's folder (default: a new one under studies/)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, for how long, and end")
    parser.add_argument(
        "--resume", metavar="DIR", help="go on with a stopped or killed study; its folder or URL"
    )
    return parser


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Adds --storage."""
    parser.add_argument(
        "--storage",
        metavar="PLACE",
        help="where studies are kept: a folder that all nodes share, or s3://BUCKET/PREFIX "
        "(default: studies)",
    )


def add_options(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Adds the flags of these fields of StudyOptions; one that is not given leaves no trace."""
    for field in dataclasses.fields(StudyOptions):
        if field.name not in names:
            continue
        default = "" if field.default in (None, dataclasses.MISSING) else f" (default: {field.default})"
        text = (HELP[field.name] + default).replace("%", "%%")
        if field.name == "fix":
            parser.add_argument(
                "--fix", nargs="+", action=_Values, metavar="NAME=VALUE", default=argparse.SUPPRESS, help=text
            )
            continue
        parser.add_argument(
            flag(field.name),
            type=TYPES[str(field.type).removesuffix(" | None")],
            choices=CHOICES.get(field.name),
            default=argparse.SUPPRESS,
            help=text,
        )


def _folder(text: str) -> Path:
    """Returns a path; a shell leaves the ~ of --study-dir=~/x as it is."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  Path's raises RuntimeError for an unknown user


class _Values(argparse.Action):
    """Turns ``hidden=32 augment=crop`` into values of TrainConfig's types."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        fix = {}
        for pair in values:
            name, equals, text = pair.partition("=")
            if not equals:
                parser.error(f"--fix {pair} is no NAME=VALUE; give for example --fix hidden=32")
            try:
                fix[name] = FIELD_TYPES[name](text)
            except KeyError:
                parser.error(f"--fix {name} is no hyperparameter{nearest(name, FIELD_TYPES)}")
            except (ValueError, argparse.ArgumentTypeError):
                kind = str(TrainConfig.__annotations__[name]).removesuffix(" | None")
                parser.error(f"--fix {pair} is not possible; {name} is a value of type {kind}")
        setattr(namespace, self.dest, fix)


def parse_study(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns what to do, and the study's options that were given; their defaults stay with StudyOptions.

    What to do has W&B's flags and key in its ``wandb``.
    """
    do, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        if name in FIELD_TYPES and word.startswith("--"):
            parser.error(f"{word} is a hyperparameter; to give it to every trial: --fix {name}=VALUE")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    do.wandb = take_flags(vars(do))
    return do, {name: vars(do).pop(name) for name in HELP if name in do}
