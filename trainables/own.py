"""A person's own training as a trial: counted, timed and saved by us, and nothing else.

The class has, and its constructor may name any of the keywords::

    class MyRun:
        def __init__(self, config, *, device, seed, epochs, threads, data_dir): ...
        def epoch(self) -> dict: ...          # numbers, with the space's metric
        def state_dict(self) -> dict: ...     # tensors and plain values
        def load_state_dict(self, state): ...
        def test(self) -> float: ...          # may be left out; of the winner's fresh seeds only
"""

from __future__ import annotations

import inspect
import io
import math
import numbers
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from tunefleet.metric import Metric
from tunefleet.models.space import OF_A_REPORT, OF_EVERY_RUN, Space
from tunefleet.trainables.training import read_checkpoint

METHODS = ("epoch", "state_dict", "load_state_dict")
OURS = (*OF_A_REPORT, "n", "crc", "epochs", "test_accuracy")  # no keys of a person's report


class OwnRun:
    """One trial of a space with a ``run`` of its own.

    Args:
        space: With the class.
        values: The trial's flat config.
        metric: What every epoch has to report.
        keywords: device, threads and data_dir, of which the class gets those that it names.

    Raises:
        ValueError: The class lacks a method.
    """

    def __init__(
        self, space: Space, values: Mapping[str, Any], metric: Metric, keywords: Mapping[str, Any]
    ) -> None:
        assert space.run is not None
        self.name, self.metric, self.epochs = space.run.__name__, metric, int(values["epochs"])
        self.values, self.reference = dict(values), space.reference
        own = {name: value for name, value in values.items() if name not in OF_EVERY_RUN}
        parameters = inspect.signature(space.run).parameters
        offered = {**keywords, "seed": values["seed"], "epochs": self.epochs}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.run = space.run(own, **{k: v for k, v in offered.items() if takes_any or k in parameters})
        if missing := [method for method in METHODS if not callable(getattr(self.run, method, None))]:
            raise ValueError(f"{self.name} has no {missing[0]}(); see docs/own-training.md")
        self.reports: list[dict[str, Any]] = []
        self._is_saved = False

    @property
    def epochs_done(self) -> int:
        """Epochs trained so far."""
        return len(self.reports)

    def epoch(self) -> dict[str, Any]:
        """Train an epoch; return its report.

        Raises:
            ValueError: What the class reports is no flat dict of numbers with the metric.
        """
        began = time.perf_counter()
        found = self._numbers(self.run.epoch())
        value = found[self.metric.name]
        report = {
            "epoch": self.epochs_done + 1,
            **found,
            "epoch_seconds": time.perf_counter() - began,
            "finished_at": time.time(),
            "diverged": not math.isfinite(value),
        }
        self.reports.append(report)
        return report

    def test(self) -> dict[str, float]:
        """Return what the class's test gives, by the metric's name of the test split; nothing without one."""
        if not callable(getattr(self.run, "test", None)):
            return {}
        value = _number(self.run.test())
        if value is None:
            raise ValueError(f"{self.name}.test() returns no number")
        self._check_bounds("test() returns", value)
        return {self.metric.test_name: value}

    def trained_state(self) -> dict[str, Any]:
        """Return what best/model.pt holds of the run."""
        return {"builder": self.reference, "config": self.values, "state": self.run.state_dict()}

    def save(self, file: IO[bytes]) -> None:
        """Write a checkpoint; the first one is read back.

        Raises:
            ValueError: It cannot be read back; names the key.
        """
        state = self.run.state_dict()
        if not self._is_saved:
            self._check_state(state)
            self._is_saved = True
        torch.save({"reports": self.reports, "state": state, "values": self.values}, file)

    def load(self, file: Path | IO[bytes]) -> None:
        """Read a checkpoint; tensors and plain values only.

        Raises:
            DamagedCheckpointError: The file is truncated or its bits have changed.
            ValueError: It is another trial's.
        """
        saved = read_checkpoint(file)
        if saved["values"] != self.values:
            raise ValueError("the checkpoint belongs to another configuration")
        self.run.load_state_dict(saved["state"])
        self.reports, self._is_saved = list(saved["reports"]), True

    def _numbers(self, reported: Any) -> dict[str, Any]:
        if not isinstance(reported, Mapping):
            raise ValueError(
                f"{self.name}.epoch() returns a {type(reported).__name__}; return a dict of numbers"
            )
        found: dict[str, Any] = {}
        for key, value in reported.items():
            if key in (*OURS, self.metric.test_name):
                raise ValueError(f"{self.name}.epoch() reports {key}, which the study itself sets; rename it")
            number = _number(value)
            if not isinstance(key, str) or number is None:
                raise ValueError(
                    f"{self.name}.epoch() reports {key}={str(value)[:40]!r} ({type(value).__name__}); "
                    "report a number"
                )
            found[key] = number
        if self.metric.name not in found:
            raise ValueError(
                f"{self.name}.epoch() reports no {self.metric.name}, which is the metric; it reports "
                f"{', '.join(found) or 'nothing'}"
            )
        self._check_bounds("epoch() reports", found[self.metric.name])
        return found

    def _check_bounds(self, what: str, value: float) -> None:
        low, high = self.metric.bounds or (-math.inf, math.inf)
        if value < low or value > high:
            raise ValueError(
                f"{self.name}.{what} {value:g}, and {self.metric.name} is a fraction of {low:g} to {high:g}; "
                "give a fraction, or call the metric otherwise"
            )

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, Mapping):
            raise ValueError(f"{self.name}.state_dict() returns a {type(state).__name__}; return a dict")
        for key, value in state.items():
            stream = io.BytesIO()
            try:
                torch.save({key: value}, stream)
                stream.seek(0)
                torch.load(stream, map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError(
                    f"{self.name}.state_dict() has {key!r} ({type(value).__name__}), which cannot be "
                    "read back safely; save tensors, numbers, text, lists and dicts"
                ) from error


def _number(value: Any) -> float | int | None:
    """Return a Python number of a number, numpy's too, or of a tensor with one; None: it is none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return _number(value.item())
    if isinstance(value, bool) or getattr(value, "shape", ()) != ():
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else None
