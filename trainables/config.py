"""TrainConfig: every value that changes a trial's result, checked once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tunefleet.models import ARCHITECTURES

PRECISIONS = ("auto", "fp32", "bf16")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine")
ALIKE = 0.7  # of a misspelt word to the one that was meant: resnet34 is no misspelt resnet_conv
AUGMENTS = ("none", "crop", "crop_flip")  # a mirrored digit is another sign: flips are a choice of their own


@dataclass(frozen=True)
class TrainConfig:
    """A whole trial: the same TrainConfig on the same data gives the same weights.

    What must not change a result (data folder, device, threads, storage) is a function argument
    elsewhere. Fields have the names of the space, the command line and trials.csv.

    Raises:
        ValueError: A value is impossible; one line that says what was given and what is allowed.
    """

    architecture: str
    epochs: int = 10  # the schedule's horizon; a pruned trial trains fewer
    batch_size: int = 128  # images per optimizer step, over all workers of the trial
    lr: float = 0.01  # per optimizer step at the schedule's top
    weight_decay: float = 0.0  # L2 in the gradient for sgd and adam, decoupled for adamw
    momentum: float = 0.0  # sgd only
    optimizer: str = "sgd"
    nesterov: bool = False
    schedule: str = "constant"
    warmup_epochs: float = 0.0  # lr rises linearly from 0 over these
    label_smoothing: float = 0.0
    augment: str = "none"  # crop: at random after padding by 1/8 of the side; crop_flip: mirrored, too
    image_size: int = 32  # pixels a side as the network sees them; enlarged on the device
    hidden: int | None = None  # width of the head, None: the architecture's published one
    kernel_size: int | None = None  # of the head's convolutions, None: the published one
    weights: str = "none"  # of the backbone: imagenet, none or a path
    seed: int = 0  # initialisation and the order of the images
    refit: bool = False  # trains on the validation images, too, which then validate nothing

    def __post_init__(self) -> None:
        check_name("architecture", self.architecture, ARCHITECTURES)
        check_name("optimizer", self.optimizer, OPTIMIZERS)
        check_name("schedule", self.schedule, SCHEDULES)
        check_name("augment", self.augment, AUGMENTS)
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("image_size", 1), ("seed", 0)):
            check_integer(name, getattr(self, name), lowest)
        for name in ("hidden", "kernel_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_number("lr", self.lr, 0, math.inf, low_allowed=False)
        check_number("weight_decay", self.weight_decay, 0, math.inf)
        check_number("momentum", self.momentum, 0, 1)
        check_number("label_smoothing", self.label_smoothing, 0, 1)
        check_number("warmup_epochs", self.warmup_epochs, 0, self.epochs)
        for name in ("nesterov", "refit"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not possible; give True or False")
        row = ARCHITECTURES[self.architecture]
        if self.batch_size == 1 and row.cut and not row.frozen:
            raise ValueError(
                f"batch_size=1 is not possible with the BatchNorm of {self.architecture}; give 2 or more"
            )
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum > 0):
            raise ValueError("nesterov=True needs optimizer=sgd and a momentum above 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build a config from a sampled dict.

        Raises:
            ValueError: A key is no field; names the nearest one.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(f"{key} is no hyperparameter{nearest(key, names)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON-able values."""
        return dataclasses.asdict(self)


def nearest(word: str, words: Any) -> str:
    """Return '; did you mean …? Choose from: …' for an error message."""
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=ALIKE)
    meant = f"; did you mean {close[0]}?" if close else ";"
    return f"{meant} Choose from: {', '.join(words)}"


def check_name(name: str, value: Any, allowed: Any) -> None:
    """Raise ValueError unless value is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{name}={value} is unknown{nearest(value, allowed)}")


def check_integer(name: str, value: Any, lowest: int) -> None:
    """Raise ValueError unless value is an integer of at least lowest."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < lowest:
        raise ValueError(f"{name}={value} is not possible; give an integer of at least {lowest}")


def check_number(name: str, value: Any, low: float, high: float, *, low_allowed: bool = True) -> None:
    """Raise ValueError unless value is a finite number in [low, high] (or in (low, high])."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (value == low and not low_allowed):
        allowed = f"at least {low}" if low_allowed else f"above {low}"
        limit = "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"{name}={value} is not possible; give a number {allowed}{limit}")


def boolean(text: str) -> bool:
    """Return the value of the word true or false.

    Raises:
        ValueError: The text is neither.
    """
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text} is neither true nor false")
    return text.lower() == "true"


_BY_ANNOTATION: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": boolean}
FIELD_TYPES = {  # parser of each hyperparameter's value on a command line
    field.name: _BY_ANNOTATION[str(field.type).removesuffix(" | None")]
    for field in dataclasses.fields(TrainConfig)
}
