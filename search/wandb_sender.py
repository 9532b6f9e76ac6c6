"""How does W&B take a run? Opened where it stands, given the rows it lacks, closed, and asked about.

The only file that imports wandb (0.31), and does so where it is used: a second of CPU, not to be paid
before there is something to send.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunefleet.files import says_full
from tunefleet.search.wandb_options import WandbOptions
from tunefleet.search.wandb_runs import NO_ROOM, STUDY, Planned, State, legible
from tunefleet.study import read_study

ANSWER_SECONDS = 4  # that one request may take
STEP_SECONDS = 5.0  # to open, fill or close a run, a question, or letting go, all its requests together
CONFIRM_SECONDS = 4.0  # for rows that were taken to show
SLOW_SECONDS = 1.0  # to finish a run: the server may be ill, so ask before the next one
BATCH = 16  # runs finished between questions to the server
OPEN_RUNS = 128  # of trials at work, kept open; more and the quietest is closed
SETTINGS: dict[str, Any] = {  # of wandb 0.31: nothing but our rows, and no wait without an end
    "silent": True,
    "console": "off",
    "stop_fn": lambda: None,  # "Stop run" on the page would raise a KeyboardInterrupt here
    "disable_git": True,
    "disable_code": True,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 2.0,
    "x_file_stream_transmit_interval": 2.0,
    "max_end_of_run_history_metrics": 0,
    "init_timeout": ANSWER_SECONDS,
    "finish_timeout": ANSWER_SECONDS,
    "finish_timeout_raises": True,
    **{
        f"x_{channel}_{name}": value
        for channel in ("graphql", "file_stream", "file_transfer")
        for name, value in (
            ("retry_max", 1),
            ("retry_wait_min_seconds", 0.5),
            ("retry_wait_max_seconds", 1.0),
            ("timeout_seconds", ANSWER_SECONDS),
        )
    },
}


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Raises TimeoutError where one step of wandb takes longer than its own limits say.

    Its settings bound each request; once a sync beside a failing server took 22 s all the same.
    """

    def give_up(*_: Any) -> None:
        raise TimeoutError("did not respond in time")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, STEP_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Trouble(Exception):  # noqa: N818  it is W&B's, and no error of ours
    """W&B did not take what it was given; one line that says why."""


