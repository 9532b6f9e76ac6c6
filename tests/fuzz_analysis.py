"""Do the commands of analysis/ answer everything in one line? Random studies, damage, flags and terminals.

::

    python -m tests.fuzz_analysis --draws 300 --seed 0

Prints a line per defect and a table of exit codes. A defect is a traceback, an exit code outside 0 to 3,
an error that is not one line on stderr, a warning of a library, and a refused command that changed a file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import replay, report, results, wandb_report
from tests.made_study import remove_trials, write_study

SECONDS = 120  # a draw may take; of a report, a few
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
FILES = ("study.json", "trials.csv", "epochs.parquet", "lr_curve.csv")
BEST = ("best/predictions.parquet", "best/misclassified.npz", "best/first_layer.npy")


def make_study(rng: random.Random, folder: Path) -> None:
    """Write a sound study of a random kind."""
    classes = rng.choice(
        [("a", "dog"), tuple(NAMES), tuple(f"class {k}" for k in range(rng.choice([25, 60])))]
    )
    epochs = rng.choice([1, 4])
    rungs = rng.choice([(), (1,)]) if epochs > 1 else ()
    write_study(folder, trials=rng.choice([1, 9, 12]), epochs=epochs, rungs=rungs, classes=classes)
    kind = rng.choice(["done", "done", "no trial", "new", "zero", "lr"])
    if kind in ("no trial", "new"):
        remove_trials(folder)
    facts = json.loads((folder / "study.json").read_text())
    if kind == "new":  # killed before it was collected
        facts = {key: facts[key] for key in facts if key not in ("trials", "statuses", "best", "final")}
        (folder / "trials.csv").unlink()
        (folder / "epochs.parquet").unlink()
    if kind == "zero":
        for file, read, write in (
            ("trials.csv", lambda file: pd.read_csv(file, dtype={"trial_id": "str"}), "to_csv"),
            ("epochs.parquet", pd.read_parquet, "to_parquet"),
        ):
            table = read(folder / file)
            getattr(table.assign(val_accuracy=0.0), write)(folder / file, index=False)
    if kind == "lr":
        curve = {"lr": [0.01, 0.1], "seeds": 3, "mean": [0.5, None], "low": [0.4, None], "high": [0.6, None]}
        pd.DataFrame(curve).assign(verdict=["done", "diverged"]).to_csv(folder / "lr_curve.csv", index=False)
    (folder / "study.json").write_text(json.dumps(facts))


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
            file.write_bytes((folder / rng.choice(["study.json", "epochs.parquet"])).read_bytes())
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


def make_command(
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
        out = out or ["--out", str(folder / "replay")]
        return kind, replay.main, [*given, *out, "--orders", "2", "--workers", "2", flag, number]
    modules = (report, results, wandb_report, replay)
    return kind, rng.choice(modules).main, [rng.choice(["--help", "--nosuch", "--nosuch\n"])]


def tree(folder: Path) -> dict[str, str]:
    """Return a hash of every file below a folder, and the folders."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder"
        for file in folder.rglob("*")
    }


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Context manager: raises TimeoutError in what takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def draw(number: int, seed: int) -> tuple[str, int | str, str]:
    """Make and run one command; return its kind, its exit code and its defect, "" without one."""
    rng = random.Random(f"{seed}-{number}")
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        folder = Path(temporary)
        studies, done = [], []
        for k in range(rng.choice([1, 1, 1, 2])):
            study = folder / str(k) / rng.choice(NAMES)
            made = folder / str(k) / "made"
            make_study(rng, made)
            done += [damage(rng, made) for _ in range(rng.choice([0, 0, 0, 1, 1, 2]))]
            made.rename(study)  # pandas writes to no path that is not UTF-8
            studies.append(str(study))
        kind, main, arguments = make_command(rng, folder, studies)
        encoding = rng.choice(["ascii", "latin-1", "utf-8"])
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in range(2)]
        before, code, defect = tree(folder), 99, ""
        try:
            with (
                limited(SECONDS),
                warnings.catch_warnings(),
                contextlib.redirect_stdout(streams[0]),
                contextlib.redirect_stderr(streams[1]),
            ):
                warnings.resetwarnings()
                for ignored in (
                    DeprecationWarning,
                    PendingDeprecationWarning,
                    ImportWarning,
                    ResourceWarning,
                ):
                    warnings.simplefilter("ignore", ignored)  # as Python does
                streams[1].reconfigure(errors="backslashreplace")  # as Python's own
                code = main(arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 99
        except BaseException:  # noqa: BLE001  what is looked for
            defect = f"traceback: {traceback.format_exc()}"
        for stream in streams:
            stream.flush()
        said = streams[1].buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        after = tree(folder)
        if not defect and code not in range(4):
            defect = f"code {code}"
        if not defect and said.count("\n") != (code == 2):
            defect = f"stderr {said!r}"
        if not defect and code == 2 and before != after:
            defect = f"refused, but changed {sorted(before.items() ^ after.items())}"
        if defect:
            defect = f"draw {number}: {kind} {arguments!a} {encoding} after {done!a}: {defect}"
        return kind, code if not defect.startswith("traceback") else "traceback", defect


def main(arguments: list[str] | None = None) -> int:
    """Run the draws; return 1 where one has a defect."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_analysis", description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    began, counts, defects = time.monotonic(), Counter[tuple[str, int | str]](), 0
    for number in range(options.first, options.first + options.draws):
        kind, code, defect = draw(number, options.seed)
        counts[kind, code] += 1
        if defect:
            defects += 1
            print(defect.encode("ascii", "backslashreplace").decode(), flush=True)
    print(f"{options.draws} draws, seed {options.seed}, {time.monotonic() - began:.0f} s, {defects} defects")
    for (kind, code), count in sorted(counts.items(), key=str):
        print(f"{kind:12} code {code}: {count}")
    return bool(defects)


if __name__ == "__main__":
    sys.exit(main())
