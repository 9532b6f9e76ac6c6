"""What may the commands of analysis/ be given? Studies, damage, flags and terminals, for tests/fuzz.py."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.fuzz import Command
from tests.made_study import MSE, edit_events, remove_trials, write_own_study, write_study
from tunefleet.analysis import report, results, wandb_report
from tunefleet.benchmarks import replay
from tunefleet.metric import ACCURACY, Metric

NAMES = (
    "study",
    "it's",
    "a b",
    "[bold]x[red]",
    "$x$",
    "100%",
    "猫",
    "line\nbreak",
    "\udcff",
    "#;&|`id`",
    "~",
    "-x",
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 10**30, 1.5, -0.0, 1e308, float("nan"), "", "x", "\udcff\n", "9" * 300),
    *([], [None], {}, {"low": 1, "high": 0, "log": True}, [[]], "[red]", "0008", "../../x"),
)
FILES = ("study.json", "result.json", "reports.jsonl", "lr_curve.csv")
BEST = ("best/predictions.parquet", "best/misclassified.npz", "best/first_layer.npy")


def make_study(rng: random.Random, folder: Path) -> None:
    """Write a sound study of a random kind."""
    classes = rng.choice(
        [("a", "dog"), tuple(NAMES), tuple(f"class {k}" for k in range(rng.choice([25, 60])))]
    )
    epochs = rng.choice([1, 4])
    rungs = rng.choice([(), (1,)]) if epochs > 1 else ()
    size = {"trials": rng.choice([1, 9, 12]), "epochs": epochs, "rungs": rungs}
    metric = rng.choice(
        [ACCURACY, ACCURACY, ACCURACY, MSE, Metric(rng.choice(["$x$", "\udcff", "a b"]), "max")]
    )
    if metric == ACCURACY:
        write_study(folder, classes=classes, **size)
    else:
        write_own_study(folder, metric, tested=rng.random() < 0.5, **size)
    kind = rng.choice(["done", "done", "no trial", "new", "zero", "lr"])
    if kind in ("no trial", "new"):
        remove_trials(folder)
    if kind == "new":  # killed before it had a result
        (folder / "result.json").unlink()
    if kind == "zero":
        value = rng.choice([0.0, None, 1e29] if metric != ACCURACY else [0.0])
        edit_events(folder, lambda event: event | ({metric.name: value} if event["epoch"] else {}))
    if kind == "lr":
        curve = {"lr": [0.01, 0.1], "seeds": 3, "mean": [0.5, None], "low": [0.4, None], "high": [0.6, None]}
        pd.DataFrame(curve).assign(verdict=["done", "diverged"]).to_csv(folder / "lr_curve.csv", index=False)


def damage(rng: random.Random, folder: Path) -> str:
    """Damage one file of a study; return what was done."""
    name = rng.choice([file for file in (*FILES * 3, *BEST) if (folder / file).is_file()] or ["study.json"])
    file = folder / name
    if not file.is_file():
        return "nothing"
    content = file.read_bytes()
    kind = rng.choice(
        ["missing", "empty", "cut", "flipped", "garbage", "folder", "null", "other", *["value"] * 6]
    )
    if kind == "missing":
        file.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "other":
        with contextlib.suppress(OSError):
            file.write_bytes((folder / rng.choice(["study.json", "reports.jsonl"])).read_bytes())
    elif kind == "value":
        with contextlib.suppress(Exception):  # of a file that is damaged already
            kind += f" {change_value(rng, file)}"
    else:
        at = rng.randrange(len(content) + 1)
        new = {
            "empty": b"",
            "cut": content[:at],
            "flipped": content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
            "garbage": rng.randbytes(200),
            "null": rng.choice([b"null", b"[]", b"{}", b"\x00" * 50, b"[" * 100_000, b"\xff\xfe{}"]),
        }
        file.write_bytes(new[kind])
    return f"{name} {kind}"


def change_value(rng: random.Random, file: Path) -> str:
    """Change or remove one value, column or array of a file that stays readable."""
    if file.suffix == ".json":
        root = json.loads(file.read_bytes())
        at, path = root, []
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = rng.choice(keys)
            path.append(str(key))
            if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.7:
                at = at[key]
                continue
            break
        value = rng.choice(VALUES)
        if rng.random() < 0.25:
            del at[key]
        else:
            at[key] = value
        file.write_text(json.dumps(root))
        return f"{'.'.join(path)} = {str(value)[:20]!a}"
    if file.suffix in (".csv", ".parquet"):
        table = (
            pd.read_csv(file, dtype=object) if file.suffix == ".csv" else pd.read_parquet(file).astype(object)
        )
        if table.empty:
            return "of nothing"
        column = rng.choice(list(table.columns))
        how = rng.choice(["drop", "cell", "column", "rows", "twice"])
        value = rng.choice([None, -1, 0, 1e308, float("inf"), "x", "", "2", True, "\n"])
        if how == "drop":
            table = table.drop(columns=column)
        elif how == "cell":
            table.loc[rng.randrange(len(table)), column] = value
        elif how == "column":
            table[column] = value
        elif how == "rows":
            table = table.head(rng.randrange(len(table)))
        else:
            table = pd.concat([table, table.tail(1)])
        if file.suffix == ".csv":
            table.to_csv(file, index=False)
        else:
            table.infer_objects().to_parquet(file)  # or an error: Parquet has no column of mixed types
        return f"{column} {how} {value!a}"
    shape = rng.choice([(), (0,), (2, 2), (2, 3, 8, 8), (2, 3, 8, 8, 2)])
    array = np.full(shape, rng.choice([np.nan, 1e30, 0.0]), rng.choice(["f4", "f8"]))
    if rng.random() < 0.5:
        array = np.zeros(shape, rng.choice(["u1", "i8"]))
    if file.suffix == ".npz":
        np.savez(file, **{rng.choice(["index", "images"]): array, "images": array})
    else:
        np.save(file, array)
    return f"an array {shape}"


def make_database(rng: random.Random, folder: Path) -> str:
    """Return the URL of a database in a random state."""
    file = folder / "optuna {x} %.db"
    kind = rng.choice(["new", "new", "new", "other", "garbage", "folder", "nowhere", "nonsense", "versions"])
    if kind in ("other", "versions"):
        with contextlib.closing(sqlite3.connect(file)) as database, database:
            database.execute("create table customers (name text)")
            for table in (
                ("studies", "trials", "version_info", "alembic_version") if kind == "versions" else ()
            ):
                database.execute(f"create table {table} (version_num text)")
    elif kind == "garbage":
        file.write_bytes(rng.randbytes(5000))
    elif kind == "folder":
        file.mkdir()
    nonsense = rng.choice(
        ["", "x", "sqlite:/x", "nosuch://a/b", "postgresql://u:secret@h:port/x", "mysql://"]
    )
    return {"nowhere": f"sqlite:///{folder}/no/x.db", "nonsense": nonsense}.get(kind, f"sqlite:///{file}")


def make_out(rng: random.Random, folder: Path) -> str:
    """Return a place to write to, possible or not."""
    (folder / "a file").write_text("mine")
    ours = folder / "mine"
    (ours / "tensorboard").mkdir(parents=True, exist_ok=True)
    (ours / "tensorboard" / "notes.txt").write_text("mine")
    odd = [str(folder / name) for name in NAMES]
    impossible = [str(folder / "a file"), str(folder / "a file" / "x"), "/proc/x", "/dev/null/x", "x" * 300]
    return rng.choice([*odd, *impossible, str(folder / "new" / "deep"), str(ours)])


def make_command(rng: random.Random, folder: Path, number: int) -> Command:
    """Return a command that reads random studies."""
    studies, done = [], []
    for k in range(rng.choice([1, 1, 1, 2])):
        study = folder / str(k) / rng.choice(NAMES)
        made = folder / str(k) / "made"
        make_study(rng, made)
        done += [damage(rng, made) for _ in range(rng.choice([0, 0, 0, 1, 1, 2]))]
        made.rename(study)  # pandas writes to no path that is not UTF-8
        studies.append(str(study))
    kind, main, arguments = choose_command(rng, folder, studies)
    encoding = rng.choice(["ascii", "latin-1", "utf-8"])
    return Command(kind, main, arguments, {"PYTHONIOENCODING": encoding}, state=done)


def choose_command(
    rng: random.Random, folder: Path, studies: list[str]
) -> tuple[str, Callable[..., int], list[str]]:
    """Return a command's name, its main function and its arguments."""
    bad = [str(folder / "nothing"), "", "/dev/null", "s3://", "file:///nowhere/x"]
    given = [*studies, rng.choice(bad)] if rng.random() < 0.1 else studies
    out = ["--out", make_out(rng, folder)] if rng.random() < 0.6 else []
    kind = rng.choice(["report", "tensorboard", "optuna", "results", "results", "wandb", "replay", "help"])
    if kind == "report":
        return kind, report.main, [*given, *out]
    if kind == "tensorboard":
        return kind, report.main, [*given, *out, "--tensorboard"]
    if kind == "optuna":
        return kind, report.main, [*given, "--optuna", make_database(rng, folder)]
    if kind == "results":
        return kind, results.main, given
    if kind == "wandb":
        more = rng.choice([[], ["--group", "a"], ["--project", "p", "--entity", "\udcff"]])
        return kind, wandb_report.main, [*given, *out, *more]
    if kind == "replay":
        number = rng.choice(["-1", "0", "1", "1", "2", "3", str(10**12), "x", ""])
        flag = rng.choice(["--eta", "--grace", "--seed", "--workers", "--orders", "--schedulers"])
        return kind, replay.main, [*given, "--orders", "2", "--workers", "2", flag, number]
    modules = (report, results, wandb_report, replay)
    return kind, rng.choice(modules).main, [rng.choice(["--help", "--nosuch", "--nosuch\n"])]
