"""What did the benchmarks find? Results of tunefleet.benchmarks.run -> one Markdown table, as in README.md.

::

    python -m tunefleet.benchmarks.table benchmarks/results/*.json benchmarks/results/*/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from tunefleet.benchmarks.arms import ARMS
from tunefleet.cli import Parser, exit_code

PEERS = tuple(arm for arm in ARMS if arm != "ours")


def work(found: dict[str, Any]) -> str:
    """Return what a result's arms were given to do."""
    images = f"{found['images']:,} images" if found["images"] else "all images"
    ends = "no-op" if found["no_op"] else f"{found['epochs']} × {images}"
    if found["pruning"]:
        ends = f"at most {ends}, until the tutorial's best"
    return f"{found['family']}: {found['trials']} × {ends}"


def row(found: dict[str, Any]) -> list[str]:
    """Return the cells of one result: work, number type, seconds of ours, and others' time over ours."""
    seconds = [run["seconds_counted"] for run in found["arms"]["ours"]]
    cells = [
        work(found),
        f"{found['precision']}, {found['processor'].split(', ')[1]}",
        f"{median(seconds):.0f}",
    ]
    for peer in PEERS:
        ratio = found["ratios"].get(peer)
        if ratio:
            low, high = ratio["interval95"]
            cells.append(f"{ratio['median']:.2f} ({low:.2f} to {high:.2f}, n = {len(ratio['values'])})")
        else:
            cells.append("unsteady" if peer in found["arms"] else "")
    return cells


def table(found: list[dict[str, Any]]) -> str:
    """Return a row per result, by number type and family; peers that no result has are left out."""
    found = sorted(found, key=lambda one: (one["precision"], work(one)))
    peers = [any(peer in one["arms"] for one in found) for peer in PEERS]
    kept = [True, True, True, *peers]
    lines = [["trials", "numbers", "ours, s", *PEERS], ["---"] * len(kept), *map(row, found)]
    return "".join(
        "| " + " | ".join(cell for cell, keep in zip(line, kept, strict=True) if keep) + " |\n"
        for line in lines
    )


def read(file: str) -> dict[str, Any]:
    """Return a result.

    Raises:
        ValueError: The file holds none.
    """
    try:
        found: dict[str, Any] = json.loads(Path(file).read_text())
        row(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no result ({error!r}); give JSON files of tunefleet.benchmarks.run"
        ) from None
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = Parser(prog="python -m tunefleet.benchmarks.table", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="that tunefleet.benchmarks.run wrote")
    files = parser.parse_args(arguments).files

    def show() -> int:
        print(table([read(file) for file in files]), end="")
        return 0

    return exit_code(show)


if __name__ == "__main__":
    sys.exit(main())
