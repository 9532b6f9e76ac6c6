"""A study folder as search/ writes one, made up: with hostile names, and as many trials as are asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

EVIL = '<script>alert("x")</script> & ünï $a_b$'
SPREAD = {  # sampled hyperparameters, as study.json describes them
    "lr": {"low": 1e-4, "high": 0.1, "log": True},
    "schedule": {"values": ["constant", "cosine"]},
}
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
    """Writes a study of which each rung lets every eta-th trial go on; trial 5 diverged at its first epoch.

    Trial k's val_accuracy rises with k and with the epoch; trial 8 is the winner, as study.json says. Of
    more than two classes, each has eight test images, of which the last two are taken for its neighbours.
    """
    rng = np.random.default_rng(0)
    (folder / "best").mkdir(parents=True)
    horizons = [*rungs, epochs]
    reports, rows = [], []
    for k in range(trials):
        reached = sum(k % eta**rung == 0 for rung in range(1, len(horizons)))
        last = horizons[reached]
        accuracy = [0.3 + 0.24 * k / trials + 0.05 * 4 / epochs * epoch for epoch in range(1, last + 1)]
        reports += [report(f"{k:04d}", n, 10.0 * k + n, value) for n, value in enumerate(accuracy, 1)]
        status = "diverged" if k == 5 else "done" if last == epochs else "pruned"
        if status == "diverged":
            reports[-1]["val_accuracy"] = accuracy[-1] = None
        sampled = [_sample(rng, described) for described in ranges.values()]
        rows.append(
            [
                *(f"{k:04d}", status, last, min(reached + 1, len(rungs)), accuracy[-1], accuracy[-1]),
                *(1.0 * last, "vm", *sampled, *FIXED.values()),
            ]
        )
    for seed in (1, 2):
        reports += [report(f"final-{seed}", n, 1e6 + n, None) for n in range(1, epochs + 1)]
    pd.DataFrame(reports).astype({"trial_id": "string"}).to_parquet(folder / "epochs.parquet")
    columns = ["trial_id", "status", "epochs", "rung", "val_accuracy", "best_val_accuracy", "seconds", "node"]
    table = pd.DataFrame(rows, columns=[*columns, *ranges, *FIXED])
    table.to_csv(folder / "trials.csv", index=False)
    _write_best(folder / "best", rng, len(classes), pixels)
    facts = _facts(epochs, rungs) | {
        "ranges": ranges,
        "data": {"name": EVIL, "classes": classes},
        "trials": trials,
        "statuses": table.status.value_counts().to_dict(),
        "epochs_spent": int(table.epochs.sum()),
        "epochs_unpruned": trials * epochs,
    }
    (folder / "study.json").write_text(json.dumps(facts))
    return folder


def remove_trials(folder: Path, status: str = "stopped") -> None:
    """Make a study one without a trial, as search/collect.py writes one."""
    none = {"trials": 0, "statuses": {}, "epochs_spent": 0, "epochs_unpruned": 0, "best": None, "final": None}
    facts = json.loads((folder / "study.json").read_text()) | none | {"status": status}
    (folder / "study.json").write_text(json.dumps(facts))
    for file in (folder / "best").iterdir():
        file.unlink()
    pd.read_parquet(folder / "epochs.parquet").head(0).to_parquet(folder / "epochs.parquet")
    (folder / "trials.csv").write_text("\n")


def report(trial_id: str, epoch: int, at: float, accuracy: float | None) -> dict[str, Any]:
    """Returns a row of epochs.parquet."""
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
        return rng.choice(described["values"])
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


def _facts(epochs: int, rungs: tuple[int, ...]) -> dict[str, Any]:
    return {
        "space": "convnet",
        "status": "done",
        "options": {"epochs": epochs, "pruner": "promote" if rungs else "none"},
        "rungs": list(rungs),
        "seconds": 75.0,
        "machine": "2 CPUs",
        "commit": "0123456789ab",
        "versions": {"torch": "2.15.0"},
        "seed": 0,
        "data_sha256": "d" * 64,
        "split_sha256": "5" * 64,
        "validation_count": 100,
        "command": "search/run.py",
        "best": {"trial_id": "0008", "val_accuracy": 0.66, "config": {"lr": 0.0123456, "schedule": "cosine"}},
        "final": {
            "seeds": [1, 2],
            "diverged": [],
            "failed": [],
            "test_accuracy": {
                "mean": 0.6543,
                "sd": 0.0123,
                "interval95": [0.54, 0.76],
                "values": [0.64, 0.67],
            },
        },
    }
