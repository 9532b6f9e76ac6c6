"""Divide each step among the workers of one trial.

A group of n workers computes what one worker would: the same order, the same batches, each image of
a batch on one worker, gradients averaged by DistributedDataParallel, BatchNorm over the whole batch,
losses and counts summed. trainables/ddp.py starts the workers; nothing here depends on Ray.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Group:
    """One worker's place among those of its trial; the default is a worker alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Group:
        """Return the place in torch's default process group."""
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, batch: Tensor) -> Tensor:
        """Return this worker's rows of a batch ``(N, …)``; none where N is too small for all."""
        return batch[self.rank :: self.size]

    def stretch(self, x: Tensor) -> Tensor:
        """Return this worker's rows of all of x ``(N, …)``, contiguous in memory."""
        return x[len(x) * self.rank // self.size : len(x) * (self.rank + 1) // self.size]

    def total(self, loss_sum: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return a scalar and counts ``(…)`` summed over the workers, in float64 where there are several."""
        if self.size == 1:
            return loss_sum, counts
        both = torch.cat([loss_sum.double().view(1), counts.double().view(-1)])
        dist.all_reduce(both)
        return both[0], both[1:].view(counts.shape)

    def synchronise_batchnorm(self, network: nn.Module) -> None:
        """Replace the BatchNorm layers inside a network by layers that normalise over all workers' images."""
        if self.size == 1:
            return
        if next(network.parameters()).device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
            return
        for module in network.modules():  # torch's own runs on accelerators only (2.15)
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d  # the same parameters, statistics and mode

    def parallel(self, network: nn.Module) -> nn.Module:
        """Wrap a network for training: backward averages gradients over the workers."""
        return network if self.size == 1 else DistributedDataParallel(network)

    def accumulating(self, network: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context manager: one part of a batch; gradients are exchanged after the last one."""
        wait = isinstance(network, DistributedDataParallel) and not last
        return network.no_sync() if wait else contextlib.nullcontext()  # type: ignore[operator]


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all workers' images together, on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)``; N may be 0 on some workers."""
        if not self.training:
            return super().forward(x)
        wide = x.float()
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        mean = _Sum.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean.view(1, -1, 1, 1)
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all workers, whose gradient is the sum of all workers' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])
