"""Compute the numbers of a report: plain tables in, plain tables out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
from scipy import stats

from tunefleet.analysis.load import StudyResults
from tunefleet.metric import ACCURACY, Metric

EDGE = 0.1  # of a range's width, at either end: a best value there asks for a wider range
TOP = 0.25  # of the trials, from which boundary shares are computed
FAR = 100.0  # times the size of the best quarter: values further from the best would hide the others
FAR_LOG = 1e5  # the same on a logarithmic axis
LARGEST = 1e300  # matplotlib's ticks overflow beyond
LOG_FROM = 100.0  # largest divided by smallest value from which an axis is logarithmic
IMPORTANCE_MIN = 8  # trials
IMPORTANCE_MAX = 200  # trials in a sample; a forest's time grows with their square
IMPORTANCE_REPEATS = 10  # bootstrap samples of the trials, whose spread is the uncertainty
IMPORTANCE_TREES = 16  # of each sample's forest: 160 in all, where optuna alone grows 64


@dataclass(frozen=True)
class Span:
    """What an axis shows of a metric: all values but those that would hide the others.

    Args:
        low: The lowest value shown.
        high: The highest.
        edge: Where the others are drawn, on the side of what is worse.
        log: Whether the axis is logarithmic.
        beyond: How many others there are.
    """

    low: float
    high: float
    edge: float
    log: bool = False
    beyond: int = 0

    @property
    def border(self) -> float:
        """Return what is between the values shown and the edge."""
        end = self.high if self.edge > self.high else self.low
        return math.sqrt(end * self.edge) if self.log else (end + self.edge) / 2

    def drawn(self, values: Any) -> np.ndarray:
        """Return values as they are drawn, those that are not shown at the edge."""
        values = np.clip(np.asarray(values, dtype=float), -LARGEST, LARGEST)
        return np.where((values < self.low) | (values > self.high), self.edge, values)


def span(values: Any, metric: Metric) -> Span:
    """Return what an axis shows of a metric's values; of one with bounds, everything.

    The size of a metric is the largest magnitude in the best quarter of its values.
    """
    values = np.asarray(values, dtype=float)
    values = np.clip(values[np.isfinite(values)], -LARGEST, LARGEST)
    if metric.bounds or not len(values):
        return Span(-math.inf, math.inf, math.nan)
    score = values if metric.mode == "max" else -values
    leading = np.sort(score)[-max(1, round(TOP * len(score))) :]
    size = float(np.abs(leading).max() or np.median(np.abs(values)) or math.inf)
    can_log = metric.mode == "min" and bool(values.min() > 0)
    shown = values[score.max() - score <= (FAR_LOG if can_log else FAR) * size]
    low, high = float(shown.min()), float(shown.max())
    log = can_log and high / low >= LOG_FROM
    if log:
        edge = high * (high / low) ** 0.08
    else:
        margin = 0.08 * (high - low or abs(high) or 1.0)
        edge = low - margin if metric.mode == "max" else high + margin
    return Span(low, high, edge, log, len(values) - len(shown))


def best_so_far(epochs: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Return the best value of the metric over the course of a search.

    Args:
        epochs: One row per report: trial_id, epoch, the metric, epoch_seconds, finished_at.
        metric: What trials are compared by.

    Returns:
        A row per report in the order of finished_at: epochs (reports so far, this one included),
        seconds (since the first epoch began), value and best (the best value so far).
    """
    rows = epochs.sort_values("finished_at", kind="stable")
    values = rows[metric.name]
    began = (rows.finished_at - rows.epoch_seconds).min()
    return pd.DataFrame(
        {
            "epochs": np.arange(1, len(rows) + 1),
            "seconds": (rows.finished_at - began).to_numpy(),
            "value": values.to_numpy(),
            "best": (values.cummax() if metric.mode == "max" else values.cummin()).ffill().to_numpy(),
        }
    )


def rung_survival(trials: pd.DataFrame, rungs: list[int], epochs: int) -> pd.Series:
    """Return how many trials reached each rung and, last, the end, by epoch.

    Args:
        trials: With a column epochs, the last one reported.
        rungs: Epochs at which trials are compared.
        epochs: Of a trial that is never pruned.
    """
    return pd.Series({epoch: int((trials.epochs >= epoch).sum()) for epoch in (*rungs, epochs)})


def comparable(study: StudyResults) -> pd.DataFrame:
    """Return each trial's hyperparameters and its metric at the first rung.

    The last values of a pruned trial and of a finished one are of different epochs; at the first rung
    (the last epoch, where there are no rungs) every trial that did not fail before has a value.
    """
    name = study.metric.name
    epoch = study.facts["rungs"][0] if study.facts["rungs"] else study.facts["options"]["epochs"]
    values = study.epochs[study.epochs.epoch == epoch].set_index("trial_id")[name]
    table = study.trials.set_index("trial_id")[study.hyperparameters]
    return table.assign(**{name: values}).dropna(subset=[name])


