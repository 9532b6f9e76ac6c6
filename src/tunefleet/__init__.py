"""Distributed hyperparameter search: Ray Tune, ASHA, honest test accuracy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunefleet.models.space import Space as Space
    from tunefleet.models.spaces import find_space as find_space
    from tunefleet.study import Study as Study

_PUBLIC = {"Space": "models.space", "Study": "study", "find_space": "models.spaces"}  # name: its module
__all__ = ["Space", "Study", "find_space"]


def __getattr__(name: str) -> Any:
    """Look public names up when they are used: importing tunefleet imports nothing heavy."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"tunefleet.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
