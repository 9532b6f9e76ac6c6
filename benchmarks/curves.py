"""What does each of many configurations reach, epoch by epoch, when none is pruned? Recorded once.

::

    python -m tunefleet.benchmarks.curves --space softmax --trials 64 --out benchmarks/curves/softmax.csv
    python -m tunefleet.benchmarks.curves --resume studies/NAME --out benchmarks/curves/softmax.csv

Runs a study without pruner (its folder is kept, and resumed like any other): random configurations of a
space after its published best, each with several seeds. When it is done, writes the table of its curves
to --out, for analysis/replay.py, and what it is of beside it (.json). Exit codes as of search/run.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import tunefleet.search  # noqa: F401  sets Ray's environment before anything imports Ray
from tunefleet.analysis.curves import COLUMNS, curves_of, table_of
from tunefleet.analysis.load import load
from tunefleet.cli import exit_code, shown
from tunefleet.files import write_whole
from tunefleet.search.flags import add_options, parse_study, study_parser
from tunefleet.search.launch import Script, resume, start
from tunefleet.search.options import StudyOptions
from tunefleet.search.spaces import described, find_space
from tunefleet.search.study_file import read_study
from tunefleet.search.suggest import RandomSampler
from tunefleet.trainables.config import check_integer

SEEDS = 2  # per configuration: what one seed's luck chose, the other judges
OPTIONS = (
    *("data", "data_dir", "image_size", "weights", "trials", "epochs", "seed", "device", "precision", "fix"),
    *("concurrency", "cpus_per_trial", "gpus_per_trial", "max_failures"),
)
DIGITS = {"val_accuracy": ".5g", "val_loss": ".4g", "epoch_seconds": ".4g"}
KEPT = (  # of study.json
    *("space", "commit", "machine", "versions", "data_sha256", "split_sha256"),
    *("train_count", "validation_count", "levers", "resources", "seconds", "epochs_spent", "statuses"),
)


def points(space: str, fix: dict[str, Any] | None, count: int, seed: int, seeds: int) -> list[dict[str, Any]]:
    """Returns the configurations of a study, each with all seeds before the next one.

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
    sampler = RandomSampler(row.ranges, dict(row.published), seed)
    drawn = [sampler.suggest("") or {} for _ in range(count)]
    return [point | {"seed": seed + k} for point in drawn for k in range(seeds)]


def new_options(do: argparse.Namespace, given: dict[str, Any]) -> StudyOptions:
    """Returns the options of a new study.

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


def write_table(folder: Path, out: Path) -> None:
    """Writes the curves of a finished study to out, and what they are of to out's .json, each whole.

    Raises:
        ValueError: The study is not done, or has no curves.
    """
    study = load(folder)
    table = table_of(study)
    curves_of(study.name, table)  # it can be replayed
    facts = study.facts
    ranges = described(find_space(facts["space"], facts["options"]["fix"]).ranges)
    drawn = [point for point in facts["options"]["points"] if point["seed"] == facts["seed"]]
    command = shlex.join(["python", "-m", "tunefleet.benchmarks.curves", *shlex.split(facts["command"])[1:]])
    told = {
        "command": command,
        **{name: facts[name] for name in KEPT},
        "data": facts["data"]["name"],
        "epochs": facts["options"]["epochs"],
        "seeds": sorted({point["seed"] for point in facts["options"]["points"]}),
        "fix": facts["options"]["fix"],
        "ranges": ranges,
        "configurations": [{name: point[name] for name in ranges} for point in drawn],
    }
    for column, digits in DIGITS.items():
        table[column] = table[column].map(lambda value, digits=digits: format(value, digits), "ignore")
    write_whole(out.with_suffix(".json"), (json.dumps(told, indent=1) + "\n").encode())
    write_whole(out, table.to_csv(columns=list(COLUMNS), index=False, lineterminator="\n").encode())


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns what to do, and the study's options that were given."""
    parser = study_parser("python -m tunefleet.benchmarks.curves", __doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the table's file, .csv")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="per configuration (default: %(default)s)")
    add_options(parser, OPTIONS)
    return parse_study(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    do, given = parse(arguments)
    return exit_code(lambda: carry_out(do, given, Console()))


def carry_out(do: argparse.Namespace, given: dict[str, Any], console: Console) -> int:
    """Does what was asked for; returns the exit code.

    Raises:
        ValueError: It cannot be done.
    """
    if do.out.suffix != ".csv" or not do.out.parent.is_dir():
        raise ValueError(f"--out={do.out} is not possible; give a .csv file in a folder that is there")
    resume_by = ("python", "-m", "tunefleet.benchmarks.curves", "--out", str(do.out), "--resume")

    def finish(folder: Path, console: Console) -> int:
        write_table(folder, do.out)
        statuses = read_study(folder)["statuses"]
        counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
        console.print(f"{counts} -> {shown(do.out)}", highlight=False, soft_wrap=True)
        return int(bool(statuses.keys() & {"error", "out_of_memory"}))

    script = Script(console, resume_by, finish)
    wandb = do.wandb | {"mode": "off"}  # nothing beside a recording, whose seconds count
    if not do.resume:
        options = new_options(do, given)
        return script.stops.run(lambda: start(options, do.study_dir, script, dry_run=do.dry_run, wandb=wandb))
    folder = Path(do.resume)
    study = read_study(folder)
    if not study["options"]["points"] or study["options"]["pruner"] != "none":
        raise ValueError(f"--resume={folder} records no curves; it is a study of another script")
    if study["status"] == "done":
        return finish(folder, console)  # its table could not be written then
    return script.stops.run(lambda: resume(folder, given, script, wandb=wandb))


if __name__ == "__main__":
    sys.exit(main())
