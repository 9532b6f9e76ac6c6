"""How does a study look? One function per figure: tables in, a matplotlib Figure out.

Ink and grid have marker colours that analysis/report.py turns into the page's own, so one SVG serves
light and dark. Series have colours that read on both, and differ in shape or dash too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from analysis import stats
from analysis.load import Study

INK, GRID = "#101114", "#d9dadd"  # stand for the page's text and rule colours
BLUE, ORANGE, GREEN, PINK, GREY = "#3b82d0", "#e07b00", "#1a9a6c", "#c8558f", "#8a8f98"  # Okabe-Ito's, toned
SERIES = (BLUE, ORANGE, GREEN, PINK, "#7a5fd0")
WIDTH, HEIGHT = 6.6, 3.5  # inches; wider ones have letters that a phone makes too small
MANY = 400  # lines or points from which a figure is drawn as pixels inside its SVG
DIVERGED = ("diverged", "error", "out_of_memory")
KINDS = {  # of trials: colour, line, marker, width
    "pruned": (GREY, "solid", ".", 0.8),
    "all epochs": (BLUE, "solid", ".", 1.4),
    "diverged or failed": (PINK, "dotted", "x", 1.0),
}
SCHEDULERS = {  # colour and marker; top_K share a colour
    "ray_asha": (ORANGE, "s"),
    "stop": (GREEN, "^"),
    "promote": (BLUE, "o"),
    "halving": (PINK, "D"),
    "random": (GREY, "X"),
}
TOPS = ("#7a5fd0", "v<>Phd")
Range = dict[str, Any] | None  # of study.json: {"values"} or {"low", "high", "log"}; None: an older study
STYLE: Any = {  # rcParams; matplotlib types each key
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "path",  # no reader needs the font
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def winner_curves(study: Study) -> Figure:
    """Draws loss and accuracy of the winner's trial, and of its seeds on their training images."""
    figure, (loss, accuracy) = _axes(1, 2)
    best = study.epochs[study.epochs.trial_id == study.facts["best"]["trial_id"]]
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for k, (_, seed) in enumerate(study.finals.groupby("trial_id")):
            label = "its fresh seeds, training" if k == 0 else None
            axes.plot(seed.epoch, seed[f"train_{name}"], color=GREY, linewidth=0.9, label=label)
        axes.plot(best.epoch, best[f"train_{name}"], color=ORANGE, linestyle="--", label="winner, training")
        axes.plot(best.epoch, best[f"val_{name}"], color=BLUE, label="winner, validation")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(accuracy)
    _legend_below(figure, accuracy)
    return figure


