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
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import search  # noqa: F401  sets Ray's environment before anything imports Ray
from models import ARCHITECTURES
from search import preflight
from search.asha import PRUNERS
from search.collect import read_study
from search.progress import Progress
from search.spaces import SPACES
from search.study import Study, StudyOptions, check_free, default_folder, flag
from search.suggest import SEARCHERS
from trainables.config import check_name
from trainables.data import prepare
from trainables.levers import PRECISIONS, choose

HELP = {
    "data": "cifar10, digits, or a folder or archive of images CLASS/FILE, with or without train/ and test/",
    "data_dir": "where downloads, decoded images and features are cached",
    "image_size": "pixels a side; larger or mixed images are resized once",
    "weights": "of ResNet backbones: imagenet, none, or a path to a torchvision ResNet-18 state_dict",
    "trials": "how many configurations to try (default: the space's)",
    "epochs": "of a trial that is never pruned, and the schedule's horizon (default: the space's)",
    "grace": "epochs before the first comparison",
    "eta": "one of eta trials goes on at each rung",
    "pruner": "promote pauses trials at rungs and lets the best go on; stop decides as they arrive",
    "searcher": "where configurations come from, after the published best",
    "concurrency": "trials at once (default: as many as CPUs or GPUs allow)",
    "cpus_per_trial": "CPUs of a trial, and its threads (default: 1, or a GPU's share)",
    "gpus_per_trial": "GPUs of a trial, fractions allowed (default: the space's where there are any)",
    "time_budget": "seconds of search, after which only the winner is retrained (default: no limit)",
    "seed": "of the sampling, and of each trial's initialisation and order",
    "final_seeds": "fresh seeds on which the winner is retrained and tested",
    "device": "auto, cpu or cuda",
    "precision": "auto chooses what the device is known to gain by",
    "max_failures": "how often a trial's worker may be lost",
}
CHOICES = {"pruner": PRUNERS, "searcher": SEARCHERS, "precision": PRECISIONS}
TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument in one line."""

    def error(self, message: str) -> Any:
        """Exits with 2."""
        print(f"error: {message}; {self.prog} --help lists the arguments", file=sys.stderr)
        raise SystemExit(2)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns what to do, and the study's options that were given; defaults stay with StudyOptions."""
    parser = Parser(prog="python search/run.py", description=__doc__.split("\n")[0])
    parser.add_argument("--space", help="architecture to search, or all; --list-spaces shows them")
    parser.add_argument("--list-spaces", action="store_true", help="print the spaces and end")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, for how long, and end")
    parser.add_argument(
        "--study-dir", type=Path, help="the study's folder (default: a new one under studies/)"
    )
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with a stopped or killed study")
    for field in dataclasses.fields(StudyOptions):
        if field.name == "space":
            continue
        default = "" if field.default in (None, dataclasses.MISSING) else f" (default: {field.default})"
        parser.add_argument(
            flag(field.name),
            type=TYPES[str(field.type).removesuffix(" | None")],
            choices=CHOICES.get(field.name),
            default=argparse.SUPPRESS,
            help=(HELP[field.name] + default).replace("%", "%%"),
        )
    options = vars(parser.parse_args(arguments))
    names = ("space", "list_spaces", "dry_run", "study_dir", "resume")
    return argparse.Namespace(**{name: options.pop(name) for name in names}), options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    console = Console()
    do, options = parse(arguments)
    try:
        if do.list_spaces:
            return list_spaces(console)
        if do.resume:
            if do.space or do.study_dir:
                raise ValueError(
                    "--resume takes space and folder from the study; leave --space and --study-dir out"
                )
            return resume(do.resume, options, console, dry_run=do.dry_run)
        if not do.space:
            raise ValueError(f"give --space NAME, or --resume DIR; spaces: {', '.join(SPACES)}, or all")
        if do.space != "all":
            return start(do.space, options, do.study_dir, console, dry_run=do.dry_run)
        check_name("--space", do.space, [*SPACES, "all"])
        codes = []
        for space in SPACES:
            folder = do.study_dir / space if do.study_dir else None
            codes.append(start(space, options, folder, console, dry_run=do.dry_run))
            if codes[-1] == 3:
                break
        return max(codes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the study began; nothing was written", file=sys.stderr)
        return 3


def start(space: str, given: dict[str, Any], folder: Path | None, console: Console, *, dry_run: bool) -> int:
    """Begins a new study; returns the exit code.

    Raises:
        ValueError: Something stands against it; nothing was written.
    """
    options = StudyOptions(space=space, **given)
    folder = folder or default_folder(space, options.data)
    check_free(folder)
    levers = choose(options.device, options.precision)
    resources = preflight.plan(options, levers, *preflight.machine())
    with console.status(f"reading {options.data}"):
        data = prepare(options.data, Path(options.data_dir), options.image_size)
    study = Study(folder, options, data, levers)
    fixed = study.fixed_values()
    with console.status("preparing inputs"):
        run = preflight.prepare_inputs(options, data, levers, fixed)
    if dry_run:
        return print_forecast(study, resources, run, console)
    preflight.check_disk(folder, preflight.checkpoint_bytes(run) * (options.trials or 0))
    study = Study.create(folder, options, data, levers, run.inputs.split_sha256)
    del run
    return carry_out(study, resources, fixed, console)


def resume(folder: Path, changes: dict[str, Any], console: Console, *, dry_run: bool) -> int:
    """Goes on with a study; returns the exit code.

    Raises:
        ValueError: There is no study, it is done, or it cannot go on as asked.
    """
    study = Study.open(folder, changes)
    if dry_run:
        raise ValueError("--dry-run forecasts a new study; leave --resume out")
    options = study.options
    resources = preflight.plan(options, study.levers, *preflight.machine())
    data = prepare(options.data, Path(options.data_dir), options.image_size)
    if data.sha256 != study.data.sha256:
        raise ValueError(
            f"--data={options.data} is not what the study began with (sha256 {data.sha256[:12]}, was "
            f"{study.data.sha256[:12]}); give the old images back"
        )
    study.data = data
    fixed = study.fixed_values()
    preflight.prepare_inputs(options, data, study.levers, fixed)
    return carry_out(study, resources, fixed, console)


def carry_out(study: Study, resources: preflight.Resources, fixed: dict[str, Any], console: Console) -> int:
    """Runs a study to its end or to a Ctrl-C, and prints what came of it."""
    import ray

    from search.engine import run_jobs

    options = study.options
    console.print(
        f"[bold]{options.space}[/] on {study.data.name}: {options.trials} trials of up to {options.epochs} "
        f"epochs, {resources.slots} at once, {study.levers.device} {study.levers.precision} "
        f"-> {shown(study.folder)}",
        highlight=False,
        soft_wrap=True,
    )
    try:
        with study.running(dataclasses.asdict(resources)):
            jobs = study.jobs(fixed)
            if not ray.is_initialized():
                preflight.connect()
            with Progress(jobs, options, resources.slots, console) as progress:
                run_jobs(
                    jobs,
                    study.context(resources.threads),
                    slots=resources.slots,
                    resources=resources.of_trial,
                    max_failures=options.max_failures,
                    on_step=progress.update,
                )
            study.tidy(jobs)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left takes a second or two
        print(
            f"\nstopped; nothing is lost. To go on: python search/run.py --resume {shown(study.folder)}",
            file=sys.stderr,
        )
        return 3
    return print_result(study.folder, console)


def print_result(folder: Path, console: Console) -> int:
    """Prints what a finished study found; returns the exit code."""
    study = read_study(folder)
    best, final = study["best"], study["final"]
    failed = {status: n for status, n in study["statuses"].items() if status in ("error", "out_of_memory")}

    def print_line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    print_line("")
    if best is None:
        print_line(
            "[bold]no trial[/] left chance: " + ", ".join(f"{n} {s}" for s, n in study["statuses"].items())
        )
        return 1
    print_line(f"[bold]best val_accuracy[/] {best['val_accuracy']:.4f}, trial {best['trial_id']}:")
    for name in SPACES[study["space"]].ranges:
        value = best["config"][name]
        print_line(f"  {name} {value:.4g}" if isinstance(value, float) else f"  {name} {value}")
    if final:
        test = final["test_accuracy"]
        spread = ""
        if test["sd"] is not None:
            low, high = test["interval95"]
            spread = f" ± {test['sd']:.4f} sd, 95 % interval of the mean {low:.4f} to {high:.4f}"
        print_line(f"[bold]test_accuracy[/] {test['mean']:.4f}{spread}, {len(test['values'])} fresh seeds")
    print_line(
        f"{study['trials']} trials, {study['epochs_spent']} epochs of {study['epochs_unpruned']} unpruned, "
        f"{preflight.clock(study['seconds'])}, busy {study['busy_fraction'] or 0:.2f} -> {shown(folder)}"
    )
    if failed:
        print_line(f"failed: {failed}; the errors stand in {shown(folder / 'reports.jsonl')}")
    return 1 if failed else 0


def print_forecast(study: Study, resources: preflight.Resources, run: Any, console: Console) -> int:
    """Prints what --dry-run promises; returns 0, or 2 where the study would not start."""
    options = study.options
    facts = preflight.forecast(options, resources, run)
    preflight.check_disk(study.folder, int(facts["checkpoint_bytes"]))
    gpus = f" and {resources.gpus_per_trial:g} GPU" if resources.gpus_per_trial else ""
    lines = [
        f"space      {options.space}: {ARCHITECTURES[options.space].summary}",
        f"data       {study.data.name}, {len(run.inputs.train_y)} train, {len(run.inputs.val_y)} validation, "
        f"{study.data.test_count} test images",
        f"trials     {options.trials}, {resources.slots} at once, each {resources.cpus_per_trial:g} CPU{gpus}"
        f", {study.levers.precision}",
        f"epochs     {facts['epochs']} expected ({(options.trials or 0) * (options.epochs or 0)} unpruned), "
        f"rungs {list(options.rungs)}, {options.pruner}",
        f"final      {options.final_seeds} seeds, {facts['final_epochs']} epochs",
        f"time       about {preflight.clock(facts['seconds'])}, from {facts['epoch_seconds']:.2f} s an epoch "
        "of the published best",
        f"disk       up to {facts['checkpoint_bytes'] / 1e6:.0f} MB of checkpoints while it runs",
        f"folder     {shown(study.folder)}, not written",
    ]
    for text in lines:
        console.print(text, highlight=False, soft_wrap=True)
    return 0


def list_spaces(console: Console) -> int:
    """Prints each space: what it is and what it samples."""
    for name, space in SPACES.items():
        console.print(f"[bold]{name}[/]: {ARCHITECTURES[name].summary}", highlight=False)
        console.print(f"    samples {', '.join(space.ranges)}", highlight=False)
        published = ", ".join(f"{key} {value}" for key, value in space.published.items())
        console.print(
            f"    published {100 * space.published_accuracy:.2f} % with {published}", highlight=False
        )
    return 0


def shown(folder: Path) -> str:
    """Returns a path as short as the reader's working directory allows."""
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative


if __name__ == "__main__":
    sys.exit(main())
