"""Write an example of a space in a file of your own.

::

    tunefleet new mine.py
"""

from __future__ import annotations

from pathlib import Path

from tunefleet.cli import Parser, exit_code, path_argument, printable, shell, shown

EXAMPLE = """\
from ray import tune
from torch import nn

from tunefleet import Space


def build(num_classes, image_shape, width=128, dropout=0.0):  # any nn.Module that returns logits
    channels, height, wide = image_shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * wide, width),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(width, num_classes),
    )


space = Space(
    build,
    {  # what is searched: arguments of build, and the training's own (tunefleet train --help lists them)
        "lr": tune.loguniform(1e-4, 1e-1),
        "width": tune.choice([64, 256, 1024]),
        "dropout": tune.uniform(0.0, 0.5),
    },
    first={"lr": 0.01, "width": 256, "dropout": 0.1},  # the first trial; may be left out
    fixed={"momentum": 0.9, "schedule": "cosine"},  # what every trial has
    epochs=27,
)

if __name__ == "__main__":  # the same from Python; the options of the command are keywords
    study = space.search(data="digits", trials=8)
    print(study.best, study.test_accuracy, study.folder)
"""


def new(file: Path) -> int:
    """Write the example; return the exit code.

    Raises:
        ValueError: There is such a file, or it is no Python file.
    """
    if file.suffix != ".py":
        raise ValueError(f"{file} is no Python file; give a name such as mine.py")
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(EXAMPLE)
    except FileExistsError:
        raise ValueError(f"{file} is there already; give another name") from None
    print(printable(f"{shown(file)} written; try: {shell('tunefleet', 'search', shown(file))} --data digits"))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(prog="tunefleet new", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=path_argument, help="to write, such as mine.py")
    given = parser.parse_args(arguments)
    return exit_code(lambda: new(given.file))
