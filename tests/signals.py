"""What do signals to all of a study's processes cost it? A study is stopped at many moments and resumed.

::

    python -m tests.signals --times 10

Three ways: ``group`` (SIGTERM to the process group: kill -TERM -- -PGID, scancel), ``tree`` (to every
process at once: systemd, a container's stop) and ``timeout`` (coreutils' timeout --preserve-status -s
TERM). Each stop has to end with code 3 within 10 s, or with 0 once the study is done; the resumed study has
to have the winner and the test accuracy of one that nobody stopped. Prints a row per stop and ends with the
number of those that did not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.conftest import ROOT
from tunefleet.study import Study

STUDY = ("--space", "softmax", "--data", "digits", "--trials", "8", "--epochs", "9", "--concurrency", "1")
STUDY = (*STUDY, "--final-seeds", "1", "--wandb", "off", "--study-dir", "study")
LONGEST = 10.0  # seconds from the signal to the end
FIRST = 0.3  # seconds after the start


def command(*arguments: str, data_dir: Path) -> list[str]:
    return [sys.executable, str(ROOT / "search/run.py"), *arguments, "--data-dir", str(data_dir)]


def outcome(folder: Path) -> object:
    study = Study(folder / "study").facts
    return study["status"], study["best"]["trial_id"], study["final"]["test_accuracy"]["values"]


def stop(way: str, folder: Path, after: float, data_dir: Path) -> tuple[int, float, str]:
    """Starts a study, stops it; returns its exit code, the seconds that took and what it said."""
    started = command(*STUDY, data_dir=data_dir)
    if way == "timeout":
        started = ["timeout", "--preserve-status", "-s", "TERM", f"{after:.2f}", *started]
    process = subprocess.Popen(
        started, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after)
    began = time.monotonic()
    if process.poll() is None and way == "group":
        os.killpg(process.pid, signal.SIGTERM)
    elif process.poll() is None and way == "tree":
        for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                each.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    return process.returncode, time.monotonic() - began, said


def main() -> int:
    """Stops studies in every way; returns how many did not end as they have to."""
    parser = argparse.ArgumentParser(prog="python -m tests.signals", description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=10, help="stops in each way (%(default)s)")
    times = parser.parse_args().times
    wrong = 0
    with tempfile.TemporaryDirectory() as top:
        data_dir, alone = Path(top, "data"), Path(top, "alone")
        alone.mkdir()
        began = time.monotonic()
        subprocess.run(command(*STUDY, data_dir=data_dir), cwd=alone, check=True, stdout=subprocess.DEVNULL)
        last, expected = time.monotonic() - began, outcome(alone)
        for way in ("group", "tree", "timeout"):
            for k in range(times):
                folder = Path(top, f"{way}-{k}")
                folder.mkdir()
                after = FIRST + (last - FIRST) * k / max(1, times - 1)
                code, seconds, said = stop(way, folder, after, data_dir)
                exists = (folder / "study" / "study.json").exists()
                right = code in (0, 3) and seconds < LONGEST and "Traceback" not in said
                if code == 3 and exists:
                    resume = command("--resume", "study", data_dir=data_dir)
                    subprocess.run(resume, cwd=folder, capture_output=True, check=False)
                right = right and (outcome(folder) == expected if exists else "nothing was written" in said)
                wrong += not right
                line = said.strip().rpartition("\n")[2][-60:]
                print(f"{way:8}{after:6.1f} s{code:4}{seconds:7.1f} s  {right}  {line}", flush=True)
                if not right:
                    print(said, flush=True)
    print(f"{3 * times} stops, {wrong} not as they have to be")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
