"""How do the architectures compare? Study folders -> one Markdown table, with the command of each row.

::

    tunefleet results studies/* > RESULTS.md

An architecture without a study here has the row "not run". Accuracies are of the test images,
measured by a study's fresh seeds (README.md, "Words"); a training of your own has its metric there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tunefleet.analysis.text import mean_and_spread, number, words
from tunefleet.cli import Parser, exit_code, path_argument, printable, shell
from tunefleet.metric import Metric
from tunefleet.study import read_study, tested

# The course report's, of CIFAR-10's test images; its ResNets began with ImageNet weights. A study.json has
# its space's own.
PUBLISHED = {
    "softmax": 0.4002,
    "twolayernn": 0.5102,
    "convnet": 0.5836,
    "mymodel": 0.7600,
    "resnet_softmax": 0.5835,
    "resnet_twolayernn": 0.5858,
    "resnet_conv": 0.6820,
    "resnet_mymodel": 0.7917,
    "resnet_softmax_updatable": 0.8296,
    "resnet_twolayernn_updatable": 0.8075,
    "resnet_conv_updatable": 0.8091,
    "resnet_mymodel_updatable": 0.8007,
    "resnet_finetune": 0.8312,
}
SHOWN = (
    *("optimizer", "lr", "weight_decay", "momentum", "batch_size", "schedule", "augment"),
    *("label_smoothing", "warmup_epochs", "backbone", "hidden", "kernel_size", "image_size"),
)
HIDDEN = {  # not used, or CIFAR-10's or the published network's own
    "backbone": "resnet18",
    "optimizer": "sgd",
    "augment": "none",
    "momentum": 0.0,
    "label_smoothing": 0.0,
    "warmup_epochs": 0.0,
    "image_size": 32,
}
WEIGHTS = {  # of backbones, by --weights or a file's name
    "imagenet": "ImageNet",
    "resnet18-imagenet.pth": "ImageNet (CNTK)",
    "resnet18-tinyimagenet.pth": "Tiny ImageNet",
    "none": "random",
}
PIPE = "\\|"  # inside a cell
TESTED = "test accuracy ± sd (seeds)"
COLUMNS = (
    *("architecture", "published", TESTED, "trials", "epochs (all)", "weights"),
    *("best hyperparameters", "minutes", "machine", "commit"),
)


def row(study: dict[str, Any]) -> list[str]:
    """Return the cells of one study, in the order of COLUMNS."""
    best, options = study["best"], study["options"]
    config = best["config"] if best else {}
    weights = Path(str(config.get("weights", "none"))).name
    name, built_in = study["space"], is_built_in(study)
    published = study.get("published", PUBLISHED.get(name) if built_in else None)
    if built_in and config.get("backbone", HIDDEN["backbone"]) != HIDDEN["backbone"]:
        published = None
    has_backbone = weights != "none" or (built_in and name.startswith("resnet"))
    return [
        name,
        f"{100 * published:.2f}" if published else "",
        _over_seeds(study["final"]),
        str(study["trials"]),
        f"{options['epochs']} ({study['epochs_spent']})",
        WEIGHTS.get(weights, weights) if has_backbone else "",
        ", ".join(
            f"{name} {number(config[name], 3)}"
            for name in dict.fromkeys((*SHOWN, *study.get("ranges", {})))
            if config.get(name) not in (None, HIDDEN.get(name))
        ),
        number(study["seconds"] / 60, 2),
        str(study.get("machine") or ""),
        study["commit"] or "",
    ]


def is_built_in(study: dict[str, Any]) -> bool:
    """Return whether a study is of a space of this package, and not of one in a person's file."""
    return study.get("source") is None


def _over_seeds(final: dict[str, Any] | None) -> str:
    """Return the test accuracy; of a training that has none, what its fresh seeds gave, by name."""
    figures = tested(final)
    if not final or not figures:
        return "no seed was tested"
    name = "test_accuracy" if "test_accuracy" in figures else next(iter(figures))
    mean, spread, _ = mean_and_spread(figures[name], fraction=Metric(name).bounds is not None)
    diverged = f", {len(final['diverged'])} diverged" if final["diverged"] else ""
    called = "" if name == "test_accuracy" else f"{name} "
    return f"{called}**{mean}**{spread} ({len(final['seeds'])}{diverged})"


def table(studies: list[dict[str, Any]]) -> str:
    """Return the Markdown table: a row per study in PUBLISHED's order, "not run" where there is none.

    Studies of other spaces are last.
    """
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for name, published in PUBLISHED.items():
        found = [row(study) for study in studies if is_built_in(study) and study["space"] == name]
        rows += found or [[name, f"{100 * published:.2f}", "not run"]]
    rows += [row(study) for study in studies if not (is_built_in(study) and study["space"] in PUBLISHED)]
    return "\n".join(f"| {' | '.join(cell.replace('|', PIPE) for cell in cells)} |" for cells in rows)


def command(study: dict[str, Any]) -> str:
    """Return the command that makes a study, without its folder."""
    first, *rest = words(study["command"])
    kept, given = [first] if first in ("tunefleet", "python") else ["python", first], iter(rest)
    for word in given:
        if word == "--study-dir":
            next(given, None)
        elif not word.startswith("--study-dir="):
            kept.append(word)
    return shell(*kept)


def main(arguments: list[str] | None = None) -> int:
    """Print the table of the studies named on the command line, and their commands."""
    parser = Parser(prog="tunefleet results", description=__doc__.split("\n")[0])
    parser.add_argument("study", nargs="+", type=path_argument, help="a study's folder; each becomes a row")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _print([read_study(folder) for folder in options.study]))


def _print(found: list[dict[str, Any]]) -> int:
    studies = [printable(study) | {"command": study["command"]} for study in found]  # shell quotes its words
    searches = [study for study in studies if not study["options"].get("points")]  # no learning-rate studies
    print(table(searches), "\n```sh", *(command(study) for study in searches), "```", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
