"""A port of Ray's tune-pytorch-cifar, whose training loop most studies on Ray Tune have.

Kept: a dataset with transforms and two DataLoaders per trial, the loop with ``.item()`` in each step, a
checkpoint with each report, Tune's defaults, one worker process per trial, ASHA with its reduction
factor of 2. Changed: our thirteen networks and hyperparameters; our split of the images, from the decoded
copy that ours reads, too, in place of torchvision's CIFAR10, which holds the same arrays; one CPU per trial,
so that two run at once on two cores; and no worker processes of the DataLoader on a CPU, where they only
compete (0 against 2: docs/log).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from tunefleet.benchmarks.obvious import obvious_network, obvious_optimizer
from tunefleet.benchmarks.task import Row, Task, no_op_accuracy, row
from tunefleet.trainables.data import ImageData, load_split, split_validation

LOADER_WORKERS = {"cpu": 0, "cuda": 4}  # processes per DataLoader


class ImagesInMemory(Dataset[tuple[Any, int]]):
    """Like torchvision.datasets.CIFAR10: each image of an array becomes a PIL image and is transformed."""

    def __init__(self, data: ImageData) -> None:
        images, self.labels = load_split(data, "train")
        self.images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        self.transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def train_cifar(config: dict[str, Any], task: Task) -> None:
    """Train one configuration."""
    if task.no_op:
        for epoch in range(1, task.epochs + 1):
            tune.report(row(config["trial"], epoch, no_op_accuracy(config["trial"], epoch)))
        return
    c, device = task.config(config["trial"]), torch.device(task.device)
    data = task.images()
    torch.manual_seed(c.seed)
    net = obvious_network(c, len(data.classes)).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = obvious_optimizer(c, net)
    trainset = ImagesInMemory(data)
    train, val = (Subset(trainset, part.tolist()) for part in split_validation(trainset.labels))
    workers = LOADER_WORKERS[task.device]
    trainloader = DataLoader(train, batch_size=c.batch_size, shuffle=True, num_workers=workers)
    valloader = DataLoader(val, batch_size=c.batch_size, shuffle=True, num_workers=workers)

    for epoch in range(1, task.epochs + 1):
        net.train()
        running_loss = 0.0
        for inputs, labels in trainloader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(net(inputs), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()

        net.eval()
        total = correct = 0
        for inputs, labels in valloader:
            with torch.no_grad():
                inputs, labels = inputs.to(device), labels.to(device)
                predicted = net(inputs).argmax(1)
                total += labels.size(0)
                correct += (predicted == labels).sum().item()

        with tempfile.TemporaryDirectory() as folder:
            torch.save((net.state_dict(), optimizer.state_dict()), Path(folder, "checkpoint.pt"))
            tune.report(
                row(config["trial"], epoch, correct / total),
                checkpoint=tune.Checkpoint.from_directory(folder),
            )


def run(task: Task) -> list[Row]:
    """Run the study as the tutorial's main() does."""
    scheduler = ASHAScheduler(max_t=task.epochs, grace_period=1, reduction_factor=2) if task.pruning else None
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(train_cifar, task=task),
            resources={"cpu": 1, "gpu": 1 / task.workers if task.device == "cuda" else 0},
        ),
        tune_config=tune.TuneConfig(metric="val_accuracy", mode="max", scheduler=scheduler, num_samples=1),
        param_space={"trial": tune.grid_search(list(range(len(task.configurations))))},
        run_config=tune.RunConfig(storage_path=task.folder),
    )
    results = tuner.fit()
    assert not results.errors, results.errors
    rows: list[Row] = []
    for k in range(len(results)):
        frame = results[k].metrics_dataframe
        assert frame is not None
        rows += json.loads(frame[["trial", "epoch", "val_accuracy", "finished_at"]].to_json(orient="records"))
    return rows
