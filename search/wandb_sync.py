"""Upload a study's runs to Weights & Biases, while it runs or at any time after.

::

    tunefleet sync studies/NAME             # uploads what W&B does not have yet
    tunefleet sync studies/NAME --offline   # writes offline runs into the folder instead

There is one run per trial and one for the study, all of it read from the study's folder; why, and what counts
as synced, is in docs/decisions.md. Exit code 0: W&B has everything, 1: something is missing, 2: bad input.

Beside a running study the same happens over and over, in a process at low priority that the study does not
need. Only this file of search/ imports wandb (0.31), which takes a second of CPU, and only to upload.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import Timeout

from tunefleet.cli import Parser, exit_code, kept_environment, printable, shell, shown
from tunefleet.files import holding, is_full, says_full, write_whole
from tunefleet.journal import TrialRecord
from tunefleet.metric import Metric
from tunefleet.search.wandb_options import (
    LONGEST_NAME,
    PASSED_ON,
    WandbOptions,
    add_wandb_flags,
    base_url,
    choose,
    take_flags,
)
from tunefleet.store import within
from tunefleet.study import REPORTED, Study, is_number_of, read_study, tested

STUDY = "study"  # the key of the study's own run, beside trial ids
COLUMNS = tuple(REPORTED)[1:]  # of a row, without trial_id; then come further numbers that were reported
UNFINISHED = ("running", "paused")
NO_ROOM = "there is no room under wandb/"
NICENESS = 10  # beside a study: trials come first
POLL_SECONDS = 2.0  # between looks at the journal
RETRY_SECONDS = 20.0  # after a failure, while the study continues
END_SECONDS = 12.0  # the study is done: the longest wait for the last runs
STOP_SECONDS = 3.0  # the same after a Ctrl-C
ANSWER_SECONDS = 4  # that one request may take
STEP_SECONDS = 5.0  # to open, fill or close a run, or a question, all its requests together
CONFIRM_SECONDS = 4.0  # until rows that were accepted show
BATCH = 16  # runs uploaded between questions to the server
OPEN_RUNS = 128  # of unfinished trials, kept open; more and the one longest without a row is closed
SETTINGS: dict[str, Any] = {  # of wandb 0.31: nothing but our rows, and no wait without an end
    **dict.fromkeys(("silent", "disable_git", "disable_code", "x_disable_stats", "x_disable_meta"), True),
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "console": "off",
    "stop_fn": lambda: None,  # "Stop run" on the page would raise a KeyboardInterrupt here
    "x_file_stream_transmit_interval": 2.0,
    "max_end_of_run_history_metrics": 0,
    "finish_timeout_raises": True,
    **dict.fromkeys(("init_timeout", "finish_timeout"), ANSWER_SECONDS),
}
for channel in ("graphql", "file_stream", "file_transfer"):
    SETTINGS |= {f"x_{channel}_retry_max": 1, f"x_{channel}_timeout_seconds": ANSWER_SECONDS}
    SETTINGS |= {f"x_{channel}_retry_wait_min_seconds": 0.5, f"x_{channel}_retry_wait_max_seconds": 1.0}
REASONS = (  # what wandb says of a failure, and our words
    (r"\b(HTTP|error) 403\b", "the key may not write there"),
    (r"\b(HTTP|error) 404\b", "the server does not have it: a wrong project, entity or address"),
    (r"\b(HTTP|error) 429\b", "the server limits the rate of requests; try again later"),
    (r"\b(HTTP|error) 5\d\d\b", "the server answers with an error"),
    (r"connection refused", "the server cannot be reached: connection refused"),
    (r"no such host|lookup ", "the server's name is not known"),
    (r"answer within|respond in time|deadline exceeded|[Tt]imed? ?out", "the server does not answer"),
    (r"x509: ", "the server's certificate is not trusted"),
    (r"first record does not look like a TLS", "the server does not speak TLS: try http://"),
    (r"invalid character '<'", "a web page answers: a proxy, a network's login, or a wrong address"),
)


@dataclass(frozen=True)
class Run:
    """One run as W&B is to have it; trials have rows, the study media."""

    key: str  # trial id or STUDY
    run_id: str
    job_type: str  # trial, final (a seed of the winner) or study
    config: dict[str, Any]
    summary: dict[str, Any]  # with status
    rows: tuple[dict[str, Any], ...] = ()
    media: tuple[str, ...] = ()  # files of the folder

    @property
    def record(self) -> dict[str, Any]:
        """Return what state.json says of the run once W&B has it."""
        return {"rows": len(self.rows), "status": self.summary["status"], "media": list(self.media)}


def runs_of(folder: Path) -> list[Run]:
    """Return all runs of a study as its folder is now; the study's own once it is done or stopped.

    Raises:
        ValueError: The folder holds no study, or its journal is damaged.
    """
    study = Study(folder)
    facts, trials = study.facts, study.records.values()
    # Run ids are unique in a project for ever, and trial ids and folder names are not: two studies in
    # folders of one name must not meet in one run, and a renamed folder is the same study.
    identity = json.dumps([facts.get(name) for name in ("started_at", "machine", "command", "seed")])
    stem = f"{facts['space']}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    statuses = {trial.trial_id: study.status_of(trial) for trial in trials}
    if any(trial.is_final for trial in trials):  # the search is over: what is paused was pruned
        study.status = "done"
        statuses |= {trial.trial_id: study.status_of(trial) for trial in study.searched}
    runs = [_of_trial(stem, trial, statuses[trial.trial_id], study.metric) for trial in trials]
    return runs if facts["status"] == "running" else [*runs, _of_study(stem, facts, study.metric, folder)]


def _of_trial(stem: str, trial: TrialRecord, status: str, metric: Metric) -> Run:
    best = metric.best(trial.values(metric.name))
    summary = {"status": status, "epochs": trial.epoch, f"best_{metric.name}": best}
    if status == "pruned":
        summary["pruned_at_epoch"] = trial.epoch
    if trial.error:
        summary["error"] = trial.error
    last = trial.reports.get(trial.epoch, {})
    summary |= {name: last[name] for name in (metric.test_name, "test_accuracy") if name in last}
    rows = [_row(report) for _, report in sorted(trial.reports.items())]
    job_type = "final" if trial.is_final else "trial"
    return Run(trial.trial_id, f"{stem}-{trial.trial_id}", job_type, trial.config, summary, rows=tuple(rows))


def _row(report: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a report."""
    fixed = {name: report[name] for name in COLUMNS if name in report}
    others = {name: value for name, value in report.items() if is_number_of(name, value)}
    return fixed | {name: value for name, value in others.items() if name not in fixed}


