"""Trials that fail as only a GPU lets them fail; workers import their class from here."""

import torch
from torch import nn

from tests.gpu import ON_GPU
from tunefleet.models import heads
from tunefleet.trainables.device import BrokenGpuError
from tunefleet.trainables.graph import CaptureError
from tunefleet.trainables.trial import Trial

VICTIM = "0001"
TOO_WIDE = 60_000  # features: 0.7 GB of weights


class Crowded(Trial):
    """Runs out of memory where a network is too wide; without a GPU it only says so."""

    def step(self):
        """Returns the report of one epoch."""
        if not ON_GPU and self.job["config"]["hidden"] == TOO_WIDE:
            self.run = _Failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
        return super().step()


class Asserting(Trial):
    """Reads beyond a tensor on the GPU in the second epoch of one trial, once."""

    def step(self):
        """Returns the report of one epoch."""
        marker = self.context.study_dir / "asserted"
        if self.job["trial_id"] == VICTIM and self.run is not None and not marker.exists():
            marker.touch()
            if not ON_GPU:
                raise BrokenGpuError("GPU-00000000 cannot be used any more by this process (a rehearsal)")
            self.run = _OutOfRange()
        return super().step()


class Synchronising(Trial):
    """Has two-layer networks that wait for the device within a step, and drop out."""

    def setup(self, config, context=None):
        """Starts the job, with other networks in this process."""
        build = heads.twolayernn
        heads.HEADS["twolayernn"] = heads.Head(
            lambda shape, num_classes, hidden: nn.Sequential(
                _Waiting(), nn.Dropout(0.2), *build(shape, num_classes, hidden)
            ),
            ("hidden",),
        )
        super().setup(config, context)

    def step(self):
        """Returns the report of one epoch."""
        if not ON_GPU and not self.job["eager"]:
            raise CaptureError("the step cannot be captured as a CUDA graph (a rehearsal)")
        return super().step()


class _Waiting(nn.Module):
    def forward(self, x):
        return x * 0 if x.sum().item() == torch.inf else x


class _OutOfRange:
    def report(self):
        torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")]
        torch.cuda.synchronize()


class _Failing:
    def __init__(self, error):
        self.error = error

    def report(self):
        raise self.error
