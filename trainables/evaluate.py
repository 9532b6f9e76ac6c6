"""How good is a trained network on images that no choice has seen? Only this file opens the test split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from trainables.data import load_split
from trainables.training import TrainingRun


def evaluate_test(run: TrainingRun, predictions: Path | None = None) -> float:
    """Evaluates a trained network on every test image once.

    Args:
        run: The trained network, with its data.
        predictions: Where to write one row per test image: index, label, predicted, confidence
            (probability of the predicted class) and one probability column per class, ``p0`` ….

    Returns:
        test_accuracy, a fraction 0..1.
    """
    images, labels = load_split(run.data, "test")
    probabilities = run.predict(torch.from_numpy(np.array(images)))
    confidence, predicted = probabilities.max(1)
    if predictions is not None:
        columns = {
            "index": np.arange(len(labels)),
            "label": labels,
            "predicted": predicted.numpy(),
            "confidence": confidence.numpy(),
            **{f"p{k}": probabilities[:, k].numpy() for k in range(probabilities.shape[1])},
        }
        temporary = predictions.with_suffix(".tmp")
        pq.write_table(pa.table(columns), temporary)
        temporary.replace(predictions)
    return float((predicted.numpy() == labels).mean())
