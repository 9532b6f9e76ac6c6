"""How fast is the machine right now? A matrix product and a memory read, timed beside every arm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

SIDE = 1024  # of the square matrices
MEMORY_BYTES = 256 * 2**20  # beyond any cache
WARM_UP = 0.5  # seconds, untimed
SECONDS = 2.0  # for which each is repeated


def probe() -> dict[str, float]:
    """Return GFLOP/s of a matrix product and GB/s of reading memory, on one thread of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
        memory = torch.ones(MEMORY_BYTES // 4)
        return {
            "gflops": 2e-9 * SIDE**3 / _median_seconds(lambda: a @ b),
            "gbytes": 1e-9 * MEMORY_BYTES / _median_seconds(memory.sum),
        }
    finally:
        torch.set_num_threads(threads)


def _median_seconds(work: Callable[[], object]) -> float:
    """Return the median seconds of a call."""
    _calls(work, WARM_UP)
    return statistics.median(_calls(work, SECONDS))


def _calls(work: Callable[[], object], for_seconds: float) -> list[float]:
    """Return the seconds of each of three calls, or of as many more as fit."""
    seconds: list[float] = []
    until = time.perf_counter() + for_seconds
    while time.perf_counter() < until or len(seconds) < 3:
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def spread(values: list[float]) -> float:
    """Return by which fraction of their median values differ at most."""
    middle = sorted(values)[len(values) // 2]
    return (max(values) - min(values)) / middle
