"""The ways to run the same trials, one per file.

``python -m tunefleet.benchmarks.arms NAME TASK ROWS`` runs it.
"""

ARMS = {  # name: module, and what it is
    "ours": ("ours", "tunefleet's engine, training code and pruning"),
    "tutorial": ("tutorial", "a port of Ray's tune-pytorch-cifar: DataLoader, transforms, Tune's defaults"),
    "tune-plain": ("tune_plain", "Ray Tune used well, with our training code"),
    "joblib": ("joblib_pool", "joblib's processes, with our training code; never prunes"),
    "optuna-halving": ("optuna_study", "Optuna in one process, SuccessiveHalvingPruner, our training code"),
}
