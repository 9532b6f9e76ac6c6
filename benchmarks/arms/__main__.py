"""Run one arm: read the task that the command line names, and write its rows.

``search``, which sets variables of Ray and Tune, is imported by ours alone: others have Tune's defaults.
Arms are imported, not run as ``__main__``, or pickles of what they define would hold all that it touches.
"""

import importlib
import json
import sys
from pathlib import Path

from tunefleet.benchmarks.arms import ARMS
from tunefleet.benchmarks.task import Task

name, task, rows = sys.argv[1:]
arm = importlib.import_module(f"tunefleet.benchmarks.arms.{ARMS[name][0]}")
Path(rows).write_text(json.dumps(arm.run(Task.read(Path(task)))))
if name == "ours":
    arm.leave(0)  # as tunefleet search ends