def all_curves(study: Study) -> Figure:
    """Draws val_accuracy of every trial; pruned, finished and diverged ones differ."""
    figure, axes = _axes()
    kinds = study.trials.set_index("trial_id").status.map(_kind)
    rows = study.epochs.dropna(subset="val_accuracy").sort_values(["trial_id", "epoch"], kind="stable")
    begins = np.flatnonzero(~rows.trial_id.duplicated())
    curves = np.split(
        rows[["epoch", "val_accuracy"]].to_numpy(), begins[1:]
    )  # a groupby takes 40 s of 10,000
    lines: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for kind, curve in zip(kinds.loc[rows.trial_id.iloc[begins]], curves, strict=False):  # [] has one part
        lines[kind].append(curve)
    for kind, (colour, style, marker, width) in KINDS.items():
        if lines[kind]:
            many = len(study.trials) > MANY
            drawn = LineCollection(lines[kind], colors=colour, linestyles=style, linewidths=width)
            axes.add_collection(drawn).set_rasterized(many)
            points = np.concatenate(lines[kind])
            axes.plot(
                *points.T,
                marker,
                color=colour,
                markersize=3.5,
                label=f"{kind} ({len(lines[kind])})",
                rasterized=many,
            )
    for rung in study.facts["rungs"]:
        axes.axvline(rung, color=GRID, linewidth=1.2, zorder=0.5)
    axes.set(xlabel="epoch (vertical lines: rungs)", ylabel="val_accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axes)
    _legend_below(figure, axes)
    return figure


def best_so_far(study: Study) -> Figure:
    """Draws the best val_accuracy against epochs spent and against seconds."""
    figure, (by_epochs, by_seconds) = _axes(1, 2, sharey=True)
    table = stats.best_so_far(study.epochs)
    for axes, x, label in (
        (by_epochs, table.epochs, "epochs spent, all trials"),
        (by_seconds, table.seconds, "seconds since the first epoch began"),
    ):
        many = len(table) > MANY
        axes.plot(x, table.val_accuracy, ".", color=GREY, markersize=3, label="a report", rasterized=many)
        axes.step(x, table.best, where="post", color=BLUE, label="best so far")
        axes.set(xlabel=label)
    by_epochs.set(ylabel="val_accuracy")
    _percent(by_epochs)
    _legend_below(figure, by_epochs)
    return figure


def rung_survival(study: Study) -> Figure:
    """Draws how many trials reached each rung."""
    figure, axes = _axes(height=2.8)
    rungs = study.facts["rungs"]
    table = stats.rung_survival(study.trials, rungs, study.facts["options"]["epochs"])
    names = [f"{epoch}" for epoch in table.epoch]
    bars = axes.bar(names, table.reached, color=BLUE, width=0.6)
    axes.bar_label(bars, color=INK, padding=2)
    axes.set(xlabel="epoch", ylabel="trials that reached it")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)
    return figure


def hyperparameters(study: Study) -> Figure | None:
    """Draws each hyperparameter against val_accuracy at the first rung; None where none was sampled."""
    table, names = stats.comparable(study), study.hyperparameters
    if not names or table.empty:
        return None
    columns = 2
    rows = math.ceil(len(names) / columns)
    figure, grid = _axes(rows, columns, height=2.6 * rows)
    best = stats.top(table).index
    for axes, name in zip(np.ravel(grid), names, strict=False):
        _against(axes, table, name, study.facts.get("ranges", {}).get(name), table.index.isin(best))
    for axes in np.ravel(grid)[len(names) :]:
        axes.set_visible(False)
    for axes in np.ravel(grid)[::columns]:
        axes.set_ylabel("val_accuracy")
    return figure


def parallel_coordinates(study: Study) -> Figure | None:
    """Draws each trial as a line through hyperparameters to val_accuracy; the best quarter in colour."""
    table, names = stats.comparable(study), study.hyperparameters
    if len(names) < 2 or table.empty:
        return None
    figure, axes = _axes()
    best = stats.top(table).index
    places = {name: _places(table[name], study.facts.get("ranges", {}).get(name)) for name in names}
    reached = table.val_accuracy.to_numpy()
    low, high = reached.min(), reached.max()
    height = (reached - low) / (high - low) if high > low else np.full(len(reached), 0.5)
    ends = [(0.0, f"{low:.1%}"), (1.0, f"{high:.1%}")] if high > low else [(0.5, f"{low:.1%}")]
    places["val_accuracy"] = height, ends
    names = list(places)
    lines = np.column_stack([place for place, _ in places.values()])
    good = table.index.isin(best)
    for chosen, colour, alpha, width in ((~good, GREY, 0.35, 0.7), (good, BLUE, 0.8, 1.2)):
        paths = [np.column_stack([np.arange(len(names)), line]) for line in lines[chosen]]
        drawn = LineCollection(paths, colors=colour, alpha=alpha, linewidths=width)
        axes.add_collection(drawn).set_rasterized(len(table) > MANY)
    axes.set_ylim(-0.04, 1.04)
    for k, (_, ticks) in enumerate(places.values()):
        for place, text in ticks:
            axes.text(k + 0.03, place, text, fontsize=7.5, va="center")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(names) - 0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    return figure


