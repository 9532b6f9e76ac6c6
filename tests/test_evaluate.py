"""The test accuracy is the naive loop's, and predictions.parquet shows how it came about."""

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision

from tests.configs import make_config
from tunefleet.trainables.data import SPLITS, ImageData, load_split
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.evaluate import evaluate_test
from tunefleet.trainables.training import TrainingRun

FP32 = DeviceSettings("cpu", "fp32", channels_last=True, micro_batch_bytes=2**18)
CASES = [
    ("softmax", {}),
    ("mymodel", {"hidden": 4, "kernel_size": 3}),  # dropout
    ("convnet", {"hidden": 4, "augment": "crop_flip"}),
    ("convnet", {"hidden": 4, "image_size": 48}),
    ("resnet_softmax", {}),  # the head was trained on features, the test images are pixels
    ("resnet_softmax_updatable", {"batch_size": 10}),
]


@pytest.fixture
def data(tmp_path) -> ImageData:
    rng = np.random.default_rng(0)
    for split, count in zip(SPLITS, (40, 23), strict=True):
        np.save(tmp_path / f"{split}_images.npy", rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
        np.save(tmp_path / f"{split}_labels.npy", np.arange(count) % 4)
    third = (0.3, 0.3, 0.3)
    return ImageData("made", str(tmp_path), tuple("abcd"), (3, 32, 32), 40, 23, third, third, "2" * 64)


def trained(data: ImageData, tmp_path, architecture: str, values: dict) -> TrainingRun:
    run = TrainingRun(make_config(architecture, **({"batch_size": 8} | values)), data, FP32, tmp_path)
    run.train_epoch()
    return run


@pytest.mark.parametrize(("architecture", "values"), CASES)
def test_accuracy_and_predictions_are_the_naive_loops(data, tmp_path, architecture, values):
    run = trained(data, tmp_path, architecture, values)
    accuracy = evaluate_test(run, tmp_path, "-made")["test_accuracy"]

    images, labels = load_split(data, "test")
    run.model.eval()
    with torch.no_grad():
        logits = [run.model(run.pipeline(torch.from_numpy(image.copy())[None])) for image in images]
    probabilities = torch.cat(logits).softmax(1).numpy()
    predicted = probabilities.argmax(1)
    assert accuracy == (predicted == labels).mean()

    wrong = np.load(tmp_path / "misclassified-made.npz")
    mistakes = np.flatnonzero(predicted != labels)
    assert sorted(wrong["index"]) == mistakes.tolist()
    assert np.array_equal(wrong["images"], images[wrong["index"]])
    confidence = probabilities.max(1)[wrong["index"]]
    assert (np.diff(confidence) <= 1e-6).all()

    table = pd.read_parquet(tmp_path / "predictions-made.parquet")
    assert table.columns.tolist() == ["index", "label", "predicted", "confidence", "p0", "p1", "p2", "p3"]
    assert table["index"].tolist() == list(range(23))
    assert table["label"].tolist() == labels.tolist()
    assert table["predicted"].tolist() == predicted.tolist()
    shown = table[["p0", "p1", "p2", "p3"]].to_numpy()
    np.testing.assert_allclose(shown, probabilities, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(table["confidence"], shown.max(1))
    assert len(list(tmp_path.glob("predictions*"))) == len(list(tmp_path.glob("misclass*"))) == 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), file)
    return str(file)


def test_features_of_the_test_images_are_computed_by_the_first_seed_alone(
    data, tmp_path, weights, monkeypatch
):
    runs = [trained(data, tmp_path, "resnet_softmax", {"weights": weights, "seed": seed}) for seed in (0, 1)]
    before = set((tmp_path / "prepared").glob("*.npy"))
    whole = [
        run.model.eval()(run.pipeline(torch.from_numpy(load_split(data, "test")[0].copy()))) for run in runs
    ]
    first = evaluate_test(runs[0], tmp_path, "-first")["test_accuracy"]
    assert len(set((tmp_path / "prepared").glob("*.npy")) - before) == 1
    table = pd.read_parquet(tmp_path / "predictions-first.parquet")
    np.testing.assert_allclose(
        table[["p0", "p3"]], whole[0].softmax(1).detach()[:, [0, 3]], rtol=1e-3, atol=1e-5
    )
    assert first == (table.label == table.predicted).mean()

    def fail(*_):
        pytest.fail("the backbone was run again")

    runs[1].model.backbone.register_forward_hook(fail)
    monkeypatch.setattr("tunefleet.trainables.inputs._Preparation.function", fail)
    labels = load_split(data, "test")[1]
    assert evaluate_test(runs[1])["test_accuracy"] == (whole[1].argmax(1).numpy() == labels).mean()


def test_testing_twice_gives_the_same_and_changes_nothing(data, tmp_path):
    run = trained(data, tmp_path, "resnet_softmax_updatable", {"batch_size": 10})
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    assert evaluate_test(run) == evaluate_test(run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert not list(tmp_path.glob("*.parquet"))
