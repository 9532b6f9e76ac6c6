"""Which hyperparameters are tried next? The published best first, then TPE, random or a grid.

A sampler is told a trial's value each time the trial pauses, not only at its end, or TPE would see
no observation until the study is over (Ray 2.60 tells searchers only of completed trials).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform

from tunefleet.trainables.config import check_name

SEARCHERS = ("tpe", "random", "grid")
STARTUP_TRIALS = 10  # drawn at random before TPE models anything; hyperopt's 20 is most of a small study
GRID_POINTS = 4  # per continuous range, ends included

Ranges = Mapping[str, Domain]


class Sampler(Protocol):
    """Where new trials come from."""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Returns a value for each range; None: there are no more."""

    def observe(self, trial_id: str, value: float) -> None:
        """Takes in a trial's val_accuracy; a later value replaces an earlier one."""


def make_sampler(searcher: str, ranges: Ranges, first: dict[str, Any] | None, seed: int) -> Sampler:
    """Builds the sampler of a study.

    Args:
        searcher: tpe, random or grid.
        ranges: What is searched, by hyperparameter.
        first: The point to try first, a value for each range; None: there is none.
        seed: Of the sampling, and of nothing else.

    Raises:
        ValueError: The searcher is unknown.
    """
    check_name("--searcher", searcher, SEARCHERS)
    if searcher == "tpe" and ranges:
        return TPESampler(ranges, first, seed)
    if searcher == "random":
        return RandomSampler(ranges, first, seed)
    return GridSampler(ranges, first, seed)


class TPESampler:
    """Tree-structured Parzen estimator (Bergstra et al. 2011) by hyperopt, through Ray's HyperOptSearch."""

    def __init__(self, ranges: Ranges, first: dict[str, Any] | None, seed: int) -> None:
        from ray.tune.search.hyperopt import HyperOptSearch  # a second or two, which others need not wait for

        self._search = HyperOptSearch(
            space=HyperOptSearch.convert_search_space(dict(ranges)),
            metric="val_accuracy",
            mode="max",
            points_to_evaluate=None if first is None else [dict(first)],
            n_initial_points=STARTUP_TRIALS,
            random_state_seed=seed,
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Returns the next point."""
        return self._search.suggest(trial_id)

    def observe(self, trial_id: str, value: float) -> None:
        """Updates the trial's observation in place."""
        # on_trial_complete would do the same and forget the trial, whose value may still rise
        self._search._process_result(trial_id, {"val_accuracy": value})


class RandomSampler:
    """Independent draws from each range."""

    def __init__(self, ranges: Ranges, first: dict[str, Any] | None, seed: int) -> None:
        self._ranges, self._first = ranges, first
        self._random = np.random.default_rng(seed)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Returns the next point."""
        if self._first is not None:
            first, self._first = self._first, None
            return dict(first)
        return {
            name: plain(domain.sample(random_state=self._random)) for name, domain in self._ranges.items()
        }

    def observe(self, trial_id: str, value: float) -> None:
        """Learns nothing."""


class PointSampler:
    """Given points, in their order; a study of them can be resumed with more at the end."""

    def __init__(self, points: list[dict[str, Any]]) -> None:
        self._points = iter(points)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Returns the next point; None when all are out."""
        return next(self._points, None)

    def observe(self, trial_id: str, value: float) -> None:
        """Learns nothing."""


class GridSampler(PointSampler):
    """Every combination once, in an order shuffled by the seed, so that its beginning is a fair sample."""

    def __init__(self, ranges: Ranges, first: dict[str, Any] | None, seed: int) -> None:
        points = [
            dict(zip(ranges, values, strict=True))
            for values in itertools.product(*(grid_values(domain) for domain in ranges.values()))
        ]
        np.random.default_rng(seed).shuffle(points)
        if first is not None:
            points = [dict(first), *(point for point in points if point != first)]
        super().__init__(points)


def grid_values(domain: Domain) -> list[Any]:
    """Returns a grid's values of one range: all of a choice, GRID_POINTS of a continuous one."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    assert isinstance(domain, Float | Integer), domain
    upper = domain.upper - isinstance(domain, Integer)  # Ray's integer ranges exclude their end
    spaced = np.geomspace if isinstance(domain.get_sampler(), LogUniform) else np.linspace
    values = spaced(domain.lower, upper, GRID_POINTS)
    if isinstance(domain, Integer):
        return sorted({round(value) for value in values})
    return [float(value) for value in values]


def plain(value: Any) -> Any:
    """Returns a Python value for a numpy one, as JSON and TrainConfig want it."""
    return value.item() if isinstance(value, np.generic) else value
