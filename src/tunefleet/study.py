"""A study's folder, seen from Python: its spec, its journal and its results.

study.json holds the study's spec and is written once; what is changed later is an event of the
journal. result.json holds status and results for people and other programs, written by the process that holds
the study's lock; only its status, seconds and count of events are read here, since everything else follows
from the journal. Folders of the first edition, whose study.json holds everything, are read alike.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import operator
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from tunefleet import lookup
from tunefleet.cli import counted, expanded, writing
from tunefleet.files import holding, locked, read_whole, write_whole
from tunefleet.journal import Journal, TrialRecord, finite, records, winner
from tunefleet.metric import ACCURACY, Metric

if TYPE_CHECKING:
    import pandas as pd

CRC = ',\n  "crc": "'  # the last entry of a JSON file: the CRC-32 of what precedes it; older files have none
STANDING: dict[str, Any] = {"status": str, "seconds": float}  # result.json; and the count of events
LARGEST = 1e100  # whose square is a float
TABLE_SECONDS = 30.0  # that another process may take to write the same tables
SPEC: dict[str, Any] = {  # study.json; a tuple (None, x) is what may be null
    **dict.fromkeys(("space", "command", "data_sha256", "split_sha256"), str),
    "commit": (None, str),  # outside a checkout it is not known
    **dict.fromkeys(("seed", "validation_count"), int),
    "rungs": [int],
    "data": {"name": str, "classes": [str]},
    "options": {"epochs": int, "pruner": str},
    "versions": {},
    "levers": {"device": str, "precision": str, "channels_last": bool, "micro_batch_bytes": (None, int)},
}
OPTIONAL: dict[str, Any] = {"ranges": {}, "published": (None, float)}  # of study.json; older ones lack them
KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}
RESULTS = (  # what the first edition kept in study.json, too
    *("status", "seconds", "events", "trials", "statuses", "epochs_spent", "epochs_unpruned"),
    *("lost_workers", "busy_fraction", "best", "final", "lr_study"),
)
REACHED = (  # columns of trials.csv; then come the hyperparameters and the other numbers of the last report
    *("trial_id", "status", "epochs", "rung", "val_accuracy", "best_val_accuracy", "seconds", "node"),
)
REPORTED = {  # columns of epochs.parquet
    "trial_id": "string",
    "epoch": "int64",
    **dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy"), "float64"),
    **dict.fromkeys(("lr", "epoch_seconds", "finished_at"), "float64"),
}


class RunningError(ValueError):
    """Another process runs the study."""


class Study:
    """One study, finished or not, as its files were when it was read.

    Attributes:
        space: That of a notebook, which the study has no copy of; None: as the study has it.

    Raises:
        ValueError: The folder holds no study, or a damaged one.
    """

    space: Any = None

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.journal = Journal(self.folder / "reports.jsonl")
        content, result = read_files(self.folder)
        self.events = self.journal.read()
        self.journal.check_holds(self.events, result.get("events", 0))
        self.runs = [event["run"] for event in self.events if "run" in event]
        self.spec = _spec(content, self.runs)
        self.metric = _metric(self.spec, self.folder)
        self.status: str = result["status"]
        self.seconds: float = result["seconds"]  # of all runs
        self.records: dict[str, TrialRecord] = records(self.events)
        self.searched = [trial for trial in self.records.values() if not trial.is_final]
        if self.status == "done" and any(map(operator.lt, _extent(self.facts), _extent(result))):
            raise ValueError(
                f"{self.journal.file} holds less than the finished study had; restore the file from a copy"
            )

    @property
    def best(self) -> dict[str, Any] | None:
        """Return the winner's configuration; None where no trial has succeeded."""
        return dict(self.winner.config) if self.winner else None

    @property
    def test(self) -> dict[str, Any] | None:
        """Return what the fresh seeds gave on the test split: name, values, mean, sd and interval95."""
        final = self.facts["final"]
        test: dict[str, Any] | None = final and final["test"]
        return test

    @property
    def test_accuracy(self) -> float | None:
        """Return the mean test accuracy over the fresh seeds; None without one."""
        final = self.facts["final"]
        return final["test_accuracy"]["mean"] if final and final["test_accuracy"] else None

    @property
    def winner(self) -> TrialRecord | None:
        """Return the best trial; None where none has succeeded."""
        return winner(self.records, self.metric)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Return all that is known of the study but its trials: its spec and its results."""
        best = self.winner
        lost = Counter(event["lost"] for event in self.events if "lost" in event)
        return self.spec | {
            "status": self.status,
            "seconds": self.seconds,
            "trials": len(self.searched),
            "statuses": dict(Counter(map(self.status_of, self.searched)).most_common()),
            "epochs_spent": sum(trial.epoch for trial in self.searched),
            "epochs_unpruned": len(self.searched) * self.spec["options"]["epochs"],
            "lost_workers": dict(lost),  # by cause
            "busy_fraction": busy_fraction(self.records.values()),
            "best": best
            and {
                "trial_id": best.trial_id,
                "config": best.config,
                self.metric.name: best.value(self.metric),
            },
            "final": final_results(self.seeds, self.metric),
            "earlier_seeds": _tested(self.records.values()) - _tested(self.seeds),
            "events": len(self.events),
        }

    @property
    def seeds(self) -> list[TrialRecord]:
        """Return the winner's fresh seeds, without those of an earlier winner of a continued study."""
        best = self.winner
        return [trial for trial in self.records.values() if best and trial.is_seed_of(best)]

    def model(self, device: str | None = None) -> Any:
        """Return the winner, trained and in eval mode.

        A space's network takes PIL images, uint8 tensors ``(N, 3, H, W)``, paths, or a list of them, returns
        class probabilities ``(N, classes)`` and knows its ``classes``. Of a space with a ``run`` of its own,
        it is an instance of that class with its state loaded. A person's code is imported from the study's
        copy.

        Args:
            device: auto, cpu or cuda; None: the study's, where it is here.

        Raises:
            ValueError: The study has no finished seed of its winner, or a file of it is damaged.
        """
        return lookup("inference.winner", "load_winner")(self, device)

    def predict(self, paths: Any, device: str | None = None) -> pd.DataFrame:
        """Predict the classes of image files; warn of those that are skipped.

        Args:
            paths: An image, a folder or an archive of images, or a list of these.
            device: As for ``model``.

        Returns:
            A row per image: path, class, and a column ``p_CLASS`` per class, its probability.

        Raises:
            ValueError: As ``model``; or no image could be read.
        """
        frame: pd.DataFrame = lookup("inference.predict", "predict")(self, paths, device)
        return frame

    def report(self, out: Path | str | None = None) -> Path:
        """Write the study's page, report.html, and its figures; return the page's path.

        Args:
            out: The folder to write into; None: the study's.

        Raises:
            ValueError: A file of the study is damaged, or the folder cannot be written to.
        """
        folder = self.folder if out is None else expanded("out", out)
        with writing(folder):
            page: Path = lookup("analysis.report", "write")(
                [lookup("analysis.load", "load")(self.folder)], folder
            )
        return page

    def status_of(self, trial: TrialRecord) -> str:
        """Return done, pruned, diverged, out_of_memory or error; running or paused in an unfinished study."""
        if trial.status:
            return trial.status
        if self.status == "done":
            return "pruned"
        return "paused" if trial.epoch in self.spec["rungs"] else "running"

    @functools.cached_property
    def trials(self) -> pd.DataFrame:
        """Return a row per trial of the search: what it reached, then every hyperparameter."""
        import pandas as pd

        rows = [
            {
                "trial_id": trial.trial_id,
                "status": self.status_of(trial),
                "epochs": trial.epoch,
                "rung": sum(rung <= trial.epoch for rung in self.spec["rungs"]),  # rungs reached
                self.metric.name: trial.value(self.metric),
                f"best_{self.metric.name}": self.metric.best(trial.values(self.metric.name)),
                "seconds": round(sum(trial.values("epoch_seconds")), 3),
                "node": trial.reports[trial.epoch].get("node") if trial.reports else None,
                **{name: value for name, value in trial.config.items() if name != "epochs"},  # the horizon
                **{name: trial.reports[trial.epoch].get(name) for name in self.others if trial.reports},
            }
            for trial in self.searched
        ]
        reached = [name.replace("val_accuracy", self.metric.name) for name in REACHED]
        return pd.DataFrame(rows, columns=None if rows else [*reached, *self.spec.get("ranges", {})])

    @functools.cached_property
    def others(self) -> list[str]:
        """Return the numbers that reports have beside the metric and what ``trials`` has anyway."""
        known = {self.metric.name, "epoch_seconds", "finished_at"}.union(*(t.config for t in self.searched))
        reports = [report for trial in self.searched for report in trial.reports.values()]
        names = dict.fromkeys(n for report in reports for n in report if is_number_of(n, report[n]))
        return [name for name in names if name not in known]

    @functools.cached_property
    def epochs(self) -> pd.DataFrame:
        """Return a row per report of the search."""
        return _reports(self.searched, self.metric)

    @functools.cached_property
    def finals(self) -> pd.DataFrame:
        """Return a row per report of the winner's seeds."""
        return _reports(self.seeds, self.metric)


