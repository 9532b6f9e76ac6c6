"""The code of the documentation runs: its blocks one after another, in a folder of their own."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from sklearn.datasets import load_digits

from tests.conftest import ROOT
from tests.images import pack
from tunefleet.study import Study

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(name):
    """Returns the language and text of each block of a page."""
    return BLOCK.findall((ROOT / "docs" / name).read_text("utf-8"))


def run_blocks(name, folder, data_dir):
    """Writes a page's files, which begin with # NAME.py, and runs the other blocks; returns their output."""
    scripts = folder / "bin"
    scripts.mkdir()
    command = scripts / "tunefleet"  # of this checkout, whatever is installed
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m tunefleet "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(data_dir.parent),
        "WANDB_MODE": "disabled",
    }
    outputs = []
    blocks = blocks_of(name)
    for _, text in (files := [block for block in blocks if re.match(r"# \w+\.py\n", block[1])]):
        (folder / text.split()[1]).write_text(text)
    for language, text in (block for block in blocks if block not in files):
        words = ["sh", "-ec", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        outputs.append(done.stdout)
    studies = [Study(file.parent) for file in folder.rglob("study.json")]
    assert all(len(study.searched) <= 2 for study in studies)  # they are to be quick
    return outputs


@pytest.fixture
def photos(tmp_path):
    """Ten digits as image files, in a folder and in an archive."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(load_digits().images[:10]):
        Image.fromarray((image * 15).astype("uint8")).save(folder / f"{number}.png")
    pack(tmp_path / "photos.zip", folder)
    return folder


@pytest.mark.slow
@pytest.mark.ray
def test_the_blocks_of_predict_run(photos, tmp_path, data_dir):
    search, predicted, in_python, exported, loaded = run_blocks("predict.md", tmp_path, data_dir)
    assert "test_accuracy" in search
    assert len(predicted.splitlines()) == 1 + 10
    assert predicted.startswith("path,class,p_0,p_1,")
    assert (tmp_path / "predictions.csv").read_text().count("\n") == 1 + 1 + 10
    assert in_python.strip() in {str(digit) for digit in range(10)}
    assert exported == "model.pt2: uint8 (N, 3, 32, 32) -> probabilities (N, 10), fp32\n"
    assert loaded.startswith("['")


@pytest.mark.slow
@pytest.mark.ray
def test_the_blocks_of_own_training_begin_with_its_debugging_and_run(tmp_path, data_dir):
    assert blocks_of("own-training.md")[0][1].startswith("tunefleet train mine.py ")
    trained, searched, squared = run_blocks("own-training.md", tmp_path, data_dir)
    assert re.match(r"epoch 1/1  train_loss 0\.\d+ ", squared)
    assert len(re.findall(r"^epoch \d/2  val_loss \d\.\d+ ", trained, re.MULTILINE)) == 2
    assert re.search(r"^test_loss \d\.\d+, 1 fresh seed$", searched, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.ray
def test_the_blocks_of_own_network_run(tmp_path, data_dir):
    for searched in run_blocks("own-network.md", tmp_path, data_dir):
        assert "best val_accuracy" in searched


@pytest.mark.slow
@pytest.mark.ray
def test_the_blocks_of_python_run(tmp_path, data_dir):
    (printed,) = run_blocks("python.md", tmp_path, data_dir)
    assert printed.splitlines()[-1] == "2"


@pytest.mark.slow
@pytest.mark.ray
def test_the_recipe_for_an_architecture_leaves_the_tests_green_and_can_be_searched(tmp_path, data_dir):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name, follow_symlinks=False)
    recipe = (ROOT / "README.md").read_text("utf-8").partition("add one row at the end of `_ROWS`")[2]
    row, spaces = BLOCK.search(recipe)[2], tmp_path / "models" / "spaces.py"
    head, end, rest = spaces.read_text().partition("\n}\n\n\nSPACES = ")
    spaces.write_text(f"{head}\n{row}{end}{rest}")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}/src", "XDG_CACHE_HOME": str(data_dir.parent)}
    tests = ["-m", "pytest", "-v", *(f"tests/test_{name}.py" for name in ("models", "spaces", "house"))]
    (name,) = re.findall(r'^"(\w+)": _row', row)
    search = ["-m", "tunefleet", "search", name, "--data", "digits", "--weights", "none", "--wandb", "off"]
    sizes = ["--trials", "2", "--epochs", "1", "--final-seeds", "0"]
    for words, expected in ((tests, rf"test_models.*\[{name}\]"), ([*search, *sizes], "2 trials, 2 epochs")):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert re.search(expected, done.stdout), done.stdout
