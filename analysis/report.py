"""Write a report of a study: one HTML file that needs nothing else, and its figures.

::

    tunefleet report studies/NAME
    tunefleet report studies/NAME --out somewhere --open
    tunefleet report studies/NAME --tensorboard
    tunefleet report studies/NAME --optuna sqlite:///optuna.db

Writes report.html and figures/*.png, *.svg into the study's folder, or into --out. The page works
from disk without a network, in light and dark, on paper and on a phone.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # from a clone: its own folder would make stats, data, … importable
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")
    from tunefleet.__main__ import script

    script("report")

import argparse
import io
import webbrowser
from collections.abc import Callable
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from tunefleet.analysis import plots, to_optuna, to_tensorboard
from tunefleet.analysis.facts import called, comparison, facts
from tunefleet.analysis.load import StudyResults, load
from tunefleet.cli import Parser, clock, counted, exit_code, path_argument, printable, writing
from tunefleet.files import write_whole
from tunefleet.metric import ACCURACY

SECTIONS = (
    ("Learning rate", "Everything else fixed, over several seeds.", ["lr_curves"]),
    ("The winner", "Learning curves of the best trial, and of its fresh seeds, if any.", ["winner_curves"]),
    (
        "The search",
        "What was tried, what it cost, and which trials continued.",
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
        "The winner's first fresh seed, on images that were used for no choice.",
        ["confusion", "confused_pairs", "class_accuracy"],
    ),
    ("What it cost", "All of a study: its search and its fresh seeds.", ["accuracy_against_seconds"]),
)
CAPTIONS = {  # {metric} is the study's
    "winner_curves": "Loss and accuracy of the winner. Fresh seeds, where it has any, train on the "
    "validation images, too, and have no validation curve.",
    "all_curves": "{metric} of every trial.",
    "best_so_far": "Best {metric} found, against what it had cost.",
    "rung_survival": "Trials that reached each epoch at which trials are compared, and the last.",
    "hyperparameters": "{metric} at the first rung; listed values are spread sideways to be seen.",
    "parallel_coordinates": "Each line is a trial.",
    "importance": "fANOVA importance (optuna) for {metric} at the first rung.",
    "confusion": "Test images by true and predicted class; colour: their share of the true class.",
    "confused_pairs": "The most frequent confusions of test images.",
    "class_accuracy": "Test accuracy of each class, with its interval.",
    "accuracy_against_seconds": "Test accuracy of each study against the time it took.",
    "lr_curves": "Means over the seeds against the learning rate.",
}
OWN_WINNER = "The winner, by epoch; grey: its fresh seeds, if any."  # of an own training
RANKED = (
    "fANOVA importance (optuna) for the rank of {metric} at the first rung."  # of a metric without bounds
)
OF_SEVERAL = ("accuracy_against_seconds", "lr_curves")  # figures that compare studies


def figures(study: StudyResults) -> dict[str, Figure]:
    """Return every figure that the study has the data for, by name."""
    drawn = {"lr_curves": plots.lr_curves([study])}
    if not study.epochs.empty:
        drawn |= {name: getattr(plots, name)(study) for name in CAPTIONS if name not in OF_SEVERAL}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def captions(study: StudyResults) -> dict[str, str]:
    """Return what is below each figure."""
    metric, texts = called(study.metric), dict(CAPTIONS)
    if not study.trains_images:
        texts["winner_curves"] = OWN_WINNER
    elif study.metric.name not in ("val_loss", "val_accuracy"):
        texts["winner_curves"] = texts["winner_curves"].replace(" and accuracy", f", accuracy and {metric}")
    if not study.metric.bounds:
        texts["importance"] = RANKED
    capital = metric.capitalize() if study.metric == ACCURACY else metric
    return {
        name: text.replace("{metric}", capital if text.startswith("{") else metric)
        for name, text in texts.items()
    }


def write(studies: list[StudyResults], out: Path) -> Path:
    """Write report.html and figures/ of one study, or of several compared; return the page's path.

    Raises:
        OSError: They cannot be written.
    """
    texts = []
    for study in studies:
        texts += [study.facts["space"], study.facts["data"]["name"], *study.classes]
        texts += [study.metric.name, *study.hyperparameters]
        for described in study.facts.get("ranges", {}).values():
            texts += map(str, described.get("values", []))
    with mpl.rc_context(plots.style(texts)):
        if len(studies) == 1:
            return _write(facts(studies[0]), figures(studies[0]), captions(studies[0]), out)
        compared = {name: getattr(plots, name)(studies) for name in OF_SEVERAL}
        shown = {name: figure for name, figure in compared.items() if figure is not None}
        return _write(comparison(studies), shown, CAPTIONS, out)


def _write(content: dict[str, Any], drawn: dict[str, Figure], captions: dict[str, str], out: Path) -> Path:
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    inline = {}
    for name, figure in drawn.items():
        with mpl.rc_context({"svg.hashsalt": name}):
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
        (folder / f"{name}.svg").write_text(buffer.getvalue(), encoding="utf-8")
        inline[name] = _themed(buffer.getvalue())
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        content, figures=inline, sections=SECTIONS, captions=captions
    )
    write_whole(out / "report.html", page.encode())
    return out / "report.html"


def _themed(svg: str) -> Markup:
    """Return an SVG file's drawing with the page's colours in place of the marker colours."""
    drawing = svg[svg.index("<svg") :]
    return Markup(drawing.replace(plots.INK, "currentColor").replace(plots.GRID, "var(--rule)"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(prog="tunefleet report", description=__doc__.split("\n")[0])
    parser.add_argument("study", nargs="+", help="a study's folder or URL; several are compared")
    parser.add_argument(
        "--out",
        type=path_argument,
        help="where to write (default: into the study's folder; of several, report/)",
    )
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--tensorboard",
        action="store_true",
        help="no page: write event files into tensorboard/, for tensorboard --logdir",
    )
    other.add_argument(
        "--optuna",
        metavar="URL",
        help="no page: add the study to a database that optuna-dashboard opens, such as sqlite:///optuna.db",
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    """Write the report and its exports; return the exit code.

    Raises:
        ValueError: It cannot be done.
    """
    studies = [load(study) for study in options.study]
    if options.optuna is not None:
        for study in studies:
            if (trials := len(study.trials)) >= 1000:
                took = clock(to_optuna.TRIAL_SECONDS * trials)
                print(f"adding {counted(trials, 'trial')} takes about {took}", file=sys.stderr)
            verb = "added to" if to_optuna.write(study, options.optuna) else "is already in"
            print(printable(f"{study.folder}: {verb} {to_optuna.shown(options.optuna)}"))
        return 0
    out = options.out or (studies[0].folder if len(studies) == 1 else Path("report"))
    with writing(out):
        if options.tensorboard:
            for file in _each(studies, options.out, to_tensorboard.write):
                print(printable(str(file)))
            return 0
        page = write(studies, out)
    print(printable(str(page)))
    if options.open:
        webbrowser.open(page.absolute().as_uri())
    return 0


def _each(
    studies: list[StudyResults], out: Path | None, write_one: Callable[[StudyResults, Path], Path]
) -> list[Path]:
    """Call a writer for each study: into its folder, or out, or a folder of out where there are several."""
    if out is None:
        return [write_one(study, study.folder) for study in studies]
    if len(studies) == 1:
        return [write_one(studies[0], out)]
    if len({study.name for study in studies}) < len(studies):
        raise ValueError("several studies have one name, so one would replace the other; give each its --out")
    return [write_one(study, out / study.name) for study in studies]
