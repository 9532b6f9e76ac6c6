"""How does a study look? One function per figure: tables in, a matplotlib Figure out.

Ink and grid have marker colours that analysis/report.py turns into the page's own, so one SVG serves
light and dark. Series have colours that read on both, and differ in shape or dash too.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, PercentFormatter, ScalarFormatter

from tunefleet.analysis import stats
from tunefleet.analysis.load import StudyResults
from tunefleet.analysis.text import number
from tunefleet.cli import counted, printable
from tunefleet.journal import LOST
from tunefleet.metric import ACCURACY, Metric

INK, GRID = "#101114", "#d9dadd"  # markers for the page's text and rule colours
BLUE, ORANGE, GREEN, PINK, GREY = "#3b82d0", "#e07b00", "#1a9a6c", "#c8558f", "#8a8f98"  # Okabe-Ito's, toned
SERIES = (BLUE, ORANGE, GREEN, PINK, "#7a5fd0")
MARKERS = "os^Dv"
WIDTH, HEIGHT = 6.6, 3.5  # inches; of a wider one the letters are too small on a phone
MANY = 400  # lines or points from which a figure is drawn as pixels inside its SVG
NUMBERED = 20  # classes of a confusion matrix with its counts
NAMED = 40  # classes that have their names on an axis
WORST = 20  # classes, pairs of them or studies that are named where all are too many
DOTTED = 60  # epochs up to which a curve's points are drawn large
LABEL = 30  # characters of a name on an axis
CELLS = 200  # of a larger matrix' side
CHOICES = 12  # of a list that have a tick each
ACROSS = 7  # hyperparameters beside each other in parallel coordinates
LOSS = Metric("val_loss", "min")
KINDS = {  # of trials: colour, line, marker, width
    "pruned": (GREY, "solid", ".", 0.8),
    "all epochs": (BLUE, "solid", ".", 1.4),
    "diverged or failed": (PINK, "dotted", "x", 1.0),
}
Ticks = list[tuple[float, str]]  # height on an axis, 0 to 1, and text
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


def style(texts: list[str]) -> Any:
    """Return STYLE, with further fonts for the characters of texts that its own font lacks."""
    families = [STYLE["font.family"]]
    missing = {character for character in set("".join(texts)) if not _drawn_by(families[0], character)}
    for font in font_manager.fontManager.ttflist if missing else ():
        usual = (font.style, font.weight, font.stretch) == ("normal", 400, "normal")
        if not usual or font.name in families or "Last Resort" in font.name:
            continue
        if found := {character for character in missing if _drawn_by(font.name, character)}:
            families.append(font.name)
            missing -= found
    return STYLE | {"font.family": families}


def _drawn_by(family: str, character: str) -> bool:
    file = font_manager.findfont(font_manager.FontProperties(family=[family]))
    return font_manager.get_font(file).get_char_index(ord(character)) != 0


def winner_curves(study: StudyResults) -> Figure | None:
    """Draw loss, accuracy and the study's metric, where reported, of the winner's trial and of its seeds.

    Seeds without validation values are drawn by their training values. None where no trial has succeeded.
    """
    if not study.facts["best"]:
        return None
    best = study.epochs[study.epochs.trial_id == study.facts["best"]["trial_id"]]
    metrics = {metric.name: metric for metric in (LOSS, ACCURACY, study.metric)}
    shown = [metric for name, metric in metrics.items() if name in best and best[name].notna().any()]
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, grid = _axes(rows, columns, height=HEIGHT * rows, squeeze=False)
    for axes, metric in zip(grid.flat, shown, strict=False):
        _winner(axes, best, study.finals, metric)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    _legend_below(figure, max(grid.flat, key=lambda axes: len(axes.lines)))
    return figure


def _winner(axes: Axes, best: pd.DataFrame, finals: pd.DataFrame, metric: Metric) -> None:
    """Draw one quantity: by the epoch, of validation and of training."""
    quantity, tables = metric.name.removeprefix("val_"), (best, finals)
    training = f"train_{quantity}"
    columns = [name for name in (training, metric.name) if name in best and best[name].notna().any()]
    drawn = [table[name] for table in tables for name in columns if name in table]
    seen = stats.span(np.concatenate(drawn), metric)
    mark = "." if len(best) < 2 else None  # a line of one point is not seen
    validated = finals[metric.name].notna().any()
    of_seeds = metric.name if validated else training
    for k, (_, seed) in enumerate(finals.groupby("trial_id") if of_seeds in finals else ()):
        label = f"its fresh seeds{'' if validated else ', training'}" if k == 0 else None
        look: Any = {"color": GREY, "marker": mark, "linewidth": 0.9, "label": label}
        axes.plot(seed.epoch, seen.drawn(seed[of_seeds]), **look)
    for name in columns:
        look = {"color": BLUE, "label": "winner, validation" if len(columns) > 1 else "winner"}
        if name == training:
            look = {"color": ORANGE, "ls": "--", "label": "winner, training"}
        axes.plot(best.epoch, seen.drawn(best[name]), marker=mark, **look)
    axes.set(xlabel="epoch", ylabel=_short(quantity, LABEL))
    _whole(axes.xaxis)
    _value_axis(axes, metric, seen)
    _note(axes, seen)


def all_curves(study: StudyResults) -> Figure:
    """Draw the metric of every trial; pruned, finished and diverged ones differ."""
    figure, axes = _axes()
    name = study.metric.name
    kinds = study.trials.set_index("trial_id").status.map(_kind)
    rows = study.epochs.dropna(subset=[name]).sort_values(["trial_id", "epoch"], kind="stable")
    seen = stats.span(rows[name], study.metric)
    begins = np.flatnonzero(~rows.trial_id.duplicated())
    reports = np.column_stack([rows.epoch, seen.drawn(rows[name])])
    curves = np.split(reports, begins[1:])  # a groupby takes 40 s of 10,000
    lines: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for kind, curve in zip(kinds.loc[rows.trial_id.iloc[begins]], curves, strict=False):  # [] has one part
        lines[kind].append(curve)
    for kind, (colour, style, marker, width) in KINDS.items():
        if lines[kind]:
            many = len(study.trials) > MANY
            alpha = _alpha(len(study.trials))
            drawn = LineCollection(
                lines[kind], colors=colour, linestyles=style, linewidths=width, alpha=alpha
            )
            axes.add_collection(drawn).set_rasterized(many)
            points = np.concatenate(lines[kind])
            axes.plot(
                *points.T,
                marker,
                color=colour,
                markersize=3.5 if study.facts["options"]["epochs"] <= DOTTED else 1.5,
                alpha=alpha,
                label=f"{kind} ({len(lines[kind]):,})",
                rasterized=many,
            )
    for rung in study.facts["rungs"]:
        axes.axvline(rung, color=GRID, linewidth=1.2, zorder=0.5)
    axes.set(xlabel="epoch (vertical lines: rungs)", ylabel=_short(name, LABEL))
    _whole(axes.xaxis)
    _value_axis(axes, study.metric, seen)
    _note(axes, seen)
    _legend_below(figure, axes)
    return figure


def best_so_far(study: StudyResults) -> Figure:
    """Draw the best value of the metric against epochs spent and against seconds."""
    figure, (by_epochs, by_seconds) = _axes(1, 2, sharey=True)
    table = stats.best_so_far(study.epochs, study.metric)
    seen = stats.span(table.value, study.metric)
    for axes, x, label in (
        (by_epochs, table.epochs, "epochs spent, all trials"),
        (by_seconds, table.seconds, "seconds since the first epoch began"),
    ):
        many = len(table) > MANY
        grey: Any = {"color": GREY, "markersize": 3, "alpha": _alpha(len(table)), "rasterized": many}
        axes.plot(x, seen.drawn(table.value), ".", label="a report", **grey)
        steps = table.best.ne(table.best.shift()) | (table.index == len(table) - 1)  # of a million rows, few
        best = seen.drawn(table.best[steps])
        axes.step(x[steps], best, where="post", color=BLUE, label="best so far")
        axes.set(xlabel=label)
        if x.max() >= 1e5:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 3M, and no 1e6 beside the axis
        _value_axis(axes, study.metric, seen)
    _whole(by_epochs.xaxis)
    by_seconds.tick_params(axis="y", which="both", labelleft=False)  # a log scale shows them again
    by_epochs.set(ylabel=_short(study.metric.name, LABEL))
    _note(by_epochs, seen)
    _legend_below(figure, by_epochs)
    return figure


def rung_survival(study: StudyResults) -> Figure:
    """Draw how many trials reached each rung."""
    figure, axes = _axes(height=2.8)
    rungs = study.facts["rungs"]
    table = stats.rung_survival(study.trials, rungs, study.facts["options"]["epochs"])
    bars = axes.bar([str(epoch) for epoch in table.index], table, color=BLUE, width=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", color=INK, padding=2)
    axes.set(xlabel="epoch", ylabel="trials that reached it")
    _whole(axes.yaxis)
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)
    return figure


def hyperparameters(study: StudyResults) -> Figure | None:
    """Draw each hyperparameter against the metric at the first rung; None where none was sampled."""
    table, names = stats.comparable(study), study.hyperparameters
    if not names or table.empty:
        return None
    columns = 2
    rows = math.ceil(len(names) / columns)
    figure, grid = _axes(rows, columns, height=2.6 * rows)
    best = table.index.isin(stats.top(table, study.metric).index)
    reached = table[study.metric.name]
    seen = stats.span(reached, study.metric)
    heights = seen.drawn(reached)
    for axes, name in zip(np.ravel(grid), names, strict=False):
        _against(axes, table[name], heights, study.facts.get("ranges", {}).get(name), best)
        _value_axis(axes, study.metric, seen)
    _note(np.ravel(grid)[0], seen)
    for axes in np.ravel(grid)[len(names) :]:
        axes.set_visible(False)
    for axes in np.ravel(grid)[::columns]:
        axes.set_ylabel(_short(study.metric.name, LABEL))
    return figure


def parallel_coordinates(study: StudyResults) -> Figure | None:
    """Draw each trial as a line through hyperparameters to the metric; the best quarter in colour.

    Many hyperparameters are split into rows of at most ACROSS, each of which ends at the metric.
    """
    table, names = stats.comparable(study), study.hyperparameters
    if len(names) < 2 or table.empty:
        return None
    rows = math.ceil(len(names) / ACROSS)
    each = math.ceil(len(names) / rows)
    figure, grid = _axes(rows, 1, height=HEIGHT * rows, squeeze=False)
    good = table.index.isin(stats.top(table, study.metric).index)
    reached = _reached(table[study.metric.name].to_numpy(), study.metric)
    for axes, first in zip(grid.flat, range(0, len(names), each), strict=True):
        places = {
            name: _places(table[name], study.facts.get("ranges", {}).get(name))
            for name in names[first : first + each]
        }
        _parallel(axes, places | {study.metric.name: reached}, good)
    return figure


def _parallel(axes: Axes, places: dict[str, tuple[np.ndarray, Ticks]], good: np.ndarray) -> None:
    lines = np.column_stack([place for place, _ in places.values()])
    for chosen, colour, alpha, width in ((~good, GREY, 0.35, 0.7), (good, BLUE, 0.8, 1.2)):
        paths = [np.column_stack([np.arange(len(places)), line]) for line in lines[chosen]]
        drawn = LineCollection(paths, colors=colour, alpha=alpha * _alpha(len(lines)), linewidths=width)
        axes.add_collection(drawn).set_rasterized(len(lines) > MANY)
    axes.set_ylim(-0.04, 1.04)
    for k, (_, ticks) in enumerate(places.values()):
        for place, text in ticks:
            axes.text(k + 0.03, place, text, fontsize=7.5, va="center")
    axes.set_xticks(range(len(places)), _shorts(list(places), LABEL), rotation=20, ha="right")
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(places) - 0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _reached(values: np.ndarray, metric: Metric) -> tuple[np.ndarray, Ticks]:
    """Return the heights and ticks of a metric, whose axis goes from its lowest to its highest value."""
    seen = stats.span(values, metric)
    drawn = seen.drawn(values)
    shown = drawn[drawn != seen.edge]
    low, high = float(shown.min()), float(shown.max())
    if metric.bounds:
        texts = [PercentFormatter(1).format_pct(end, high - low) for end in (low, high)]
    else:
        texts = _distinct(low, high)
    ticks = dict(zip((low, high), texts, strict=True))
    if seen.beyond:
        ticks[seen.edge] = "beyond"
    if len(ticks) == 1:
        return np.full(len(values), 0.5), [(0.5, texts[0])]

    def scaled(of: Any) -> np.ndarray:
        return np.log(of) if seen.log else np.asarray(of)

    bottom, top = scaled([min(ticks), max(ticks)])
    heights = (scaled(list(ticks)) - bottom) / (top - bottom)
    ends = list(zip(heights.tolist(), ticks.values(), strict=True))
    return (scaled(drawn) - bottom) / (top - bottom), ends


def _distinct(low: float, high: float) -> list[str]:
    """Return two numbers with as many digits as tell them apart."""
    texts = [[number(end, digits) for end in (low, high)] for digits in range(4, 18)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[0])


def importance(study: StudyResults) -> Figure | None:
    """Draw how much of the variance of the metric each hyperparameter explains."""
    found = stats.importance(stats.comparable(study), study.facts.get("ranges", {}), study.metric)
    if found is None:
        return None
    figure, axes = _axes(height=0.6 + 0.34 * len(found))
    rows = found.iloc[::-1]
    axes.barh(
        _shorts(rows.name.tolist(), LABEL), rows["mean"], xerr=rows.sd, color=BLUE, ecolor=INK, height=0.6
    )
    axes.set(xlabel="share of variance explained (lines: sd over bootstrap samples)")
    axes.set_xlim(left=0)
    _percent(axes.xaxis)
    axes.grid(axis="y", visible=False)
    return figure


def confusion(study: StudyResults) -> Figure | None:
    """Draw the winner's confusion matrix of the test images; None without predictions.

    With more than NUMBERED classes, counts are left out; with more than NAMED, class numbers replace names;
    with more than CELLS, each cell is the maximum of a block, since a single pair would be less than a pixel.
    """
    if study.predictions is None:
        return None
    counts = stats.confusion(study.predictions, len(study.classes))
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(3.6, 0.42 * len(counts) + 1.6) if len(counts) <= NUMBERED else WIDTH
    figure, axes = _axes(width=max(WIDTH, size + 0.6), height=size)
    axes.grid(visible=False)
    axes.set(xlabel="predicted", ylabel="true class")
    if len(counts) > NAMED:
        cells = stats.largest_of_blocks(share, CELLS)
        width = math.ceil(len(counts) / CELLS)
        edges = (-0.5, len(cells) * width - 0.5)
        image = axes.imshow(cells, cmap="Blues", norm=PowerNorm(0.5, 0, 1), extent=(*edges, *edges[::-1]))
        axes.set(xlim=(-0.5, len(counts) - 0.5), ylim=(len(counts) - 0.5, -0.5))
        across = "" if width == 1 else f" (largest of {width} × {width} cells)"
        bar = figure.colorbar(image, label=f"share of the true class{across}", shrink=0.6)
        _percent(bar.ax.yaxis)
        axes.set(xlabel="predicted, by number", ylabel="true class, by number")
        return figure
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts) if len(counts) <= NUMBERED else ():
        text, dark = f"{counts[row, column]}", share[row, column] > 0.5
        look: Any = {"ha": "center", "va": "center", "color": "#ffffff" if dark else "#202124"}
        axes.text(column, row, text, fontsize=8 if len(text) < 5 else 6, **look)
    names, letters = _shorts(study.classes), 10 if len(counts) <= NUMBERED else 6
    axes.set_xticks(range(len(names)), names, fontsize=letters, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names, fontsize=letters)
    return figure


def confused_pairs(study: StudyResults) -> Figure | None:
    """Draw the most frequent confusions, where a matrix has too many classes to show their counts."""
    if study.predictions is None or len(study.classes) <= NUMBERED:
        return None
    pairs = stats.confused_pairs(stats.confusion(study.predictions, len(study.classes))).head(WORST)
    if pairs.empty:
        return None
    figure, axes = _axes(height=0.8 + 0.24 * len(pairs))
    names = _shorts(study.classes, 24)
    labels = [f"{names[k]} → {names[n]}" for k, n in zip(pairs.label, pairs.predicted, strict=True)]
    bars = axes.barh(range(len(pairs)), pairs.images, color=BLUE, height=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", color=INK, padding=2, fontsize=8)
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="test images (true class → predicted)")
    _whole(axes.xaxis)
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    return figure


def class_accuracy(study: StudyResults) -> Figure | None:
    """Draw the accuracy of each class, with its interval; None without predictions.

    With more than NAMED classes, show the distribution and the WORST least accurate ones.
    """
    if study.predictions is None:
        return None
    table = stats.class_accuracy(stats.confusion(study.predictions, len(study.classes)))
    table = table.assign(name=_shorts(study.classes))
    if len(table) <= NAMED:
        figure, axes = _axes(height=0.8 + 0.28 * len(table))
    else:
        table = table.dropna(subset="accuracy").sort_values("accuracy", kind="stable")
        heights = (2.4, 0.4 + 0.28 * WORST)
        figure, (whole, axes) = _axes(2, 1, height=sum(heights), height_ratios=heights)
        whole.ecdf(table.accuracy, color=BLUE)
        whole.set(xlabel=f"accuracy of {counted(len(table), 'class', 'classes')}", ylabel="classes up to it")
        _percent(whole.xaxis, whole.yaxis)
        table = table.head(WORST)
        axes.set_title(f"the {len(table)} classes with the lowest accuracy", loc="left")
    error = np.abs(np.vstack([table.accuracy - table.low, table.high - table.accuracy]))
    axes.errorbar(
        table.accuracy, range(len(table)), xerr=error, fmt="o", color=BLUE, ecolor=GREY, markersize=4
    )
    axes.set_yticks(range(len(table)), table.name)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set(xlabel="accuracy on test images (lines: Wilson's 95 % interval)")
    _percent(axes.xaxis)
    return figure


def _means(study: StudyResults) -> pd.Series:
    assert study.lr_curve is not None
    return study.lr_curve["mean"].dropna()


def lr_curves(studies: list[StudyResults]) -> Figure | None:
    """Draw the metric against lr of every learning-rate study that has it; diverged values are crosses."""
    studies = [study for study in studies if study.lr_curve is not None]
    studies = [study for study in studies if study.metric == studies[0].metric]
    if not studies:
        return None
    figure, axes = _axes()
    metric = studies[0].metric
    means = [float(mean) for study in studies for mean in _means(study)]
    worst = min(means, key=metric.score, default=math.nan)
    for k, study in enumerate(studies):
        curve, colour, marker = study.lr_curve, SERIES[k % len(SERIES)], MARKERS[(k + k // 5) % 5]
        assert curve is not None
        shown, label = curve.dropna(subset="mean"), f"{_label(study)} ({counted(curve.seeds.max(), 'seed')})"
        axes.fill_between(shown.lr, shown.low, shown.high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(shown.lr, shown["mean"], color=colour, marker=marker, markersize=4, label=label)
        lost = curve[curve.verdict == "diverged"]
        axes.plot(lost.lr, [worst] * len(lost), "x", color=colour)
    axes.set_xscale("log")
    axes.set(xlabel="lr (bands: 95 % interval over seeds; crosses: diverged)", ylabel=metric.name)
    if metric.bounds:
        _percent(axes.yaxis)
    _legend_below(figure, axes)
    return figure


def accuracy_against_seconds(studies: list[StudyResults]) -> Figure | None:
    """Draw each study's test accuracy against its time.

    Of many studies, only those on the front are named: no other is both faster and better.
    """
    tests = [(study, study.test_figures) for study in studies if study.test_figures]
    if not tests:
        return None
    figure, axes = _axes()
    points = [(max(study.facts["seconds"], 1), test["mean"]) for study, test in tests]
    for k, ((study, test), (seconds, mean)) in enumerate(zip(tests, points, strict=True)):
        colour, marker = SERIES[k % len(SERIES)], MARKERS[k // len(SERIES) % 5]
        axes.errorbar(seconds, mean, yerr=test["sd"], fmt=marker, color=colour, markersize=5)
        if len(tests) <= WORST or not any(s < seconds and m > mean for s, m in points):
            place: Any = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(_short(study.facts["space"], 30), (seconds, mean), **place)
    axes.margins(x=0.2, y=0.12)
    _log_x(axes)
    axes.set(xlabel="seconds of the whole study (lines: sd over fresh seeds)", ylabel="test accuracy")
    _percent(axes.yaxis)
    return figure


def _axes(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = HEIGHT, **others: Any
) -> Any:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **others)


def _percent(*axis: Axis) -> None:
    for each in axis:
        each.set_major_formatter(PercentFormatter(1))


def _value_axis(axes: Axes, metric: Metric, seen: stats.Span) -> None:
    """Give the y axis ticks as the metric's values are written, and a line before those at the edge."""
    if metric.bounds:
        _percent(axes.yaxis)
    elif seen.log:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    if seen.beyond:
        axes.axhline(seen.border, color=GREY, linewidth=0.8, linestyle=":")


