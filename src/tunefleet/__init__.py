"""Distributed hyperparameter search: Ray Tune, ASHA, honest test accuracy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunefleet.models.space import Space as Space
    from tunefleet.models.spaces import find_space as find_space
    from tunefleet.search.api import resume as resume
    from tunefleet.study import Study as Study
    from tunefleet.study import load as load
    from tunefleet.trainables.training import TrainingRun as TrainingRun

_PUBLIC = {  # name: its module
    "Space": "models.space",
    "Study": "study",
    "TrainingRun": "trainables.training",
    "find_space": "models.spaces",
    "load": "study",
    "resume": "search.api",
}
__all__ = ["Space", "Study", "TrainingRun", "find_space", "load", "resume"]


def lookup(module: str, name: str) -> Any:
    """Return what a module further up has: the one way by which lower code calls it (`Space.search`)."""
    return getattr(importlib.import_module(f"tunefleet.{module}"), name)


def __getattr__(name: str) -> Any:
    """Look public names up when they are used: importing tunefleet imports nothing heavy."""
    if name in _PUBLIC:
        return lookup(_PUBLIC[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
