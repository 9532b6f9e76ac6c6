"""Options of a study: fields, flags, and the checks that come before anything is read or written."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.search.sample import Categorical, Domain

from tunefleet.cli import Parser, expanded, path_argument
from tunefleet.metric import OF_IMAGES, Metric, metric_of
from tunefleet.models.checks import check_integer, check_name, check_number
from tunefleet.models.ranges import interval, parse_range, plain_range
from tunefleet.models.space import FIELDS, NOT_SEARCHED, OF_EVERY_RUN, PRECISIONS, Space
from tunefleet.models.spaces import SMALLEST_SIZE
from tunefleet.search.asha import PRUNERS, rung_epochs
from tunefleet.search.suggest import SEARCHERS, Observation, suggest
from tunefleet.search.wandb_options import take_flags
from tunefleet.trainables.data import DATA_DIR


def flag(name: str) -> str:
    """Return a field's flag: ``final_seeds`` -> ``--final-seeds``."""
    return f"--{name.replace('_', '-')}"


OF_IMAGES_ONLY = ("data", "image_size", "weights", "precision", "metric")
SEED_MAX = 2**32 - 1  # numpy's RandomState, and so hyperopt, takes no larger one
TYPES: dict[str, Any] = {
    "Space": Space,
    "int": int,
    "str": str,
    "float": (int, float),
    "None": type(None),
    "dict[str, Any]": dict,
    "dict[str, str]": dict,
    "list[dict[str, Any]]": list,
}