def load(folder: Path | str) -> Study:
    """Return a study, finished or not, as its folder has it; nothing of the person's code is imported.

    Args:
        folder: The study's; of one under a URL, the files are copied to studies/NAME first.

    Raises:
        ValueError: The folder holds no study, or a damaged one.
    """
    return Study(expanded("study", lookup("mirror", "fetch_study")(str(folder))))


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a study's study.json and result.json say, without its journal.

    The second is what the first edition kept in study.json, and has status and seconds in any case.

    Raises:
        ValueError: There is no study, or a file is damaged.
    """
    content, result = read_whole(folder / "study.json"), read_whole(folder / "result.json")
    if content is None:
        raise ValueError(f"{folder} holds no study: there is no study.json in it")
    spec = parse(content, str(folder / "study.json"), SPEC)
    _check(spec, {name: OPTIONAL[name] for name in OPTIONAL if name in spec}, str(folder / "study.json"))
    standing = spec if result is None else parse(result, str(folder / "result.json"), {})
    standing = {"status": "running", "seconds": 0.0} | standing
    _check(standing, STANDING, str(folder / ("study.json" if result is None else "result.json")))
    return spec, standing


def read_study(folder: Path) -> dict[str, Any]:
    """Return all that is known of a study but its trials.

    Raises:
        ValueError: As ``Study``.
    """
    return Study(folder).facts


def write_study(folder: Path, spec: dict[str, Any]) -> None:
    """Write a new study's study.json."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "study.json", spec)


