"""What may a person ask of a study? Every flag's value, checked before anything is read or written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunefleet.search.asha import PRUNERS, rung_epochs
from tunefleet.search.spaces import SMALLEST_SIZE, find_space, fixed_values
from tunefleet.search.suggest import SEARCHERS, Observation, suggest
from tunefleet.trainables.config import TrainConfig, check_integer, check_name, check_number
from tunefleet.trainables.data import DATA_DIR, expanded


def flag(name: str) -> str:
    """Returns a field's flag: ``final_seeds`` -> ``--final-seeds``."""
    return f"--{name.replace('_', '-')}"


SEED_MAX = 2**32 - 1  # numpy's RandomState, and so hyperopt, takes no larger one
NOT_TO_FIX = {  # and what to do instead
    "architecture": "give --space",
    "refit": "the winner's seeds have it, and no trial",
    **{name: f"give {flag(name)}" for name in ("epochs", "image_size", "weights", "seed")},
}


TYPES: dict[str, Any] = {
    "int": int,
    "str": str,
    "float": (int, float),
    "None": type(None),
    "dict[str, Any]": dict,
    "list[dict[str, Any]]": list,
}


@dataclass(frozen=True)
class StudyOptions:
    """What a person may ask of a study; the names are the flags of search/run.py.

    Fields marked *resume* may be changed when a study goes on: none of them changes a result.

    Raises:
        ValueError: A value is impossible.
    """

    space: str
    data: str = "cifar10"  # resume; where the same images are now
    image_size: int | None = None  # None: what the space is best at on the device
    weights: str = "imagenet"  # of ResNet backbones
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
    data_dir: str = str(DATA_DIR)  # resume
    concurrency: int | None = None  # resume; None: as many as CPUs or GPUs allow
    cpus_per_trial: float | None = None  # resume; None: 1, or a GPU's share of the CPUs
    gpus_per_trial: float | None = None  # resume; None: the space's where there are GPUs
    workers_per_trial: int | None = None  # None: the space's where there are as many GPUs, else 1
    max_failures: int = 3  # resume; lost workers per trial
    time_budget: float | None = None  # resume; seconds of search, None: no limit
    storage: str | None = None  # URL of an object store that holds the study's folder; None: a disk does
    fix: dict[str, Any] | None = None  # config values that every trial has, instead of sampled ones
    points: list[dict[str, Any]] | None = None  # run these instead of sampling: config values per trial

    def __post_init__(self) -> None:
        self._check_types()
        space = find_space(self.space)
        for name in ("data", "data_dir", "weights"):
            if (value := getattr(self, name)).startswith("~"):
                object.__setattr__(self, name, str(expanded(flag(name), value)))
        if self.points:
            object.__setattr__(self, "trials", len(self.points))
        if self.trials is None:
            object.__setattr__(self, "trials", space.trials)
        if self.epochs is None:
            object.__setattr__(self, "epochs", space.epochs)
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
        _ = self.rungs
        self._check_values()

    def _check_types(self) -> None:
        """A study.json that was edited may have anything in it."""
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), str(field.type).split(" | ")
            if not isinstance(value, tuple(TYPES[kind] for kind in kinds)):
                raise ValueError(
                    f"{flag(field.name)}={value!r} is not possible; give a value of type {kinds[0]}"
                )

    def _check_values(self) -> None:
        for name in self.fix or {}:
            if name in NOT_TO_FIX:
                raise ValueError(f"--fix {name} is not possible; {NOT_TO_FIX[name]}")
        values = self._fixed_values(self.image_size or SMALLEST_SIZE)
        for point in self.points or []:
            TrainConfig.from_dict(values | point)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Returns the epochs at which trials are compared; none without a pruner."""
        assert self.epochs is not None
        rungs = rung_epochs(self.grace, self.eta, self.epochs)
        return () if self.pruner == "none" else rungs

    def fixed_values(self) -> dict[str, Any]:
        """Returns every config value that is not sampled; the image size is settled by then."""
        assert self.image_size is not None
        return self._fixed_values(self.image_size)

    def _fixed_values(self, image_size: int) -> dict[str, Any]:
        assert self.epochs is not None
        return fixed_values(
            self.space,
            epochs=self.epochs,
            image_size=image_size,
            weights=self.weights,
            seed=self.seed,
            fix=self.fix,
        )

    def suggest(self, number: int, observations: Sequence[Observation]) -> dict[str, Any] | None:
        """Return what is sampled of trial ``number``, given all earlier ones; None: there are no more."""
        space = find_space(self.space, self.fix)
        points = self.points if space.ranges or self.points else [{}]  # all is fixed: one trial
        if points:
            return points[number] if number < len(points) else None
        return suggest(self.searcher, space.ranges, space.published, self.seed, number, observations)


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
