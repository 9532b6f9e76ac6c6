"""Which trials are the arms timed on? Families, and their committed configurations.

configurations.json has each architecture's published best and random points of its space, as they were drawn
once: results of another year are of the same trials.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunefleet.search.spaces import find_space, fixed_values
from tunefleet.trainables.config import TrainConfig

FILE = Path(__file__).with_name("configurations.json")
DRAWN = 32  # configurations per architecture
# The tutorial has a constant lr and pixels as they are. Nothing that only one arm has may be timed.
FIX: dict[str, Any] = {
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "augment": "none",
}


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
        family: Which trials; more than the committed list has begin it again.
        weights: Of ResNet backbones: imagenet, none or a path.
        repetition: Each has an order of its own where arms prune, since it matters when a good one comes.
    """
    drawn = json.loads(FILE.read_text())[family.architecture]
    fixed = fixed_values(
        family.architecture, epochs=family.epochs, image_size=32, weights=weights, seed=0, fix=FIX
    )
    listed = [fixed | drawn[trial % DRAWN] for trial in range(family.trials)]
    if not family.pruning or repetition == 0:
        return listed
    return [listed[k] for k in np.random.default_rng(repetition).permutation(family.trials)]


def published(architecture: str, *, epochs: int, weights: str, seed: int = 0) -> TrainConfig:
    """Return the published best of an architecture, without what only one arm has."""
    fixed = fixed_values(architecture, epochs=epochs, image_size=32, weights=weights, seed=seed, fix=FIX)
    return TrainConfig.from_dict(fixed | dict(find_space(architecture, FIX).published))