def write_result(study: Study, status: str, seconds: float) -> None:
    """Write result.json; for the process that holds the study's lock.

    Args:
        study: As it was read.
        status: running, stopped or done, from now on.
        seconds: Of all runs so far.
    """
    study.status, study.seconds = status, seconds
    study.__dict__.pop("facts", None)  # they follow from these
    _write(study.folder / "result.json", {k: v for k, v in study.facts.items() if k not in study.spec})


def cut(folder: Path, count: int) -> None:
    """Keep only the first events of a damaged journal; for the process that holds the study's lock.

    Raises:
        ValueError: The study is done, or one of these lines is damaged.
    """
    _, result = read_files(folder)
    if result["status"] == "done":
        raise ValueError(f"{folder} is done; its results in result.json and trials.csv stay as they are")
    Journal(folder / "reports.jsonl").keep(count)
    _write(folder / "result.json", {name: result[name] for name in STANDING} | {"events": count})


def write_tables(folder: Path, **standing: Any) -> Study:
    """Write trials.csv and epochs.parquet, and result.json where a status is given; return the study.

    Args:
        folder: The study's.
        standing: ``status`` and ``seconds`` as for ``write_result``, where this process holds the lock.

    Raises:
        ValueError: As ``Study``.
    """
    with contextlib.ExitStack() as stack:  # another process may write them, from an older journal
        with contextlib.suppress(Timeout):  # the other one was stopped; a study's end does not wait for it
            stack.enter_context(holding(folder / ".collect.lock", TABLE_SECONDS))
        study = Study(folder)
        if standing:
            write_result(study, **standing)
        write_whole(folder / "trials.csv", study.trials.to_csv(index=False, lineterminator="\n").encode())
        parquet = io.BytesIO()  # pyarrow opens no path that is not UTF-8
        _reports(study.records.values(), study.metric).to_parquet(parquet, index=False)
        write_whole(folder / "epochs.parquet", parquet.getvalue())
    return study


