"""What a study compares trials by: the only place that knows whether more is better."""

from __future__ import annotations

import math
from dataclasses import dataclass

FRACTIONS = ("accuracy", "balanced_accuracy", "macro_f1")  # of images, 0 to 1, more is better
OF_IMAGES = {  # that training on images reports: their modes
    **{f"val_{name}": "max" for name in FRACTIONS},
    "val_loss": "min",
}
MODES = ("max", "min")


@dataclass(frozen=True)
class Metric:
    """A number of each report.

    Args:
        name: Its key in a report.
        mode: max or min.

    Raises:
        ValueError: The mode is neither.
    """

    name: str = "val_accuracy"
    mode: str = "max"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not possible; give max or min")

    @property
    def test_name(self) -> str:
        """Return what the same number of the test split is called."""
        return f"test_{self.name.removeprefix('val_')}"

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Return between which values it lies; None: it may be any."""
        return (0.0, 1.0) if self.name.partition("_")[2] in FRACTIONS else None

    def score(self, value: float | None) -> float:
        """Return a number that is higher for what is better; -inf for a value that is missing."""
        if value is None or not math.isfinite(value):
            return -math.inf
        return value if self.mode == "max" else -value

    def best(self, values: list[float]) -> float | None:
        """Return the best of some values; None where there is none."""
        return max(values, key=self.score, default=None)

    def clip(self, low: float, high: float) -> list[float]:
        """Return an interval without what no value can be."""
        least, most = self.bounds or (-math.inf, math.inf)
        return [max(least, low), min(most, high)]


ACCURACY = Metric()


def metric_of(name: str, mode: str | None = None) -> Metric:
    """Return the metric of that name.

    Args:
        name: A report's key.
        mode: max or min; None: known of what is reported of images.

    Raises:
        ValueError: The mode is not known, or another one than the metric's.
    """
    known = OF_IMAGES.get(name)
    if mode is None and known is None:
        raise ValueError(f"metric={name} has no mode; give mode='max' or mode='min'")
    if mode and known and mode != known:
        raise ValueError(f"mode={mode!r} is not that of {name}; leave it out")
    return Metric(name, mode or known or "max")
