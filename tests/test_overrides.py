"""A TrainingRun of one's own: another loss, optimizer or augmentation, and everything else kept."""

import dataclasses

import pytest
import torch
from ray import tune
from torch import nn
from torch.nn import functional as F

from tunefleet import Space
from tunefleet.trainables.data import load_split
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.evaluate import evaluate_test
from tunefleet.trainables.group import Group
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


class Groups(TrainingRun):
    def make_optimizer(self, parameters):
        first, *others = parameters
        groups = [{"params": [first], "lr": self.config.lr / 10}, {"params": others}]
        return torch.optim.SGD(groups, lr=self.lr)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return prepare("digits", folder), folder


def start(kind, digits, *, settings=FP32, build=build, cuda_graph=False, **values):
    ranges = {"lr": tune.loguniform(1e-4, 1e-1)}
    space = Space(build, ranges, run=kind, name="mine", micro_batches=True, cuda_graph=cuda_graph)
    return kind(space.config({"lr": 0.01, "epochs": 2, **values}), digits[0], settings, digits[1])


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


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_the_schedule_keeps_the_ratios_of_lrs_after_a_resume_too(digits, cuda_graph):
    settings = dataclasses.replace(FP32, cuda_graph=True)  # with which lrs are tensors
    run = start(Groups, digits, settings=settings, cuda_graph=cuda_graph)
    for _ in range(2):
        run._set_lr(0.005)
        lrs = [group["lr"] for group in run.optimizer.param_groups]
        assert [float(lr) for lr in lrs] == pytest.approx([0.0005, 0.005])
        assert [isinstance(lr, torch.Tensor) for lr in lrs] == [cuda_graph] * 2
        run.load_state_dict(run.state_dict())


def test_an_optimizer_that_names_the_configs_lr_follows_the_schedule(digits):
    run = start(Adagrad, digits, settings=dataclasses.replace(FP32, cuda_graph=True), cuda_graph=True)
    run._set_lr(0.005)
    assert float(run.optimizer.param_groups[0]["lr"]) == pytest.approx(0.005)


def test_another_loss_is_of_whole_batches_in_training(digits):
    def convolve(num_classes, image_shape):
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.Flatten(), nn.Linear(64, num_classes))

    in_parts = dataclasses.replace(FP32, micro_batch_bytes=1)
    sizes = [
        start(kind, digits, settings=in_parts, build=convolve).micro_batch for kind in (Adagrad, Squared)
    ]
    assert sizes == [8, 128]


def test_the_test_loss_is_the_runs_own(digits):
    run = start(Squared, digits)
    images, labels = load_split(digits[0], "test")
    probabilities, _ = run.predict_and_loss(images, torch.tensor(labels))
    expected = (probabilities - F.one_hot(torch.tensor(labels), 10)).square().sum(1).mean().item()
    assert evaluate_test(run)["test_loss"] == pytest.approx(expected, rel=1e-4)


def test_workers_that_augment_draw_the_same_next_order(digits):
    states = []
    for rank in range(2):
        run = start(Dark, digits)
        run.group = Group(rank, 2)
        run.train_step(torch.arange(7), None)  # of which they have four and three
        states.append(run.generator.get_state())
    assert torch.equal(*states)


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
