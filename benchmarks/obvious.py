"""What network and optimizer does one write first? The textbook's, for ours to be compared with."""

from __future__ import annotations

import torch
from torch import nn

from tunefleet.models.backbones import load_network
from tunefleet.models.building import Classifier
from tunefleet.models.space import TrainConfig

SIDE = 32  # pixels, of the images


def obvious_network(config: TrainConfig, classes: int) -> nn.Module:
    """Build Conv → ReLU → MaxPool networks for images ``(N, 3, 32, 32)``; they return logits.

    Parameters are in the order of ours, so that weights can be copied.

    Args:
        config: The trial; hidden and kernel_size must be set where the architecture has them.
        classes: How many logits.

    Raises:
        ValueError: The architecture has no row here.
    """
    name, own = config.space.name, config.model
    h, k = own.get("hidden", 0), own.get("kernel_size", 0)
    if name.startswith("resnet"):
        network = load_network("resnet18", config.weights)
        network.fc = nn.Identity() if name == "resnet_softmax" else nn.Linear(512, classes)
    if name == "resnet_softmax":
        return Classifier(network, nn.Linear(512, classes), frozen=True)
    if name == "resnet_softmax_updatable":
        return network
    if name == "softmax":
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, classes))
    if name == "twolayernn":
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, h), nn.ReLU(), nn.Linear(h, classes))
    if name == "convnet":
        features = 3 * h * ((SIDE + 1 - k) // 2) ** 2
        convolution = (nn.Conv2d(3, 3 * h, k), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(features, classes))
    if name == "mymodel":
        side = SIDE
        for _ in range(3):
            side = (side + 3 - k) // 2
        return nn.Sequential(
            *(
                layer
                for before, after in ((3, h), (h, 2 * h), (2 * h, 4 * h))
                for layer in (nn.Conv2d(before, after, k, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            ),
            *(nn.Flatten(), nn.Linear(4 * h * side**2, 5 * h), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Linear(5 * h, 50), nn.ReLU(), nn.Dropout(0.2), nn.Linear(50, classes)),
        )
    raise ValueError(f"there is no obvious network of {name}")


def obvious_optimizer(c: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a trial over the parameters that are trained."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if c.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=c.lr, weight_decay=c.weight_decay)
    return torch.optim.SGD(parameters, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