@dataclass(frozen=True)
class StudyOptions:
    """What a person may ask of a study; the names are the flags of search/run.py.

    Fields marked *resume* may be changed when a study is resumed: none of them changes a result.

    Raises:
        ValueError: A value is impossible.
    """

    space: Space
    data: str = "cifar10"  # resume; where the same images are now
    image_size: int | None = None  # None: what the space is best at on the device
    weights: str = "imagenet"  # of a backbone
    trials: int | None = None  # None: the space's
    epochs: int | None = None  # None: the space's
    grace: int = 1
    eta: int = 3
    pruner: str | None = None  # None: promote, or stop where a trial has several workers
    searcher: str = "tpe"
    seed: int = 0
    final_seeds: int = 3
    device: str = "auto"  # resume; the numbers may then differ from those of one device
    precision: str = "auto"
    metric: str | None = None  # None: the space's
    data_dir: str = str(DATA_DIR)  # resume
    concurrency: int | None = None  # resume; None: as many as CPUs or GPUs allow
    cpus_per_trial: float | None = None  # resume; None: 1, or a GPU's share of the CPUs
    gpus_per_trial: float | None = None  # resume; None: the space's where there are GPUs
    workers_per_trial: int | None = None  # None: the space's where there are as many GPUs, else 1
    max_failures: int = 3  # resume; lost workers per trial
    time_budget: float | None = None  # resume; seconds of search, None: no limit
    storage: str | None = None  # URL of an object store that holds the study's folder; None: a disk does
    fix: dict[str, Any] | None = None  # config values that every trial has, instead of sampled ones
    range: dict[str, str] | None = None  # in place of the space's, as text: {"lr": "loguniform(1e-5, 1e-2)"}
    points: list[dict[str, Any]] | None = None  # run these instead of sampling: config values per trial

    def __post_init__(self) -> None:
        self._check_types()
        if self.range:
            texts = {name: written(name, value) for name, value in self.range.items()}
            object.__setattr__(self, "range", texts)
        for name in ("data", "data_dir", "weights"):
            if (value := getattr(self, name)).startswith("~"):
                object.__setattr__(self, name, str(expanded(flag(name), value)))
        if self.points:
            object.__setattr__(self, "trials", len(self.points))
        if self.trials is None:
            object.__setattr__(self, "trials", self.space.trials)
        if self.epochs is None:
            object.__setattr__(self, "epochs", self.space.epochs)
        if self.pruner is not None:
            check_name("--pruner", self.pruner, PRUNERS)
        if self.workers_per_trial is not None:
            check_integer("--workers-per-trial", self.workers_per_trial, 1)
        check_name("--searcher", self.searcher, SEARCHERS)
        for name, lowest in (
            ("trials", 1),
            ("epochs", 1),
            ("seed", 0),
            ("final_seeds", 0),
        ):
            check_integer(flag(name), getattr(self, name), lowest)
        if self.seed > SEED_MAX:
            raise ValueError(f"--seed={self.seed} is not possible; give an integer from 0 to {SEED_MAX}")
        check_integer("--max-failures", self.max_failures, 0)
        for name in ("image_size", "concurrency"):
            if getattr(self, name) is not None:
                check_integer(flag(name), getattr(self, name), 1)
        for name in ("cpus_per_trial", "time_budget"):
            if getattr(self, name) is not None:
                check_number(flag(name), getattr(self, name), 0, float("inf"), low_allowed=False)
        if self.gpus_per_trial is not None:
            check_number("--gpus-per-trial", self.gpus_per_trial, 0, float("inf"))
        if not self.space.trains_images and (self.workers_per_trial or 1) > 1:
            raise ValueError(
                f"--workers-per-trial={self.workers_per_trial}: {self.space.name} trains alone; give 1"
            )
        _ = self.rungs, self.compared
        self._check_values()

    @property
    def compared(self) -> Metric:
        """Return the metric that trials are compared by."""
        return metric_of(self.metric) if self.metric else metric_of(self.space.metric, self.space.mode)

    def _check_types(self) -> None:
        """A study.json that was edited may have anything in it."""
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), str(field.type).split(" | ")
            if not isinstance(value, tuple(TYPES[kind] for kind in kinds)):
                raise ValueError(
                    f"{flag(field.name)}={value!r} is not possible; give a value of type {kinds[0]}"
                )

    def _check_values(self) -> None:
        space = self.space
        for option in PAIRS:
            for name in getattr(self, option) or {}:
                if name in NOT_SEARCHED and (space.trains_images or name in OF_EVERY_RUN):
                    raise ValueError(f"{flag(option)} {name} is not possible; {NOT_SEARCHED[name]}")
                space.check_known(name)
        values = self._fixed_values(self.image_size or SMALLEST_SIZE)
        for point in self.points or [] if self.space.trains_images else []:
            self.space.config(values | point)

    def to_dict(self) -> dict[str, Any]:
        """Return all options as plain JSON-able values."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "space"]
        return {"space": self.space.reference, **{name: getattr(self, name) for name in names}}

    @functools.cached_property
    def searched(self) -> Space:
        """Return the space without what is fixed."""
        fix, texts = self.fix or {}, self.range or {}
        if both := fix.keys() & texts.keys():
            raise ValueError(f"{min(both)} is in --fix and in --range; leave it out of one")
        return self.space.fixing(fix).ranging({name: _range(name, text) for name, text in texts.items()})

    @property
    def moved(self) -> str:
        """Return a line about the first trial's values that a range has moved; empty where there is none."""
        before, after = {**self.space.fixed, **self.space.start}, self.searched.start
        moved = [
            f"{name} {after[name]}, since {before[name]} is not in its --range"
            for name in after
            if name in before and before[name] != after[name]
        ]
        return f"the first trial has {'; '.join(moved)}" if moved else ""

    @property
    def rungs(self) -> tuple[int, ...]:
        """Return the epochs at which trials are compared; none without a pruner."""
        assert self.epochs is not None
        rungs = rung_epochs(self.grace, self.eta, self.epochs)
        return () if self.pruner == "none" else rungs

    def fixed_values(self) -> dict[str, Any]:
        """Return every config value that is not sampled; the image size is settled by then."""
        return self._fixed_values(self.image_size or SMALLEST_SIZE)

    def _fixed_values(self, image_size: int) -> dict[str, Any]:
        assert self.epochs is not None
        return self.searched.fixed_values(
            epochs=self.epochs, image_size=image_size, weights=self.weights, seed=self.seed
        )

    def suggest(self, number: int, observations: Sequence[Observation]) -> dict[str, Any] | None:
        """Return what is sampled of trial ``number``, given all earlier ones; None: there are no more."""
        space = self.searched
        points = self.points if space.ranges or self.points else [{}]  # all is fixed: one trial
        if points:
            return points[number] if number < len(points) else None
        return suggest(self.searcher, space.ranges, space.start, self.seed, number, observations)


