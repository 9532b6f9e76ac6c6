"""A study folder as search/ writes one, made up: with hostile names, and any number of trials."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tunefleet.journal import records, winner
from tunefleet.metric import Metric
from tunefleet.study import Study, write_result

EVIL = '<script>alert("x")</script> & ünï $a_b$'
SPREAD = {  # sampled hyperparameters, as study.json describes them
    "lr": {"low": 1e-4, "high": 0.1, "log": True},
    "schedule": {"values": ["constant", "cosine"]},
}
MSE = Metric("val_mse", "min")
FIXED = {  # columns of trials.csv that a study does not sample
    "optimizer": "sgd",
    "weight_decay": 0.0,
    "momentum": 0.9,
    "batch_size": 128,
    "augment": "none",
    "label_smoothing": 0.0,
    "image_size": 32,
    "weights": "none",
    "seed": 0,
}


def write_study(
    folder: Path,
    *,
    trials: int = 12,
    epochs: int = 4,
    rungs: tuple[int, ...] = (1,),
    eta: int = 4,
    ranges: dict[str, Any] = SPREAD,
    classes: tuple[str, ...] = (EVIL, "dog"),
    pixels: int = 8,
) -> Path:
    """Writes a study whose rungs each promote every eta-th trial; trial 5 diverged at its first epoch.

    Trial k's val_accuracy rises with k and with the epoch; of 12, trial 8 is the winner. Of
    more than two classes, each has eight test images, of which the last two are taken for its neighbours.
    """
    rng = np.random.default_rng(0)
    (folder / "best").mkdir(parents=True)
    horizons = [*rungs, epochs]
    events: list[dict[str, Any]] = []
    for k in range(trials):
        reached = sum(k % eta**rung == 0 for rung in range(1, len(horizons)))
        last = horizons[reached]
        sampled = {name: _sample(rng, described) for name, described in ranges.items()}
        events.append({"trial_id": f"{k:04d}", "epoch": 0, "config": sampled | FIXED | {"epochs": epochs}})
        for epoch in range(1, last + 1):
            accuracy = 0.3 + 0.24 * k / trials + 0.05 * 4 / epochs * epoch
            events.append(report(f"{k:04d}", epoch, 10.0 * k + epoch, accuracy) | {"node": "vm"})
        if k == 5:
            events[-1] |= {"status": "diverged", "val_accuracy": None}
        elif last == epochs:
            events[-1]["status"] = "done"
    best = winner(records(events))
    for seed, accuracy in ((1, 0.6456), (2, 0.6630)):  # mean 0.6543, sd 0.0123
        of_seed = (best.config if best else FIXED) | {"epochs": epochs, "seed": seed, "refit": True}
        events.append({"trial_id": f"final-{seed}", "epoch": 0, "config": of_seed})
        events += [report(f"final-{seed}", n, 1e6 + n, None) for n in range(1, epochs + 1)]
        events[-1] |= {"status": "done", "test_accuracy": accuracy}
    _write_best(folder / "best", rng, len(classes), pixels)
    content = spec(
        options={"epochs": epochs, "pruner": "promote" if rungs else "none"},
        rungs=rungs,
        ranges=ranges,
        data={"name": EVIL, "classes": classes},
    )
    (folder / "study.json").write_text(json.dumps(content))
    write_events(folder, events)
    return folder


def write_own_study(folder: Path, metric: Metric = MSE, *, tested: bool = True, **size: Any) -> Path:
    """Writes the same study of a training of somebody's own.

    Where accuracy is a, the metric is 100 · (1 - a): of trial 8, the winner, 34 at last. Of the fresh seeds
    it is 36 and 34, and 35.44 and 33.70 on the test split, where there is one.
    """
    write_study(folder, classes=(), **size)
    for file in (folder / "best").iterdir():
        file.unlink()
    change(folder, metric={"name": metric.name, "mode": metric.mode}, data={"name": "own", "classes": []})
    change(folder, space="mine", data_sha256="", split_sha256="", validation_count=0)

    def edit(event: dict[str, Any]) -> dict[str, Any]:
        if event["epoch"] == 0:
            own = ("lr", "schedule", "epochs", "seed", *size.get("ranges", {}))
            config = {name: value for name, value in event["config"].items() if name in own}
            return event | {"config": {"architecture": "mine"} | config}
        of_us = ("trial_id", "epoch", "epoch_seconds", "finished_at", "node", "status")
        kept = {name: event[name] for name in of_us if name in event}
        accuracy, test = event["val_accuracy"], event.get("test_accuracy")
        value = None if accuracy is None else round(100 * (1 - accuracy), 6)
        kept |= {metric.name: value, "train_mse": 1 / event["epoch"], "grad_norm": 2}
        if event["trial_id"].startswith("final"):
            kept[metric.name] = {"final-1": 36.0, "final-2": 34.0}[event["trial_id"]]
        if test is not None:
            kept |= {"tested": tested} | ({metric.test_name: round(100 * (1 - test), 6)} if tested else {})
        return kept

    edit_events(folder, edit)
    return folder


def write_events(folder: Path, events: list[dict[str, Any]], status: str = "done") -> None:
    """Writes a study's journal, in the old form, and its result.json."""
    (folder / "result.json").unlink(missing_ok=True)
    (folder / "reports.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_result(Study(folder), status, 75.0)


def with_changes(study: Any, **attributes: Any) -> Any:
    """Returns a copy of a loaded study with other attributes."""
    other = copy.copy(study)
    other.__dict__.update(attributes)
    return other


def edit_events(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Has other events in a study's journal; those of which nothing is left are dropped."""
    lines = (folder / "reports.jsonl").read_text().splitlines()
    write_events(folder, [event for line in lines if (event := edit(json.loads(line)))])


def change(folder: Path, **spec: Any) -> None:
    """Has other values in study.json."""
    file = folder / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | spec))


