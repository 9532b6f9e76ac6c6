"""Make a report's words, tables and images from a study's tables."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from PIL import Image

from tunefleet.analysis import results, stats
from tunefleet.analysis.load import StudyResults
from tunefleet.analysis.text import listed, mean_and_spread, number, percent, words
from tunefleet.cli import clock, counted, printable, shell
from tunefleet.metric import ACCURACY, Metric
from tunefleet.study import seeds_of, tested, tested_before

GROUPS = {
    "Plain networks": "Trained from scratch on pixels.",
    "Frozen backbones": "The head is trained, the backbone is not.",
    "Updatable backbones": "Backbone and head are trained from the backbone's weights.",
    "Own networks": "Each is that of a Space of your own.",
    "Own trainings": "Each has a metric of its own.",
}
COSTS = "Epochs: of a trial that is not pruned (of all trials together). Minutes: of the whole study."
COMPARED = (
    "Each architecture's best, retrained over fresh seeds: percent of the test images. Published: what the "
    "space states, of the built-in ones the course report's accuracy on CIFAR-10, to be compared with that "
    "of CIFAR-10 images only. " + COSTS
)
UNTESTED = "Validation accuracy; no fresh seeds were tested."
SHOWN_WEIGHTS = 64  # filters
PIXELS = 200  # of an image's longer side: two for each CSS pixel, for high-resolution screens
FIRST_ROWS = 200  # of the trials' table, shown at first, and all that is shown without JavaScript


def facts(study: StudyResults) -> dict[str, Any]:
    """Return the words, tables and images of a study's page."""
    known, best = study.facts, study.facts.get("best")
    config = best["config"] if best else {}
    return {
        "title": title(study) + (", by learning rate" if study.lr_curve is not None else ""),
        "subtitle": f"A study of {counted(known['trials'], 'trial')}{_compared_by(study.metric)}, "
        f"status {known['status']}" + (f", on {known['machine']}." if known.get("machine") else "."),
        "cards": cards(study),
        "metric": printable(study.metric.name),
        "best": [(name, plain(config[name])) for name in study.hyperparameters if name in config],
        "best_text": _best_text(study),
        "edges": _edges(study),
        "weights": (weights := first_layer_images(study.first_layer)),
        "weights_text": "Of the winner's first seed; each image has its own scale"
        + (
            f", {len(weights)} of {len(study.first_layer)} shown."
            if study.first_layer is not None and len(weights) < len(study.first_layer)
            else "."
        ),
        "mistakes": (mistakes := _mistakes(study)),
        "mistakes_text": f"The {counted(len(mistakes), 'mistake')} that the winner's first seed made with "
        "most confidence: true class, predicted class and its probability.",
        **_trials(study),
        "footer": f"Code {known['commit']}, {', '.join(f'{k} {v}' for k, v in known['versions'].items())}; "
        f"seed {known['seed']}"
        + (
            f", data {known['data_sha256'][:12]}, split {known['split_sha256'][:12]}"
            if study.trains_images
            else ""
        )
        + f". Command: {shell(*words(known['command']))}",
    }


def title(study: StudyResults) -> str:
    """Return what was searched, and on which images, if any."""
    space = str(study.facts["space"])
    return f"{space} on {study.facts['data']['name']}" if study.trains_images else space


def called(metric: Metric) -> str:
    """Return what a page's sentences call a metric."""
    return "validation accuracy" if metric == ACCURACY else str(printable(metric.name))


def _compared_by(metric: Metric) -> str:
    better = "more" if metric.mode == "max" else "less"
    return "" if metric == ACCURACY else f" by {called(metric)} ({better} is better)"


def _best_text(study: StudyResults) -> str:
    known, best, metric = study.facts, study.facts.get("best"), study.metric
    if not best:
        return ""
    text = f"Trial {best['trial_id']}, chosen by its {called(metric)} of {number(best[metric.name])}"
    if study.trains_images:
        text += f" on {counted(known['validation_count'], 'image')}"
    elif known["final"] and not known["final"]["test"]:
        text += "; there is no test figure"
    return f"{text}. {tested_before(known)}".rstrip()


def comparison(studies: list[StudyResults]) -> dict[str, Any]:
    """Return the words and tables of several studies' page: a table for each group of architectures."""
    searches = [study for study in studies if study.lr_curve is None]
    groups: dict[str, list[list[str]]] = {name: [] for name in GROUPS}
    for study in searches:
        space, *cells = [cell.replace("**", "") for cell in results.row(study.facts)]
        images = study.facts["data"]["name"] if study.trains_images else ""
        groups[_group(study)].append([space, images, *cells])
    names = sorted({study.facts["data"]["name"] for study in studies if study.trains_images})
    if not all(study.trains_images for study in studies):
        names = []  # not all are on them
    of_images = any(study.trains_images for study in searches)
    subtitle = COMPARED if of_images else COSTS if searches else UNTESTED
    return {
        "title": f"{len(studies)} studies" + (f" on {listed(names)}" if names else ""),
        "subtitle": subtitle,
        "tables": [(name, GROUPS[name], *_filled(name, rows)) for name, rows in groups.items() if rows],
    }


