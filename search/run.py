"""Searches one architecture's hyperparameters, retrains the winner and says how good it is.

::

    python search/run.py --space resnet_conv

Writes a study folder (default ``studies/SPACE-DATA-TIME/``; README.md lists its files). Ctrl-C stops a
study, ``--resume FOLDER`` goes on with it. Exit code 0: all well, 1: done but some trials failed,
2: bad input, nothing was written, 3: stopped, resumable.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import search  # noqa: F401  sets Ray's environment before anything imports Ray
from search.asha import PRUNERS
from search.launch import leave, resume, start
from search.options import StudyOptions, flag
from search.printing import list_spaces
from search.spaces import SPACES
from search.suggest import SEARCHERS
from search.wandb_options import add_wandb_flags, take_flags
from trainables.command_line import Parser, exit_code
from trainables.config import FIELD_TYPES, TrainConfig, check_name, nearest
from trainables.levers import PRECISIONS

HELP = {
    "data": "cifar10, digits, or a folder or archive of images CLASS/FILE, with or without train/ and test/",
    "data_dir": "where downloads, decoded images and features are cached",
    "image_size": "pixels a side; larger or mixed images are resized once",
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
    "(default: 1, or 2 for resnet_finetune where there are 2 GPUs)",
    "time_budget": "seconds of search, after which only the winner is retrained (default: no limit)",
    "seed": "of the sampling, and of each trial's initialisation and order",
    "final_seeds": "fresh seeds on which the winner is retrained and tested",
    "device": "auto, cpu or cuda",
    "precision": "auto chooses what the device is known to gain by",
    "fix": "values of TrainConfig that every trial has, instead of sampled ones: hidden=32 augment=crop",
    "max_failures": "how often a trial's worker may die; a lost node does not count",
}
STORAGE_HELP = (
    "where studies are kept: a folder that all nodes share, or s3://BUCKET/PREFIX (default: studies)"
)
RESUME_HELP = "go on with a stopped or killed study; its folder or URL"
CHOICES = {"pruner": PRUNERS, "searcher": SEARCHERS, "precision": PRECISIONS}
TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns what to do, and the study's options that were given; defaults stay with StudyOptions."""
    parser = Parser(prog="python search/run.py", description=__doc__.split("\n")[0])
    parser.add_argument("--space", help="architecture to search, or all; --list-spaces shows them")
    parser.add_argument("--list-spaces", action="store_true", help="print the spaces and end")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, for how long, and end")
    parser.add_argument(
        "--study-dir", type=Path, help="the study's folder (default: a new one under studies/)"
    )
    parser.add_argument("--storage", metavar="PLACE", help=STORAGE_HELP)
    parser.add_argument("--resume", metavar="DIR", help=RESUME_HELP)
    add_options(parser, [field.name for field in dataclasses.fields(StudyOptions) if field.name in HELP])
    add_wandb_flags(parser)
    options = vars(parser.parse_args(arguments))
    names = ("space", "list_spaces", "dry_run", "study_dir", "storage", "resume")
    wandb = take_flags(options)
    return argparse.Namespace(**{name: options.pop(name) for name in names}, wandb=wandb), options


def add_options(parser: argparse.ArgumentParser, names: list[str]) -> None:
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


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    do, options = parse(arguments)
    return exit_code(lambda: carry_out(do, options, Console()))


def carry_out(do: argparse.Namespace, options: dict[str, Any], console: Console) -> int:
    """Does what was asked for; returns the exit code.

    Raises:
        ValueError: It cannot be done.
    """
    if do.list_spaces:
        return list_spaces(console)
    if do.resume:
        if do.space or do.study_dir or do.storage:
            raise ValueError(
                "--resume takes space, folder and storage from the study; leave --space, --study-dir and "
                "--storage out"
            )
        if do.dry_run:
            raise ValueError("--dry-run forecasts a new study; leave --resume out")
        return resume(do.resume, options, console, wandb=do.wandb)
    if not do.space:
        raise ValueError(f"give --space NAME, or --resume DIR; spaces: {', '.join(SPACES)}, or all")
    check_name("--space", do.space, [*SPACES, "all"])
    if do.space != "all":
        return start(
            StudyOptions(space=do.space, **options),
            do.study_dir,
            console,
            dry_run=do.dry_run,
            wandb=do.wandb,
            storage=do.storage,
        )
    codes = []
    for space in SPACES:
        folder = do.study_dir / space if do.study_dir else None
        try:
            codes.append(
                start(
                    StudyOptions(space=space, **options),
                    folder,
                    console,
                    dry_run=do.dry_run,
                    wandb=do.wandb,
                    storage=do.storage,
                )
            )
        except ValueError as error:  # one space's trouble is not the next one's
            print(f"error: {space}: {error}", file=sys.stderr)
            codes.append(2)
        if codes[-1] == 3:
            break
    return max(codes)


if __name__ == "__main__":
    leave(main())
