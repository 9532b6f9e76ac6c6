"""A stranger's folder: a network, its neighbour and some JPEGs, and nothing of this project edited."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tunefleet.study import Study
from tunefleet.trainables.data import draw_test

pytestmark = pytest.mark.ray

MINE = """
from ray import tune
from torch import nn
from tunefleet import Space
import models

def build(num_classes, image_shape, width=8, dropout=0.0):
    body = models.body(image_shape[0], width)
    return nn.Sequential(body, nn.Dropout(dropout), nn.Linear(16 * width, num_classes))

space = Space(
    build,
    {"lr": tune.loguniform(1e-3, 1e-1), "width": tune.choice([4, 8]), "dropout": tune.uniform(0.0, 0.5)},
    epochs=9,
    trials=6,
)
"""
MODELS = """
from torch import nn

def body(channels, width):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    )
"""
OWN = """
import logging

import torch
from ray import tune
from torch import nn
from tunefleet import Space

logging.basicConfig(level="INFO", format="%(message)s")

class Fit:
    def __init__(self, config, *, seed):
        self.epochs = 0
        logging.info("width %s", config["width"])
        if config["width"] == 13:
            raise RuntimeError("unlucky")
        torch.manual_seed(seed)
        self.x = torch.randn(200, 4)
        self.y = self.x.sum(1, keepdim=True) + 2
        width, self.lr = config["width"], config["lr"]
        self.network = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def loss(self, first, last):
        return (self.network(self.x[first:last]) - self.y[first:last]).square().mean()

    def epoch(self):
        self.epochs += 1
        print("epoch", self.epochs)
        for first in range(0, 150, 10):
            gradients = torch.autograd.grad(self.loss(first, first + 10), list(self.network.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(self.network.parameters(), gradients):
                    parameter -= self.lr * gradient
        with torch.no_grad():
            return {"val_mse": self.loss(150, 180)}

    def state_dict(self):
        return {"epochs": self.epochs, "network": self.network.state_dict()}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]
        self.network.load_state_dict(state["network"])

    def test(self):
        with torch.no_grad():
            return self.loss(180, 200).item()

space = Space(
    run=Fit,
    ranges={"lr": tune.choice([0.01, 0.03, 1e6]), "width": tune.choice([4, 13, 16])},
    metric="val_mse",
    mode="min",
    trials=16,
    epochs=9,
)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return write_strangers_files(tmp_path)


def write_strangers_files(folder):
    """Writes mine.py, a models.py that it imports, and 300 small JPEGs of two classes."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(MINE)
    (folder / "models.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    for k in range(300):
        name = ("dark", "light")[k % 2]
        file = folder / "photos" / name / f"{k}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 128, (24, 24, 3), dtype=np.uint8) + np.uint8(100 * (k % 2))
        Image.fromarray(pixels).save(file)
    return folder


def tunefleet(folder, *words, **options):
    environment = os.environ | {"COLUMNS": "80", "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-P", "-m", "tunefleet", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=-1,
        stderr=-1,
        text=True,
        start_new_session=True,
        **options,
    )


def done(process, code=0):
    out, err = process.communicate(timeout=180)
    assert process.returncode == code, (out, err)
    return out


def killed(process, study, reports=4):
    """Waits for some reports, and kills a study's driver."""
    journal = study / "reports.jsonl"
    for _ in range(1800):
        if journal.exists() and journal.read_bytes().count(b"epoch_seconds") >= reports:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_strangers_network_from_search_to_report(folder):
    search = ["search", "mine.py", "--data", "photos", "--study-dir", "study", "--wandb", "offline"]
    killed(tunefleet(folder, *search, "--final-seeds", 1), folder / "study")
    (folder / "models.py").write_text("raise RuntimeError('edited')")
    assert "models.py differs from the study's copy, which is used" in done(
        tunefleet(folder, "resume", "study")
    )
    study = Study(folder / "study")
    assert study.status == "done"
    assert len(study.searched) == 6
    assert study.best["width"] in (4, 8)
    assert study.test_accuracy > 0.8
    assert not (folder / "study" / "logs").exists()  # nothing is printed
    assert sorted(file.name for file in (folder / "study" / "source").iterdir()) == ["mine.py", "models.py"]
    assert "report.html" in done(tunefleet(folder, "report", "study"))
    assert list((folder / "study" / "wandb").glob("offline-run-*"))
    table = done(tunefleet(folder, "predict", "study", "photos")).splitlines()
    assert (len(table), table[0]) == (1 + 300, "path,class,p_dark,p_light")
    assert sum(row.split("/")[1] == row.split(",")[1] for row in table[1:]) > 0.8 * 300
    labels = [row.split("/")[1] == "light" for row in table[1:]]
    ours = pd.DataFrame([row.split(",") for row in table[1:]])[draw_test(np.array(labels))]
    tested = pd.read_parquet(folder / "study" / "best" / "predictions.parquet")
    assert ours[1].tolist() == [("dark", "light")[k] for k in tested["predicted"]]
    np.testing.assert_allclose(ours[[2, 3]].astype(float), tested[["p0", "p1"]], atol=1e-3)
    assert "probabilities (N, 2)" in done(tunefleet(folder, "export", "study", "model.pt2"))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet34", "mobilenet_v3_small", "timm:test_vit"])
def test_another_backbone_is_searched_reported_and_predicted_with(folder, backbone):
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    small = ["--image-size", 32, "--trials", 2, "--epochs", 1, "--final-seeds", 1, "--wandb", "off"]
    search = ["search", "resnet_softmax", "--data", "photos", "--weights", "none", "--study-dir", "study"]
    done(tunefleet(folder, *search, *small, "--fix", f"backbone={backbone}"))
    study = Study(folder / "study")
    assert [trial.status for trial in study.searched] == ["done"] * 2
    assert study.best["backbone"] == backbone
    assert not backbone.startswith("timm:") or study.spec["versions"]["timm"] == version("timm")
    assert f"backbone {backbone}" in (row := done(tunefleet(folder, "results", "study")))
    assert "58.35" not in row.split("resnet_twolayernn")[0]  # published, of ResNet-18
    table = done(tunefleet(folder, "predict", "study", "photos")).splitlines()
    assert len(table) == 1 + 300


@pytest.mark.slow
def test_a_training_of_its_own_is_searched_pruned_killed_and_tested(folder):
    search = [
        "search",
        "own.py",
        "--study-dir",
        "study",
        "--wandb",
        "offline",
        "--final-seeds",
        2,
        "--concurrency",
        1,
    ]
    killed(tunefleet(folder, *search), folder / "study", 12)
    out = done(tunefleet(folder, "resume", "study"), code=1)  # some trials have failed
    study = Study(folder / "study")
    statuses = study.facts["statuses"]
    assert statuses["error"] >= 1
    assert statuses["diverged"] >= 1
    assert {"pruned", "done"} & statuses.keys()
    values = [trial.value(study.metric) for trial in study.searched if trial.status in (None, "done")]
    assert study.winner.value(study.metric) == min(value for value in values if value is not None)
    assert study.test["name"] == "test_mse"
    assert len(study.test["values"]) == 2
    assert study.test_accuracy is None
    for trial in study.records.values():
        log = (folder / "study" / "logs" / f"{trial.trial_id}.txt").read_text().splitlines()
        assert f"width {trial.config['width']}" == log[0]
        epochs = [int(line.split()[1]) for line in log if line.startswith("epoch ")]
        assert sorted(set(epochs)) == list(range(1, trial.epoch + 1))  # promoted and resumed ones append
        if trial.status == "error":
            assert trial.error.startswith(f"what it printed is in logs/{trial.trial_id}.txt\n")
    assert len(study.searched) == 16  # the last six of them TPE's
    low, high = study.test["interval95"]
    assert low < study.test["mean"] < high
    assert list((folder / "study" / "wandb").glob("offline-run-*"))
    done(tunefleet(folder, "report", "study"))
    page = (folder / "study" / "report.html").read_text()
    assert "val_mse" in page
    assert "Misclassified" not in page
    assert "tensorboard" in done(tunefleet(folder, "report", "study", "--tensorboard"))
    assert "added to" in done(tunefleet(folder, "report", "study", "--optuna", "sqlite:///all.db"))
    assert study.model().test() == pytest.approx(study.test["values"][0])
    assert "best val_mse" in out
    assert "test_mse" in out
    error = tunefleet(folder, "search", "own.py", "--data", "digits").communicate()[1]
    assert "--data is for images, and own trains by itself" in error


def test_a_study_from_python_is_stopped_by_nothing_and_resumed_by_name(folder):
    (folder / "script.py").write_text(
        MINE + "if __name__ == '__main__':\n"
        "    how = dict(data='photos', trials=2, epochs=1, final_seeds=1, wandb='off', study_dir='s')\n"
        "    study = space.search(**how)\n"
        "    print('best', study.best['width'], study.test['name'], study.folder)\n"
        "    import tunefleet\n"
        "    again = tunefleet.resume('s', trials=3)\n"
        "    print('trials', len(tunefleet.load('s').trials))\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    script = subprocess.Popen(
        [sys.executable, "script.py"], cwd=folder, env=environment, stdout=-1, stderr=-1, text=True
    )
    out = done(script)
    assert "test_accuracy s" in out
    assert "trials 3" in out