class Sender:
    """Brings runs to W&B and keeps those of trials at work open, so that they are live.

    Args:
        folder: The study's.
        options: Where to.
        state: What is known to be there; kept up to date on disk.
    """

    def __init__(self, folder: Path, options: WandbOptions, state: State) -> None:
        self.folder, self.options, self.state = folder, options, state
        self.online = options.mode == "online"
        self.open: dict[str, Any] = {}  # wandb's runs by key, the quietest first
        self.sent: dict[str, int] = {}  # rows, by key
        self.asked = not self.online  # whether the server was asked what it has from before
        self.written: list[Planned] = []  # offline and closed, but whole only after end()
        self.doubted: set[str] = set()  # keys of runs that the server had once

    def doubt(self) -> None:
        """Take nothing for granted that the server confirmed earlier: it may have forgotten runs."""
        self.doubted, self.state.runs = set(self.state.runs), {}

    def send(self, runs: list[Planned], *, live: bool) -> None:
        """Brings W&B up to date.

        Args:
            runs: All of the study.
            live: Runs of trials at work stay open; else all are closed.

        Raises:
            Trouble: W&B did not take it all; what it confirmed is noted.
        """
        missing = self.state.missing(runs, self.options.mode)
        missing = [run for run in missing if run not in self.written]
        if not missing:
            return
        with _in_one_line(self.options.key):
            if not self.asked:
                missing, self.asked = self._confirm(missing), True
                if self.doubted & {run.key for run in missing}:
                    self.state.sweep = None  # it was made of runs that are gone
            closed: list[Planned] = []
            for run in missing:
                with patience():
                    self._log(run)
                if live and not run.ended:
                    continue
                began = time.monotonic()
                with patience():
                    self._close(run)
                closed.append(run)
                if len(closed) >= BATCH or time.monotonic() - began > SLOW_SECONDS:
                    self._check(closed)
                    closed = []
            self._check(closed)

    def make_sweep(self, runs: list[Planned]) -> None:
        """Shows the study as a W&B sweep with its trials as prior runs, once.

        Raises:
            Trouble: W&B did not take it.
        """
        import wandb

        config = sweep_config(read_study(self.folder), self.options.group or legible(self.folder.name))
        ids = [run.run_id for run in runs if run.job_type == "trial"]
        with _in_one_line(self.options.key), contextlib.redirect_stdout(None):
            self._set_up()
            self.state.sweep = wandb.sweep(
                config, entity=self.state.entity, project=self.options.project, prior_runs=ids
            )
        self.state.save()

    def end(self) -> None:
        """Lets go of W&B; offline runs are whole from here on, and another attempt may begin."""
        import wandb

        with contextlib.suppress(TimeoutError), patience():
            wandb.teardown()
        self.state.offline |= {run.key: run.record for run in self.written}
        self.state.save()
        self.open, self.sent, self.written, self.asked = {}, {}, [], not self.online

    def _set_up(self) -> None:
        import wandb

        for name in ("data", "cache"):  # else ~/.local/share/wandb and ~/.cache/wandb
            os.environ[f"WANDB_{name.upper()}_DIR"] = str(self.folder / "wandb" / "tmp" / name)
        wandb.setup(settings=wandb.Settings(**SETTINGS))

    def _run(self, run: Planned) -> Any:
        """Returns wandb's run, opened where it is not."""
        import wandb

        if run.key not in self.open:
            if len(self.open) >= OPEN_RUNS:
                self.open.pop(next(iter(self.open))).finish()
            if not self.online:
                remove_offline(self.folder, run)
            self._set_up()
            opened = wandb.init(
                mode="online" if self.online else "offline",
                project=self.options.project,
                entity=self.options.entity,
                group=self.options.group or legible(self.folder.name),
                job_type=run.job_type,
                id=run.run_id,
                name=legible(self.folder.name) if run.key == STUDY else run.key,
                tags=self.options.tags or None,
                dir=self.folder,
                config=run.config,
                reinit="create_new",
                resume="allow" if self.online else None,
            )
            opened.define_metric("epoch", hidden=True)
            opened.define_metric("*", step_metric="epoch")
            self.sent[run.key] = opened.starting_step if run.rows else 0
            self.state.entity = self.state.entity or opened.entity
            self.open[run.key] = opened
        return self.open[run.key]

    def _log(self, run: Planned) -> None:
        opened = self._run(run)
        rows = run.rows[self.sent[run.key] :]
        if rows:
            self.open[run.key] = self.open.pop(run.key)  # it is the least quiet now
        for row in rows:
            opened.log({**row, "_timestamp": row["finished_at"]})  # a step= would keep the row in memory
        self.sent[run.key] = max(self.sent[run.key], len(run.rows))

    def _close(self, run: Planned) -> None:
        opened = self.open.pop(run.key)
        if run.media:
            opened.log(media(self.folder, run.media))
        opened.summary.update({**run.summary, "media": list(run.media)})
        opened.finish(exit_code=int(run.failed))

    def _check(self, closed: list[Planned]) -> None:
        """Notes what W&B has of runs just closed.

        Raises:
            Trouble: Not all of it.
        """
        if not self.online:
            self.written += closed
            return
        deadline = time.monotonic() + CONFIRM_SECONDS
        while closed := self._confirm(closed):
            if time.monotonic() > deadline:
                raise Trouble(f"the server did not take all of {len(closed)} runs, {closed[0].key} first")
            time.sleep(0.3)

    def _confirm(self, runs: list[Planned]) -> list[Planned]:
        """Asks the server what it has, notes the runs that are whole there, and returns the others."""
        import wandb

        if not runs:
            return []
        self._set_up()
        api = wandb.Api(timeout=ANSWER_SECONDS)
        self.state.entity = self.state.entity or self.options.entity or api.default_entity
        path, left = f"{self.state.entity}/{self.options.project}", []
        for start in range(0, len(runs), BATCH):
            part = runs[start : start + BATCH]
            with patience():
                there = api.runs(path, filters={"name": {"$in": [run.run_id for run in part]}}, lazy=False)
                try:
                    found = {run.id: run for run in there}
                except ValueError:  # no such project yet
                    found = {}
                for run in part:
                    if run.run_id in found and is_whole(found[run.run_id], run):
                        self.state.runs[run.key] = run.record
                    else:
                        left.append(run)
        self.state.save()
        return left


