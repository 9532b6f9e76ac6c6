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
from typing import Any

from rich.console import Console

from search.flags import HELP, add_options, add_storage, parse_study, study_parser
from search.launch import Script, leave, resume, start
from search.options import StudyOptions
from search.printing import list_spaces
from search.spaces import SPACES
from search.wandb_options import add_wandb_flags
from trainables.command_line import exit_code
from trainables.config import check_name


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
    codes = []
    for space in SPACES:
        folder = do.study_dir / space if do.study_dir else None
        try:
            codes.append(
                start(
                    StudyOptions(space=space, **options),
                    folder,
                    script,
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
