"""A TrainingRun of one's own: another loss, optimizer or augmentation, and everything else kept."""

import pytest
import torch
from ray import tune
from torch import nn
from torch.nn import functional as F

from tunefleet import Space
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

FP32 = DeviceSettings("cpu", "fp32", channels_last=True, micro_batch_bytes=None)


def build(num_classes, image_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))


class SameLoss(TrainingRun):
    def loss(self, logits, y):
        return F.cross_entropy(logits, y)


class Squared(TrainingRun):
    def loss(self, logits, y):
        return (logits.softmax(1) - F.one_hot(y, logits.shape[1])).square().sum(1).mean()


class Adagrad(TrainingRun):
    def make_optimizer(self, parameters):
        return torch.optim.Adagrad(parameters, lr=self.config.lr)


class Dark(TrainingRun):
    def augment(self, images, generator):
        factor = torch.rand(len(images), 1, 1, 1, generator=generator)
        return (images * factor).to(torch.uint8)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return prepare("digits", folder), folder


def start(kind, digits, **values):
    space = Space(build, {"lr": tune.loguniform(1e-4, 1e-1)}, run=kind, name="mine")
    return kind(space.config({"lr": 0.01, "epochs": 2, **values}), digits[0], FP32, digits[1])


def test_a_loss_that_is_ours_gives_the_same_numbers(digits):
    ours, theirs = (start(kind, digits).epoch() for kind in (TrainingRun, SameLoss))
    for name in ("train_loss", "val_loss", "val_accuracy"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5)


def test_another_loss_trains_and_is_what_is_reported(digits):
    run = start(Squared, digits)
    reports = [run.epoch(), run.epoch()]
    assert reports[1]["train_loss"] < reports[0]["train_loss"] <= 2
    assert 0 < reports[1]["val_loss"] <= 2


def test_another_optimizer_is_saved_and_restored(digits, tmp_path):
    run = start(Adagrad, digits)
    run.epoch()
    run.save(tmp_path / "checkpoint.pt")
    again = start(Adagrad, digits)
    again.load(tmp_path / "checkpoint.pt")
    assert isinstance(again.optimizer, torch.optim.Adagrad)
    assert again.epoch()["train_loss"] == run.epoch()["train_loss"]


def test_another_augmentation_draws_from_the_checkpoints_generator(digits, tmp_path):
    run = start(Dark, digits)
    assert run.inputs.kind == "images"
    run.epoch()
    run.save(tmp_path / "checkpoint.pt")
    again = start(Dark, digits)
    again.load(tmp_path / "checkpoint.pt")
    assert again.epoch()["train_loss"] == run.epoch()["train_loss"]


def test_a_space_with_such_a_run_is_one_of_images():
    assert Space(build, run=Squared).trains_images
    with pytest.raises(ValueError, match="did you mean momentum"):
        Space(build, {"momentun": tune.uniform(0.0, 1.0)}, run=Squared)