def importance(study: Study) -> Figure | None:
    """Draws how much of the variance of val_accuracy each hyperparameter explains."""
    found = stats.importance(stats.comparable(study), study.facts.get("ranges", {}))
    if found is None:
        return None
    figure, axes = _axes(height=0.6 + 0.34 * len(found))
    rows = found.iloc[::-1]
    axes.barh(rows.name, rows["mean"], xerr=rows.sd, color=BLUE, ecolor=INK, height=0.6)
    axes.set(xlabel="share of variance explained (lines: sd over bootstrap samples)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", visible=False)
    return figure


def confusion(study: Study) -> Figure | None:
    """Draws the winner's confusion matrix of the test images; None without predictions."""
    if study.predictions is None:
        return None
    counts = stats.confusion(study.predictions, len(study.classes))
    size = max(3.6, 0.42 * len(counts) + 1.6)
    figure, axes = _axes(width=size + 0.6, height=size)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= 20:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                dark = share[row, column] > 0.5
                axes.text(
                    column,
                    row,
                    str(counts[row, column]),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#ffffff" if dark else "#202124",
                )
    names = [_short(name) for name in study.classes]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true class")
    axes.grid(visible=False)
    return figure


def class_accuracy(study: Study) -> Figure | None:
    """Draws the accuracy of each class, with its interval; None without predictions."""
    if study.predictions is None:
        return None
    table = stats.class_accuracy(stats.confusion(study.predictions, len(study.classes)))
    figure, axes = _axes(height=0.8 + 0.28 * len(table))
    names = [_short(name) for name in study.classes]
    error = np.abs(np.vstack([table.accuracy - table.low, table.high - table.accuracy]))
    axes.errorbar(
        table.accuracy, range(len(names)), xerr=error, fmt="o", color=BLUE, ecolor=GREY, markersize=4
    )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on test images (lines: Wilson's 95 % interval)")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def lr_curves(studies: list[Study]) -> Figure | None:
    """Draws val_accuracy against lr of every learning-rate study; diverged values are crosses below."""
    studies = [study for study in studies if study.lr_curve is not None]
    if not studies:
        return None
    figure, axes = _axes()
    lowest = min(float(study.lr_curve["mean"].min()) for study in studies if study.lr_curve is not None)
    for k, study in enumerate(studies):
        curve, colour, marker = study.lr_curve, SERIES[k % len(SERIES)], "os^Dv"[k % 5]
        assert curve is not None
        told, label = curve.dropna(subset="mean"), f"{_label(study)} ({curve.seeds.max()} seeds)"
        axes.fill_between(told.lr, told.low, told.high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(told.lr, told["mean"], color=colour, marker=marker, markersize=4, label=label)
        lost = curve[curve.verdict == "diverged"]
        axes.plot(lost.lr, [lowest] * len(lost), "x", color=colour)
    axes.set_xscale("log")
    axes.set(xlabel="lr (bands: 95 % interval over seeds; crosses: diverged)", ylabel="val_accuracy")
    _percent(axes)
    _legend_below(figure, axes)
    return figure


def accuracy_against_seconds(studies: list[Study]) -> Figure | None:
    """Draws each study's test accuracy against its time."""
    told = [study for study in studies if study.test_accuracy]
    if not told:
        return None
    figure, axes = _axes()
    for k, study in enumerate(told):
        test, colour = study.test_accuracy, SERIES[k % len(SERIES)]
        assert test is not None
        seconds, marker = study.facts["seconds"], "os^Dv"[k // len(SERIES) % 5]
        axes.errorbar(seconds, test["mean"], yerr=test["sd"], fmt=marker, color=colour, markersize=5)
        axes.annotate(
            _short(study.facts["space"], 30),
            (seconds, test["mean"]),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.2, y=0.12)
    axes.set(xlabel="seconds of the whole study (lines: sd over fresh seeds)", ylabel="test accuracy")
    _percent(axes)
    return figure


def schedulers(table: pd.DataFrame) -> Figure:
    """Draws regret against epochs spent of schedulers that searched the same curves.

    Args:
        table: Of analysis/compared.py: a row per family, workers and scheduler.

    Returns:
        A row per family and a column per number of workers.
    """
    families, workers = list(dict.fromkeys(table.family)), list(dict.fromkeys(table.workers))
    width, height = max(WIDTH, 1.2 + 2.2 * len(workers)), 1.0 + 2.4 * len(families)
    figure, grid = _axes(
        len(families), len(workers), width=width, height=height, sharex="row", sharey="row", squeeze=False
    )
    styles = dict(SCHEDULERS)
    tops = [name for name in dict.fromkeys(table.scheduler) if name not in styles]
    styles |= {name: (TOPS[0], TOPS[1][k % len(TOPS[1])]) for k, name in enumerate(tops)}
    for (family, at_once), rows in table.groupby(["family", "workers"], sort=False):
        axes = grid[families.index(family), workers.index(at_once)]
        for row in rows.to_dict("records"):
            colour, marker = styles[row["scheduler"]]
            for measure, fill in (("regret_other", "none"), ("regret", colour)):
                if math.isnan(row[measure]):
                    continue  # one seed
                errors = {  # a mean of equal values may lie beyond its interval by a rounding error
                    f"{x}err": [
                        [max(0.0, row[name] - row[f"{name}_low"])],
                        [max(0.0, row[f"{name}_high"] - row[name])],
                    ]
                    for x, name in (("x", "epochs"), ("y", measure))
                }
                label = row["scheduler"] if measure == "regret" else None
                drawn = {"fmt": marker, "color": colour, "mfc": fill, "markersize": 5, "linewidth": 0.9}
                axes.errorbar(row["epochs"], row[measure], **errors, **drawn, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_title(f"{_short(str(family), 24)}, {at_once} at once")
        axes.set_xlabel("epochs spent")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    for axes in grid[:, 0]:
        axes.set_ylabel("regret (hollow: on the other seed)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _axes(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = HEIGHT, **others: Any
) -> Any:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **others)


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))


def _kind(status: str) -> str:
    if status in DIVERGED:
        return "diverged or failed"
    return "all epochs" if status == "done" else "pruned"


def _against(axes: Axes, table: pd.DataFrame, name: str, described: Range, good: np.ndarray) -> None:
    values, many = table[name], len(table) > MANY
    if choices := _choices(values, described):
        spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(values))
        x = np.array([stats.choice_index(choices, value) for value in values]) + spread
        names = [str(choice) for choice in choices]
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=30 if len(names) > 4 else 0)
    else:
        x = values.to_numpy()
        if described is not None and described["log"]:
            axes.set_xscale("log")
    axes.plot(x[~good], table.val_accuracy[~good], ".", color=GREY, markersize=5, rasterized=many)
    axes.plot(x[good], table.val_accuracy[good], "D", color=BLUE, markersize=4, rasterized=many)
    axes.set_xlabel(name)
    _percent(axes)


def _choices(values: pd.Series, described: Range) -> list[Any]:
    """Returns a list's choices; none of a continuous range."""
    if described is None:
        return sorted(values.astype(str).unique())
    return described.get("values", [])


def _places(values: pd.Series, described: Range) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Returns each value's height on its axis, 0 to 1, and the axis' ticks as (height, text)."""
    if choices := _choices(values, described):
        step = 1 / max(len(choices) - 1, 1)
        heights = np.array([stats.choice_index(choices, value) for value in values]) * step
        return heights, [(k * step, str(choice)) for k, choice in enumerate(choices)]
    assert described is not None
    low, high = described["low"], described["high"]
    ticks = [(0.0, f"{low:g}"), (1.0, f"{high:g}")]
    if described["log"]:
        return np.asarray(np.log(values / low) / math.log(high / low)), ticks
    return np.asarray((values - low) / (high - low)), ticks


def _short(name: str, most: int = 18) -> str:
    """Returns a class name that fits a tick; matplotlib would read $ as mathematics."""
    short = name if len(name) <= most else f"{name[: most - 1]}…"
    return short.replace("$", r"\$")


def _label(study: Study) -> str:
    return _short(f"{study.facts['space']}, {study.facts['data']['name']}", 48)
