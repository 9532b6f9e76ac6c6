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

# Predicts the test images, all and one, with nothing imported but torch and what torch imports.
LOADED = """
import json, sys, torch
extra = {"classes.json": ""}
model = torch.export.load(sys.argv[1], extra_files=extra).module()
images = torch.load(sys.argv[2], weights_only=True)
torch.save([model(images), model(images[:1]), json.loads(extra["classes.json"])], sys.argv[3])
found = {name.partition(".")[0] for name in sys.modules}
assert not found & {"tunefleet", "ray", "torchvision", "PIL"}, found
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_data(tmp_path_factory.mktemp("arrays"))


def predictions(study):
    table = pd.read_parquet(study / "best" / "predictions.parquet")
    return table[["p0", "p1", "p2", "p3"]].to_numpy()


def loaded(file, data, tmp_path):
    images = torch.from_numpy(np.load(Path(data.folder) / "test_images.npy"))
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", LOADED, file, tmp_path / "images.pt", tmp_path / "results.pt"]
    subprocess.run(command, check=True, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}, timeout=120)
    return torch.load(tmp_path / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", SPACES)
def test_an_exported_network_gives_the_probabilities_of_the_test(name, data, data_dir, tmp_path, capfd):
    side = {"convnet": 48}.get(name, 32)  # enlarged in one of them
    study = finished_study(
        tmp_path / "study", SPACES[name], data, data_dir, **values_of(name), image_size=side
    )
    file = tmp_path / "model.pt2"
    assert main([str(study), str(file), "--data-dir", str(data_dir)]) == 0
    out, _ = capfd.readouterr()
    assert out == f"{file}: uint8 (N, 3, 32, 32) -> probabilities (N, 4), fp32\n"
    program = torch.export.load(file)
    found = program.module()(torch.from_numpy(np.load(Path(data.folder) / "test_images.npy")))
    np.testing.assert_allclose(found.detach().numpy(), predictions(study), atol=1e-3)


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


def test_torch_alone_loads_the_program_of_a_persons_network(data, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "parts.py").write_text(PARTS)
    study = finished_study(tmp_path / "study", find_space("mine.py"), data, data_dir)
    for name in ("mine.py", "parts.py"):
        (tmp_path / name).unlink()
    assert main(["study", "model.pt2", "--data-dir", str(data_dir)]) == 0
    probabilities, first, classes = loaded("model.pt2", data, tmp_path)
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
