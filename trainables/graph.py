"""Run a training step as one CUDA graph.

A step of a small network is bound by the launches of its kernels: ResNet-18 on 32×32 images uses 0.4 % of
an H100. A CUDA graph records the kernels of one step and launches them together. The rules (PyTorch, "CUDA
graphs"):

- A replay repeats the same kernels on the same addresses. Whatever changes from step to step is read from
  tensors that stay where they are: a whole epoch's image indices, crops and learning rates, copied once, of
  which a counter on the device selects a row.
- Capturing executes nothing, so the first steps run eagerly. They are the warm-up that libraries and the
  optimizer's state need, on a stream of their own, as autograd requires.
- Nothing inside may wait for the device. Python inside `forward` runs once, at the capture.
- Dropout draws from CUDA's default generator, which a replay advances as an eager step does.
- A batch of another size runs eagerly in between. The graph owns its memory until it is dropped.

A capture that fails leaves CUDA's generator unusable (torch 2.15), whatever the reason: the process has to
end (`CaptureError`), and the job continues eagerly from its checkpoint on another worker.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tunefleet.trainables.device import causes, is_out_of_memory

WARM_UP_STEPS = 3  # eager; PyTorch's own examples take 3, DDP's 11

TrainStep = Callable[[Tensor, Tensor | None], None]  # indices (N,) and crops (N, 3) of one batch


class CaptureError(Exception):
    """A step could not be captured; this process must not continue to train."""


class CaptureMemoryError(CaptureError):
    """A step could not be captured for lack of memory; a smaller trial's could be."""


class StepGraph:
    """The full batches of each epoch of one trial, as replays of one captured step.

    Args:
        steps: Full batches per epoch.
        batch_size: Images in each.
        set_lr: Sets the optimizer's learning rates, which are tensors, by the schedule's, a scalar tensor.
        device: Of the steps.
        augmented: Whether steps take crops.
    """

    def __init__(
        self,
        steps: int,
        batch_size: int,
        set_lr: Callable[[Tensor], None],
        device: torch.device,
        *,
        augmented: bool,
    ) -> None:
        self.set_lr = set_lr
        self.order = torch.zeros(steps, batch_size, dtype=torch.int64, device=device)
        self.crops = (
            torch.zeros(steps, batch_size, 3, dtype=torch.int64, device=device) if augmented else None
        )
        self.lrs = torch.zeros(steps, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.warm_up_steps = 0
        self._side: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin_epoch(self, order: Tensor, crops: Tensor | None, lrs: list[float]) -> None:
        """Copy what the steps of an epoch read.

        Args:
            order: Indices of all images ``(N,)``; those beyond the full batches are ignored.
            crops: Of all images ``(N, 3)``, where steps take crops.
            lrs: Of all steps.
        """
        steps, count = len(self.lrs), self.order.numel()
        self.order.copy_(order[:count].view_as(self.order))
        if self.crops is not None:
            assert crops is not None
            self.crops.copy_(crops[:count].view_as(self.crops))
        self.lrs.copy_(torch.tensor(lrs[:steps]))
        self.counter.zero_()

    def step(self, train_step: TrainStep) -> None:
        """Take the epoch's next step.

        Args:
            train_step: Runs one step; it must launch the same kernels each time.

        Raises:
            CaptureError: The step cannot be captured.
        """
        if self._graph is None and self.warm_up_steps < WARM_UP_STEPS:
            self._warm_up(train_step)
            return
        if self._graph is None:
            self._graph = self._capture(train_step)
        self._graph.replay()

    def _warm_up(self, train_step: TrainStep) -> None:
        self._side = self._side or torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            self._one_step(train_step)
        current.wait_stream(self._side)
        self.warm_up_steps += 1

    def _capture(self, train_step: TrainStep) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._one_step(train_step)
        except Exception as error:
            kind = CaptureMemoryError if is_out_of_memory(error) else CaptureError
            cause = list(causes(error))[-1]  # the end of a failed capture raises an error of its own
            reason = str(cause).partition("\n")[0]
            raise kind(f"the step cannot be captured as a CUDA graph ({reason})") from error
        return graph

    def _one_step(self, train_step: TrainStep) -> None:
        self.set_lr(self.lrs.index_select(0, self.counter).squeeze(0))
        crops = None if self.crops is None else self.crops.index_select(0, self.counter).squeeze(0)
        train_step(self.order.index_select(0, self.counter).squeeze(0), crops)
        self.counter.add_(1)
