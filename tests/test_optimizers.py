"""Do our optimizers take torch's steps, whatever the memory format, and without torch's compiler?"""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from tunefleet.trainables.config import TrainConfig
from tunefleet.trainables.optimizers import make_optimizer

LR = 0.01
KINDS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def config_of(kind: str) -> TrainConfig:
    return TrainConfig("convnet", lr=LR, optimizer=kind, weight_decay=0.1, **KINDS[kind][1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    model(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_torchs(kind: str) -> None:
    ours, theirs = network(), network()
    torchs, options = KINDS[kind]
    optimizer = make_optimizer(config_of(kind), ours.parameters(), LR)
    reference = torchs(theirs.parameters(), lr=LR, weight_decay=0.1, **options)
    assert optimizer.turned == [p.dim() == 4 for p in ours.parameters()]
    for seed in range(3):
        train(ours, optimizer, seed)
        train(theirs, reference, seed)
        assert all(p.grad is None for p in ours.parameters())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert p.stride() == q.stride()
    for k, of_parameter in reference.state_dict()["state"].items():
        for name, value in of_parameter.items():
            torch.testing.assert_close(optimizer.state_dict()["state"][k][name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_from_a_state(kind: str) -> None:
    model = network()
    optimizer = make_optimizer(config_of(kind), model.parameters(), LR)
    train(model, optimizer, 0)
    again = copy.deepcopy(model)
    resumed = make_optimizer(config_of(kind), again.parameters(), LR)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 1)
    train(again, resumed, 1)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_steps_without_the_compiler() -> None:
    """Importing it takes a second of every worker."""
    code = (
        "import sys, torch; from tunefleet.trainables.config import TrainConfig\n"
        "from tunefleet.trainables.optimizers import make_optimizer\n"
        "p = torch.ones(2, requires_grad=True); p.sum().backward()\n"
        "for kind in ('sgd', 'adam', 'adamw'):\n"
        "    o = make_optimizer(TrainConfig('softmax', lr=0.1, optimizer=kind), [p], 0.1)\n"
        "    o.step(); o.load_state_dict(o.state_dict())\n"
        "o.zero_grad()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
