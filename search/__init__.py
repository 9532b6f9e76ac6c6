"""What one study does: suggest, schedule, prune and promote trials, and retrain the winner.

Ray and Tune read their variables when they are imported, workers' allocators theirs when a worker
starts. So they are set here, before any module of this package can import Ray. A value that the user
has set wins.
"""

import os
import sys
import tempfile

_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # set explicitly, or every start prints a warning (Ray 2.60)
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's boxes; search/display.py shows the study
    "RAY_ENABLE_AUTO_CONNECT": "0",  # or a call in the second after ray.shutdown() starts another Ray
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative --data means the same in a worker
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # or raylets' texts come again at the end, unfiltered (engine.py)
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves trials on a shared host
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for the next check; the default is 2 s
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or print() passes by sys.stdout, and so by a trial's log
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # or Tune restarts such a trial itself, unseen by us
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # reports.jsonl is the record
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are in reports.jsonl
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # search/run.py answers Ctrl-C within seconds
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own snapshots are never read
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # or workers start one after another; far fewer are offered
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # glibc gives freed activations back to the kernel after every micro-batch, and has them zeroed again
    # for the next: up to a third of convnet's step (docs/log). Bytes.
    "MALLOC_MMAP_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
if os.path.expanduser("~") == "~":  # noqa: PTH111  a container's user without one; Ray cannot be imported then
    os.environ["HOME"] = tempfile.gettempdir()
if os.environ.get("RAY_ADDRESS", "local") in ("", "local"):
    _ENVIRONMENT["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # a Ray of our own listens on 127.0.0.1 alone
if "ray" in sys.modules:  # it has settled how it authenticates; servers started now must do the same
    del _ENVIRONMENT["RAY_AUTH_MODE"]
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
