"""How do schedulers compare that searched the same curves? The replays' arrays -> a table, text, a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from tunefleet.analysis import plots, stats

REFERENCE = "ray_asha"  # what the others are compared with
MEASURES = ("epochs", "seconds", "regret", "regret_other")  # of one search; benchmarks/replay.py
EXPLAINED = """\
epochs: spent by the whole search; ratio: to ray_asha's. seconds: simulated.
regret: final val_accuracy of the best curve less that of the one picked, in
points of percent; other: of the same pick on the other seeds' curves (random's
is what chance costs). above: more than ray_asha's, in the same orders.
a..b: 95 % bootstrap interval over orders of arrival, on these very curves."""


def compare(found: np.ndarray, names: Sequence[str], generator: np.random.Generator) -> pd.DataFrame:
    """Return a row per scheduler: what its searches took and found, and how that compares with REFERENCE.

    Args:
        found: ``(M, S, orders, 4)``, MEASURES of each search, by scheduler, seed and order of arrival.
        names: Of the M schedulers; REFERENCE is one of them.
        generator: Of the bootstrap, which draws orders; the seeds' mean stands for each of them.

    Returns:
        scheduler; of each measure the mean, and ``epochs_ratio``, ``seconds_ratio`` (to REFERENCE's mean),
        ``regret_above`` and ``regret_other_above`` (REFERENCE's mean subtracted); and beside each of these,
        with ``_low`` and ``_high``, its 95 % interval.
    """
    reference = list(names).index(REFERENCE)
    columns: dict[str, Any] = {"scheduler": list(names)}
    for measure, values in zip(MEASURES, np.moveaxis(found.mean(axis=1), 2, 0), strict=True):  # (M, orders)
        means, samples = values.mean(axis=1), stats.bootstrap_means(values.T, generator)
        regret = measure.startswith("regret")
        against = np.subtract if regret else np.divide
        for name, mean, sample in (
            (measure, means, samples),
            (
                f"{measure}_above" if regret else f"{measure}_ratio",
                against(means, means[reference]),
                against(samples, samples[:, [reference]]),
            ),
        ):
            columns[name] = mean
            columns[f"{name}_low"], columns[f"{name}_high"] = stats.interval95(sample)
    return pd.DataFrame(columns)


def as_text(table: pd.DataFrame) -> str:
    """Return a comparison as text that fits 80 columns; regrets in points of percent."""
    lines = [
        f"{'':9}{'epochs':>7}{'ratio':>6}{'':11}{'seconds':>8}{'regret':>7}{'above':>13}{'other':>6}{'above':>13}"
    ]
    for row in table.to_dict("records"):
        ratio = f"{row['epochs_ratio']:6.2f} {row['epochs_ratio_low']:.2f}..{row['epochs_ratio_high']:.2f}"
        line = f"{row['scheduler']:9}{row['epochs']:7.0f}{ratio:17}{_seconds(row['seconds']):>8}"
        for measure, width in (("regret", 7), ("regret_other", 6)):
            low, high = row[f"{measure}_above_low"], row[f"{measure}_above_high"]
            above = "-" if math.isnan(low) else f"{_points(low, '+')}..{_points(high, '+')}"
            line += f"{_points(row[measure]):>{width}}{above:>13}"
        lines.append(line)
    return "\n".join(lines)


def write(table: pd.DataFrame, asked: dict[str, Any], out: Path) -> list[Path]:
    """Write replay.png and replay.json; return their paths.

    Args:
        table: Comparisons with the further columns family and workers.
        asked: What they were asked for; stands in the JSON, too.
        out: A folder.
    """
    with mpl.rc_context(plots.style(list(table.family))):
        plots.schedulers(table).savefig(out / "replay.png", dpi=160, facecolor="white")
    rows = table.astype(object).where(table.notna(), None).to_dict("records")  # JSON has no NaN
    content = json.dumps(asked | {"reference": REFERENCE, "results": rows}, indent=1)
    (out / "replay.json").write_text(content + "\n", encoding="utf-8")
    return [out / "replay.png", out / "replay.json"]


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _points(fraction: float, sign: str = "") -> str:
    points = 100 * fraction
    return "-" if math.isnan(points) else f"{points:{sign}.{1 if abs(points) >= 10 else 2}f}"
