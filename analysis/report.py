"""What came out of a study, fit to show? One HTML file that needs nothing else, and its figures.

::

    python analysis/report.py studies/NAME
    python analysis/report.py studies/NAME --out somewhere --open

Writes report.html and figures/*.png, *.svg into the study's folder, or into --out. The page works
from disk without a network, in light and dark, on paper and on a phone.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype
from PIL import Image

from analysis import plots, results, stats
from analysis.load import Study, load

SECTIONS = (
    ("The winner", "How the best trial and its retrained seeds learnt.", ["winner_curves"]),
    (
        "The search",
        "What was tried, what it cost, and who was let go on.",
        ["all_curves", "best_so_far", "rung_survival"],
    ),
    (
        "Hyperparameters",
        "All trials are compared at the first rung, the last epoch that each of them saw; diamonds and "
        "coloured lines are the best quarter there.",
        ["hyperparameters", "parallel_coordinates", "importance"],
    ),
    (
        "On the test images",
        "The winner's first fresh seed, on images that no choice has seen.",
        ["confusion", "class_accuracy"],
    ),
    ("What it cost", "All of a study: its search and its fresh seeds.", ["accuracy_against_seconds"]),
    ("Learning rate", "Everything else fixed, over several seeds.", ["lr_curves"]),
)
CAPTIONS = {
    "winner_curves": "Loss and accuracy of the winner. Its fresh seeds train on the validation images, "
    "too, so they have no validation curve.",
    "all_curves": "Validation accuracy of every trial.",
    "best_so_far": "Best validation accuracy found, against what it had cost.",
    "rung_survival": "Trials that reached each epoch at which trials are compared, and the last.",
    "hyperparameters": "Validation accuracy at the first rung; listed values are spread sideways to be seen.",
    "parallel_coordinates": "Each line is a trial.",
    "importance": "fANOVA importance (optuna) for validation accuracy at the first rung.",
    "confusion": "Test images by true and predicted class.",
    "class_accuracy": "Test accuracy of each class.",
    "accuracy_against_seconds": "Test accuracy of each study against the time it took.",
    "lr_curves": "Validation accuracy against the learning rate.",
}
GROUPS = {
    "Plain networks": "Trained from scratch on pixels; percent of the test images.",
    "Frozen ResNet-18": "The head is trained, the backbone is not.",
    "Updatable ResNet-18": "Backbone and head are trained from the backbone's weights.",
}
EMPTY: dict[str, Any] = {  # what a page may leave out
    **dict.fromkeys(("subtitle", "best_text", "weights_text", "footer"), ""),
    **dict.fromkeys(("cards", "best", "tables", "edges", "weights", "mistakes", "columns", "rows"), ()),
    "sections": SECTIONS,
    "captions": CAPTIONS,
}
SHOWN_WEIGHTS = 64  # filters


def figures(study: Study) -> dict[str, Figure]:
    """Returns every figure that the study has the data for, by name."""
    drawers: dict[str, Callable[[Study], Figure | None]] = {
        "all_curves": plots.all_curves,
        "best_so_far": plots.best_so_far,
        "rung_survival": plots.rung_survival,
        "hyperparameters": plots.hyperparameters,
        "parallel_coordinates": plots.parallel_coordinates,
        "importance": plots.importance,
        "confusion": plots.confusion,
        "class_accuracy": plots.class_accuracy,
        "lr_curves": lambda study: plots.lr_curves([study]),
    }
    if study.epochs.empty:
        drawers = {"lr_curves": drawers["lr_curves"]}
    elif study.facts.get("best"):
        drawers = {"winner_curves": plots.winner_curves, **drawers}
    with mpl.rc_context(plots.STYLE):
        drawn = {name: draw(study) for name, draw in drawers.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write(studies: list[Study], out: Path) -> Path:
    """Writes report.html and figures/ of one study, or of several compared; returns the page's path."""
    if len(studies) == 1:
        return _write(facts(studies[0]), figures(studies[0]), out)
    with mpl.rc_context(plots.STYLE):
        drawn = {
            "accuracy_against_seconds": plots.accuracy_against_seconds(studies),
            "lr_curves": plots.lr_curves(studies),
        }
    return _write(comparison(studies), {name: f for name, f in drawn.items() if f is not None}, out)