def is_whole(there: Any, run: Planned) -> bool:
    """Returns whether a run as the server has it (``wandb.apis.public.Run``) is all of ours."""
    summary = dict(there.summary)
    if summary.get("status") != run.summary["status"] or list(summary.get("media") or []) != list(run.media):
        return False
    if run.media:
        return len(list(there.files(pattern="media/images/%"))) >= len(run.media)
    return bool(there.history_line_count == len(run.rows))


def media(folder: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """Returns a study's figures and misclassified images as W&B takes them.

    Plain images and no tables: those are staged as artifacts outside the run (wandb 0.31).
    """
    import numpy as np
    import pyarrow.parquet as pq
    import wandb

    shown: dict[str, Any] = {}
    for file in files:
        if not file.endswith(".npz"):
            shown[Path(file).with_suffix("").as_posix()] = wandb.Image(str(folder / file))
            continue
        classes = [legible(name) for name in read_study(folder)["data"]["classes"]]
        guesses = pq.read_table(
            folder / "best" / "predictions.parquet", columns=["label", "predicted", "confidence"]
        ).to_pydict()
        with np.load(folder / file) as arrays:
            shown["misclassified"] = [
                wandb.Image(
                    image.transpose(1, 2, 0),
                    caption=f"{classes[guesses['label'][k]]}, predicted {classes[guesses['predicted'][k]]} "
                    f"with {guesses['confidence'][k]:.2f}",
                )
                for k, image in zip(arrays["index"], arrays["images"], strict=True)
            ]
    return shown


def sweep_config(study: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a study's ranges as W&B describes a sweep."""
    parameters: dict[str, Any] = {}
    for parameter, domain in study["ranges"].items():
        if "values" in domain:
            parameters[parameter] = {"values": domain["values"]}
            continue
        whole = isinstance(domain["low"], int) and isinstance(domain["high"], int)
        kind = "log_uniform_values" if domain["log"] else "int_uniform" if whole else "uniform"
        parameters[parameter] = {"distribution": kind, "min": domain["low"], "max": domain["high"]}
    for parameter in ("lr", "seed") if study["options"].get("points") else ():  # a learning-rate study
        values = sorted({point[parameter] for point in study["options"]["points"]})
        parameters[parameter] = {"values": values}
    metric = {"name": "val_accuracy", "goal": "maximize"}
    return {"name": name, "method": "random", "metric": metric, "parameters": parameters}


def remove_offline(folder: Path, run: Planned) -> None:
    """Removes what was written of an offline run: it is written anew, whole."""
    for old in (folder / "wandb").glob(f"offline-run-*-{run.run_id}"):
        shutil.rmtree(old)


@contextlib.contextmanager
def _in_one_line(key: str | None) -> Iterator[None]:
    """Turns whatever wandb raises for want of a server into Trouble."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except (wandb.errors.Error, WandbApiFailedError, OSError) as error:  # a TimeoutError is an OSError
        raise Trouble(reason(str(error), key)) from error


def reason(text: str, key: str | None = None) -> str:
    """Returns why W&B failed, in a few words and without the key."""
    if says_full(text):
        return NO_ROOM
    for pattern, words in (
        (r"\b(HTTP|error) 403\b", "the key may not write there"),
        (r"\b(HTTP|error) 404\b", "the server does not have it: a wrong project, entity or address"),
        (r"\b(HTTP|error) 429\b", "the server limits the rate of requests; try again later"),
        (r"\b(HTTP|error) 5\d\d\b", "the server answers with an error"),
        (r"connection refused", "the server cannot be reached: connection refused"),
        (r"no such host|lookup ", "the server's name is not known"),
        (r"did not respond in time|deadline exceeded|[Tt]imed? ?out", "the server does not answer"),
        (r"x509: ", "the server's certificate is not trusted"),
        (r"first record does not look like a TLS", "the server does not speak TLS: try http://"),
        (r"invalid character '<'", "a web page answers: a proxy, a network's login, or a wrong address"),
    ):
        if re.search(pattern, text):
            return words
    refused = re.search(r"verify credentials with \S+?: (.*)|error 401", text, re.DOTALL)
    line = " ".join((refused[1] or "" if refused else text).split())[:200]
    if key:
        line = line.replace(key, "…")
    return f"the server refuses the key{line and ': ' + line}" if refused else line
