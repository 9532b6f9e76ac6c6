"""Random studies, damage, flags and terminals: one line, a code of 0 to 3, nothing left behind."""

import contextlib
import random
import subprocess
import sys

import pytest
import ray

from tests.fuzz_search import make_study
from tunefleet.study import Study

DRAWS, SEED = 25, 22


@pytest.mark.ray
@pytest.mark.parametrize("commands", ["analysis", "search"])
def test_random_commands_have_no_defect(commands):
    """In a process of its own: each draw is a fork of it, and this one has threads."""
    fuzz = [sys.executable, "-m", "tests.fuzz", commands, "--draws", str(DRAWS), "--seed", str(SEED)]
    process = subprocess.run(fuzz, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


def test_enough_of_the_fuzzers_studies_are_whole(tmp_path):
    """Or every command would refuse them at their first check, and nothing behind it would be tried."""
    init, whole = ray.init, 0
    for seed in range(60):
        (tmp_path / str(seed)).mkdir()
        study, _ = make_study(random.Random(seed), tmp_path / str(seed))
        with contextlib.suppress(ValueError, OSError):
            Study(study)
            whole += 1
    assert whole > 15
    assert ray.init is init  # in this process other tests follow
