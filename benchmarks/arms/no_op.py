"""A training that trains nothing: what remains of a study is the engine's cost."""

from __future__ import annotations

from typing import Any

from tunefleet.benchmarks.task import no_op_accuracy
from tunefleet.models.sources import Source
from tunefleet.models.space import Space


class NoOp:
    """Reports at once what every arm's trial of that number reports."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.trial, self.done = config["trial"], 0

    def epoch(self) -> dict[str, float]:
        """Return an epoch's report."""
        self.done += 1
        return {"val_accuracy": no_op_accuracy(self.trial, self.done)}

    def state_dict(self) -> dict[str, int]:
        """Return the epochs done."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint."""
        self.done = state["done"]


SPACE = Space(run=NoOp, name="no-op", source=Source("no-op", "no-op", __name__, "SPACE"))
