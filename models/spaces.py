"""What is searched, per architecture? Ranges, fixed values, budgets and the published best.

The published bests are those of the course report that this project starts from (README.md); each is
the first trial of its study, so no study of the same budget does worse than to repeat it.

Why the ranges are what they are. A study has 32 to 64 trials, of which a third see a second rung: it
can place lr, tell two or three values of a choice apart, and no more. So

- lr is the one continuous range, log-uniform over two to three decades around what works;
- momentum, weight decay and batch size are short lists around the published value and the usual one:
  neighbours differ by less than seeds do, and momentum of 0.98 is lr times five in other words;
- schedule and augmentation are the levers that the report lacked, and label smoothing for ResNets,
  which have the room to memorise the images;
- every trial has a cosine schedule, and random crops where it convolves over pixels; mirrored or not
  is searched. Both pay at the end only: at every rung before it they are behind or no
  better (docs/decisions.md), so early pruning cannot judge them. Two linear layers search them;
- widths are searched only below what a trial can afford: twice the width is four times the epoch;
- image_size is a flag of the study (``--image-size``), not a range: an epoch takes (size / 32)² as
  long, so ASHA would compare epochs that cost 1 with epochs that cost 16. ImageNet weights saw 224
  pixels: frozen features gain 14 points from 128 over 32 (a linear probe: 67.0, 75.6, 81.4, 80.3 % at
  32, 64, 128, 224), trained backbones 3 more than from 64. So a row says which size is its best, with
  trained weights, for what a GPU or two cores can afford.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search.sample import Domain

from tunefleet.models.network import Network
from tunefleet.models.sources import BUILT_IN, Source, find, restored
from tunefleet.models.space import Space

FLAT_HEADS = ("softmax", "twolayernn")  # read pixels in NCHW order
SMALLEST_SIZE = 32  # pixels a side; CIFAR-10's own


LR = tune.loguniform(1e-4, 1e-1)
WEIGHT_DECAY = tune.choice([0.0, 1e-5, 1e-4, 5e-4, 1e-3, 1e-2])
MOMENTUM = tune.choice([0.0, 0.5, 0.7, 0.85, 0.9, 0.95, 0.98, 0.99])
BATCH_SIZE = tune.choice([64, 128, 256, 512])  # cheap steps to few steps
AUGMENT = tune.choice(["crop", "crop_flip"])
SGD = {
    "lr": LR,
    "weight_decay": WEIGHT_DECAY,
    "momentum": MOMENTUM,
    "batch_size": BATCH_SIZE,
}
KERNEL_SIZE = tune.choice([3, 5])
OF_SGD = (
    "lr over three decades around what works; momentum, weight decay and batch size are the published value "
    "and usual ones, whose neighbours differ by less than seeds do"
)
OF_RESNETS = (
    "little weight decay, since few steps are taken away from good weights; no batches of 512, whose few "
    "steps would cost epochs that a ResNet takes minutes for"
)
OF_MAPS = f"{OF_RESNETS}; behind maps of 8×8 three poolings fit with a kernel of 3, none with 5"


def _resnet(momentum: float) -> dict[str, Domain]:
    """Return the ranges of a study that begins with trained weights.

    Args:
        momentum: The published one, beside the two usual ones.
    """
    return SGD | {
        "weight_decay": tune.choice([0.0, 1e-4, 5e-4, 1e-3]),
        "momentum": tune.choice(sorted({momentum, 0.9, 0.95})),
        "batch_size": tune.choice([64, 128, 256]),
    }


FINE_TUNING = {"augment": AUGMENT, "label_smoothing": tune.choice([0.0, 0.1])}
WITHOUT_SMOOTHING = {"augment": "crop", "label_smoothing": 0.0}


def _row(
    network: Network,
    summary: str,
    ranges: Mapping[str, Domain],
    first: Mapping[str, Any],
    published: float,
    *,
    fixed: Mapping[str, Any] | None = None,
    cpu_image_size: int = SMALLEST_SIZE,
    why: str = "",
    **others: Any,
) -> Space:
    """Return a row: what all thirteen have in common is here, with what was measured of them (docs/log)."""
    return Space(
        network,
        ranges,
        first=first,
        summary=summary,
        published=published,
        fixed={"schedule": "cosine", **(fixed or {})},
        normalise=network.statistics if network.cut else "data",
        channels_last=network.cut is not None or network.head not in FLAT_HEADS,
        micro_batches=True,
        feature_cache=network.frozen,
        cuda_graph=True,
        why=why or (OF_RESNETS if network.cut else OF_SGD),
        cpu_image_size=cpu_image_size,
        **others,
    )


def _published(
    weight_decay: float, momentum: float, batch_size: int, lr: float, **others: Any
) -> dict[str, Any]:
    """Return a published best in the order of the report's table."""
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "batch_size": batch_size,
        **others,
    }