def written(name: str, value: Any) -> str:
    """Return a range as text, which ``parse_range`` reads.

    Raises:
        ValueError: It is neither a text nor one of Ray Tune's ranges that can be searched.
    """
    if isinstance(value, str):
        return value
    value = plain_range(name, value)
    if isinstance(value, Categorical):
        return f"choice({list(value.categories)!r})"
    found = interval(value)
    low, high = (round(end) if found.integer else end for end in (found.low, found.high))
    kind = f"{'log' * found.log}{'randint' if found.integer else 'uniform'}"
    if found.integer and found.step == 1:
        return f"{kind}({low}, {high + 1})"  # without its end
    step = round(found.step) if found.integer and found.step else found.step
    return f"q{kind}({low}, {high}, {step})" if found.step else f"{kind}({low}, {high})"


def _range(name: str, text: str) -> Domain:
    try:
        return parse_range(text)
    except ValueError as error:
        raise ValueError(f"--range {name}={text} is not possible ({error})") from None


EXTENDING = ("trials", "final_seeds")  # may grow, also when a study is finished
RESUMABLE = (
    "data",
    "device",
    "data_dir",
    "concurrency",
    "cpus_per_trial",
    "gpus_per_trial",
    "max_failures",
    "time_budget",
)

HELP = {
    "data": "cifar10, digits, a folder or archive of images CLASS/FILE, with or without train/, val/ and "
    "test/, or FILE.py:FUNCTION that returns images (docs/own-network.md)",
    "data_dir": "where downloads, decoded images and features are cached",
    "image_size": "pixels a side; larger or mixed images are resized once (default: 32, or with trained "
    "weights what the space is best at on the device)",
    "weights": "of a backbone: imagenet, none, or a path to a state_dict of the whole network",
    "trials": "how many configurations to try (default: the space's)",
    "epochs": "of a trial that is never pruned, and the schedule's horizon (default: the space's)",
    "grace": "epochs before the first comparison",
    "eta": "keep the top 1/eta of the trials at each rung",
    "pruner": "promote pauses trials at rungs and continues the best; stop decides as they arrive "
    "(default: promote, or stop where a trial has several workers)",
    "searcher": "where configurations come from, after the published best",
    "concurrency": "trials at once (default: as many as CPUs or GPUs allow)",
    "cpus_per_trial": "CPUs of a trial, and its threads (default: 1, or a GPU's share)",
    "gpus_per_trial": "GPUs of a trial, fractions allowed (default: the space's where there are any)",
    "workers_per_trial": "processes that train a trial together (DDP) and share its CPUs and GPUs "
    "(default: 1)",
    "time_budget": "seconds of search, after which only the winner is retrained (default: no limit)",
    "seed": "of the sampling, and of each trial's initialisation and order",
    "final_seeds": "fresh seeds on which the winner is retrained and tested",
    "device": "auto, cpu or cuda; on resume the device to continue on",
    "metric": f"what trials are compared by: {', '.join(OF_IMAGES)} (default: the space's)",
    "precision": "auto chooses what the device is known to gain by",
    "fix": "hyperparameters that every trial has, instead of sampled ones: hidden=32 backbone=resnet34",
    "range": "other ranges than the space's: 'lr=loguniform(1e-5, 1e-2)' 'batch_size=choice(64, 128)'",
    "max_failures": "how often a trial's worker may die; a lost node does not count",
}
CHOICES = {"pruner": PRUNERS, "searcher": SEARCHERS, "precision": PRECISIONS, "metric": OF_IMAGES}
PAIRS = ("fix", "range")  # fields of several names and values
PARSED: dict[str, Any] = {"int": int, "float": float, "str": str}  # a field's type: what parses its flag


