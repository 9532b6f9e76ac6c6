"""What a network reads is prepared once, is what the pipeline says, and is shared by all who may share it."""

import dataclasses
import errno
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from tests.configs import make_config
from tunefleet.models.spaces import SPACES, find_space
from tunefleet.trainables import inputs as inputs_module
from tunefleet.trainables.data import SPLITS, ImageData, load_split, split_sha256, split_validation
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.examine import examine
from tunefleet.trainables.inputs import (
    LOADED_MAX,
    backbone_sha256,
    build_model,
    is_prepared,
    kind_of,
    load_inputs,
)
from tunefleet.trainables.pipeline import Pipeline
from tunefleet.trainables.training import TrainingRun

FP32 = DeviceSettings("cpu", "fp32", channels_last=True, micro_batch_bytes=8 * 2**20)
BF16 = dataclasses.replace(FP32, precision="bf16")
NCHW = dataclasses.replace(FP32, channels_last=False)


def save_images(folder, counts=(40, 8), size=32) -> ImageData:
    """Writes random images of four classes in the decoded format."""
    rng = np.random.default_rng(0)
    for split, count in zip(SPLITS, counts, strict=True):
        np.save(folder / f"{split}_images.npy", rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
        np.save(folder / f"{split}_labels.npy", np.arange(count) % 4)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return ImageData("made", str(folder), tuple("abcd"), (3, size, size), *counts, mean, std, "0" * 64)


@pytest.fixture
def data(tmp_path) -> ImageData:
    return save_images(tmp_path)


@pytest.fixture(autouse=True)
def opened(monkeypatch) -> dict:
    """Gives each test a worker that has opened nothing yet."""
    empty: dict = {}
    monkeypatch.setattr(inputs_module, "_loaded", empty)
    return empty


def prepared(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "prepared").iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize(
    ("architecture", "values", "kind"),
    [
        ("softmax", {}, "normalised"),
        ("convnet", {"augment": "crop_flip"}, "images"),
        ("convnet", {"image_size": 64}, "images"),
        ("resnet_softmax", {}, "features"),
        ("resnet_softmax", {"image_size": 64}, "features"),
        ("resnet_softmax", {"augment": "crop_flip"}, "images"),
        ("resnet_softmax_updatable", {}, "normalised"),
        ("resnet_finetune", {"image_size": 64}, "images"),
    ],
)
def test_the_config_alone_chooses_the_kind(data, architecture, values, kind):
    assert kind_of(make_config(architecture, **values), data) == kind


@pytest.mark.parametrize("settings", [FP32, BF16, NCHW])
@pytest.mark.parametrize("architecture", ["softmax", "convnet"])
def test_normalised_inputs_are_the_pipelines(tmp_path, data, architecture, settings):
    config = make_config(architecture)
    inputs = load_inputs(config, data, settings, tmp_path)
    images, labels = load_split(data, "train")
    pipeline = Pipeline.of(config, data, settings)
    for x, y, index in zip(
        (inputs.train_x, inputs.val_x),
        (inputs.train_y, inputs.val_y),
        split_validation(labels),
        strict=True,
    ):
        assert x.dtype == settings.dtype
        assert torch.equal(x, pipeline(torch.from_numpy(images[index])))
        assert y.tolist() == labels[index].tolist()


def test_uint8_images_are_the_splits(tmp_path, data):
    inputs = load_inputs(make_config("convnet", augment="crop_flip"), data, FP32, tmp_path)
    images, labels = load_split(data, "train")
    train, val = split_validation(labels)
    assert np.array_equal(inputs.train_x.numpy(), images[train])
    assert np.array_equal(inputs.val_x.numpy(), images[val])
    assert inputs.split_sha256 == split_sha256(train, val)


@pytest.mark.parametrize(("architecture", "last"), [("convnet", True), ("softmax", False)])
def test_convolutions_read_channels_last_and_linear_layers_do_not(tmp_path, data, architecture, last):
    x = load_inputs(make_config(architecture), data, FP32, tmp_path).train_x
    assert x.is_contiguous(memory_format=torch.channels_last) == last
    assert x[torch.tensor([3, 1])].is_contiguous(memory_format=torch.channels_last) == last


def test_no_image_is_in_both_parts_and_none_is_lost(tmp_path, data):
    inputs = load_inputs(make_config("softmax", augment="crop_flip"), data, FP32, tmp_path)
    train, val = ({image.numpy().tobytes() for image in x} for x in (inputs.train_x, inputs.val_x))
    assert not train & val
    assert len(train) + len(val) == data.train_count


@pytest.mark.parametrize("architecture", ["resnet_softmax", "resnet_mymodel"])
def test_features_are_the_backbones_in_eval_mode(tmp_path, data, architecture):
    config = make_config(architecture, seed=3)
    inputs = load_inputs(config, data, FP32, tmp_path)
    images, labels = load_split(data, "train")
    train, _ = split_validation(labels)
    backbone = build_model(config, data).backbone.eval()
    with torch.no_grad():
        expected = backbone(Pipeline.of(config, data, FP32)(torch.from_numpy(images[train])))
    torch.testing.assert_close(inputs.train_x, expected, rtol=1e-4, atol=1e-5)
    assert not inputs.train_x.requires_grad


def test_features_are_computed_once(tmp_path, data, monkeypatch, opened):
    config = make_config("resnet_softmax")
    first = load_inputs(config, data, FP32, tmp_path)
    monkeypatch.setattr(inputs_module._Preparation, "function", lambda *_: pytest.fail("computed again"))
    assert load_inputs(config, data, FP32, tmp_path) is first
    opened.clear()  # another worker of the node
    assert torch.equal(load_inputs(config, data, FP32, tmp_path).train_x, first.train_x)


def test_configs_that_differ_elsewhere_share_one_preparation(tmp_path, data):
    first = load_inputs(make_config("resnet_softmax", lr=0.1), data, FP32, tmp_path)
    other = make_config("resnet_twolayernn", lr=0.2, batch_size=7, hidden=9, momentum=0.5, epochs=3)
    assert load_inputs(other, data, FP32, tmp_path) is first
    assert len(prepared(tmp_path)) == 1


def test_seeds_share_normalised_images(tmp_path, data):
    first = load_inputs(make_config("convnet", seed=0), data, FP32, tmp_path)
    assert load_inputs(make_config("mymodel", seed=1), data, FP32, tmp_path) is first


def test_pretrained_features_do_not_depend_on_the_seed(tmp_path, data):
    weights = tmp_path / "resnet18.pth"
    torch.save(resnet18(weights=None).state_dict(), weights)
    first = load_inputs(make_config("resnet_softmax", weights=str(weights), seed=0), data, FP32, tmp_path)
    second = load_inputs(make_config("resnet_softmax", weights=str(weights), seed=1), data, FP32, tmp_path)
    assert second is first


def test_cut_weights_seed_and_size_have_their_own_features(tmp_path, data):
    weights = tmp_path / "resnet18.pth"
    torch.save(resnet18(weights=None).state_dict(), weights)
    configs = [
        make_config("resnet_softmax"),
        make_config("resnet_conv"),
        make_config("resnet_softmax", seed=1),
        make_config("resnet_softmax", weights=str(weights)),
        make_config("resnet_softmax", image_size=48),
    ]
    for config in configs:
        load_inputs(config, data, FP32, tmp_path)
    assert len(prepared(tmp_path)) == len(configs)


def test_a_backbones_hash_is_its_own_and_not_the_heads(data, tmp_path):
    weights = tmp_path / "resnet18.pth"
    torch.save(resnet18(weights=None).state_dict(), weights)
    copy = tmp_path / "copy.pth"
    copy.write_bytes(weights.read_bytes())

    def hash_of(architecture, **values):
        return backbone_sha256(make_config(architecture, **values), data)

    random = hash_of("resnet_softmax")
    assert hash_of("resnet_softmax", lr=0.5, batch_size=3) == random
    inputs_module._hashes.clear()
    assert hash_of("resnet_twolayernn", hidden=7, image_size=64) == random
    pretrained = hash_of("resnet_softmax", weights=str(weights), seed=1)
    assert hash_of("resnet_twolayernn", weights=str(copy), seed=2, hidden=9) == pretrained
    others = [hash_of("resnet_softmax", seed=1), hash_of("resnet_conv"), hash_of("resnet_mymodel")]
    assert len({random, pretrained, *others}) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda backbone: backbone.append(torch.nn.Tanh()),
        lambda backbone: backbone.conv1.weight.data.view(-1)[0].add_(1),
        lambda backbone: setattr(backbone.bn1, "eps", 0.1),
    ],
)
def test_another_backbone_under_the_same_name_has_its_own_features(
    tmp_path, data, monkeypatch, opened, change
):
    config = make_config("resnet_softmax")
    first = load_inputs(config, data, FP32, tmp_path)

    def changed(self, *arguments):
        model = self.build(*arguments[:2])
        change(model.backbone)
        return model

    opened.clear()  # another process, another version of the code
    inputs_module._hashes.clear()
    monkeypatch.setattr("tunefleet.models.space.Space.network", changed)
    assert not torch.equal(load_inputs(config, data, FP32, tmp_path).train_x, first.train_x)


