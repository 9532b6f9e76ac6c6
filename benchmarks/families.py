"""Which trials are the arms timed on? Families, their committed configurations, and their images.

configurations.json has each architecture's published best and random points of its space, drawn once, so that
results of another year are of the same trials.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tunefleet.models.spaces import SPACES
from tunefleet.trainables.data import load_split
from tunefleet.trainables.preparation import prepare

FILE = Path(__file__).with_name("configurations.json")
# The tutorial has a constant lr and pixels as they are; what only one arm has must not be timed.
FIX = {"schedule": "constant", "warmup_epochs": 0.0, "label_smoothing": 0.0, "augment": "none"}


@dataclass(frozen=True)
class Family:
    """Trials of one architecture, sized for two cores."""

    architecture: str
    trials: int
    epochs: int
    images: int | None  # training images, of which a tenth validates; None: all
    pruning: bool = False  # each arm in its own way; what counts is when a good trial is found
    no_op: bool = False


FAMILIES = {
    "softmax": Family("softmax", trials=16, epochs=5, images=None),
    "twolayernn": Family("twolayernn", trials=16, epochs=3, images=None),
    "convnet": Family("convnet", trials=16, epochs=2, images=3000),
    "mymodel": Family("mymodel", trials=16, epochs=1, images=1800),
    "resnet": Family("resnet_softmax_updatable", trials=16, epochs=1, images=1800),
    "frozen": Family("resnet_softmax", trials=16, epochs=9, images=6000),
    "study": Family("convnet", trials=32, epochs=9, images=1800, pruning=True),
    "no-op": Family("softmax", trials=200, epochs=1, images=1800, no_op=True),
}


def configurations(family: Family, weights: str, repetition: int = 0) -> list[dict[str, Any]]:
    """Return the fields of TrainConfig of each trial of a family.

    Args:
        family: Its trials; more than the committed list has start over at its beginning.
        weights: Of ResNet backbones: imagenet, none or a path.
        repetition: Where arms prune, each has an order of its own, since it matters when a good trial comes.
    """
    drawn = json.loads(FILE.read_text())[family.architecture]
    space = SPACES[family.architecture].fixing(FIX)
    fixed = space.fixed_values(epochs=family.epochs, image_size=32, weights=weights, seed=0)
    listed = [fixed | drawn[trial % len(drawn)] for trial in range(family.trials)]
    if not family.pruning or repetition == 0:
        return listed
    return [listed[k] for k in np.random.default_rng(repetition).permutation(family.trials)]


def subset(data_name: str, data_dir: Path, images: int | None) -> str:
    """Return a folder of some training images, equally many of each class, for all arms to read.

    Args:
        data_name: As ``--data`` takes it.
        data_dir: The cache folder; the tree is kept there.
        images: How many; None: all, of the data itself.

    Raises:
        ValueError: A class has too few.
    """
    data = prepare(data_name, data_dir)
    if images is None:
        return absolute(data_name)
    folder = data_dir / f"benchmark-{data.sha256[:12]}-{images}"
    if not folder.exists():
        x, y = load_split(data, "train")
        building, count = Path(tempfile.mkdtemp(dir=data_dir)), images // len(data.classes)
        for k, name in enumerate(data.classes):
            indices = np.flatnonzero(y == k)
            if len(indices) <= count:
                raise ValueError(
                    f"a class has {len(indices)} images, too few for {count} of each; give more --data"
                )
            for n, index in enumerate(
                indices[: count + 1]
            ):  # a data set must have a test/, which is not read
                file = building / ("train" if n < count else "test") / name / f"{index:06d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(x[index].transpose(1, 2, 0)).save(file)
        building.rename(folder)
    return str(folder)


def absolute(name: str) -> str:
    """Return a path that means the same in every process; what is no path, as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name
