"""The ways to run the same trials. Each file is one, run as ``python -m benchmarks.arms.NAME TASK ROWS``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.task import Row, Task

ARMS = {  # name: module, and what it is
    "ours": ("ours", "tunefleet's engine, training code and pruning"),
    "tutorial": ("tutorial", "a port of Ray's tune-pytorch-cifar: DataLoader, transforms, Tune's defaults"),
    "tune-plain": ("tune_plain", "Ray Tune used well, with our training code"),
    "joblib": ("joblib_pool", "joblib's processes, with our training code; never prunes"),
    "optuna-halving": ("optuna_study", "Optuna in one process, SuccessiveHalvingPruner, our training code"),
    "optuna-hyperband": ("optuna_study", "Optuna in one process, HyperbandPruner, our training code"),
}


def serve(run: Callable[[Task], list[Row]]) -> None:
    """Reads the task and writes the rows that the command line names."""
    task, rows = (Path(name) for name in sys.argv[1:3])
    rows.write_text(json.dumps(run(Task.read(task))))
