"""Write a study's tables from its journal: trials.csv, epochs.parquet, result.json.

Happens at the end of each study, and by hand at any time::

    tunefleet collect studies/NAME
    tunefleet collect --keep-lines N studies/NAME    # of a damaged reports.jsonl

Of a study that is running it writes the tables only: result.json belongs to the process that runs it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from tunefleet.cli import Parser, counted, exit_code, printable
from tunefleet.study import RunningError, cut, lock_study, read_files, write_tables


def collect(folder: Path, keep_lines: int | None) -> str:
    """Write a study's tables; return its state, in a line.

    Args:
        folder: The study's; it may be running.
        keep_lines: Cut its journal off after so many lines; None: leave it as it is.

    Raises:
        ValueError: As ``Study``; or the journal of a finished or a running study would be cut.
    """
    read_files(folder)  # a lock would make the folder of a study that is not there
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(lock_study(folder).release)
        except RunningError:
            if keep_lines is not None:
                raise
            study, torn = write_tables(folder), 0
        else:
            if keep_lines is not None:
                cut(folder, keep_lines)
            _, result = read_files(folder)
            study = write_tables(folder, status=result["status"], seconds=result["seconds"])
            torn = study.journal.torn()
    left_out = f", a torn last line of {torn} bytes left out" if torn else ""
    trials, epochs = study.facts["trials"], study.facts["epochs_spent"]
    return f"{counted(trials, 'trial')}, {counted(epochs, 'epoch')}, status {study.status}{left_out}"


def main(arguments: list[str] | None = None) -> int:
    """Collect the studies named on the command line; return the exit code."""
    parser = Parser(prog="tunefleet collect", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, nargs="+", help="a study's folder")
    parser.add_argument(
        "--keep-lines",
        type=int,
        metavar="N",
        help="keep N lines of a damaged reports.jsonl; the whole file stays as reports.jsonl.damaged",
    )
    given = parser.parse_args(arguments)

    def run() -> int:
        for folder in given.study:
            print(f"{printable(str(folder))}: {collect(folder, given.keep_lines)}")
        return 0

    return exit_code(run)
