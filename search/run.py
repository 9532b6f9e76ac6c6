"""Search one architecture's hyperparameters, retrain the winner and test it.

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
import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from tunefleet.cli import Parser, exit_code, kept_environment, printable, shell, shown
from tunefleet.files import write_whole
from tunefleet.models.spaces import SPACES, find_space
from tunefleet.search.display import list_space, list_spaces
from tunefleet.search.options import (
    EXTENDING,
    HELP,
    RESUMABLE,
    StudyOptions,
    add_options,
    add_storage,
    flag,
    parse_study,
    parsed,
    study_parser,
)
from tunefleet.search.running import check_free, default_folder, resume, start
from tunefleet.search.session import Session, say_nothing_written
from tunefleet.search.wandb_options import WandbOptions, add_wandb_flags
from tunefleet.store import Store
from tunefleet.study import read_files

ALL = "all.json"  # in a folder of the studies of all spaces: their options


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return what to run, and the study's options that were given."""
    what = "architecture to search, or all; --list-spaces shows them"
    parser = study_parser("tunefleet search", __doc__.split("\n")[0], what)
    parser.add_argument("name", nargs="?", metavar="SPACE", help="the same as --space SPACE")
    parser.add_argument(
        "--list-spaces",
        nargs="?",
        const="",
        metavar="SPACE",
        help="print the spaces, or the ranges of one, and exit",
    )
    add_storage(parser)
    add_options(parser, HELP)
    add_wandb_flags(parser)
    flags, options = parse_study(parser, arguments)
    if flags.name and flags.space:
        parser.error(f"--space={flags.space} and {flags.name}; give one of them")
    flags.space = flags.space or flags.name
    return flags, options


@kept_environment()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line of ``tunefleet search``; return the exit code."""
    flags, options = parse(arguments)
    session = Session(Console())
    return session.stops.run(lambda: exit_code(lambda: search(flags, options, session)))


@kept_environment()
def resume_main(arguments: list[str] | None = None) -> int:
    """Run the command line of ``tunefleet resume``; return the exit code."""
    parser = Parser(prog="tunefleet resume", description="Continue a stopped or killed study.")
    parser.add_argument("study", help="its folder or URL")
    add_options(parser, (*RESUMABLE, *EXTENDING))
    add_wandb_flags(parser)
    flags, options = parse_study(parser, arguments)
    session = Session(Console())
    return session.stops.run(
        lambda: exit_code(lambda: resume_any(flags.study, options, session, flags.wandb))
    )


def search(flags: argparse.Namespace, options: dict[str, Any], session: Session) -> int:
    """Start or resume a study, or list the spaces; return the exit code.

    Raises:
        ValueError: It cannot run as asked.
    """
    if flags.list_spaces is not None:
        named = flags.list_spaces or flags.space
        return list_space(find_space(named), session.console) if named else list_spaces(session.console)
    if flags.resume:
        if flags.space or flags.study_dir or flags.storage:
            raise ValueError(
                "--resume takes space, folder and storage from the study; leave --space, --study-dir and "
                "--storage out"
            )
        if flags.dry_run:
            raise ValueError("--dry-run forecasts a new study; leave --resume out")
        return resume_any(flags.resume, options, session, flags.wandb)
    if not flags.space:
        raise ValueError(f"give a space; spaces: {', '.join(SPACES)}, or all")
    if flags.space != "all":
        space = find_space(flags.space)
        of_study = StudyOptions(space, **parsed(options, space))
        how = {"dry_run": flags.dry_run, "wandb": flags.wandb, "storage": flags.storage}
        return start(of_study, flags.study_dir, session, **how)
    folder = flags.study_dir or default_folder("all", options.get("data", StudyOptions.data))
    check_free(folder)
    given = {name: value for name, value in flags.wandb.items() if name != "key"}
    of_all = {"options": options, "storage": flags.storage, "wandb": given}
    if flags.dry_run:
        return run_all(folder, of_all, {}, session, dry_run=True, wandb=flags.wandb)
    new = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ALL, (json.dumps(of_all, indent=2) + "\n").encode())
    try:
        return run_all(folder, of_all, {}, session, wandb=flags.wandb)
    except ValueError:  # nothing else was written
        (folder / ALL).unlink()
        for parent in new:
            parent.rmdir()
        raise


def resume_any(location: str, changes: dict[str, Any], session: Session, wandb: Mapping[str, Any]) -> int:
    """Continue one study, or those of all spaces in a folder; return the exit code.

    Raises:
        ValueError: It cannot continue as asked.
    """
    if not (file := Path(location, ALL)).is_file():
        return resume(location, changes, session, wandb=wandb)
    if extending := [flag(name) for name in EXTENDING if name in changes]:
        raise ValueError(
            f"{location} has the studies of all spaces, and {', '.join(extending)} extends one; give its "
            f"folder: {location}/SPACE"
        )
    of_all = read_all(file)
    return run_all(file.parent, of_all, changes, session, wandb=of_all["wandb"] | wandb)


def read_all(file: Path) -> dict[str, Any]:
    """Return the options of the studies of all spaces.

    Raises:
        ValueError: The file cannot be read, or is damaged.
    """
    try:
        of_all: dict[str, Any] = json.loads(file.read_bytes())
        WandbOptions(**of_all["wandb"] | {"mode": "off"})
        names = {field.name for field in dataclasses.fields(StudyOptions)} - {"space"}
        if of_all["options"].keys() <= names and isinstance(of_all["storage"], str | None):
            return of_all
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(f"{file} is damaged; restore it, or resume the studies beside it one by one")


def run_all(
    folder: Path,
    of_all: dict[str, Any],
    changes: dict[str, Any],
    session: Session,
    *,
    dry_run: bool = False,
    wandb: Mapping[str, Any],
) -> int:
    """Run the unfinished studies of all spaces in one folder; return the exit code.

    Args:
        folder: Of the studies, one for each space.
        of_all: The content of its ALL file.
        changes: Options that were given when it was resumed.
        session: The command.
        dry_run: Forecast the studies and write nothing.
        wandb: The fields of WandbOptions that were given.

    Raises:
        ValueError: The first study cannot run as asked, and no other has: nothing else was written.
    """
    session = dataclasses.replace(session, location=folder)

    def stop_between(reason: str) -> int:
        code = say_nothing_written(reason)
        print(f"To resume the other studies: {shell(*session.resume, shown(folder))}", file=sys.stderr)
        return code

    if not dry_run:
        session.stops.nothing_yet = stop_between
    codes, storage = [0], of_all["storage"]
    for space in SPACES:
        study = folder / space
        try:
            if (study / "study.json").exists():
                done = read_files(study)[1]["status"] == "done"
                codes.append(0 if done else resume(study, changes, session, wandb=wandb))
            else:
                options = StudyOptions(SPACES[space], **parsed(of_all["options"] | changes, SPACES[space]))
                is_url = storage and not Store(storage).folder  # else the folder is given already
                location = Store(storage).below(folder.name).location if is_url else None
                codes.append(start(options, study, session, dry_run=dry_run, wandb=wandb, storage=location))
        except ValueError as error:
            if not any(folder.glob("*/study.json")) and len(codes) == 1:
                raise ValueError(f"{space}: {error}") from error
            # the other spaces' studies can still run
            print(f"error: {space}: {printable(str(error))}", file=sys.stderr)
            codes.append(2)
        if codes[-1] == 3:
            break
    return max(codes)