_ROWS: dict[str, Space] = {
    "softmax": _row(
        Network("softmax"),
        "softmax regression on pixels",
        SGD,
        _published(0.0, 0.0, 512, 0.01),
        0.4002,
        epochs=27,
        gpus_per_trial=0.25,
    ),
    "twolayernn": _row(
        Network("twolayernn", hidden=250),
        "two linear layers on pixels",
        {
            "lr": tune.loguniform(1e-5, 1e-2),
            "weight_decay": WEIGHT_DECAY,
            "batch_size": BATCH_SIZE,
            "hidden": tune.choice([100, 250, 500, 1000]),
            "augment": tune.choice(["none", "crop", "crop_flip"]),
        },
        {
            "lr": 1e-4,
            "weight_decay": 1e-4,
            "batch_size": 256,
            "hidden": 250,
            "augment": "none",
        },
        0.5102,
        epochs=27,
        why="Adam, as published: its lr lives a decade lower, and it has no momentum to search",
        fixed={"optimizer": "adam"},
        gpus_per_trial=0.25,
    ),
    "convnet": _row(
        Network("convnet", hidden=50, kernel_size=5),
        "one convolution, one linear layer",
        {
            "lr": tune.loguniform(1e-3, 3e-2),
            "weight_decay": tune.choice([0.0, 1e-4, 1e-3, 1e-2]),
            "batch_size": tune.choice([64, 128, 512]),
            "hidden": tune.choice([20, 50]),
            "kernel_size": tune.choice([5, 7]),
            "augment": AUGMENT,
        },
        {
            "lr": 0.001,
            "weight_decay": 0.01,
            "batch_size": 512,
            "hidden": 50,
            "kernel_size": 5,
            "augment": "crop",
        },
        0.5836,
        epochs=15,
        trials=24,
        why="3·hidden channels are most of an epoch's time; one layer sees no more than its kernel, so 7; "
        "momentum is the published one, without which nothing gets going in these epochs; without warm-up "
        "the best lr lie where some seeds diverge",  # docs/decisions.md
        fixed={"momentum": 0.9, "warmup_epochs": 1},
        gpus_per_trial=0.5,
    ),
    "mymodel": _row(
        Network("mymodel", hidden=64, kernel_size=5),
        "three convolutions, dropout",
        SGD | {"hidden": tune.choice([32, 64, 96]), "kernel_size": KERNEL_SIZE, "augment": AUGMENT},
        _published(0.001, 0.98, 128, 0.001, hidden=64, kernel_size=5, augment="crop"),
        0.76,
        epochs=27,
    ),
    # features are computed once, so epochs are cheap; augmenting would compute them again in each
    "resnet_softmax": _row(
        Network("softmax", cut="pool", frozen=True),
        "frozen backbone, softmax head",
        _resnet(0.99),
        _published(1e-4, 0.99, 128, 0.001),
        0.5835,
        epochs=27,
        gpus_per_trial=0.25,
        image_size=128,
        cpu_image_size=128,  # 9 minutes once for 50,000 images on two cores
    ),
    "resnet_twolayernn": _row(
        Network("twolayernn", cut="pool", frozen=True, hidden=100),
        "frozen backbone, twolayernn head",
        _resnet(0.7) | {"hidden": tune.choice([50, 100, 250, 500])},
        _published(0.001, 0.7, 128, 0.03, hidden=100),
        0.5858,
        epochs=27,
        gpus_per_trial=0.25,
        image_size=128,
        cpu_image_size=128,
    ),
    "resnet_conv": _row(
        Network("convnet_padded", cut="conv4_x", frozen=True, hidden=150, kernel_size=3),
        "frozen backbone, convnet head",
        _resnet(0.9) | {"hidden": tune.choice([50, 100, 150])},
        _published(5e-4, 0.9, 128, 0.05, hidden=150),
        0.6820,
        epochs=27,
        fixed={"kernel_size": 3},
        gpus_per_trial=0.5,
        image_size=128,  # its maps of 8×8 cost two cores 80 s an epoch
    ),
    "resnet_mymodel": _row(
        Network("mymodel", cut="conv2_x", frozen=True, hidden=128, kernel_size=3),
        "frozen backbone, mymodel head",
        _resnet(0.85) | {"hidden": tune.choice([32, 64, 128])},
        _published(1e-4, 0.85, 128, 0.04, hidden=128),
        0.7917,
        why=OF_MAPS,
        epochs=27,
        fixed={"kernel_size": 3},
        image_size=64,
    ),
    "resnet_softmax_updatable": _row(
        Network("softmax", cut="pool"),
        "resnet_softmax, all of it trained",
        _resnet(0.0) | FINE_TUNING,
        _published(0.001, 0.0, 128, 0.01, **WITHOUT_SMOOTHING),
        0.8296,
        epochs=27,
        image_size=64,
    ),
    "resnet_twolayernn_updatable": _row(
        Network("twolayernn", cut="pool", hidden=150),
        "resnet_twolayernn, all of it trained",
        _resnet(0.99) | FINE_TUNING | {"hidden": tune.choice([100, 150, 250])},
        _published(0.0, 0.99, 128, 0.001, hidden=150, **WITHOUT_SMOOTHING),
        0.8075,
        epochs=27,
        image_size=64,
    ),
    "resnet_conv_updatable": _row(
        Network("convnet_padded", cut="conv4_x", hidden=64, kernel_size=3),
        "resnet_conv, all of it trained",
        _resnet(0.98) | FINE_TUNING | {"hidden": tune.choice([32, 64, 128])},
        _published(0.001, 0.98, 128, 0.001, hidden=64, **WITHOUT_SMOOTHING),
        0.8091,
        epochs=27,
        fixed={"kernel_size": 3},
        image_size=64,
    ),
    "resnet_mymodel_updatable": _row(
        Network("mymodel", cut="conv2_x", hidden=128, kernel_size=3),
        "resnet_mymodel, all of it trained",
        _resnet(0.7) | FINE_TUNING | {"hidden": tune.choice([64, 128])},
        _published(1e-4, 0.7, 128, 0.04, hidden=128, **WITHOUT_SMOOTHING),
        0.8007,
        why=OF_MAPS,
        epochs=27,
        fixed={"kernel_size": 3},
        image_size=64,
    ),
    "resnet_finetune": _row(
        Network("softmax", cut="fc"),
        "backbone with its fc, softmax head, all trained",
        _resnet(0.0) | FINE_TUNING,
        _published(0.001, 0.0, 128, 0.01, **WITHOUT_SMOOTHING),
        0.8312,
        epochs=27,
        image_size=64,
    ),
}


SPACES = {
    name: dataclasses.replace(space, name=name, source=Source(name, name, BUILT_IN, "SPACES", name))
    for name, space in _ROWS.items()
}


def find_space(reference: str) -> Space:
    """Return a row of SPACES, or the space of a file or module (`trainables.sources.find`).

    Raises:
        ValueError: There is none.
    """
    return find(reference, SPACES)


def recorded_space(spec: Mapping[str, Any], folder: Path, data_dir: str) -> tuple[Space, str]:
    """Return a study's space, from the copy of its sources, and a line where the originals differ.

    Args:
        spec: The content of study.json.
        folder: The study's.
        data_dir: Below which the copy is imported.

    Raises:
        ValueError: There is no such space, or the copy is damaged.
    """
    if spec.get("source") is None:
        return find_space(spec["options"].get("space", "")), ""
    space, line = restored(spec["source"], folder / "source", data_dir)
    return dataclasses.replace(space, **spec["network"]), line


def default_image_size(space: Space, weights: str, device: str) -> int:
    """Return the pixels a side that a space is best at, on cpu or cuda."""
    size = (space.cpu_image_size if device == "cpu" else None) or space.image_size
    return SMALLEST_SIZE if size is None or (space.takes_weights and weights == "none") else size
