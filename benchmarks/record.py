"""What does each of many configurations reach, epoch by epoch, when none is pruned? Recorded once.

::

    python -m tunefleet.benchmarks.record --space softmax --trials 64 --study-dir studies/softmax-curves

Runs a study without pruner, for benchmarks/replay.py: random configurations of a space after its published
best, each with several seeds. Its folder is resumed like any other. Exit codes as of ``tunefleet search``.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

import tunefleet.search  # noqa: F401  sets Ray's environment before anything imports Ray
from tunefleet.cli import exit_code
from tunefleet.search.options import StudyOptions, add_options, parse_study, study_parser
from tunefleet.search.running import resume, start
from tunefleet.search.session import Session, leave
from tunefleet.search.spaces import find_space
from tunefleet.search.suggest import suggest
from tunefleet.trainables.config import check_integer

SEEDS = 2  # per configuration: what one seed's luck chose, the other judges
OPTIONS = (
    *("data", "data_dir", "image_size", "weights", "trials", "epochs", "seed", "device", "precision", "fix"),
    *("concurrency", "cpus_per_trial", "gpus_per_trial", "max_failures"),
)


def points(space: str, fix: dict[str, Any] | None, count: int, seed: int, seeds: int) -> list[dict[str, Any]]:
    """Return the configurations of a study, each with all seeds before the next one.

    Args:
        space: Whose ranges are sampled; its published best comes first.
        fix: Values that are not sampled.
        count: How many configurations.
        seed: Of the sampling, and the first of the configurations' own.
        seeds: How many each configuration has.

    Raises:
        ValueError: The space is unknown, or nothing is left to sample.
    """
    row = find_space(space, fix)
    if not row.ranges:
        raise ValueError("--fix leaves nothing to sample; leave a value out")
    drawn = [suggest("random", row.ranges, row.published, seed, k, []) or {} for k in range(count)]
    return [point | {"seed": seed + k} for point in drawn for k in range(seeds)]


def new_options(do: argparse.Namespace, given: dict[str, Any]) -> StudyOptions:
    """Return the options of a new study.

    Raises:
        ValueError: A value is impossible.
    """
    if not do.space:
        raise ValueError("give --space NAME, or --resume DIR")
    check_integer("--seeds", do.seeds, 1)
    asked = StudyOptions(space=do.space, **given)  # checks --trials and --seed, and has their defaults
    assert asked.trials is not None
    return StudyOptions(
        space=do.space,
        points=points(do.space, asked.fix, asked.trials, asked.seed, do.seeds),
        pruner="none",
        final_seeds=0,
        **given,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = study_parser("python -m tunefleet.benchmarks.record", __doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="per configuration (default: %(default)s)")
    add_options(parser, OPTIONS)
    do, given = parse_study(parser, arguments)
    session, off = Session(Console()), {"mode": "off"}

    def record() -> int:
        if do.resume:
            return resume(do.resume, given, session)
        return start(new_options(do, given), do.study_dir, session, dry_run=do.dry_run, wandb=off)

    return session.stops.run(lambda: exit_code(record))


if __name__ == "__main__":
    leave(main())
