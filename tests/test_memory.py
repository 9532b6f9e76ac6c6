"""A data set larger than memory: no process holds it, or its inputs, in memory of its own.

The limit is RLIMIT_DATA, which counts what Linux has to find memory for: the heap and private writable
maps, copy-on-write maps of files among them, however little of them is written. RLIMIT_AS would count the
shared pages of mapped files, too, which the kernel drops and reads again as it likes.
"""

import os
import subprocess
import sys

import pytest

COUNT = 30_000  # images that train, and as many that test: 92 MB each as bytes, 369 MB as inputs
ROOM = 56 * 2**20  # bytes beyond what the libraries hold
PROGRAM = f"""
import resource, sys
import numpy as np, torch
from pathlib import Path
from tests.configs import make_config
from tunefleet.trainables import own_images, training
from tunefleet.trainables.device import choose
from tunefleet.trainables.evaluate import evaluate_test
from tunefleet.trainables.own_images import load_images
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

own_images.PART_BYTES = training.EVAL_BATCH_BYTES = 2**20  # as small to this set as they are to a large one
torch.set_num_threads(1)
torch.nn.Linear(64, 64)(torch.zeros(512, 64)).sum().backward()  # starts what starts once
folder = Path(sys.argv[1])
shape = ({COUNT}, 32, 32, 3)
labels = np.arange({COUNT}) % 2
images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
for start in range(0, {COUNT}, 1000):
    noise = np.random.default_rng(start).integers(0, 60, (1000, *shape[1:]), dtype=np.uint8)
    images[start : start + 1000] = noise + np.uint8(90) * labels[:1000, None, None, None].astype(np.uint8)
del images
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + {ROOM}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
mapped = np.load(folder / "images.npy", mmap_mode="r")
for held in (lambda: np.array(mapped), lambda: np.load(folder / "images.npy", mmap_mode="c")):
    try:
        held()
    except (OSError, MemoryError):
        continue
    raise SystemExit("the limit limits nothing")
split = (mapped, labels)
images = load_images("<dict>", {{"train": split, "test": split, "classes": ["dark", "light"]}})
data = prepare(images, folder)
for architecture in ("softmax", "twolayernn"):
    config = make_config(architecture, epochs=1, batch_size=128)
    run = TrainingRun(config, data, choose("cpu", "fp32"), folder)
    report, tested = run.epoch(), evaluate_test(run)
    assert len(run.inputs.train_y) + len(run.inputs.val_y) == data.test_count == {COUNT}
    print(architecture, report["val_accuracy"], tested["test_accuracy"])
    assert min(report["val_accuracy"], tested["test_accuracy"]) > 0.9
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts maps on Linux alone")
def test_a_data_set_larger_than_the_limit_trains_and_is_tested(tmp_path):
    program = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # or each thread takes room of its own
    run = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
