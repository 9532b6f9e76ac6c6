"""Does a study of thousands of trials stay as fast and as small as at its beginning?

Runs a study whose trials train nothing, with the default pruner, and prints milliseconds per trial and the
driver's memory at its beginning and its end, and the size of the study's folder; writes nothing else. A
hundred trials take a second, less than a neighbour's burst on a shared machine: hence medians of runs::

    python -m tunefleet.benchmarks.scale --trials 2000 --repeat 3
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from tunefleet.benchmarks.families import FAMILIES, configurations
from tunefleet.benchmarks.task import Row, Task
from tunefleet.cli import Parser, exit_code
from tunefleet.models.checks import check_integer
from tunefleet.trainables.data import DATA_DIR

WINDOW = 100  # trials whose time is measured together
SETTLED = 100  # trials after which workers are up and everything is imported
EPOCHS = 3  # of a trial that is promoted to the end
SAMPLE_SECONDS = 0.2  # between two samples of the driver's memory
COLUMNS = ("ms", "at end", "times", "MiB", "at end", "times", "folder")  # times: end / beginning


def run(trials: int, data: str, data_dir: Path) -> tuple[float, ...]:
    """Run a study of trials that only report; return a row of the table, in the order of COLUMNS.

    Raises:
        RuntimeError: It failed; the end of what it printed.
    """
    family = dataclasses.replace(FAMILIES["no-op"], trials=trials, epochs=EPOCHS)
    with tempfile.TemporaryDirectory() as name:
        (folder := Path(name, "arm")).mkdir()
        task = Task(
            arm="ours",
            configurations=configurations(family, "none"),
            epochs=EPOCHS,
            pruning=True,
            no_op=True,
            data=data,
            data_dir=str(data_dir.absolute()),
            workers=2,
            device="cpu",
            precision="fp32",
            folder=str(folder),
        )
        task.write(Path(name, "task"))
        command = [sys.executable, "-m", "tunefleet.benchmarks.arms", "ours", f"{name}/task", f"{name}/rows"]
        with Path(name, "printed").open("w") as out:
            process = psutil.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
            memory = [*_memory(process, folder / "study" / "reports.jsonl")]
        if process.wait() != 0:
            raise RuntimeError(Path(name, "printed").read_text()[-3000:])
        rows = json.loads(Path(name, "rows").read_text())
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return numbers(ms_per_trial(rows), (memory[0], memory[-1]), size / 2**20)


def _memory(process: psutil.Popen, journal: Path) -> Iterable[float]:
    """Yield anonymous MiB of a process now and then, from the time when its study has settled.

    Libraries are left out: they become the driver's own when its workers exit.
    """
    while True:
        try:
            process.wait(SAMPLE_SECONDS)
            return
        except psutil.TimeoutExpired:
            if not journal.exists() or journal.read_bytes().count(b'"config"') < SETTLED:
                continue
            memory = process.memory_info()
            if used := memory.rss - memory.shared:  # 0 when it is about to exit
                yield used / 2**20


def ms_per_trial(rows: list[Row]) -> tuple[float, float]:
    """Return milliseconds between trials' first reports, of WINDOW trials after SETTLED, and of the last."""
    times = sorted(row["finished_at"] for row in rows if row["epoch"] == 1)
    first = times[SETTLED + WINDOW] - times[SETTLED]
    return 1000 * first / WINDOW, 1000 * (times[-1] - times[-1 - WINDOW]) / WINDOW


def numbers(ms: tuple[float, float], mib: tuple[float, float], folder_mib: float) -> tuple[float, ...]:
    """Return a row of the table from pairs (after SETTLED trials, at the end)."""
    return (*ms, ms[1] / ms[0], *mib, mib[1] / mib[0], folder_mib)


def _line(name: str, row: Sequence[float]) -> str:
    return f"{name:6}" + "".join(f"{number:10.2f}" for number in row)


def main(arguments: list[str] | None = None) -> int:
    """Print what a long study took."""
    parser = Parser(prog="python -m tunefleet.benchmarks.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=2000, help="of the study (%(default)s)")
    parser.add_argument("--data", default="digits", help="which trials would train on (%(default)s)")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="cache (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="runs (%(default)s)")
    options = parser.parse_args(arguments)
    check_integer("--trials", options.trials, SETTLED + 2 * WINDOW)
    check_integer("--repeat", options.repeat, 1)
    print(f"{options.trials} trials, after {SETTLED} and at the end: ms per trial, MiB of driver and folder")
    print("run   " + "".join(f"{column:>10}" for column in COLUMNS))
    rows = []
    for number in range(options.repeat):
        rows.append(run(options.trials, options.data, options.data_dir))
        print(_line(str(number + 1), rows[-1]), flush=True)
    print(_line("median", [*map(statistics.median, zip(*rows, strict=True))]))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