def _filled(group: str, rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and cells of the comparison's columns that have a value in any row."""
    heads = ["architecture", "images", *results.COLUMNS[1:]]
    if group == "Own trainings":
        heads[0], heads[heads.index(results.TESTED)] = "space", "mean ± sd (seeds)"
    kept = [k for k in range(len(heads)) if any(row[k] for row in rows)]
    return [heads[k] for k in kept], [[row[k] for k in kept] for row in rows]


def first_layer_images(weights: np.ndarray | None) -> list[str]:
    """Return filters as images, for layers that see pixels; none for others.

    Args:
        weights: ``(out, 3, k, k)``, or ``(out, 3·H·H)`` of a layer that sees the flattened image.
    """
    if weights is None:
        return []
    if weights.ndim == 2:
        side = math.isqrt(weights.shape[1] // 3)
        if weights.shape[1] != 3 * side * side or side < 8:
            return []
        weights = weights.reshape(-1, 3, side, side)
    if weights.ndim != 4 or weights.shape[1] != 3 or weights.shape[2] < 2:
        return []
    images = []
    for kernel in weights[:SHOWN_WEIGHTS]:
        kernel = np.nan_to_num(kernel)
        low, high = kernel.min(), kernel.max()
        images.append(_png((255 * (kernel - low) / max(high - low, 1e-12)).astype(np.uint8)))
    return images


def _group(study: StudyResults) -> str:
    plain, frozen, updatable, networks, trainings = GROUPS
    space = study.facts["space"]
    if not study.trains_images:
        return trainings
    if not results.is_built_in(study.facts):
        return networks
    if not space.startswith("resnet"):
        return plain
    return updatable if space.endswith(("_updatable", "_finetune")) else frozen


def cards(study: StudyResults) -> list[tuple[str, str]]:
    """Return the numbers at a report's top: what each is, and its value."""
    shown, known = [], study.facts
    best, final, metric = known.get("best"), known.get("final") or {}, study.metric
    for name, test in tested(final).items():
        fraction = Metric(name).bounds is not None
        mean, spread, interval = mean_and_spread(test, fraction=fraction)
        what = "test accuracy" if name == "test_accuracy" else str(printable(name))
        untested = "" if final["test"] else "; there is no test figure"
        text = f"{what}, mean{' ± sd' if spread else ''} of {seeds_of(test, final)}{untested}"
        unit = " %" if fraction else ""
        shown.append((text, f"{mean}{spread}{unit}"))
        if interval:
            shown.append(("95 % interval of that mean", f"{interval}{unit}"))
    if best:
        value = best[metric.name]
        shown.append((f"best {called(metric)}", f"{percent(value, 2)} %" if metric.bounds else number(value)))
    counts = ", ".join(f"{count:,} {status}" for status, count in known["statuses"].items())
    shown += [
        (f"trials: {counts}" if counts else "trials", f"{known['trials']:,}"),
        (f"epochs spent, of {known['epochs_unpruned']:,} without pruning", f"{known['epochs_spent']:,}"),
        ("search and fresh seeds together" if final else "the search", clock(known["seconds"])),
    ]
    return shown


def _edges(study: StudyResults) -> list[tuple[str, str, str]]:
    table = stats.comparable(study)
    rows = []
    for name, described in study.facts.get("ranges", {}).items():
        if "low" in described and len(table):
            values = stats.top(table, study.metric)[name].astype(float)
            share = stats.boundary_share(values, described["low"], described["high"], log=described["log"])
            rows.append((name, f"{percent(share['low'])} %", f"{percent(share['high'])} %"))
    return rows


def _trials(study: StudyResults) -> dict[str, Any]:
    """Return the table of all trials; hyperparameters that all of them share become one line."""
    table = study.trials.drop(columns=study.others)
    outcome = list(table.columns).index("node")
    shared = [
        name
        for name in table.columns[outcome:]
        if name not in study.hyperparameters and table[name].nunique(dropna=False) == 1
    ]
    if len(table):
        first = table.iloc[0]
        same = [f"{name} {plain(first[name])}" for name in shared if plain(first[name])]
        table = table.drop(columns=shared)
    cells = [[plain(value) for value in table[name].tolist()] for name in table.columns]
    rows = [list(row) for row in zip(*cells, strict=True)]
    return {
        "columns": [(str(name), _is_number(table[name])) for name in table.columns],
        "rows": rows,
        "first_rows": rows[:FIRST_ROWS],
        "shared": ", ".join(same) if rows else "",
    }


def _mistakes(study: StudyResults) -> list[tuple[str, str, str, str]]:
    if study.misclassified is None or study.predictions is None:
        return []
    index, images = study.misclassified
    rows = study.predictions.set_index("index").loc[index]
    truth, predicted = ([study.classes[label] for label in rows[name]] for name in ("label", "predicted"))
    sure = [f"{percent(confidence)}\u00a0%" for confidence in rows.confidence]
    return list(zip(map(_png, images), truth, predicted, sure, strict=True))


def _png(image: np.ndarray) -> str:
    """Return uint8 ``(3, H, W)`` as a data address, reduced to what a page shows."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    picture.thumbnail((PIXELS, PIXELS))
    picture.save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _is_number(column: pd.Series) -> bool:
    return is_numeric_dtype(column) and not is_bool_dtype(column)


def plain(value: Any) -> str:
    """Return a value for people: a number rounded, nothing of what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(printable(number(value)))
