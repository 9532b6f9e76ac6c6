"""The command line: ``tunefleet COMMAND …``, or ``python -m tunefleet COMMAND …``."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import NoReturn

from tunefleet.cli import end_at_once, printable

COMMANDS = {  # name: module and function, summary
    "new": ("new:main", "write an example of a space in a file of your own"),
    "search": ("search.run:main", "search a space's hyperparameters, then test the winner"),
    "resume": ("search.run:resume_main", "continue a stopped or killed study"),
    "lr-study": ("search.lr_study:main", "accuracy against the learning rate, everything else fixed"),
    "report": ("analysis.report:main", "write a study's page, event files or an Optuna database"),
    "predict": ("inference.predict:main", "predict the classes of images with a study's winner"),
    "export": ("inference.export:main", "write a study's winner as a file that torch alone loads"),
    "wandb-report": ("analysis.wandb_report:main", "write or upload a W&B report of studies"),
    "results": ("analysis.results:main", "print a table of studies, and their commands"),
    "sync": ("search.wandb_sync:main", "upload a study's runs to W&B"),
    "push": ("mirror:main", "upload a study's folder to its object store"),
    "collect": ("collect:main", "write a study's tables from its journal"),
    "train": ("trainables.train:main", "train one configuration in this process, without Ray"),
}
NOTHING_WRITTEN = {"search", "resume", "lr-study"}  # while these import, a signal is answered with a line


def main(arguments: list[str]) -> int:
    """Run one command; return its exit code."""
    name, *rest = arguments or [""]
    if name in ("", "-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: tunefleet COMMAND …\n")
        for command, (_, summary) in COMMANDS.items():
            print(f"  {command:{width}}  {summary}")
        print("\ntunefleet COMMAND --help lists a command's arguments")
        return 0 if name else 2
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(
            f"error: {printable(name)} is no command; {hint}choose from: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    if name in NOTHING_WRITTEN:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end_at_once)
    module, _, function = COMMANDS[name][0].partition(":")
    code: int = getattr(importlib.import_module(f"tunefleet.{module}"), function)(rest)
    return code


def script(*arguments: str) -> NoReturn:
    """Run the command line of this process, after the command that a script is for; exit."""
    code = main([*arguments, *sys.argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    if "ray" in sys.modules:
        from tunefleet.search.session import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    script()