def remove_trials(folder: Path, status: str = "stopped") -> None:
    """Makes a study one without a trial."""
    for file in (folder / "best").iterdir():
        file.unlink()
    write_events(folder, [], status)


def report(trial_id: str, epoch: int, at: float, accuracy: float | None) -> dict[str, Any]:
    """Returns a report of an epoch."""
    return {
        "trial_id": trial_id,
        "epoch": epoch,
        "train_loss": 1 / epoch,
        "train_accuracy": 0.4 + 0.01 * epoch,
        "val_loss": None if accuracy is None else 1.2 / epoch,
        "val_accuracy": accuracy,
        "lr": 0.1,
        "epoch_seconds": 1.0,
        "finished_at": at,
    }


def _sample(rng: np.random.Generator, described: dict[str, Any]) -> Any:
    if "values" in described:
        return described["values"][int(rng.integers(len(described["values"])))]
    low, high = described["low"], described["high"]
    return 10 ** rng.uniform(np.log10(low), np.log10(high)) if described["log"] else rng.uniform(low, high)


def _write_best(best: Path, rng: np.random.Generator, classes: int, pixels: int) -> None:
    label, predicted = np.array([0, 0, 1, 1, 0, 1]), np.array([0, 1, 1, 0, 0, 1])
    if classes > 2:
        label = np.repeat(np.arange(classes), 8)
        predicted = (label + np.tile([0, 0, 0, 0, 0, 0, 1, 2], classes)) % classes
    columns = {"index": range(len(label)), "label": label, "predicted": predicted, "confidence": 0.75}
    columns |= {f"p{k}": np.float32(1 / classes) for k in range(classes)}
    pd.DataFrame(columns).to_parquet(best / "predictions.parquet")
    images = rng.integers(0, 256, (2, 3, pixels, pixels), dtype=np.uint8)
    np.savez(best / "misclassified.npz", index=np.array([3, 1]), images=images)
    np.save(best / "first_layer.npy", rng.normal(size=(5, 3, 3, 3)))


def spec(**other: Any) -> dict[str, Any]:
    """Returns what a study.json holds."""
    return {
        "space": "convnet",
        "options": {"epochs": 4, "pruner": "promote"},
        "rungs": [1],
        "data": {"name": "digits", "classes": ["cat", "dog"]},
        "machine": "2 CPUs",
        "commit": "0123456789ab",
        "versions": {"torch": "2.15.0"},
        "levers": {"device": "cpu", "precision": "fp32", "channels_last": True, "micro_batch_bytes": None},
        "seed": 0,
        "data_sha256": "d" * 64,
        "split_sha256": "5" * 64,
        "validation_count": 100,
        "command": "search/run.py",
    } | other
