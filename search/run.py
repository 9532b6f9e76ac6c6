"""Searches one architecture's hyperparameters, retrains the winner and says how good it is.

::

    python search/run.py --space resnet_conv

Writes a study folder (default ``studies/SPACE-DATA-TIME/``; README.md lists its files). Ctrl-C stops a
study, ``--resume FOLDER`` goes on with it. Exit code 0: all well, 1: done but some trials failed,
2: bad input, nothing was written, 3: stopped, resumable.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a folder of PYTHONPATH may have a search.py or a models.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import search  # noqa: F401  sets Ray's environment before anything imports Ray
from search import stopping

if __name__ == "__main__":
    stopping.answer_at_once()  # what follows takes seconds to import

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from search.flags import HELP, add_options, add_storage, parse_study, study_parser
from search.folders import check_free, default_folder
from search.launch import Script, leave, resume, start
from search.options import StudyOptions
from search.printing import list_spaces, shown
from search.spaces import SPACES
from search.study_file import read_study, write_whole
from search.wandb_options import WandbOptions, add_wandb_flags
from trainables.command_line import exit_code, printable, shell
from trainables.config import check_name
from trainables.storage import is_url

ALL = "all.json"  # in a folder of the studies of all spaces: what was asked of each


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns what to do, and the study's options that were given."""
    what = "architecture to search, or all; --list-spaces shows them"
    parser = study_parser("python search/run.py", __doc__.split("\n")[0], what)
    parser.add_argument("--list-spaces", action="store_true", help="print the spaces and end")
    add_storage(parser)
    add_options(parser, HELP)
    add_wandb_flags(parser)
    return parse_study(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    do, options = parse(arguments)
    script = Script(Console())
    return script.stops.run(lambda: exit_code(lambda: carry_out(do, options, script)))


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
        if not is_url(do.resume) and (file := Path(do.resume, ALL)).is_file():
            asked = read_asked(file)
            return run_all(file.parent, asked, options, script, wandb=asked["wandb"] | do.wandb)
        return resume(do.resume, options, script, wandb=do.wandb)
    if not do.space:
        raise ValueError(f"give --space NAME, or --resume DIR; spaces: {', '.join(SPACES)}, or all")
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
        code = stopping.say_nothing_written(reason)
        resume_by = shell("python", script.name, "--resume", shown(folder))
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
                place = f"{storage.rstrip('/')}/{folder.name}" if storage and is_url(storage) else None
                codes.append(start(options, study, script, dry_run=dry_run, wandb=wandb, storage=place))
        except ValueError as error:  # one space's trouble is not the next one's
            print(f"error: {space}: {printable(str(error))}", file=sys.stderr)
            codes.append(2)
        if codes[-1] == 3:
            break
    return max(codes)


if __name__ == "__main__":
    leave(main())