def test_each_backbone_has_its_own_features(tmp_path, data):
    names = ["resnet18", "resnet34", "mobilenet_v3_small"]
    if importlib.util.find_spec("timm"):
        names += ["timm:test_vit", "timm:test_vit2"]
    for name in names:
        load_inputs(make_config("resnet_softmax", backbone=name), data, FP32, tmp_path)
    assert len(prepared(tmp_path)) == len(names)


MINE = """
from ray import tune
from torch import nn
from tunefleet import Space
from parts import Body

class Net(nn.Module):
    def __init__(self, num_classes, image_shape, hidden=4):
        super().__init__()
        self.backbone, self.frozen = Body(), True
        head = nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        self.head = nn.Sequential(nn.Flatten(), *head)
    def forward(self, x):
        return self.head(self.backbone(x))

space = Space(Net, {"lr": tune.loguniform(1e-3, 1e-1)})
"""
PARTS = """
from torch import nn

class Body(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 2, 8, stride=8)
    def forward(self, x):
        return FACTOR * super().forward(x)
"""


def test_backbones_that_differ_in_an_imported_forward_alone_have_their_own_features(
    tmp_path, data, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    features, trees = [], []
    for factor in (2, 3):
        (tmp_path / "parts.py").write_text(PARTS.replace("FACTOR", str(factor)))
        config = find_space("mine.py").config({"lr": 0.1})
        config = dataclasses.replace(config, space=examine(config, data))
        features.append(load_inputs(config, data, FP32, tmp_path).train_x)
        trees.append(inputs_module._module_sha256(build_model(config, data).backbone))
    assert trees[0] == trees[1]
    torch.testing.assert_close(3 * features[0], 2 * features[1])
    assert len(prepared(tmp_path)) == 2


@pytest.mark.parametrize("own", [False, True])
def test_four_widths_of_a_head_share_features_and_keep_their_numbers(tmp_path, data, own, monkeypatch):
    def losses(values, folder):
        config = SPACES["resnet_twolayernn"].config({"batch_size": 8, **values})
        if own:
            config = find_space("mine.py").config({"batch_size": 8, **values})
            config = dataclasses.replace(config, space=examine(config, data))
        run = TrainingRun(config, data, FP32, folder)
        return [run.epoch()["train_loss"] for _ in range(2)]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "parts.py").write_text(PARTS.replace("FACTOR", "2"))
    shared = [losses({"hidden": hidden}, tmp_path / "shared") for hidden in (3, 5, 8, 13)]
    assert len(prepared(tmp_path / "shared")) == 1
    inputs_module._loaded.clear()
    for hidden, found in zip((3, 5, 8, 13), shared, strict=True):
        assert losses({"hidden": hidden}, tmp_path / str(hidden)) == found
    assert len({tuple(found) for found in shared}) == 4


