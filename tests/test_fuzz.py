"""Random studies, damage, flags and terminals: one line, a code of 0 to 3, nothing left behind."""

import subprocess
import sys

import pytest

DRAWS, SEED = 50, 22


@pytest.mark.parametrize("commands", ["analysis", "search"])
def test_fifty_random_commands_have_no_defect(commands):
    """In a process of its own: each draw is a fork of it, and this one has threads."""
    fuzz = [sys.executable, "-m", "tests.fuzz", commands, "--draws", str(DRAWS), "--seed", str(SEED)]
    process = subprocess.run(fuzz, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
