"""How does a running study feed W&B without ever waiting for it? A process beside it reads its journal.

The study writes ``reports.jsonl`` as it always does; the other process (``tunefleet sync STUDY
--follow``) reads along at low priority. It may hang, crash or never start: the study notices
nothing. When the study ends it says so by closing the pipe, waits a bounded time, and says what W&B
does not have yet and what brings it there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tunefleet.cli import shell
from tunefleet.search.display import shown
from tunefleet.search.wandb_options import WandbOptions
from tunefleet.search.wandb_runs import standing, tidy

END_SECONDS = 12.0  # the study is done: wait so long for the last runs
STOP_SECONDS = 3.0  # after a Ctrl-C
POLL_SECONDS = 0.05  # between looks whether it has ended


class Sidecar:
    """The process that feeds W&B beside one study.

    Args:
        folder: The study's.
        options: Where its runs go; with mode off there is no process.
    """

    def __init__(self, folder: Path, options: WandbOptions) -> None:
        self.folder, self.options = folder, options
        self.process: subprocess.Popen[bytes] | None = None
        self.given_up = False

    def start(self) -> None:
        """Begin to feed W&B."""
        if self.options.mode == "off":
            return
        root = Path(__file__).parents[2]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
            **({"WANDB_API_KEY": self.options.key} if self.options.key else {}),
        }
        log = self.folder / "wandb" / "sync.log"
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError))  # the study is whole without it
            log.parent.mkdir(exist_ok=True)
            file = stack.enter_context(log.open("wb"))
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "tunefleet.search.wandb_sync",  # -P: not a module of the user's folder
                    str(self.folder),
                    "--follow",
                ],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,  # a Ctrl-C is the study's; and its group can be ended whole
            )

    def give_up(self, reason: str) -> None:
        """Waits for W&B no longer; a signal's answer once the study is done."""
        self.given_up = True

    def end(self, seconds: float) -> str:
        """Ends the process.

        Args:
            seconds: How long it may take to send the rest.

        Returns:
            How the study stands with W&B and what to do about it; nothing with mode off.
        """
        if self.options.mode == "off":
            return ""
        why = ""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            began = time.monotonic()
            while self.process.poll() is None and time.monotonic() - began < seconds and not self.given_up:
                time.sleep(POLL_SECONDS)
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)  # wandb's own process, too
                self.process.wait()
                tidy(self.folder)
                why = f"given up after {time.monotonic() - began:.0f} s"
            log = self.folder / "wandb" / "sync.log"
            if self.process.returncode and not why:
                why = f"the process that sends them ended with {self.process.returncode}, see {shown(log)}"
            with contextlib.suppress(OSError):
                if not log.stat().st_size:
                    log.unlink()
            self.process = None
        try:
            line, missing = standing(self.folder, self.options, why)
        except (OSError, ValueError) as error:  # the study is whole all the same
            line, missing = str(error), True
        command = f"; to upload: {shell('tunefleet', 'sync', shown(self.folder))}"
        return f"W&B: {line}{command if missing or self.options.mode == 'offline' else ''}"
