"""Distributed hyperparameter search: Ray Tune, ASHA, honest test accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunefleet.study import Study as Study

__all__ = ["Study"]


def __getattr__(name: str) -> Any:
    """Look public names up when they are used: importing tunefleet imports nothing heavy."""
    if name == "Study":
        from tunefleet.study import Study

        return Study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