def _note(axes: Axes, seen: stats.Span) -> None:
    """Say how many values are drawn at the edge."""
    if seen.beyond:
        side = "below" if seen.edge < seen.low else "above"
        text = f"{counted(seen.beyond, 'value')} far {side}, drawn beyond the dotted line"
        axes.set_title(text, loc="right", fontsize=8)


def _whole(axis: Axis) -> None:
    """Give an axis ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))


def _alpha(count: int) -> float:
    """Return the opacity of each of many points: density shows, and a single point stays visible."""
    return max(0.15, min(1.0, MANY / count))


def _log_x(axes: Axes) -> None:
    """Make the x axis logarithmic, with ticks labelled in full: 500, 1,000, 2,000."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low >= 10:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.xaxis.set_minor_formatter("")


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    widths = [0.5 + 0.085 * len(label) for label in labels]  # inches
    columns = len(labels) if sum(widths) < WIDTH else max(1, int(WIDTH / max(widths)))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(labels) / columns) - 1))
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _kind(status: str) -> str:
    if status in LOST:
        return "diverged or failed"
    return "all epochs" if status == "done" else "pruned"


def _against(axes: Axes, values: pd.Series, heights: np.ndarray, described: Range, good: np.ndarray) -> None:
    many = len(values) > MANY
    if choices := _choices(values, described):
        spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(values))
        x = _indices(choices, values) + spread
        shown = range(0, len(choices), math.ceil(len(choices) / CHOICES))
        names = [_short(str(choices[k]), 12) for k in shown]
        crowded = sum(map(len, names)) > 24
        axes.set_xticks(shown, names, fontsize=8, rotation=30 * crowded, ha="right" if crowded else "center")
        axes.set_xlim(-0.5, len(choices) - 0.5)
    else:
        x = values.to_numpy()
        if described is not None and described["log"]:
            axes.set_xscale("log")
    for chosen, marker, colour, size in ((~good, ".", GREY, 5), (good, "D", BLUE, 4)):
        look: Any = {"color": colour, "markersize": size, "alpha": _alpha(len(values)), "rasterized": many}
        axes.plot(x[chosen], heights[chosen], marker, **look)
    axes.set_xlabel(_short(str(values.name), LABEL))


