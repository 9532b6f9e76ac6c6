"""What does each of many configurations reach, epoch by epoch, when none is pruned? Recorded once.

::

    python -m tunefleet.benchmarks.record --space softmax --trials 64 --study-dir studies/softmax-curves

Runs a study without pruner, for benchmarks/replay.py: random configurations of a space after its published
best, each with several seeds. ``tunefleet resume`` resumes it, ``tunefleet search`` has the same exit codes.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

import tunefleet.search  # noqa: F401  sets Ray's environment before anything imports Ray
from tunefleet.cli import exit_code
from tunefleet.models.checks import check_integer
from tunefleet.models.spaces import find_space
from tunefleet.search.options import StudyOptions, add_options, parse_study, parsed, study_parser
from tunefleet.search.running import resume, start
from tunefleet.search.session import Session, leave
from tunefleet.search.suggest import suggest

SEEDS = 2  # per configuration: what one seed's luck chose, the other judges
OPTIONS = (
    *("data", "data_dir", "image_size", "weights", "trials", "epochs", "seed", "device", "precision", "fix"),
    *("concurrency", "cpus_per_trial", "gpus_per_trial", "max_failures"),
)


def new_options(flags: argparse.Namespace, given: dict[str, Any]) -> StudyOptions:
    """Return the options of a new study: each configuration with all seeds before the next one.

    Raises:
        ValueError: A value is impossible, or nothing is left to sample.
    """
    if not flags.space:
        raise ValueError("give --space NAME, or --resume DIR")
    check_integer("--seeds", flags.seeds, 1)
    space = find_space(flags.space)
    given = parsed(given, space)
    checked = StudyOptions(space, **given)  # has the defaults, too
    assert checked.trials is not None
    row, seed = checked.searched, checked.seed
    if not row.ranges:
        raise ValueError("--fix leaves nothing to sample; leave a value out")
    drawn = [suggest("random", row.ranges, row.start, seed, k, []) or {} for k in range(checked.trials)]
    points = [point | {"seed": seed + k} for point in drawn for k in range(flags.seeds)]
    return StudyOptions(space, points=points, pruner="none", final_seeds=0, **given)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = study_parser("python -m tunefleet.benchmarks.record", __doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="per configuration (default: %(default)s)")
    add_options(parser, OPTIONS)
    flags, given = parse_study(parser, arguments)
    session, off = Session(Console()), {"mode": "off"}

    def record() -> int:
        if flags.resume:
            return resume(flags.resume, given, session)
        return start(new_options(flags, given), flags.study_dir, session, dry_run=flags.dry_run, wandb=off)

    return session.stops.run(lambda: exit_code(record))


if __name__ == "__main__":
    leave(main())
