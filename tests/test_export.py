"""tunefleet export: a file that torch alone loads, with the numbers of the test."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.configs import make_model
from tests.finished import CLASSES, finished_study, made_data
from tests.test_winner import MINE, PARTS, values_of
from tunefleet.inference.export import main
from tunefleet.models.building import Classifier, make_plain
from tunefleet.models.spaces import SPACES, find_space
from tunefleet.study import Study

# Predicts the test images, all and one, with nothing there but Python, torch and what torch imports.
ALONE = """
import json, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

ALLOWED = {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "numpy", "sympy", "mpmath", "networkx"}
ALLOWED |= {"jinja2", "markupsafe", "filelock", "fsspec", "typing_extensions"}

class Alone(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        there = name.partition(".")[0] in ALLOWED or name.startswith("_sysconfigdata")
        return super().find_spec(name, path, target) if there else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Alone]
assert not any(Alone.find_spec(name) for name in ("tunefleet", "ray", "torchvision", "PIL"))
import torch
images = torch.load(sys.argv[1], weights_only=True)
for line in sys.stdin:
    extra = {"classes.json": ""}
    model = torch.export.load(line.strip(), extra_files=extra).module()
    torch.save([model(images), model(images[:1]), json.loads(extra["classes.json"])], sys.argv[2])
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_data(tmp_path_factory.mktemp("arrays"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Has a process with torch alone predict the test images with a program; returns what it gives."""
    folder = tmp_path_factory.mktemp("alone")
    torch.save(torch.from_numpy(np.load(Path(data.folder) / "test_images.npy")), folder / "images.pt")
    command = [sys.executable, "-P", "-c", ALONE, folder / "images.pt", folder / "results.pt"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env={"OMP_NUM_THREADS": "1"}, **pipes)

    def predict(file):
        print(Path(file).absolute(), file=process.stdin, flush=True)
        assert process.stdout.readline() == "done\n"
        return torch.load(folder / "results.pt", weights_only=True)

    with process:
        yield predict
        process.stdin.close()


def predictions(study):
    table = pd.read_parquet(study / "best" / "predictions.parquet")
    return table[["p0", "p1", "p2", "p3"]].to_numpy()


@pytest.mark.parametrize("name", SPACES)
def test_torch_alone_gives_the_probabilities_of_the_test(name, data, data_dir, tmp_path, capfd, alone):
    side = {"convnet": 48}.get(name, 32)  # enlarged in one of them
    study = finished_study(
        tmp_path / "study", SPACES[name], data, data_dir, **values_of(name), image_size=side
    )
    file = tmp_path / "model.pt2"
    assert main([str(study), str(file), "--data-dir", str(data_dir)]) == 0
    out, _ = capfd.readouterr()
    assert out == f"{file}: uint8 (N, 3, 32, 32) -> probabilities (N, 4), fp32\n"
    np.testing.assert_allclose(alone(file)[0].detach(), predictions(study), atol=1e-3)


@pytest.mark.parametrize("backbone", ["resnet34", "mobilenet_v3_small", "convnext_tiny", "timm:test_vit"])
def test_another_backbone_is_predicted_with_and_exported(backbone, data, data_dir, tmp_path):
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    space = SPACES["resnet_softmax_updatable"]
    study = finished_study(tmp_path / "study", space, data, data_dir, backbone=backbone)
    images = torch.from_numpy(np.load(Path(data.folder) / "test_images.npy"))
    np.testing.assert_allclose(Study(study).model()(images), predictions(study), atol=1e-3)
    file = tmp_path / "model.pt2"
    assert main([str(study), str(file), "--data-dir", str(data_dir)]) == 0
    found = torch.export.load(file).module()(images)
    np.testing.assert_allclose(found.detach().numpy(), predictions(study), atol=1e-3)


@pytest.mark.parametrize("name", SPACES)
def test_plain_layers_are_torchs_own(name):
    network = make_model(name, 4, (3, 32, 32), **values_of(name))
    make_plain(network)
    ours = {type(m) for m in network.modules() if not type(m).__module__.startswith("torch")}
    assert ours == {Classifier}


def test_torch_alone_loads_the_program_of_a_persons_network(data, data_dir, tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "parts.py").write_text(PARTS)
    study = finished_study(tmp_path / "study", find_space("mine.py"), data, data_dir)
    for name in ("mine.py", "parts.py"):
        (tmp_path / name).unlink()
    assert main(["study", "model.pt2", "--data-dir", str(data_dir)]) == 0
    probabilities, first, classes = alone("model.pt2")
    np.testing.assert_allclose(probabilities.detach(), predictions(study), atol=1e-3)
    np.testing.assert_allclose(first.detach(), predictions(study)[:1], atol=1e-3)
    assert classes == list(CLASSES)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("if x.sum() > 0: return self.last(x)\n        return self.last(-x)", r"torch says \w+: .+; use"),
        ("return self.last(x) + torch.rand(4)", "gives other numbers than the network"),
    ],
)
def test_a_network_that_cannot_be_exported_is_one_line(
    data, data_dir, tmp_path, monkeypatch, forward, message, capfd
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"""
import torch
from ray import tune
from tunefleet import Space

class Net(torch.nn.Module):
    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.last = torch.nn.LazyLinear(num_classes)

    def forward(self, x):
        x = x.flatten(1)
        {forward}

space = Space(Net, {{"lr": tune.uniform(0.0, 1.0)}})
""")
    finished_study(tmp_path / "study", find_space("mine.py"), data, data_dir)
    capfd.readouterr()
    assert main(["study", "model.pt2", "--data-dir", str(data_dir)]) == 2
    _, err = capfd.readouterr()
    assert err.startswith("error: mine cannot be exported: ")
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert not (tmp_path / "model.pt2").exists()


def test_a_file_that_is_there_or_has_another_suffix_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("model.pt2").touch()
    for name, message in (
        ("model.pt2", "file=model.pt2 exists; give a new file, or remove it"),
        ("model.onnx", "model.onnx has not the suffix of torch's programs; give NAME.pt2"),
        ("no/model.pt2", "file=no/model.pt2 cannot be written: there is no folder no; make it first"),
    ):
        assert main(["study", name]) == 2
        assert capfd.readouterr().err == f"error: {message}\n"
    assert main(["study", "new.pt2"]) == 2
    assert "study holds no study" in capfd.readouterr().err
