"""How much of the device does a training step use? Images per second against what its multipliers could do.

Prints, per architecture, images/s of TrainingRun.train_epoch, and the share of the FLOP/s that a matrix
product of the same number type reaches on this device at the same time; writes nothing but caches::

    python -m benchmarks.roofline --data cifar10 --device cuda
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.epoch import BATCHES
from benchmarks.families import published
from trainables.command_line import Parser, exit_code
from trainables.config import check_integer, check_name
from trainables.data import DATA_DIR, prepare
from trainables.levers import Levers, choose
from trainables.training import TrainingRun

MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
PRODUCTS = 10  # matrix products of which the median counts


def peak_flops(levers: Levers) -> float:
    """Returns FLOP/s of a square matrix product in the number type of the levers."""
    side = MATRIX_SIDE[torch.device(levers.device).type]
    a, b = (torch.rand(side, side, device=levers.device).to(levers.dtype) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS + 1):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds[1:])


def flops_per_image(run: TrainingRun, count: int) -> float:
    """Returns FLOPs of a forward and backward pass, as torch counts them: those of the textbook's sums.

    Args:
        run: Whose network.
        count: Images of the batch that is counted on; the figure is per image.
    """
    x, y = run.to_network(run.inputs.train_x[:count]), run.inputs.train_y[:count]
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(run.network(x.float()), y).backward()
    run.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops() / count


def main(arguments: list[str] | None = None) -> int:
    """Prints a row per architecture."""
    parser = Parser(prog="python -m benchmarks.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="*", metavar="ARCH", help=f"of: {', '.join(BATCHES)}")
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder or archive of 32×32 images")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="cache folder (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="epochs, after one untimed (%(default)s)")
    options = parser.parse_args(arguments)
    check_integer("--threads", options.threads, 1)
    check_integer("--repeat", options.repeat, 1)
    for name in options.architectures:
        check_name("ARCH", name, BATCHES)
    levers = choose(options.device, options.precision)
    data = prepare(options.data, options.data_dir)
    torch.set_num_threads(options.threads)
    print(f"{levers.device} {levers.precision}, {options.threads} thread(s), {data.name}")
    print(f"{'architecture':26}{'images/s':>10}{'MFLOP':>8}{'GFLOP/s':>10}{'of peak':>9}{'peak':>9}")
    for name in options.architectures or BATCHES:
        run = TrainingRun(published(name, epochs=1, weights="none"), data, levers, options.data_dir)
        flops = flops_per_image(run, min(run.micro_batch, len(run.inputs.train_y)))
        seconds, peaks = [], []
        for _ in range(options.repeat + 1):
            peaks.append(peak_flops(levers))
            began = time.perf_counter()
            run.train_epoch()[0].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        speed = len(run.inputs.train_y) / statistics.median(seconds[1:])
        peak = statistics.median(peaks)
        print(
            f"{name:26}{speed:10.0f}{flops / 1e6:8.1f}{speed * flops / 1e9:10.1f}"
            f"{speed * flops / peak:9.0%}{peak / 1e9:9.0f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
