"""Evaluate a trained network on the test split, which only this file opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tunefleet.trainables.data import load_split
from tunefleet.trainables.training import TrainingRun, class_metrics

MODEL_FILE = "model.pt"
MODEL_VERSION = 1  # of its content
MISCLASSIFIED = 64  # images kept for the report: the mistakes made with most confidence


def result_files(tag: str = "") -> tuple[str, str, str]:
    """Return the names of the files that ``evaluate_test`` writes: predictions, mistakes, network."""
    return f"predictions{tag}.parquet", f"misclassified{tag}.npz", model_file(tag)


def model_file(tag: str = "") -> str:
    """Return the name of the file with a seed's trained network, or the state of a training of its own."""
    return f"{Path(MODEL_FILE).stem}{tag}{Path(MODEL_FILE).suffix}"


def trained_network(run: TrainingRun) -> dict[str, Any]:
    """Return all that predicting needs, readable with ``weights_only=True``: the network, backbone included.

    ``stored_size`` and ``image_size`` are pixels per side, of decoded images and as the network sees them;
    ``mean`` and ``std`` normalise fractions 0..1; ``network`` is its state, on the CPU; ``batch_size`` is of
    images that it was tested with at a time.
    """
    images = torch.empty((1, *run.data.image_shape), dtype=torch.uint8)
    return {
        "format_version": MODEL_VERSION,
        "builder": run.config.space.reference,
        "config": run.config.to_dict(),
        "classes": list(run.data.classes),
        "stored_size": run.data.image_shape[1],
        "image_size": run.config.image_size,
        "mean": list(run.pipeline.mean),
        "std": list(run.pipeline.std),
        "device": run.settings.device,
        "precision": run.settings.precision,
        "channels_last": run.settings.channels_last,
        "batch_size": run.eval_batch(images),
        "frozen": bool(getattr(run.model, "frozen", False)),
        "network": {
            name: value.cpu() if isinstance(value, torch.Tensor) else value
            for name, value in run.model.state_dict().items()
        },
    }


def evaluate_test(run: TrainingRun, folder: Path | None = None, tag: str = "") -> dict[str, float]:
    """Evaluate a trained network on every test image once.

    Args:
        run: The trained network, with its data.
        folder: Where to write ``predictions{tag}.parquet``, one row per test image: index, label,
            predicted, confidence (probability of the predicted class) and one probability column per
            class, ``p0`` …; and ``misclassified{tag}.npz``: index ``(M,)`` into these rows and images,
            uint8 ``(M, 3, H, W)``, of at most MISCLASSIFIED mistakes, most confident first; and
            ``model{tag}.pt``, as ``trained_network`` returns it.
        tag: Part of the files' names.

    Returns:
        test_accuracy, test_balanced_accuracy, test_macro_f1 (fractions 0..1) and test_loss (the run's own).
    """
    images, mapped = load_split(run.data, "test")
    labels = np.array(mapped)  # torch warns of arrays that it cannot write
    probabilities, loss = run.predict_and_loss(images, torch.from_numpy(labels))
    confidence, predicted = (values.numpy() for values in probabilities.max(1))
    if folder is not None:
        columns = {
            "index": np.arange(len(labels)),
            "label": labels,
            "predicted": predicted,
            "confidence": confidence,
            **{f"p{k}": probabilities[:, k].numpy() for k in range(probabilities.shape[1])},
        }
        wrong = np.flatnonzero(predicted != labels)
        wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISCLASSIFIED]
        folder.mkdir(exist_ok=True)
        predictions, misclassified, network = (folder / name for name in result_files(tag))
        torch.save(trained_network(run), network)
        with misclassified.open("wb") as stream:
            np.savez(stream, index=wrong, images=images[wrong])
        with predictions.open("wb") as stream:
            pq.write_table(pa.table(columns), stream)
    classes = probabilities.shape[1]
    pairs = torch.from_numpy(labels * classes + predicted)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    metrics = {f"test_{name}": value for name, value in class_metrics(confusion).items()}
    return metrics | {"test_loss": loss}