def boundary_share(values: pd.Series, low: float, high: float, *, log: bool) -> dict[str, float]:
    """Return which fractions of the values lie within EDGE of a range's low and of its high end."""
    if log:
        values, low, high = np.log(values), math.log(low), math.log(high)
    place = (values - low) / (high - low)
    return {"low": float((place <= EDGE).mean()), "high": float((place >= 1 - EDGE).mean())}


def top(table: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Return the TOP share of the trials by the metric, at least one."""
    count = max(1, round(TOP * len(table)))
    return table.sort_values(metric.name, ascending=metric.mode == "min", kind="stable").head(count)


def importance(table: pd.DataFrame, ranges: dict[str, Any], metric: Metric = ACCURACY) -> pd.DataFrame | None:
    """Return how much of the variance of the metric each hyperparameter explains.

    fANOVA (Hutter et al. 2014) as optuna has it, on bootstrap samples of the trials. Of a metric without
    bounds, the ranks of its values are explained: one trial at 1e29 would be all of the variance.

    Args:
        table: Of ``comparable``.
        ranges: Of study.json: ``{"low", "high", "log"}`` or ``{"values"}`` by name.
        metric: What trials are compared by.

    Returns:
        A row per hyperparameter, most important first: name, mean and sd over the samples; None where
        the trials are too few.
    """
    if len(table) < IMPORTANCE_MIN or not ranges or table[metric.name].nunique() < 2:
        return None
    if not metric.bounds:
        table = table.assign(**{metric.name: table[metric.name].rank()})
    distributions = {name: distribution(described) for name, described in ranges.items()}
    generator = np.random.default_rng(0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # not a line for each study
    samples = []
    for seed in range(IMPORTANCE_REPEATS):
        sample = table.iloc[generator.integers(0, len(table), min(len(table), IMPORTANCE_MAX))]
        study = optuna.create_study(direction="maximize")
        study.add_trials([_trial(dict(row), distributions, metric.name) for _, row in sample.iterrows()])
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=IMPORTANCE_TREES, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples.append(optuna.importance.get_param_importances(study, evaluator=evaluator))
    found = pd.DataFrame(samples, columns=list(ranges)).fillna(0.0)
    rows = pd.DataFrame({"name": list(ranges), "mean": found.mean().to_numpy(), "sd": found.std().to_numpy()})
    return rows.sort_values("mean", ascending=False, kind="stable", ignore_index=True)


def choice_index(choices: Sequence[Any], value: Any) -> int:
    """Return which of a range's choices a table's cell is: 0 is also 0.0, "False" also False, NaN null.

    Raises:
        ValueError: It is none of them.
    """
    if isinstance(value, float) and math.isnan(value):
        value = None
    for k, choice in enumerate(choices):
        if choice == value or str(choice) == str(value):
            return k
    raise ValueError(f"{value!r} is none of the choices {', '.join(map(str, choices))}")


def confusion(predictions: pd.DataFrame, classes: int) -> np.ndarray:
    """Return counts ``(classes, classes)``: true label by row, predicted label by column."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (predictions.label.to_numpy(), predictions.predicted.to_numpy()), 1)
    return counts


def confused_pairs(counts: np.ndarray) -> pd.DataFrame:
    """Return a row per pair of classes that was confused, most frequent first: label, predicted, images."""
    wrong = counts - np.diag(counts.diagonal())
    label, predicted = np.nonzero(wrong)
    rows = pd.DataFrame({"label": label, "predicted": predicted, "images": wrong[label, predicted]})
    return rows.sort_values("images", ascending=False, kind="stable", ignore_index=True)


def largest_of_blocks(matrix: np.ndarray, most: int) -> np.ndarray:
    """Return a matrix ``(n, n)`` as one of at most ``most`` rows, each cell the largest of a block."""
    width = -(-len(matrix) // most)
    blocks = -(-len(matrix) // width)
    padded = np.zeros((blocks * width, blocks * width))
    padded[: len(matrix), : len(matrix)] = matrix
    return np.asarray(padded.reshape(blocks, width, blocks, width).max((1, 3)))


def class_accuracy(counts: np.ndarray) -> pd.DataFrame:
    """Return a row per class of a confusion matrix: images, accuracy, and Wilson's 95 % interval."""
    images, right = counts.sum(1), counts.diagonal()
    rows = []
    for n, k in zip(images.tolist(), right.tolist(), strict=True):
        if n == 0:
            rows.append((0, math.nan, math.nan, math.nan))
            continue
        interval = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        rows.append((n, k / n, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["images", "accuracy", "low", "high"])


def distribution(described: dict[str, Any]) -> Any:
    """Return a range of study.json as Optuna writes it."""
    if "values" in described:
        return optuna.distributions.CategoricalDistribution(described["values"])
    return optuna.distributions.FloatDistribution(described["low"], described["high"], log=described["log"])


def _trial(row: dict[Any, Any], distributions: dict[str, Any], metric: str) -> Any:
    params = {name: param(row[name], distribution) for name, distribution in distributions.items()}
    return optuna.trial.create_trial(params=params, distributions=distributions, value=row[metric])


def param(value: Any, distribution: Any) -> Any:
    """Return a cell of trials.csv as the value of its distribution."""
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return distribution.choices[choice_index(distribution.choices, value)]
    return float(value)