def lock_study(folder: Path) -> FileLock:
    """Return a study's lock, held; the system frees it when the process dies.

    Raises:
        RunningError: Another process holds it.
        ValueError: The folder cannot be locked.
    """
    try:
        return locked(folder / ".lock", 0)
    except Timeout:
        raise RunningError(f"another process is running {folder}; wait for it or stop it") from None
    except OSError as error:
        raise ValueError(f"{folder} cannot be locked ({error}); give a folder on another disk") from None


def _spec(content: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return study.json with what later runs changed, without the results that old ones hold."""
    spec = {k: v for k, v in content.items() if k not in RESULTS}
    for run in runs:
        new = {key: value for key, value in run.items() if key != "at"}
        spec |= new | {"options": spec["options"] | run.get("options", {})}
    return spec


def _metric(spec: dict[str, Any], folder: Path) -> Metric:
    """Return what a study compares trials by; of older ones, val_accuracy."""
    found = spec.get("metric", {"name": ACCURACY.name, "mode": ACCURACY.mode})
    try:
        _check(found, {"name": str, "mode": str}, "metric")
        return Metric(found["name"], found["mode"])
    except ValueError:
        raise ValueError(f"{folder}/study.json has an impossible metric; restore it from a copy") from None


def _extent(facts: dict[str, Any]) -> tuple[int, int, int]:
    """Return how much a study tells of: trials, their epochs, and seeds of the winner that ended."""
    final = facts.get("final") or {"seeds": [], "failed": []}
    seeds = len(final["seeds"]) + len(final.get("failed", []))
    return facts.get("trials", 0), facts.get("epochs_spent", 0), seeds


def final_results(trials: Iterable[TrialRecord], metric: Metric = ACCURACY) -> dict[str, Any] | None:
    """Return what the winner's fresh seeds gave; None where none has ended.

    A diverged seed is tested like the others, and its accuracy counts: a mean without it would
    flatter. One whose value is not finite has none to count. ``failed`` are the seeds that ended by an
    error, which say nothing of the winner.
    """
    ended = [trial for trial in trials if trial.is_final and trial.status]
    if not ended:
        return None
    tested = [trial for trial in ended if trial.status in ("done", "diverged")]
    last = [trial.reports[trial.epoch] for trial in tested]
    values = {
        name: [report[name] for report in last if report.get(name) is not None]
        for name in dict.fromkeys((metric.test_name, "test_accuracy", metric.name))
    }
    tests = {name: over_seeds(found, Metric(name, metric.mode)) for name, found in values.items() if found}
    return {
        "seeds": [trial.config["seed"] for trial in tested],
        "diverged": [trial.config["seed"] for trial in tested if trial.status == "diverged"],
        "failed": [trial.config["seed"] for trial in ended if trial not in tested],
        "test_accuracy": tests.get("test_accuracy"),
        "test": {"name": metric.test_name, **tests[metric.test_name]} if metric.test_name in tests else None,
        "metric": {"name": metric.name, **tests[metric.name]} if metric.name in tests else None,
    }


def tested(final: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return what the fresh seeds gave, by name: the metric on the test split, and accuracy beside it.

    Of a training without a test, the metric itself.
    """
    if not final:
        return {}
    first = final.get("test") or final.get("metric")
    figures = {first["name"]: first} if first else {}
    if final["test_accuracy"]:
        figures["test_accuracy"] = final["test_accuracy"]
    return figures


def seeds_of(figures: dict[str, Any], final: dict[str, Any]) -> str:
    """Return whose mean figures are, such as "3 fresh seeds, 1 of them diverged"."""
    count, seeds = len(figures["values"]), counted(len(final["seeds"]), "fresh seed")
    diverged = f", {len(final['diverged'])} of them diverged" if final.get("diverged") else ""
    return f"{f'{count} of ' if count < len(final['seeds']) else ''}{seeds}{diverged}"


def _tested(trials: Iterable[TrialRecord]) -> int:
    return sum(trial.is_final and trial.status in ("done", "diverged") for trial in trials)


def tested_before(facts: dict[str, Any]) -> str:
    """Return a sentence where seeds of an earlier winner were tested on the same split, else nothing."""
    count, final = facts["earlier_seeds"], facts["final"]
    if not count or not final or not final["test"]:
        return ""
    images = "images" if facts["data"]["classes"] else "data"
    return (
        f"The test {images} were looked at before, for {count} seed{'s' * (count > 1)} of an earlier winner."
    )


def over_seeds(values: list[float], metric: Metric = ACCURACY) -> dict[str, Any]:
    """Return mean, standard deviation and Student's 95 % interval of the mean over seeds.

    Args:
        values: One per seed.
        metric: Of which they are: an interval does not exceed what it can be.

    Returns:
        ``values``, ``mean``, ``sd`` (n - 1 in the denominator) and ``interval95``; the last two are
        None for fewer than two seeds. The interval speaks of the seeds, not of other images.
    """
    scale = max(1.0, max(map(abs, values)) / LARGEST)
    n, mean = len(values), math.fsum(value / scale for value in values) / len(values) * scale
    if n < 2:
        return {"values": values, "mean": mean, "sd": None, "interval95": None}
    from scipy.special import stdtrit  # half a second, which a study without seeds need not wait for

    sd = math.sqrt(math.fsum(((value - mean) / scale) ** 2 for value in values) / (n - 1)) * scale
    half = float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
    return {"values": values, "mean": mean, "sd": sd, "interval95": metric.clip(mean - half, mean + half)}


def busy_fraction(trials: Iterable[TrialRecord]) -> float | None:
    """Return seconds inside epochs ÷ worker seconds between each worker's first and last of them."""
    workers: dict[Any, list[tuple[float, float]]] = {}
    for report in (report for trial in trials for report in trial.reports.values()):
        seconds, end = report.get("epoch_seconds"), report.get("finished_at")
        if seconds is not None and end is not None:
            workers.setdefault((report.get("node"), report.get("pid")), []).append((end - seconds, end))
    busy = sum(end - start for spans in workers.values() for start, end in spans)
    present = sum(
        max(end for _, end in spans) - min(start for start, _ in spans) for spans in workers.values()
    )
    return round(busy / present, 4) if present else None


def is_number_of(name: str, value: Any) -> bool:
    """Return whether a report's value is something that was measured."""
    return isinstance(value, int | float) and not isinstance(value, bool) and name not in ("epoch", "pid")


def _reports(trials: Iterable[TrialRecord], metric: Metric) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {"trial_id": trial.trial_id, **trial.reports[epoch]}
        for trial in trials
        for epoch in sorted(trial.reports)
    ]
    others = dict.fromkeys(name for row in rows for name in row if is_number_of(name, row[name]))
    columns = REPORTED | {name: "float64" for name in (metric.name, *others) if name not in REPORTED}
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