def test_precisions_and_memory_formats_have_their_own_files(tmp_path, data):
    for settings in (FP32, BF16, NCHW):
        load_inputs(make_config("convnet"), data, settings, tmp_path)
    assert len(prepared(tmp_path)) == 3


def test_other_weights_under_the_same_path_are_other_features(tmp_path, data):
    weights = tmp_path / "resnet18.pth"
    config = make_config("resnet_softmax", weights=str(weights))
    state = resnet18(weights=None).state_dict()
    features = []
    for scale in (1, 2):
        torch.save(state | {"conv1.weight": scale * state["conv1.weight"]}, weights)
        features.append(load_inputs(config, data, FP32, tmp_path).train_x)
    assert not torch.equal(*features)


def test_home_is_meant_by_a_tilde(tmp_path, data, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    state = resnet18(weights=None).state_dict()
    features = []
    for scale in (1, 2):  # replaced by other weights of the same size and time
        torch.save(state | {"conv1.weight": scale * state["conv1.weight"]}, tmp_path / "w.pth")
        os.utime(tmp_path / "w.pth", (10**9, 10**9))
        config = make_config("resnet_softmax", weights="~/w.pth")
        features.append(load_inputs(config, data, FP32, "~/cache").train_x)
    assert not torch.equal(*features)
    assert len(prepared(tmp_path / "cache")) == 2
    assert not (tmp_path / "~").exists()


def test_what_is_prepared_is_read_from_a_folder_that_cannot_be_written(tmp_path, data, monkeypatch, opened):
    first = load_inputs(make_config("softmax"), data, FP32, tmp_path)
    opened.clear()
    monkeypatch.setattr(inputs_module, "holding", lambda *_: pytest.fail("locked"))
    assert torch.equal(load_inputs(make_config("softmax"), data, FP32, tmp_path).train_x, first.train_x)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, data):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^--data-dir=.*/file cannot be written \(.*\); give another$"):
        load_inputs(make_config("softmax"), data, FP32, tmp_path / "file")


