"""Studies as a user starts them, in processes of their own, several at a time."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.gpu import DEVICE, ON_GPU
from tunefleet.journal import Journal
from tunefleet.study import read_study

DATA = os.environ.get("GPU_TESTS_DATA", "digits")  # benchmarks/gpu.sh kill has real images
SECONDS = 100 if ON_GPU else 400  # that a study may take; a rehearsal shares two cores
KILLED_AFTER = 8  # reports
KILLED = (
    "--space",
    "twolayernn",
    "--concurrency",
    "1",
    "--trials",
    "6",
    "--epochs",
    "9",
    "--final-seeds",
    "1",
)
# small batches: while its trials last, the fourth worker starts, too
FOUR = ("--space", "softmax", "--trials", "32", "--final-seeds", "1", "--fix", "batch_size=2")
STUDIES = {
    "four": (*FOUR, "--gpus-per-trial", "0.25") if ON_GPU else FOUR,
    "undisturbed": KILLED,
    "killed": KILLED,
    "hidden": ("--space", "softmax", "--trials", "1", "--epochs", "1", "--final-seeds", "0"),
    "refused": ("--space", "softmax", "--dry-run"),
}


def uuid() -> str:
    """Returns the first GPU's UUID as CUDA_VISIBLE_DEVICES takes it."""
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


class Started:
    """One of STUDIES at work.

    Args:
        name: Which.
        folder: A new one, for the study's.
        data_dir: Where images are cached.
    """

    def __init__(self, name: str, folder: Path, data_dir: Path) -> None:
        self.name, self.study, self.data_dir = name, folder / "study", data_dir
        self.environment = os.environ | {"COLUMNS": "80"}
        if name in ("hidden", "refused"):
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        elif name == "undisturbed" and ON_GPU:
            self.environment["CUDA_VISIBLE_DEVICES"] = uuid()
        device = {"refused": "cuda", "hidden": "auto"}.get(name, DEVICE)
        self._start(*STUDIES[name], "--data", DATA, "--device", device, "--study-dir", self.study)
        self._thread = threading.Thread(target=self._kill_and_resume)
        if name == "killed":
            self._thread.start()

    def _start(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "tests.gpu.driver", *arguments]
        self.process = subprocess.Popen(
            [*map(str, command), "--data-dir", str(self.data_dir), "--wandb", "off"],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def _kill_and_resume(self) -> None:
        journal, end = Journal(self.study / "reports.jsonl"), time.monotonic() + SECONDS
        while sum("val_loss" in event for event in journal.read()) < KILLED_AFTER:
            if time.monotonic() > end or self.process.poll() is not None:
                return  # which the test will say
            time.sleep(0.01)
        self.process.kill()
        self.process.communicate()
        self._start("--resume", self.study)

    def finish(self) -> tuple[int, str, str]:
        """Waits for the end; returns exit code, stdout and stderr."""
        if self._thread.ident:
            self._thread.join()
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err

    def events(self) -> list[dict]:
        """Returns the journal so far."""
        return Journal(self.study / "reports.jsonl").read()

    def content(self) -> dict:
        """Returns all that is known of the study but its trials."""
        return read_study(self.study)

    def end(self) -> None:
        """Ends the study if it still runs."""
        if self._thread.ident:
            self._thread.join()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