def parse(content: bytes, location: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Return what a JSON file of a study holds, without its checksum.

    Args:
        content: The file's.
        location: Where it is, for the error.
        shape: What it has to hold, such as SPEC.

    Raises:
        ValueError: It is damaged.
    """
    try:
        text = content.decode()
        found: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location} cannot be read ({error}); restore it from a copy") from None
    crc = _crc(text.rpartition(CRC)[0])
    if not isinstance(found, dict) or found.pop("crc", crc) != crc:
        raise ValueError(f"{location} is damaged; restore it from a copy")
    _check(found, shape, location)
    return found


def _write(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps({key: finite(value) for key, value in content.items()}, indent=2).removesuffix("\n}")
    write_whole(file, f'{text}{CRC}{_crc(text)}"\n}}\n'.encode())


def _crc(content: str) -> str:
    return f"{zlib.crc32(content.encode()):08x}"


def _check(value: Any, shape: Any, location: str, name: str = "it") -> None:
    """Raise ValueError where a file does not hold what it has to."""
    if isinstance(shape, tuple):
        if value is None:
            return
        shape = shape[1]
    kind: Any = dict if isinstance(shape, dict) else list if isinstance(shape, list) else shape
    fits = isinstance(value, (int, float) if kind is float else kind)
    error = ""
    if not fits or isinstance(value, bool) != (kind is bool):  # a bool is an int to Python
        error = f"{name} is {str(value)[:40]!r}, and has to be {KINDS[kind]}"
    elif kind is dict and (lacking := [key for key in shape if key not in value]):
        error = f"{name} lacks {lacking[0]}"
    if error:
        raise ValueError(f"{location} is damaged ({error}); restore it from a copy")
    if kind is dict:
        for key, of in shape.items():
            _check(value[key], of, location, key)
    elif kind is list:
        for item in value:
            _check(item, shape[0], location, name)
