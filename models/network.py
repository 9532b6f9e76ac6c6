"""Builders of the thirteen networks, without torch, whose import takes a second.

A network is a head, alone or behind a frozen or updatable backbone; `models.building` builds it::

    build = Network("mymodel", cut="conv2_x", frozen=True, hidden=128, kernel_size=3)
    model = build(10, (3, 32, 32), hidden=64, weights="imagenet")
    logits = model(images)  # (N, 3, 32, 32) to (N, 10)
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RESNET18 = "resnet18"  # of the published accuracies


@dataclass(frozen=True)
class Network:
    """A builder.

    Attributes:
        head: a row of `heads.HEADS`.
        cut: a row of `backbones.CUTS`, where the backbone ends and the head begins; None: no backbone.
        frozen: the backbone gets no gradient and its BatchNorm statistics are fixed.
        hidden: width of the head by default; None: the head has no such argument.
        kernel_size: of the head's convolutions in pixels, likewise.
        backbone: by default, where there is one.
    """

    head: str
    cut: str | None = None
    frozen: bool = False
    hidden: int | None = None
    kernel_size: int | None = None
    backbone: str = RESNET18

    def __call__(self, num_classes: int, image_shape: tuple[int, int, int], **own: Any) -> Any:
        """Build the network; see `models.building.build`."""
        from tunefleet.models.building import build

        given = {name: value for name, value in own.items() if value is not None}
        return build(num_classes, image_shape, **{**dataclasses.asdict(self), **given})

    def check(self, backbone: Any = RESNET18, **_: Any) -> None:
        """Raise ValueError where the network cannot have this backbone."""
        if self.cut and backbone != RESNET18:  # else torch is not imported
            from tunefleet.models.backbones import check_backbone

            check_backbone(backbone, self.cut)

    def statistics(self, own: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and standard deviation that a backbone's weights were trained with."""
        from tunefleet.models.backbones import training_of

        return training_of(own["backbone"])[:2]

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the arguments of this network, which `inspect.signature` gives for those of the call."""
        anywhere, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, anywhere) for name in ("num_classes", "image_shape")]
        for name in ("hidden", "kernel_size"):
            if (default := getattr(self, name)) is not None:
                parameters.append(inspect.Parameter(name, by_name, default=default, annotation=int))
        if self.cut:
            for name, default in (("backbone", self.backbone), ("weights", "none")):
                parameters.append(inspect.Parameter(name, by_name, default=default, annotation=str))
        return inspect.Signature(parameters)
