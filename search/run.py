"""Searches one architecture's hyperparameters, retrains the winner and says how good it is.

::

    tunefleet search resnet_conv
    python search/run.py --space resnet_conv      # the same, from a clone

Writes a study folder (default ``studies/SPACE-DATA-TIME/``; README.md lists its files). Ctrl-C stops a
study, ``tunefleet resume FOLDER`` continues it. Exit code 0: all well, 1: done but some trials failed,
2: bad input, nothing was written, 3: stopped, resumable.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # from a clone: its own folder would make stats, data, … importable
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")
    from tunefleet.__main__ import script

    script("search")

import argparse
import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from tunefleet.cli import Parser, exit_code, printable, shell, shown
from tunefleet.files import write_whole
from tunefleet.search.flags import HELP, add_options, add_storage, parse_study, study_parser
from tunefleet.search.folders import check_free, default_folder
from tunefleet.search.launch import Script, resume, start
from tunefleet.search.options import RESUMABLE, StudyOptions
from tunefleet.search.printing import list_spaces
from tunefleet.search.spaces import SPACES
from tunefleet.search.stopping import say_nothing_written
from tunefleet.search.study_file import read_study
from tunefleet.search.wandb_options import WandbOptions, add_wandb_flags
from tunefleet.store import Store
from tunefleet.trainables.config import check_name

ALL = "all.json"  # in a folder of the studies of all spaces: what was asked of each


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns what to do, and the study's options that were given."""
    what = "architecture to search, or all; --list-spaces shows them"
    parser = study_parser("tunefleet search", __doc__.split("\n")[0], what)
    parser.add_argument("name", nargs="?", metavar="SPACE", help="the same as --space SPACE")
    parser.add_argument("--list-spaces", action="store_true", help="print the spaces and end")
    add_storage(parser)
    add_options(parser, HELP)
    add_wandb_flags(parser)
    do, options = parse_study(parser, arguments)
    if do.name and do.space:
        parser.error(f"--space={do.space} and {do.name}; give one of them")
    do.space = do.space or do.name
    return do, options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    do, options = parse(arguments)
    script = Script(Console())
    return script.stops.run(lambda: exit_code(lambda: carry_out(do, options, script)))


def resume_main(arguments: list[str]) -> int:
    """Run the command line of ``tunefleet resume``; return the exit code."""
    parser = Parser(prog="tunefleet resume", description="Continue a stopped or killed study.")
    parser.add_argument("resume", metavar="STUDY", help="its folder or URL")
    add_options(parser, RESUMABLE)
    add_wandb_flags(parser)
    do, options = parse_study(parser, arguments)
    script = Script(Console())
    run = functools.partial(resume_any, do.resume, options, script, do.wandb)
    return script.stops.run(lambda: exit_code(run))


def resume_any(place: str, options: dict[str, Any], script: Script, wandb: Mapping[str, Any]) -> int:
    """Continue one study, or those of all spaces in a folder; return the exit code."""
    if (file := Path(place, ALL)).is_file():
        asked = read_asked(file)
        return run_all(file.parent, asked, options, script, wandb=asked["wandb"] | wandb)
    return resume(place, options, script, wandb=wandb)


def carry_out(do: argparse.Namespace, options: dict[str, Any], script: Script) -> int:
    """Does what was asked for; returns the exit code.

    Raises:
        ValueError: It cannot be done.
    """
    if do.list_spaces:
        return list_spaces(script.console)
    if do.resume:
        if do.space or do.study_dir or do.storage:
            raise ValueError(
                "--resume takes space, folder and storage from the study; leave --space, --study-dir and "
                "--storage out"
            )
        if do.dry_run:
            raise ValueError("--dry-run forecasts a new study; leave --resume out")
        return resume_any(do.resume, options, script, do.wandb)
    if not do.space:
        raise ValueError(f"give a space; spaces: {', '.join(SPACES)}, or all")
    check_name("--space", do.space, [*SPACES, "all"])
    if do.space != "all":
        return start(
            StudyOptions(space=do.space, **options),
            do.study_dir,
            script,
            dry_run=do.dry_run,
            wandb=do.wandb,
            storage=do.storage,
        )
    folder = do.study_dir or default_folder("all", options.get("data", StudyOptions.data))
    check_free(folder)
    given = {name: value for name, value in do.wandb.items() if name != "key"}
    asked = {"options": options, "storage": do.storage, "wandb": given}
    if not do.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ALL, (json.dumps(asked, indent=2) + "\n").encode())
    return run_all(folder, asked, {}, script, dry_run=do.dry_run, wandb=do.wandb)


def read_asked(file: Path) -> dict[str, Any]:
    """Returns what was asked of the studies of all spaces.

    Raises:
        ValueError: The file cannot be read, or is damaged.
    """
    try:
        asked: dict[str, Any] = json.loads(file.read_bytes())
        WandbOptions(**asked["wandb"] | {"mode": "off"})
        names = {field.name for field in dataclasses.fields(StudyOptions)} - {"space"}
        if asked["options"].keys() <= names and isinstance(asked["storage"], str | None):
            return asked
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(f"{file} is damaged; restore it, or resume the studies beside it one by one")


def run_all(
    folder: Path,
    asked: dict[str, Any],
    changes: dict[str, Any],
    script: Script,
    *,
    dry_run: bool = False,
    wandb: Mapping[str, Any],
) -> int:
    """Runs the studies of all spaces in one folder, the finished ones apart; returns the exit code.

    Args:
        folder: Of the studies, one for each space.
        asked: The content of its ALL file.
        changes: Options that were given when it was resumed.
        script: What has been started.
        dry_run: Forecast the studies and write nothing.
        wandb: The fields of WandbOptions that were given.
    """
    script = dataclasses.replace(script, place=folder)

    def nothing_yet(reason: str) -> int:
        code = say_nothing_written(reason)
        resume_by = shell(*script.resume, shown(folder))
        print(f"To resume the other studies: {resume_by}", file=sys.stderr)
        return code

    if not dry_run:
        script.stops.nothing_yet = nothing_yet
    codes = [0]
    for space in SPACES:
        study, storage = folder / space, asked["storage"]
        try:
            if (study / "study.json").exists():
                done = read_study(study)["status"] == "done"
                codes.append(0 if done else resume(study, changes, script, wandb=wandb))
            else:
                options = StudyOptions(space=space, **(asked["options"] | changes))
                is_url = storage and not Store(storage).folder  # else the folder is given already
                place = Store(storage).below(folder.name).place if is_url else None
                codes.append(start(options, study, script, dry_run=dry_run, wandb=wandb, storage=place))
        except ValueError as error:  # one space's trouble is not the next one's
            print(f"error: {space}: {printable(str(error))}", file=sys.stderr)
            codes.append(2)
        if codes[-1] == 3:
            break
    return max(codes)