def _of_study(stem: str, study: dict[str, Any], metric: Metric, folder: Path) -> Run:
    names = ("status", "trials", "epochs_spent", "epochs_unpruned", "seconds")
    summary = {name: study.get(name) for name in names}
    if best := study.get("best"):
        summary |= {"best_trial": best["trial_id"], metric.name: best[metric.name]}
        summary |= {f"best/{name}": value for name, value in best["config"].items()}
    for name, test in tested(study.get("final")).items():
        low, high = test["interval95"] or (None, None)
        key = (
            f"final_{name}" if name == metric.name else name
        )  # without a test; the best trial's has the name
        summary |= {key: test["mean"], f"{key}_sd": test["sd"]}
        summary |= {f"{key}_low": low, f"{key}_high": high, "seeds": len(test["values"])}
    config = {name: study.get(name) for name in ("space", "seed", "commit", "versions", "machine", "options")}
    media = [file.relative_to(folder).as_posix() for file in sorted((folder / "figures").glob("*.png"))]
    if all((folder / "best" / name).exists() for name in ("misclassified.npz", "predictions.parquet")):
        media.append("best/misclassified.npz")
    return Run(STUDY, f"{stem}-{STUDY}", STUDY, config, summary, media=tuple(media))


def read_state(folder: Path, options: WandbOptions) -> dict[str, Any]:
    """Return what W&B is known to have: wandb/state.json, where its server, project and mode are the same.

    ``runs`` has each confirmed run's record by key, ``entity`` whose they are as the server said, ``sweep``
    the sweep's id, ``error`` why the last attempt failed, in a line.

    Raises:
        ValueError: The file is damaged.
    """
    target = {name: getattr(options, name) for name in ("mode", "project", "entity")}
    state: dict[str, Any] = {"target": target | {"base_url": base_url()}, "runs": {}}
    state |= {"entity": None, "sweep": None, "error": None}
    try:
        if (file := folder / "wandb" / "state.json").exists():
            found = json.loads(file.read_bytes().decode())
            if found["target"] == state["target"]:
                state |= {name: found[name] for name in state} | {"runs": dict(found["runs"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); remove it, and the next sync asks W&B what it has"
        ) from None
    return state


def describe(folder: Path, options: WandbOptions, state: dict[str, Any], why: str = "") -> tuple[str, bool]:
    """Return how complete a study is in W&B, in a line, and whether anything is missing there.

    ``why`` is the reason for what is missing, where W&B gave none.
    """
    runs, offline = runs_of(folder), options.mode == "offline"
    missing = sum(state["runs"].get(run.key) != run.record for run in runs)
    why = f" ({state['error'] or why})" if state["error"] or why else ""
    if missing:
        verb = "is" if missing == 1 else "are"
        rest = f"offline runs {verb} not written" if offline else f"runs {verb} not synced"
        return f"{missing} of {len(runs)} {rest}{why}", True
    if offline:
        sweep = ", no sweep made" if options.sweep else ""
        return f"{len(runs)} runs written offline, none of them uploaded{sweep}", False
    where = f"{state['entity'] or options.entity or ''}/{options.project}".lstrip("/")
    if options.sweep and not state["sweep"]:
        return f"all {len(runs)} runs are in {where}, the sweep is not{why}", True
    return f"all {len(runs)} runs are in {where}, group {options.group or legible(folder.name)}", False


def legible(text: str, longest: int = LONGEST_NAME) -> str:
    """Return a name as W&B accepts it: valid Unicode in one line, of limited length."""
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:longest]