def study_parser(program: str, description: str, space_help: str = "architecture") -> Parser:
    """Return a parser with the flags of every study: --space, --study-dir, --dry-run and --resume."""
    parser = Parser(prog=program, description=description)
    parser.add_argument("--space", help=space_help)
    parser.add_argument(
        "--study-dir", type=path_argument, help="the study's folder (default: a new one under studies/)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, for how long, and end")
    parser.add_argument(
        "--resume", metavar="DIR", help="continue a stopped or killed study; its folder or URL"
    )
    return parser


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Add --storage."""
    parser.add_argument(
        "--storage",
        metavar="PLACE",
        help="where studies are kept: a folder that all nodes share, or s3://BUCKET/PREFIX "
        "(default: studies)",
    )


def add_options(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Add the flags of these fields of StudyOptions; one that is not given leaves no trace."""
    for field in dataclasses.fields(StudyOptions):
        if field.name not in names:
            continue
        default = "" if field.default in (None, dataclasses.MISSING) else f" (default: {field.default})"
        text = (HELP[field.name] + default).replace("%", "%%")
        if field.name in PAIRS:
            parser.add_argument(
                flag(field.name),
                nargs="+",
                action=_Pairs,
                metavar="NAME=VALUE",
                default=argparse.SUPPRESS,
                help=text,
            )
            continue
        parser.add_argument(
            flag(field.name),
            type=PARSED[str(field.type).removesuffix(" | None")],
            choices=CHOICES.get(field.name),
            metavar="METRIC" if field.name == "metric" else None,
            default=argparse.SUPPRESS,
            help=text,
        )


class _Pairs(argparse.Action):
    """Turns ``hidden=32 augment=crop`` into a dict of texts; what they mean depends on the space."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest, None) or {})  # of the same flag, given before
        for pair in values:
            name, equals, text = pair.partition("=")
            if not equals:
                parser.error(f"{option_string} {pair} is no NAME=VALUE; give for example --fix lr=0.01")
            pairs[name] = text
        setattr(namespace, self.dest, pairs)


def check_given(space: Space, names: Collection[str]) -> None:
    """Raise ValueError where an option was given that only images have, and a training has none."""
    for name in names:
        if name in OF_IMAGES_ONLY and not space.trains_images:
            raise ValueError(f"{flag(name)} is for images, and {space.name} trains by itself; leave it out")


def parsed(options: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Return options whose ``--fix`` has values, each of its hyperparameter's type.

    Raises:
        ValueError: An option, a name or a text fits nothing of the space.
    """
    check_given(space, options)
    if options.get("fix") is None:
        return dict(options)
    try:
        values = {name: space.parse(name, text) for name, text in options["fix"].items()}
    except ValueError as error:
        raise ValueError(f"--fix {error}") from None
    return {**options, "fix": values}


def parse_study(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return what to do, and the study's options that were given; their defaults stay with StudyOptions.

    What to do has W&B's flags and key in its ``wandb``.
    """
    flags, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        if name in FIELDS and name in HELP:  # those of a new study, and this is none
            horizon = ": it is its schedule's horizon" if name == "epochs" else ""
            parser.error(f"{flag(name)} cannot change when a study is resumed{horizon}")
        if name in FIELDS and word.startswith("--"):
            parser.error(f"{word} is a hyperparameter; to give it to every trial: --fix {name}=VALUE")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    flags.wandb = take_flags(vars(flags))
    return flags, {name: vars(flags).pop(name) for name in HELP if name in flags}