def _write(told: dict[str, Any], drawn: dict[str, Figure], out: Path) -> Path:
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    inline = {}
    for name, figure in drawn.items():
        with mpl.rc_context(plots.STYLE | {"svg.hashsalt": name}):
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
        (folder / f"{name}.svg").write_text(buffer.getvalue())
        inline[name] = _themed(buffer.getvalue())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(EMPTY | told | {"figures": inline})
    file = out / "report.html"
    temporary = file.with_name("report.html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(file)
    return file


def facts(study: Study) -> dict[str, Any]:
    """Returns what the page says in words, tables and images."""
    told, best = study.facts, study.facts.get("best")
    config = best["config"] if best else {}
    return {
        "title": f"{told['space']} on {told['data']['name']}",
        "subtitle": f"A study of {told['trials']} trials, status {told['status']}.",
        "cards": _cards(study),
        "best": [(name, _plain(config[name])) for name in study.hyperparameters if name in config],
        "best_text": f"Trial {best['trial_id']}, chosen by its validation accuracy of "
        f"{best['val_accuracy']:.4f} on {told['validation_count']:,} images."
        if best
        else "",
        "edges": _edges(study),
        "weights": (weights := first_layer_images(study.first_layer)),
        "weights_text": "Of the winner's first seed; each image has its own scale"
        + (
            f", {len(weights)} of {len(study.first_layer)} shown."
            if study.first_layer is not None and len(weights) < len(study.first_layer)
            else "."
        ),
        "mistakes": _mistakes(study),
        "columns": [(str(name), is_numeric_dtype(study.trials[name])) for name in study.trials.columns],
        "rows": [[_plain(value) for value in row] for row in study.trials.itertuples(index=False)],
        "footer": f"Code {told['commit']}, {', '.join(f'{k} {v}' for k, v in told['versions'].items())}; "
        f"seed {told['seed']}, data {told['data_sha256'][:12]}, split {told['split_sha256'][:12]}. "
        f"Command: {told['command']}",
    }


def comparison(studies: list[Study]) -> dict[str, Any]:
    """Returns what the page of several studies says: a table for each group of architectures."""
    searches = [study for study in studies if study.lr_curve is None]
    groups: dict[str, list[list[str]]] = {name: [] for name in GROUPS}
    for study in searches:
        row = [cell.replace("**", "") for cell in results.row(study.facts)]
        groups[_group(study.facts["space"])].append(row)
    names = sorted({study.facts["data"]["name"] for study in studies})
    return {
        "title": f"{len(studies)} studies on {', '.join(names)}",
        "subtitle": "Each architecture's best, retrained over fresh seeds, beside what was published.",
        "tables": [(name, GROUPS[name], results.COLUMNS, rows) for name, rows in groups.items() if rows],
    }


def first_layer_images(weights: np.ndarray | None) -> list[str]:
    """Returns filters as images, for layers that see pixels; none for others.

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
        low, high = kernel.min(), kernel.max()
        images.append(_png((255 * (kernel - low) / max(high - low, 1e-12)).astype(np.uint8)))
    return images


def _group(space: str) -> str:
    plain, frozen, updatable = GROUPS
    if not space.startswith("resnet"):
        return plain
    return updatable if space.endswith(("_updatable", "_finetune")) else frozen


def _cards(study: Study) -> list[tuple[str, str]]:
    cards, told = [], study.facts
    best, final, test = told.get("best"), told.get("final"), study.test_accuracy
    if final and test:
        seeds = len(final["seeds"])
        diverged = f", {len(final['diverged'])} of them diverged" if final.get("diverged") else ""
        spread = "" if test["sd"] is None else f" ± {100 * test['sd']:.2f}"
        cards.append(
            (
                f"test accuracy, mean ± sd of {seeds} fresh seeds{diverged}",
                f"{100 * test['mean']:.2f}{spread} %",
            )
        )
        if test["interval95"]:
            low, high = (100 * end for end in test["interval95"])
            cards.append(("95 % interval of that mean", f"{low:.2f} to {high:.2f} %"))
    if best:
        cards.append(("best validation accuracy", f"{100 * best['val_accuracy']:.2f} %"))
    spent, unpruned = told["epochs_spent"], told["epochs_unpruned"]
    counts = ", ".join(f"{count} {status}" for status, count in told["statuses"].items())
    cards += [
        (f"trials: {counts}", str(told["trials"])),
        (f"epochs spent, of {unpruned} without pruning", str(spent)),
        ("search and fresh seeds together", _clock(told["seconds"])),
    ]
    if told.get("machine"):
        cards.append(("machine", told["machine"]))
    return cards


def _edges(study: Study) -> list[tuple[str, str, str]]:
    table = stats.comparable(study)
    rows = []
    for name, described in study.facts.get("ranges", {}).items():
        if "low" in described and len(table):
            values = stats.top(table)[name].astype(float)
            share = stats.boundary_share(values, described["low"], described["high"], log=described["log"])
            rows.append((name, f"{100 * share['low']:.0f} %", f"{100 * share['high']:.0f} %"))
    return rows


def _mistakes(study: Study) -> list[tuple[str, str, str, str]]:
    if study.misclassified is None or study.predictions is None:
        return []
    index, images = study.misclassified
    rows = study.predictions.set_index("index").loc[index]
    truth, said = ([study.classes[label] for label in rows[name]] for name in ("label", "predicted"))
    sure = [f"{100 * confidence:.0f} %" for confidence in rows.confidence]
    return list(zip(map(_png, images), truth, said, sure, strict=True))


def _png(image: np.ndarray) -> str:
    """Returns uint8 ``(3, H, W)`` as a data address."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _themed(svg: str) -> Markup:
    """Returns an SVG file's drawing with the page's colours in place of the marker colours."""
    drawing = svg[svg.index("<svg") :]
    return Markup(drawing.replace(plots.INK, "currentColor").replace(plots.GRID, "var(--rule)"))


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python analysis/report.py", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, nargs="+", help="a study's folder; several are compared")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: into the study's folder; of several, report/)"
    )
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    options = parser.parse_args(arguments)
    try:
        studies = [load(folder) for folder in options.study]
        alone = options.study[0] if len(studies) == 1 else Path("report")
        page = write(studies, options.out or alone)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page)
    if options.open:
        webbrowser.open(page.absolute().as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())