class Uploader:
    """Uploads what W&B lacks and keeps the runs of unfinished trials open, so that they are live.

    ``path`` is the study's folder as wandb can pass it on.
    """

    def __init__(self, folder: Path, options: WandbOptions, path: Path) -> None:
        self.folder, self.options, self.path = folder, options, path
        self.online, self.group = options.mode == "online", options.group or legible(folder.name)
        self.state = read_state(folder, options)
        self.open: dict[str, Any] = {}  # wandb's runs by key, the longest without a row first
        self.sent: dict[str, int] = {}  # rows that open runs have
        self.closed: dict[str, Run] = {}  # complete once the server says so, or offline after _close()

    def upload(self, *, live: bool, doubt: bool = False) -> bool:
        """Upload what is missing; return whether that worked. If not, the state's ``error`` says why.

        ``live`` leaves the runs of unfinished trials open; ``doubt`` asks the server about every run again:
        it may have lost some since.
        """
        import wandb
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        self.state["error"] = None
        worked = False
        try:
            (self.path / "wandb" / "tmp").mkdir(exist_ok=True)
            wandb.setup(settings=wandb.Settings(**SETTINGS))  # not to init(): Api() needs the limits, too
            self._upload(runs_of(self.folder), live, doubt)
            worked = True
        except (wandb.errors.Error, WandbApiFailedError, OSError) as error:  # a TimeoutError is an OSError
            self.state["error"] = reason(str(error), self.options.key)
        finally:
            if not worked:
                self.closed = {}  # what is offline may be torn
            if not worked or not live:
                self._close()
        self._save()
        return worked

    def _close(self) -> None:
        """Close wandb, after which another attempt may open the same runs; offline runs are complete then."""
        import wandb

        with contextlib.suppress(TimeoutError, SystemExit):  # SystemExit: wandb's service failed
            within(STEP_SECONDS, wandb.teardown)
        if not self.online:
            for new in (self.folder / "wandb" / "tmp" / "wandb").glob("offline-run-*"):
                for old in (self.folder / "wandb").glob(f"offline-run-*-{new.name.split('-', 3)[3]}"):
                    shutil.rmtree(old)
                new.rename(self.folder / "wandb" / new.name)
            self.state["runs"] |= {key: run.record for key, run in self.closed.items()}
        self.open, self.sent, self.closed = {}, {}, {}
        shutil.rmtree(self.folder / "wandb" / "tmp", ignore_errors=True)

    def _upload(self, runs: list[Run], live: bool, doubt: bool) -> None:
        known = self.state["runs"] | {key: run.record for key, run in self.closed.items()}
        missing = [run for run in runs if known.get(run.key) != run.record]
        if self.online and not live:
            if doubt:
                missing, self.state["runs"] = runs, {}
            missing = self._lacking(missing)
            if known.keys() & {run.key for run in missing if run.job_type == "trial"}:
                self.state["sweep"] = None  # it was made of runs that are gone
        for start in range(0, len(missing), BATCH):
            for run in missing[start : start + BATCH]:
                close = not live or run.summary["status"] not in UNFINISHED
                within(STEP_SECONDS, partial(self._log, run, close=close))
            end = time.monotonic() + CONFIRM_SECONDS
            while self.online and (lacking := self._lacking(list(self.closed.values()))):
                if time.monotonic() > end:
                    first = lacking[0].key
                    raise OSError(f"the server did not take all of {len(lacking)} runs, {first} first")
                time.sleep(0.3)
            self.closed = {} if self.online else self.closed
        if self.online and not live and self.options.sweep and not self.state["sweep"]:
            trials = [run.run_id for run in runs if run.job_type == "trial"]
            self.state["sweep"] = within(STEP_SECONDS, partial(self._make_sweep, trials))

    def _lacking(self, runs: list[Run]) -> list[Run]:
        """Ask the server what it has, note the runs that are complete there, and return the others."""
        import wandb

        lacking = []
        for start in range(0, len(runs), BATCH):
            ids = [run.run_id for run in runs[start : start + BATCH]]

            def ask(ids: list[str] = ids) -> dict[str, Any]:
                api = wandb.Api(timeout=ANSWER_SECONDS)
                self.state["entity"] = self.state["entity"] or self.options.entity or api.default_entity
                path = f"{self.state['entity']}/{self.options.project}"
                found = api.runs(path, filters={"name": {"$in": ids}}, lazy=False)
                try:
                    return {run.id: run for run in found}
                except ValueError:  # no such project yet
                    return {}

            remote = within(STEP_SECONDS, ask)
            for run in runs[start : start + BATCH]:
                if run.run_id in remote and is_complete(remote[run.run_id], run):
                    self.state["runs"][run.key] = run.record
                else:
                    lacking.append(run)
        self._save()
        return lacking

    def _log(self, run: Run, *, close: bool) -> None:
        """Log the rows that a run lacks, in an open run; then close it, if so asked."""
        if run.key not in self.open:
            if len(self.open) >= OPEN_RUNS:
                self.open.pop(next(iter(self.open))).finish()
            self.open[run.key] = self._opened(run)
            self.sent[run.key] = self.open[run.key].starting_step  # its step is 0 until the first row
        opened, rows = self.open[run.key], run.rows[self.sent[run.key] :]
        if rows:
            self.open[run.key] = self.open.pop(run.key)  # last in the order of closing
        for row in rows:
            opened.log({**row, "_timestamp": row["finished_at"]})  # a step= would keep the row in memory
        self.sent[run.key] += len(rows)
        if close:
            del self.open[run.key]
            if run.media:
                opened.log(images(self.path, run.media))
            opened.summary.update({**run.summary, "media": list(run.media)})
            opened.finish(exit_code=int(run.summary["status"] in ("error", "out_of_memory")))
            self.closed[run.key] = run

    def _opened(self, run: Run) -> Any:
        import wandb

        opened = wandb.init(
            mode="online" if self.online else "offline",
            project=self.options.project,
            entity=self.options.entity,
            group=self.group,
            job_type=run.job_type,
            id=run.run_id,
            name=legible(self.folder.name) if run.key == STUDY else run.key,
            tags=self.options.tags or None,
            dir=self.path / "wandb" / "tmp",
            config=run.config,
            reinit="create_new",
            resume="allow" if self.online else None,
        )
        opened.define_metric("epoch", hidden=True)
        opened.define_metric("*", step_metric="epoch")
        self.state["entity"] = self.state["entity"] or opened.entity
        return opened

    def _make_sweep(self, trials: list[str]) -> str:
        """Show the study as a W&B sweep with its trials as prior runs; return its id."""
        import wandb

        config = sweep_config(read_study(self.folder), self.group)
        with contextlib.redirect_stdout(None):
            return wandb.sweep(
                config, entity=self.state["entity"], project=self.options.project, prior_runs=trials
            )

    def _save(self) -> None:
        """Write state.json; without room for it, the next sync asks W&B again."""
        content = (json.dumps(self.state, indent=1) + "\n").encode()
        try:
            write_whole(self.folder / "wandb" / "state.json", content)
        except OSError as error:
            if not is_full(error):
                raise
            self.state["error"] = self.state["error"] or NO_ROOM


