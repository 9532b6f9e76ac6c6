"""How good is the winner, honestly? Fresh seeds, retrained in full; the test split opened once each.

Nothing is left to choose by then, so they train on the validation images, too (``refit``). The seeds
run through the same engine as every trial (search/jobs.py starts them when the search is over); this
file says what their results mean.
"""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from tunefleet.search.journal import TrialRecord


def summarise(values: list[float]) -> dict[str, Any]:
    """Returns mean, standard deviation and Student's 95 % interval of the mean over seeds.

    Args:
        values: One test_accuracy per seed, fractions 0..1.

    Returns:
        ``values``, ``mean``, ``sd`` (n - 1 in the denominator) and ``interval95``; the last two are
        None for fewer than two seeds. The interval speaks of the seeds, not of other test images.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"values": values, "mean": mean, "sd": None, "interval95": None}
    sd = float(np.std(values, ddof=1))
    half = float(stdtrit(len(values) - 1, 0.975)) * sd / math.sqrt(len(values))
    return {
        "values": values,
        "mean": mean,
        "sd": sd,
        "interval95": [max(0.0, mean - half), min(1.0, mean + half)],
    }


def final_results(trials: dict[str, TrialRecord]) -> dict[str, Any] | None:
    """Returns ``final`` of study.json; None where no seed has ended.

    A diverged seed is tested like the others, and its accuracy counts: a mean without it would
    flatter. ``failed`` are the seeds that ended by an error, which say nothing of the winner.
    """
    ended = [trial for trial in trials.values() if trial.is_final and trial.status]
    if not ended:
        return None
    tested = [trial for trial in ended if trial.status in ("done", "diverged")]
    return {
        "seeds": [trial.config["seed"] for trial in tested],
        "diverged": [trial.config["seed"] for trial in tested if trial.status == "diverged"],
        "failed": [trial.config["seed"] for trial in ended if trial not in tested],
        "test_accuracy": summarise([trial.reports[trial.epoch]["test_accuracy"] for trial in tested])
        if tested
        else None,
    }


def keep_best(study_dir: Path, trials: dict[str, TrialRecord]) -> None:
    """Fills best/ from the first finished seed.

    config.json, checkpoint.pt, predictions.parquet, misclassified.npz and first_layer.npy: the
    first layer's weights ``(out, in, k, k)`` or ``(out, in)``, of the head
    where the backbone is frozen, whose own first layer was not trained.
    """
    done = [trial for trial in trials.values() if trial.is_final and trial.status == "done"]
    if not done:
        return
    best = study_dir / "best"
    (best / "config.json").write_text(json.dumps(done[0].config, indent=2) + "\n")
    checkpoint = study_dir / "checkpoints" / f"{done[0].trial_id}.pt"
    if checkpoint.exists() and (network := _network_of(checkpoint)):
        first = next(tensor for tensor in network.values() if tensor.dim() >= 2)
        np.save(best / "first_layer.npy", first.float().numpy())
        checkpoint.replace(best / "checkpoint.pt")
    for name in ("predictions.parquet", "misclassified.npz"):
        file = best / name
        of_seed = file.with_stem(f"{file.stem}-{done[0].trial_id}")
        if of_seed.exists():
            of_seed.replace(file)
        for others in best.glob(f"{file.stem}-*{file.suffix}"):
            others.unlink()


def _network_of(checkpoint: Path) -> dict[str, Any] | None:
    """Return a checkpoint's network; None, and a line that says so, where the file is damaged."""
    import torch  # takes a second, and commands read final results without it

    with contextlib.suppress(zipfile.BadZipFile, EOFError):
        with zipfile.ZipFile(checkpoint) as archive:  # torch.load checks no sum (2.15)
            whole = archive.testzip() is None
        if whole:
            network: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)["network"]
            return network
    print(f"best/ has no checkpoint: {checkpoint.name} is damaged; test accuracies and predictions are whole")
    return None