def test_a_full_disk_is_an_error_and_no_killed_process(tmp_path, data, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="No space left on device"):
        load_inputs(make_config("softmax"), data, FP32, tmp_path)
    assert prepared(tmp_path) == []


def test_a_worker_keeps_few_inputs_open(tmp_path, data, opened):
    configs = [
        make_config("softmax"),
        make_config("convnet"),
        make_config("convnet", augment="crop_flip"),
        make_config("softmax"),
    ]
    for config in configs:
        load_inputs(config, data, FP32, tmp_path)
        assert len(opened) <= LOADED_MAX
    assert len(opened) == LOADED_MAX
    assert len(prepared(tmp_path)) == 3  # what was closed is still prepared


def test_a_failed_preparation_leaves_nothing(tmp_path, data, monkeypatch, opened):
    def fail(preparation, file, *rest):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs_module._Preparation, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        load_inputs(make_config("softmax"), data, FP32, tmp_path)
    assert prepared(tmp_path) == []
    assert not opened


def test_what_a_kill_left_is_not_taken_for_whole(tmp_path, data, monkeypatch):
    config = make_config("softmax")
    whole = load_inputs(config, data, FP32, tmp_path).val_x.clone()
    (name,) = prepared(tmp_path)
    file = tmp_path / "prepared" / name
    file.rename(file.with_suffix(".partial")).write_bytes(b"half")  # as if killed before the rename
    monkeypatch.setattr(inputs_module, "_loaded", {})
    assert torch.equal(load_inputs(config, data, FP32, tmp_path).val_x, whole)
    assert prepared(tmp_path) == [name]


@pytest.mark.parametrize("values", [{}, {"augment": "crop"}])
def test_a_refit_trains_on_every_image_of_the_same_file(tmp_path, data, values):
    split = load_inputs(make_config("convnet", **values), data, FP32, tmp_path)
    refit = load_inputs(make_config("convnet", refit=True, **values), data, FP32, tmp_path)
    assert torch.equal(refit.train_x, torch.cat([split.train_x, split.val_x]))
    assert torch.equal(refit.train_y, torch.cat([split.train_y, split.val_y]))
    assert len(refit.val_x) == len(refit.val_y) == 0
    assert refit.split_sha256 == split.split_sha256
    assert len(prepared(tmp_path)) == 1


@pytest.mark.filterwarnings("error")
def test_inputs_are_shared_pages_that_cannot_be_written(tmp_path, data):
    inputs = load_inputs(make_config("softmax"), data, FP32, tmp_path)
    (line,) = (
        line for line in Path("/proc/self/maps").read_text().splitlines() if f"{tmp_path}/prep" in line
    )
    assert line.split()[1] == "r--s"
    assert len(inputs.train_x) + len(inputs.val_x) == 40


def test_inputs_are_known_to_be_prepared_once_they_are(tmp_path, data):
    config = make_config("softmax")
    assert not is_prepared(config, data, FP32, tmp_path)
    load_inputs(config, data, FP32, tmp_path)
    assert is_prepared(config, data, FP32, tmp_path)
