"""Which share of each step is this worker's? The arithmetic of several workers that train one trial.

A group of n workers computes what one worker would: the same order, the same batches, each image of
a batch on one worker, gradients averaged by DistributedDataParallel, BatchNorm over the whole batch,
losses and counts summed. Nothing here knows Ray; trainables/ddp.py starts the workers.
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
        """Returns the place in torch's default process group."""
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, batch: Tensor) -> Tensor:
        """Returns this worker's rows of a batch ``(N, …)``; none where N is too small for all."""
        return batch[self.rank :: self.size]

    def stretch(self, x: Tensor) -> Tensor:
        """Returns this worker's rows of all of x ``(N, …)`` as one stretch of memory."""
        return x[len(x) * self.rank // self.size : len(x) * (self.rank + 1) // self.size]

    def total(self, loss_sum: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both scalars summed over the workers, in float64 where there are several."""
        if self.size == 1:
            return loss_sum, correct
        both = torch.stack([loss_sum.double(), correct.double()])
        dist.all_reduce(both)
        return both[0], both[1]

    def synchronise_batchnorm(self, network: nn.Module) -> None:
        """Makes the BatchNorm layers inside a network see the batch of all workers."""
        if self.size == 1:
            return
        if next(network.parameters()).device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        else:  # torch's own runs on accelerators only (2.15)
            _synchronise_batchnorm(network)

    def parallel(self, network: nn.Module) -> nn.Module:
        """Returns what to call in training: gradients are averaged over the workers in backward."""
        return network if self.size == 1 else DistributedDataParallel(network)

    def accumulating(self, network: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Returns the context of one part of a batch: only after the last are gradients exchanged."""
        wait = isinstance(network, DistributedDataParallel) and not last
        return network.no_sync() if wait else contextlib.nullcontext()  # type: ignore[operator]


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all workers' images together, on a CPU."""

    @classmethod
    def of(cls, layer: nn.BatchNorm2d) -> SyncBatchNorm2d:
        """Returns a layer with the same parameters, statistics and mode."""
        sync = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        sync._parameters, sync._buffers = layer._parameters, layer._buffers
        return sync.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(N, C, H, W)``; N may be 0 on some workers."""
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


def _synchronise_batchnorm(network: nn.Module) -> None:
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, SyncBatchNorm2d.of(child))
        else:
            _synchronise_batchnorm(child)
