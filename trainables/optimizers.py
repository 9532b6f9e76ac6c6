"""Which optimizer does a trial have? torch's fused ones, without what they cost beside their arithmetic."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tunefleet.trainables.config import TrainConfig


def make_optimizer(
    config: TrainConfig, parameters: Iterable[Tensor], lr: float | Tensor
) -> torch.optim.Optimizer:
    """Builds the optimizer, fused (14 % of a step of twolayernn); the caller sets the lr of every step.

    Args:
        config: Names the optimizer and its values.
        parameters: What is trained.
        lr: A number; or a scalar on the GPU, and its steps may be captured as a CUDA graph.
    """
    options: dict[str, Any] = {"lr": lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return Sgd(parameters, momentum=config.momentum, nesterov=config.nesterov, **options)
    options["capturable"] = isinstance(lr, Tensor)  # SGD always is, once it has its momentum
    return {"adam": Adam, "adamw": AdamW}[config.optimizer](parameters, **options)


class Lean(torch.optim.Optimizer):
    """What torch's optimizers (2.15) do not need to do here; the numbers stay the same.

    - Their methods are decorated to keep torch.compile out, and import it to do so: more than a second in
      every worker of a study. The undecorated ones are called.
    - Their fused steps copy gradients in channels_last. Such a parameter is passed as the contiguous
      ``(O, H, W, I)`` view of its memory; a state_dict still has the parameters' shapes.
    """

    def __init__(self, parameters: Iterable[Tensor], **options: Any) -> None:
        self.parameters = list(parameters)
        self.turned = [
            p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
            for p in self.parameters
        ]
        self.views = [
            _channels_last(p.detach()).requires_grad_() if turned else p
            for p, turned in zip(self.parameters, self.turned, strict=True)
        ]
        super().__init__(self.views, **options)

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures
        """Takes a step by the parameters' gradients."""
        for p, view, turned in zip(self.parameters, self.views, self.turned, strict=True):
            if turned:
                view.grad = None if p.grad is None else _channels_last(p.grad)
        with torch.no_grad():
            inspect.unwrap(super().step)(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients."""
        for tensor in (*self.parameters, *self.views):
            tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, in the parameters' shapes."""
        state: dict[str, Any] = inspect.unwrap(super().state_dict)(self)
        return self._turned(state, _channels_first)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to a state that ``state_dict`` returned."""
        inspect.unwrap(super().load_state_dict)(self, self._turned(state_dict, _channels_last))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Is called by torch, once."""
        inspect.unwrap(super().add_param_group)(self, param_group)

    def _turned(self, state_dict: dict[str, Any], turn: Any) -> dict[str, Any]:
        """Returns a state_dict with the tensors of turned parameters passed through a function."""
        state = {
            k: {
                name: turn(value) if self.turned[k] and torch.is_tensor(value) and value.dim() == 4 else value
                for name, value in of_parameter.items()
            }
            for k, of_parameter in state_dict["state"].items()
        }
        return {**state_dict, "state": state}


def _channels_last(tensor: Tensor) -> Tensor:
    """Returns ``(O, I, H, W)`` as ``(O, H, W, I)``, the same memory."""
    return tensor.permute(0, 2, 3, 1)


def _channels_first(tensor: Tensor) -> Tensor:
    """Returns ``(O, H, W, I)`` as ``(O, I, H, W)``, the same memory."""
    return tensor.permute(0, 3, 1, 2)


class Sgd(Lean, torch.optim.SGD):
    """Stochastic gradient descent with momentum."""


class Adam(Lean, torch.optim.Adam):
    """Adam (Kingma & Ba 2015), with weight decay in the gradient."""


class AdamW(Lean, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