def is_complete(remote: Any, run: Run) -> bool:
    """Return whether a run as the server has it (``wandb.apis.public.Run``) is all of ours."""
    summary = dict(remote.summary)
    if summary.get("status") != run.summary["status"] or list(summary.get("media") or []) != list(run.media):
        return False
    if run.media:
        return len(list(remote.files(pattern="media/images/%"))) >= len(run.media)
    return bool(remote.history_line_count == len(run.rows))


def images(folder: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """Return a study's figures and misclassified images as W&B logs them.

    Plain images and no tables: those are staged as artifacts outside the run (wandb 0.31).
    """
    import numpy as np
    import pyarrow.parquet as pq
    import wandb

    figures = [file for file in files if file.endswith(".png")]
    logged: dict[str, Any] = {file.removesuffix(".png"): wandb.Image(str(folder / file)) for file in figures}
    if figures == list(files):
        return logged
    classes = [legible(name) for name in read_study(folder)["data"]["classes"]]
    columns = ["label", "predicted", "confidence"]
    guesses = pq.read_table(folder / "best" / "predictions.parquet", columns=columns).to_pylist()
    logged["misclassified"] = []
    with np.load(folder / "best" / "misclassified.npz") as arrays:
        for k, image in zip(arrays["index"], arrays["images"], strict=True):
            label, predicted, confidence = (guesses[k][name] for name in columns)
            caption = f"{classes[label]}, predicted {classes[predicted]} with {confidence:.2f}"
            logged["misclassified"].append(wandb.Image(image.transpose(1, 2, 0), caption=caption))
    return logged


def sweep_config(study: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a study's ranges as W&B describes a sweep."""
    parameters: dict[str, Any] = {}
    for parameter, domain in study["ranges"].items():
        if "values" in domain:
            parameters[parameter] = {"values": domain["values"]}
            continue
        integers = isinstance(domain["low"], int) and isinstance(domain["high"], int)
        kind = "log_uniform_values" if domain["log"] else "int_uniform" if integers else "uniform"
        parameters[parameter] = {"distribution": kind, "min": domain["low"], "max": domain["high"]}
    points = study["options"].get("points") or []  # of a learning-rate study
    for parameter in dict.fromkeys(name for point in points for name in point):
        values = {point[parameter] for point in points if parameter in point}
        parameters[parameter] = {"values": sorted(values)}
    metric = Metric(**study.get("metric", {}))
    goal = {"name": metric.name, "goal": "maximize" if metric.mode == "max" else "minimize"}
    return {"name": name, "method": "random", "metric": goal, "parameters": parameters}


def reason(text: str, key: str | None = None) -> str:
    """Return why W&B failed, in a few words and without the key."""
    if says_full(text):
        return NO_ROOM
    for pattern, words in REASONS:
        if re.search(pattern, text):
            return words
    refused = re.search(r"verify credentials with \S+?: (.*)|error 401", text, re.DOTALL)
    line = " ".join((refused[1] or "" if refused else text).split())[:200]
    if key:
        line = line.replace(key, "…")
    return f"the server refuses the key{line and ': ' + line}" if refused else line


def follow(uploader: Uploader) -> None:
    """Upload what the study writes until stdin ends; a failure is tried again later."""
    seen, not_before, journal = -1, 0.0, uploader.folder / "reports.jsonl"
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        size = journal.stat().st_size if journal.exists() else 0
        if size == seen or time.monotonic() < not_before:
            continue
        seen = size
        # before the first report workers are starting, and need the CPUs
        if any(run.rows for run in runs_of(uploader.folder)) and not uploader.upload(live=True):
            not_before, seen = time.monotonic() + RETRY_SECONDS, -1


@contextlib.contextmanager
def only_ours(folder: Path, key: str | None) -> Iterator[Path]:
    """Context manager: leave wandb only what we choose; yield the folder by a path that it can pass on.

    Its variables could change a run behind our back (WANDB_RUN_ID, WANDB_SWEEP_ID, …), and its service
    process gets folder, working directory and arguments, of which it accepts UTF-8 only.
    """
    for name in [name for name in os.environ if name.startswith("WANDB_") and name not in PASSED_ON]:
        del os.environ[name]
    logging.raiseExceptions = False  # a full disk is reported in our line, not in logging's tracebacks
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir("/"))
        stack.callback(setattr, sys, "argv", sys.argv)
        sys.argv = sys.argv[:1]
        if legible(str(folder), sys.maxsize) != str(folder):
            link = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "study"
            link.symlink_to(folder)
            folder = link
        os.environ |= {
            f"WANDB_{name}_DIR": str(folder / "wandb" / "tmp" / name) for name in ("DATA", "CACHE")
        }
        os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
        os.environ |= {"WANDB_API_KEY": key} if key else {}
        yield folder


def sync(given: dict[str, Any]) -> int:
    """Sync a study's folder as the command line says; return the exit code.

    Raises:
        ValueError: It cannot be done.
    """
    folder, flags = Path(os.path.realpath(given["study"])), take_flags(given)
    if not given["follow"]:
        os.environ.pop("WANDB_MODE", None)  # who calls this wants to sync
        flags["mode"] = "offline" if given["offline"] else "online"
    options = choose(flags, read_study(folder).get("wandb"))
    runs_of(folder)  # a damaged journal is an error before anything else
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(only_ours(folder, options.key))
        (folder / "wandb").mkdir(exist_ok=True)
        try:
            stack.enter_context(holding(folder / "wandb" / ".lock", 0))
        except Timeout:
            raise ValueError(f"another process is syncing {given['study']}; wait for it") from None
        shutil.rmtree(folder / "wandb" / "tmp", ignore_errors=True)  # of a process that was killed
        uploader = Uploader(folder, options, path)
        if given["follow"]:
            os.nice(NICENESS)
            follow(uploader)
        uploader.upload(live=False, doubt=not given["follow"])
        line, missing = describe(folder, options, uploader.state)
    if given["follow"]:  # the study reports it, from state.json
        return 0
    print(printable(f"error: {line}" if missing else line), file=sys.stderr if missing else sys.stdout)
    return int(missing)


@kept_environment()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(prog="tunefleet sync", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="the study's folder")
    parser.add_argument("--offline", action="store_true", help="write offline runs instead of uploading")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    add_wandb_flags(parser, mode=False)
    given = vars(parser.parse_args(arguments))

    def command() -> int:
        try:
            return sync(given)
        except OSError as error:
            if not is_full(error):
                raise
            print(printable(f"error: {given['study']} is not synced ({NO_ROOM})"), file=sys.stderr)
            return 1

    return exit_code(command)


class LiveUpload:
    """The upload beside one study, a process that the study waits for only at its end; none with mode off."""

    def __init__(self, folder: Path, options: WandbOptions) -> None:
        self.folder, self.options = folder, options
        self.log = folder / "wandb" / "sync.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.given_up = False

    def start(self) -> None:
        """Start to upload."""
        if self.options.mode == "off":
            return
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        if self.options.key:
            environment["WANDB_API_KEY"] = self.options.key
        with contextlib.suppress(OSError):  # the study is complete without it
            self.log.parent.mkdir(exist_ok=True)
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(  # -P: not a module of the user's folder
                    [sys.executable, "-P", "-m", "tunefleet", "sync", str(self.folder), "--follow"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C is the study's; and its group can be ended whole
                )

    def give_up(self, reason: str) -> None:
        """Stop waiting for W&B; a signal's answer once the study is done."""
        self.given_up = True

    def end(self, seconds: float) -> str:
        """End the process after its last uploads; return how complete W&B is, nothing with mode off."""
        if self.options.mode == "off":
            return ""
        try:
            why = self._end_process(seconds)
            state = read_state(self.folder, self.options)
            line, missing = describe(self.folder, self.options, state, why)
        except (OSError, ValueError) as error:  # the study is complete all the same
            line, missing = str(error), True
        command = f"; to upload: {shell('tunefleet', 'sync', shown(self.folder))}"
        return f"W&B: {line}{command if missing or self.options.mode == 'offline' else ''}"

    def _end_process(self, seconds: float) -> str:
        """End the process, and kill it after some seconds; return what went wrong, if anything."""
        process, self.process, began = self.process, None, time.monotonic()
        if process is None or process.stdin is None:
            return ""
        process.stdin.close()
        while process.poll() is None and time.monotonic() - began < seconds and not self.given_up:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # wandb's own process, too
            process.wait()
            shutil.rmtree(self.folder / "wandb" / "tmp", ignore_errors=True)
            return f"given up after {time.monotonic() - began:.0f} s"
        if process.returncode:
            return f"the process that sends them ended with {process.returncode}, see {shown(self.log)}"
        self.log.unlink(missing_ok=True)
        return ""
