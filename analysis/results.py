"""How do the architectures compare? Study folders -> one Markdown table, with the command of each row.

::

    python -m analysis.results studies/* > RESULTS.md

An architecture without a study here has the row "not run". Accuracies are of the test images,
measured by a study's fresh seeds (README.md, "Words").
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

# The course report's, of CIFAR-10's test images; its ResNets began with ImageNet weights
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
TOLD = (
    *("optimizer", "lr", "weight_decay", "momentum", "batch_size", "schedule", "augment"),
    *("label_smoothing", "warmup_epochs", "hidden", "kernel_size", "image_size"),
)
UNTOLD = {  # not used, or CIFAR-10's own
    "optimizer": "sgd",
    "augment": "none",
    "momentum": 0.0,
    "label_smoothing": 0.0,
    "warmup_epochs": 0.0,
    "image_size": 32,
}
WEIGHTS = {  # of backbones, by --weights or a file's name
    "imagenet": "ImageNet (torchvision)",
    "resnet18-imagenet.pth": "ImageNet (CNTK)",
    "resnet18-tinyimagenet.pth": "Tiny ImageNet",
    "none": "random",
}
COLUMNS = (
    *("architecture", "published", "test accuracy ± sd (seeds)", "trials", "epochs (all)", "weights"),
    *("best hyperparameters", "minutes", "machine", "commit"),
)


def read(folder: Path) -> dict[str, Any]:
    """Returns a study's study.json.

    Raises:
        ValueError: The folder holds none.
    """
    try:
        return json.loads((folder / "study.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no study that can be read ({error})") from None


def row(study: dict[str, Any]) -> list[str]:
    """Returns the cells of one study, in the order of COLUMNS."""
    final, best, options = study["final"], study["best"], study["options"]
    accuracy = "no seed was tested"
    if final and final["test_accuracy"]:
        test, count = final["test_accuracy"], len(final["seeds"])
        spread = "" if test["sd"] is None else f" ± {100 * test['sd']:.2f}"
        diverged = f", {len(final['diverged'])} diverged" if final["diverged"] else ""
        accuracy = f"**{100 * test['mean']:.2f}**{spread} ({count}{diverged})"
    config = best["config"] if best else {}
    backbone = Path(config.get("weights", "none")).name
    return [
        study["space"],
        f"{100 * PUBLISHED[study['space']]:.2f}" if study["space"] in PUBLISHED else "",
        accuracy,
        str(study["trials"]),
        f"{options['epochs']} ({study['epochs_spent']})",
        WEIGHTS.get(backbone, backbone) if study["space"].startswith("resnet") else "",
        ", ".join(
            f"{name} {_short(config[name])}"
            for name in TOLD
            if config.get(name) not in (None, UNTOLD.get(name))
        ),
        f"{study['seconds'] / 60:.0f}",
        study.get("machine", ""),
        str(study["commit"]),
    ]


def table(studies: list[dict[str, Any]]) -> str:
    """Returns the Markdown table: a row per study in PUBLISHED's order, "not run" where there is none.

    Studies of other spaces stand at the end.
    """
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for name, published in PUBLISHED.items():
        rows = [row(study) for study in studies if study["space"] == name]
        lines += [" | ".join(cells) for cells in rows or [[name, f"{100 * published:.2f}", "not run"]]]
    lines += [" | ".join(row(study)) for study in studies if study["space"] not in PUBLISHED]
    return "\n".join(f"| {line} |" for line in lines)


def command(study: dict[str, Any]) -> str:
    """Returns the command that makes a study, without its folder."""
    words = shlex.split(study["command"])
    if "--study-dir" in words:
        at = words.index("--study-dir")
        del words[at : at + 2]
    return shlex.join(["python", *words])


def main(arguments: list[str] | None = None) -> int:
    """Prints the table of the studies named on the command line, and their commands."""
    folders = sys.argv[1:] if arguments is None else arguments
    if not folders:
        print("error: give study folders: python -m analysis.results studies/*", file=sys.stderr)
        return 2
    try:
        studies = [read(Path(folder)) for folder in folders]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    searches = [study for study in studies if not study["options"].get("points")]  # no learning-rate studies
    print(table(searches), "\n```sh", *(command(study) for study in searches), "```", sep="\n")
    return 0


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
