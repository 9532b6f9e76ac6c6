"""How fast is the machine right now? A matrix product and a memory read, timed beside every arm."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SIDE = 1024  # of the square matrices
MEMORY_BYTES = 256 * 2**20  # beyond any cache
WARM_UP = 0.5  # seconds, untimed
SECONDS = 2.0  # for which each is repeated


def probe() -> dict[str, float]:
    """Returns GFLOP/s of a matrix product and GB/s of reading memory, on one thread of the CPU."""
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
    """Returns the median seconds of a call."""
    timed: list[tuple[float, float]] = []  # when it ended, how long it took
    started = ended = time.perf_counter()
    while ended < started + WARM_UP + SECONDS or len(timed) < 3:
        began, _ = time.perf_counter(), work()
        ended = time.perf_counter()
        timed.append((ended, ended - began))
    seconds = [took for when, took in timed if when >= started + WARM_UP]
    return sorted(seconds)[len(seconds) // 2]


def spread(values: list[float]) -> float:
    """Returns by which fraction of their median values differ at most."""
    middle = sorted(values)[len(values) // 2]
    return (max(values) - min(values)) / middle