def _choices(values: pd.Series, described: Range) -> list[Any]:
    """Return a list's choices; none of a continuous range."""
    if described is None:
        return sorted(values.astype(str).unique())
    return described.get("values", [])


def _indices(choices: list[Any], values: pd.Series) -> np.ndarray:
    """Return which choice each value is."""
    codes, kinds = pd.factorize(values, use_na_sentinel=False)
    return np.array([stats.choice_index(choices, kind) for kind in kinds])[codes]


def _places(values: pd.Series, described: Range) -> tuple[np.ndarray, Ticks]:
    """Return each value's height on its axis, 0 to 1, and the axis' ticks as (height, text)."""
    if choices := _choices(values, described):
        step = 1 / max(len(choices) - 1, 1)
        shown = range(0, len(choices), math.ceil(len(choices) / CHOICES))
        return _indices(choices, values) * step, [(k * step, _short(str(choices[k]), 12)) for k in shown]
    assert described is not None
    low, high = described["low"], described["high"]
    ticks = [(0.0, number(float(low))), (1.0, number(float(high)))]
    if described["log"]:
        return np.asarray(np.log(values / low) / math.log(high / low)), ticks
    return np.asarray((values - low) / (high - low)), ticks


def _short(name: str, most: int = 18) -> str:
    """Return a name that fits a tick, in characters that the current fonts can draw."""
    families = mpl.rcParams["font.family"]
    name = "".join(
        c if any(_drawn_by(family, c) for family in families) else c.encode("unicode_escape").decode()
        for c in printable(name)
    )
    short = name if len(name) <= most else f"{name[: most - 1]}…"
    return short.replace("$", r"\$")  # or matplotlib reads mathematics


def _shorts(names: list[str], most: int = 18) -> list[str]:
    """Return names that fit a tick and stay distinct: those that begin alike end in their number."""
    shorts = [_short(name, most) for name in names]
    twice = {short for short, times in Counter(shorts).items() if times > 1}
    return [
        f"{_short(name, most - 2 - len(str(k)))} #{k}" if short in twice else short
        for k, (name, short) in enumerate(zip(names, shorts, strict=True))
    ]


def _label(study: StudyResults) -> str:
    return _short(f"{study.facts['space']}, {study.facts['data']['name']}", 48)
