"""Suggest hyperparameters: a pure function of the seed, the trial's number and what was observed.

Nothing is remembered between two suggestions, so a resumed study draws nothing again, and another version of
a library changes later trials only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.search.sample import Categorical, Domain

from tunefleet.models.ranges import Ranges, interval

SEARCHERS = ("tpe", "random", "grid")
STARTUP_TRIALS = 10  # drawn at random before TPE models anything; hyperopt's 20 is most of a small study
GRID_POINTS = 4  # per range of numbers, ends included
WORST = math.inf  # the loss of a failed trial; hyperopt minimises


@dataclass(frozen=True)
class Observation:
    """What is known of an earlier trial."""

    config: Mapping[str, Any]
    value: float | None = None  # higher is better; None: not yet known
    failed: bool = False  # worse than any value


def suggest(
    searcher: str,
    ranges: Ranges,
    first: Mapping[str, Any] | None,
    seed: int,
    number: int,
    observations: Sequence[Observation],
) -> dict[str, Any] | None:
    """Return a value for each range, as Python numbers and strings; None: a grid is exhausted.

    ``first`` is the point of trial 0, if any; ``number`` is the trial's, from 0; ``observations`` are those
    of all earlier trials, in the order of their numbers.
    """
    if first is not None and number == 0:
        return dict(first)
    if searcher == "grid":
        return next(itertools.islice(_grid(ranges, first, seed), number, None), None)
    entropy = np.random.SeedSequence((seed, number))
    if searcher == "random" or number < STARTUP_TRIALS or not ranges:
        rng = np.random.default_rng(entropy)
        return {name: _draw(domain, rng) for name, domain in ranges.items()}
    return _tpe(ranges, number, observations, int(entropy.generate_state(1)[0]))


def grid_values(domain: Domain) -> list[Any]:
    """Return a grid's values of one range: all of a choice, GRID_POINTS of numbers, evenly spaced."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    found = interval(domain)
    spaced = np.geomspace if found.log else np.linspace
    values = spaced(found.low, found.high, GRID_POINTS)
    return sorted({found.value(value) for value in values})


def _grid(ranges: Ranges, first: Mapping[str, Any] | None, seed: int) -> Iterable[dict[str, Any]]:
    """Return every combination once, shuffled by the seed, so that its beginning is a fair sample."""
    points = [
        dict(zip(ranges, values, strict=True))
        for values in itertools.product(*(grid_values(domain) for domain in ranges.values()))
    ]
    np.random.default_rng(seed).shuffle(points)
    if first is None:
        return points
    return [dict(first), *(point for point in points if point != first)]


def _draw(domain: Domain, rng: np.random.Generator) -> Any:
    if isinstance(domain, Categorical):
        return domain.categories[int(rng.integers(len(domain.categories)))]
    found = interval(domain)
    low, high = found.bounds
    if found.log:
        return found.value(math.exp(rng.uniform(math.log(low), math.log(high))))
    return found.value(rng.uniform(low, high))


def _tpe(ranges: Ranges, number: int, observations: Sequence[Observation], draw_seed: int) -> dict[str, Any]:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), by hyperopt."""
    import hyperopt  # a second, which the other searchers need not wait for
    from hyperopt import hp, tpe

    space: dict[str, Any] = {}
    for name, domain in ranges.items():
        if isinstance(domain, Categorical):
            space[name] = hp.choice(name, list(domain.categories))
            continue
        found = interval(domain)
        low, high = found.bounds
        space[name] = (
            hp.loguniform(name, math.log(low), math.log(high)) if found.log else hp.uniform(name, low, high)
        )
    trials = hyperopt.trials_from_docs([_document(ranges, k, seen) for k, seen in enumerate(observations)])
    (new,) = tpe.suggest(
        [number],
        hyperopt.Domain(lambda config: 0, space),
        trials,
        draw_seed,
        n_startup_jobs=0,
        verbose=False,
    )
    drawn = {name: values[0] for name, values in new["misc"]["vals"].items()}
    return {
        name: domain.categories[int(drawn[name])]
        if isinstance(domain, Categorical)
        else interval(domain).value(float(drawn[name]))
        for name, domain in ranges.items()
    }


def _document(ranges: Ranges, number: int, seen: Observation) -> dict[str, Any]:
    """Return an observation as hyperopt keeps it; without a loss it counts as running.

    A value that its range does not allow is left out, as hyperopt does with a parameter that depends on
    another.
    """
    values: dict[str, list[Any]] = {}
    for name, domain in ranges.items():
        value = seen.config.get(name)
        if isinstance(domain, Categorical):
            value = domain.categories.index(value) if value in domain.categories else None
        values[name] = [] if value is None else [value]
    loss = WORST if seen.failed else None if seen.value is None else -seen.value
    return {
        "tid": number,
        "state": 2 if loss is not None else 1,  # hyperopt's JOB_STATE_DONE, JOB_STATE_RUNNING
        "result": {"status": "ok", "loss": loss} if loss is not None else {"status": "new"},
        "misc": {
            "tid": number,
            "cmd": None,
            "idxs": {name: [number] * len(value) for name, value in values.items()},
            "vals": values,
        },
        "version": 0,
        **dict.fromkeys(("spec", "exp_key", "owner", "book_time", "refresh_time")),
    }
