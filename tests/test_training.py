"""One trial: it learns, it repeats, it resumes, and its report is the naive loop's."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.configs import NETWORKS, make_config, own_arguments
from tunefleet.trainables.data import SPLITS, ImageData
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.training import TrainingRun, gather, lr_at

FP32 = DeviceSettings("cpu", "fp32", channels_last=True, micro_batch_bytes=8 * 2**20)
CLASSES = 4
SMALL = {"hidden": 4, "kernel_size": 3}
UPDATABLE = [name for name, row in NETWORKS.items() if row.cut and not row.frozen]
FROZEN = [name for name, row in NETWORKS.items() if row.frozen]
TIMES = ("epoch_seconds", "finished_at")  # of a report: all that may differ between equal runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageData:
    """72 training and 32 validation images, whose class is the brightest quarter."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    counts = (104, 8)
    for split, count in zip(SPLITS, counts, strict=True):
        labels = np.arange(count) % CLASSES
        images = rng.integers(0, 128, (count, 3, 32, 32), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            top, left = 16 * (label // 2), 16 * (label % 2)
            image[:, top : top + 16, left : left + 16] += 127
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)
    mean, std = (0.37, 0.37, 0.37), (0.26, 0.26, 0.26)
    return ImageData("quarters", str(folder), tuple("abcd"), (3, 32, 32), *counts, mean, std, "1" * 64)


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """Returns a function that builds a small run."""
    data_dir = tmp_path_factory.mktemp("cache")

    def build_run(architecture: str, leaves_chance_by: int | None = None, **values) -> TrainingRun:
        small = {arg: SMALL[arg] for arg in own_arguments(architecture)}
        config = make_config(architecture, **({"batch_size": 16, "epochs": 3, "seed": 1} | small | values))
        return TrainingRun(config, data, FP32, data_dir, leaves_chance_by)

    return build_run


def without_times(report: dict) -> dict:
    return {name: value for name, value in report.items() if name not in TIMES}


def assert_same(a, b):
    """Asserts that nested states hold bit for bit the same."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            if name not in TIMES:
                assert_same(a[name], b[name])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def naive(run: TrainingRun, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Returns mean loss and accuracy, image by image, in eval mode."""
    run.network.eval()
    with torch.no_grad():
        logits = torch.cat([run.network(run.to_network(x[i : i + 1])) for i in range(len(y))])
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("architecture", NETWORKS)
def test_loss_falls_and_the_same_seed_gives_the_same_numbers(start, architecture):
    run = start(architecture, optimizer="adam", lr=0.001, batch_size=12)
    reports = [run.epoch() for _ in range(3)]
    assert reports[-1]["train_loss"] < reports[0]["train_loss"]
    assert not reports[-1]["diverged"]
    again = start(architecture, optimizer="adam", lr=0.001, batch_size=12)
    assert without_times(again.epoch()) == without_times(reports[0])


def test_other_seeds_give_other_numbers(start):
    losses = {start("softmax", seed=seed).epoch()["train_loss"] for seed in range(3)}
    assert len(losses) == 3


def test_a_learnable_set_is_learnt(start):
    run = start("convnet", lr=0.02, momentum=0.9)
    for _ in range(3):
        report = run.epoch()
    assert report["val_accuracy"] == 1


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
@pytest.mark.parametrize("architecture", FROZEN)
def test_a_frozen_backbone_does_not_move(start, architecture, augment):
    run = start(architecture, lr=0.1, augment=augment)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train_epoch()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("backbone.")


@pytest.mark.parametrize("architecture", UPDATABLE)
def test_updatable_statistics_follow_training_but_not_evaluation(start, architecture):
    run = start(architecture)
    statistics = {name: buffer for name, buffer in run.model.named_buffers() if "running" in name}
    before = {name: buffer.clone() for name, buffer in statistics.items()}
    run.evaluate(run.inputs.val_x, run.inputs.val_y)
    assert all(torch.equal(buffer, before[name]) for name, buffer in statistics.items())
    run.train_epoch()
    assert not any(torch.equal(buffer, before[name]) for name, buffer in statistics.items())


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("softmax", {"momentum": 0.9, "nesterov": True}),
        ("twolayernn", {"optimizer": "adam", "weight_decay": 0.01}),
        ("convnet", {"augment": "crop_flip", "optimizer": "adamw", "weight_decay": 0.1}),
        ("mymodel", {"augment": "crop_flip", "momentum": 0.9, "warmup_epochs": 0.5}),  # dropout
        ("resnet_mymodel", {"momentum": 0.9}),  # cached features and dropout
        ("resnet_twolayernn", {"augment": "crop_flip", "momentum": 0.9}),
        ("resnet_mymodel_updatable", {"augment": "crop_flip", "momentum": 0.9}),  # dropout and BatchNorm
    ],
)
def test_resumed_equals_uninterrupted(start, tmp_path, architecture, values):
    values = {"schedule": "cosine", "label_smoothing": 0.1} | values
    whole = start(architecture, **values)
    whole.epoch()
    whole.save(tmp_path / "checkpoint.pt")
    later = [without_times(whole.epoch()) for _ in range(2)]

    start("mymodel", seed=9).epoch()  # the worker does something else meanwhile
    resumed = start(architecture, **values)
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.epochs_done == 1
    assert [without_times(resumed.epoch()) for _ in range(2)] == later
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("architecture", ["convnet", "resnet_conv"])
@pytest.mark.parametrize("part", [1, 5, 16])
def test_parts_give_the_gradient_of_the_batch(start, architecture, part):
    whole, split = (start(architecture, batch_size=72, lr=0.1, momentum=0.9) for _ in range(2))
    whole.micro_batch, split.micro_batch = 72, part
    loss, correct = whole.train_epoch()
    split_loss, split_correct = split.train_epoch()
    torch.testing.assert_close(split_loss, loss)
    assert split_correct == correct
    for a, b in zip(split.trained, whole.trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_step_is_torchs_step_on_the_mean_loss(start, optimizer):
    values = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    run = start("twolayernn", optimizer=optimizer, batch_size=72, lr=0.01, weight_decay=0.1, **values)
    reference = start("twolayernn").network
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    textbook = kind(reference.parameters(), lr=0.01, weight_decay=0.1, **values)
    F.cross_entropy(reference(run.inputs.train_x), run.inputs.train_y).backward()
    textbook.step()
    run.train_epoch()
    for a, b in zip(run.network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [16, 50, 72, 1000])
@pytest.mark.parametrize("architecture", ["softmax", "convnet", "resnet_softmax"])
def test_the_report_is_the_naive_loops(start, architecture, batch_size):
    run = start(architecture, batch_size=batch_size, lr=1e-30)  # the weights stay what they are
    report = run.epoch()
    train_loss, train_accuracy = naive(run, run.inputs.train_x, run.inputs.train_y)
    val_loss, val_accuracy = naive(run, run.inputs.val_x, run.inputs.val_y)
    assert report["train_loss"] == pytest.approx(train_loss, rel=1e-4)
    assert report["val_loss"] == pytest.approx(val_loss, rel=1e-4)
    assert (report["train_accuracy"], report["val_accuracy"]) == (train_accuracy, val_accuracy)
    assert report["epoch"] == 1
    assert report["lr"] == 1e-30


def test_label_smoothing_is_in_the_training_loss_alone(start):
    run = start("softmax", label_smoothing=0.5, lr=1e-30)
    report = run.epoch()
    x, y = run.inputs.train_x, run.inputs.train_y
    smoothed = F.cross_entropy(run.network(x), y, label_smoothing=0.5).item()
    assert report["train_loss"] == pytest.approx(smoothed, rel=1e-5)
    assert report["val_loss"] == pytest.approx(naive(run, run.inputs.val_x, run.inputs.val_y)[0], rel=1e-5)


@pytest.mark.parametrize("architecture", ["mymodel", "resnet_softmax_updatable"])
def test_every_epoch_trains_in_train_mode_and_evaluates_in_eval_mode(start, architecture):
    run = start(architecture)
    modes = []
    run.network.register_forward_hook(lambda network, *_: modes.append(network.training))
    for _ in range(2):
        run.epoch()
    assert modes == 2 * (5 * [True] + 2 * [False])  # 72 images in batches of 16; 32 to validate


def test_a_frozen_backbone_is_in_eval_mode_while_its_head_trains(start):
    run = start("resnet_conv", augment="crop_flip")
    modes = set()
    run.model.register_forward_hook(lambda m, *_: modes.add((m.head.training, m.backbone.training)))
    run.train_epoch()
    assert modes == {(True, False)}


def test_accuracy_at_chance_is_diverged_once_the_architecture_should_have_left_it(start, monkeypatch):
    monkeypatch.setattr(
        "tunefleet.trainables.training.CHANCE_MARGIN", 6
    )  # as if there were a quarter of the images
    small = start("convnet", leaves_chance_by=1, lr=1e-30)
    assert not small.epoch()["diverged"]  # so few that chance reaches half way to certainty
    monkeypatch.setattr("tunefleet.trainables.training.CHANCE_MARGIN", 1)
    stuck = start("convnet", leaves_chance_by=2, lr=1e-30)
    assert [stuck.epoch()["diverged"] for _ in range(3)] == [False, True, True]
    patient = start("convnet", lr=1e-30)
    assert not any(patient.epoch()["diverged"] for _ in range(3))
    learning = start("convnet", leaves_chance_by=1, lr=0.02, momentum=0.9)
    assert not [learning.epoch()["diverged"] for _ in range(3)][-1]


def test_a_refit_has_no_validation_figures_and_diverges_by_its_training_accuracy(start, monkeypatch):
    monkeypatch.setattr("tunefleet.trainables.training.CHANCE_MARGIN", 2)
    stuck = start("convnet", refit=True, leaves_chance_by=2, lr=1e-30)
    monkeypatch.setattr(stuck, "evaluate", lambda *_: pytest.fail("evaluated on images it trains on"))
    reports = [stuck.epoch(), stuck.epoch()]
    assert [report["diverged"] for report in reports] == [False, True]
    assert all(report["val_loss"] is report["val_accuracy"] is None for report in reports)
    assert 0 < reports[0]["train_accuracy"] * 104 == pytest.approx(round(reports[0]["train_accuracy"] * 104))


def test_a_loss_that_is_no_number_is_a_report(start):
    run = start("twolayernn", lr=1e30)
    report = run.epoch()
    assert report["diverged"]
    assert not math.isfinite(report["train_loss"])
    assert 0 <= report["val_accuracy"] <= 1
    assert run.epoch()["diverged"]


def test_lr_rises_and_falls_as_worked_out_by_hand():
    config = make_config("softmax", epochs=10, lr=0.1, warmup_epochs=2, schedule="cosine")
    by_hand = {
        0: 0,
        0.5: 0.025,
        1: 0.05,
        2: 0.1,
        4: 0.1 * (1 + math.sqrt(0.5)) / 2,
        6: 0.05,
        8: 0.0146447,
        10: 0,
    }
    for epochs, lr in by_hand.items():
        assert lr_at(config, epochs) == pytest.approx(lr, abs=1e-7)
    constant = make_config("softmax", epochs=10, lr=0.1, warmup_epochs=2)
    assert [lr_at(constant, e) for e in (1, 2, 9.9)] == pytest.approx([0.05, 0.1, 0.1])
    only_warming = make_config("softmax", epochs=2, lr=0.1, warmup_epochs=2, schedule="cosine")
    assert lr_at(only_warming, 1) == pytest.approx(0.05)


def test_every_step_gets_the_lr_of_its_middle(start):
    run = start("softmax", lr=0.1, epochs=2, warmup_epochs=1, schedule="cosine")
    seen = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    reports = [run.epoch(), run.epoch()]
    falling = [0.05 * (1 + math.cos(math.pi * part)) for part in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert seen == pytest.approx([0.01, 0.03, 0.05, 0.07, 0.09, *falling])
    assert [report["lr"] for report in reports] == [seen[4], seen[9]]


def test_a_checkpoint_is_read_on_the_cpu_whatever_the_device(start, tmp_path):
    """The states of random generators have to be there; mapped to a GPU they cannot be set."""
    run = start("twolayernn", optimizer="adam")
    run.epoch()
    run.save(tmp_path / "checkpoint.pt")
    resumed = start("twolayernn", optimizer="adam")
    resumed.device = torch.device("meta")  # in place of a GPU: nothing that is mapped there has values
    resumed.load(tmp_path / "checkpoint.pt")
    assert_same(resumed.state_dict(), run.state_dict())


def test_a_gpus_checkpoint_continues_on_the_cpu(start):
    run = start("mymodel", momentum=0.9)
    run.epoch()
    state = copy.deepcopy(run.state_dict() | {"cuda_rng": torch.zeros(16, dtype=torch.uint8)})
    expected = without_times(run.epoch())
    resumed = start("mymodel", momentum=0.9)
    resumed.load_state_dict(state)
    assert without_times(resumed.epoch()) == expected


def test_what_follows_from_config_and_epoch_is_not_in_a_checkpoint(start):
    run = start("twolayernn", optimizer="adam")
    run.epoch()
    assert set(run.state_dict()["optimizer"]) == {0, 1, 2, 3}  # the state of each parameter


def test_a_checkpoint_of_the_first_edition_is_read(start):
    run = start("twolayernn", optimizer="adam", schedule="cosine")
    run.epoch()
    state = run.state_dict()
    state = copy.deepcopy(state | {"optimizer": run.optimizer.state_dict()})  # with its learning rate
    resumed = start("twolayernn", optimizer="adam", schedule="cosine")
    resumed.load_state_dict(state)
    assert without_times(resumed.epoch()) == without_times(run.epoch())


def test_another_trials_checkpoint_is_refused(start):
    state = start("softmax", lr=0.1).state_dict()
    with pytest.raises(ValueError, match="another configuration"):
        start("softmax", lr=0.2).load_state_dict(state)


def test_a_checkpoint_of_another_split_is_refused(start):
    run = start("softmax")
    with pytest.raises(ValueError, match="another training/validation split"):
        run.load_state_dict(run.state_dict() | {"split_sha256": "0" * 64})


def test_a_checkpoint_holds_tensors_and_plain_values(start, tmp_path):
    run = start("convnet", optimizer="adam")
    report = run.epoch()
    run.save(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["reports"] == [report]
    assert run.config.space.config(state["config"]) == run.config
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_on_features_holds_the_head_alone(start):
    names = start("resnet_softmax").state_dict()["network"]
    assert len(names) == 2  # weight and bias of its linear layer


def test_a_last_batch_of_one_image_trains(start):
    start("resnet_softmax_updatable", batch_size=71).train_epoch()  # 72 images: 71 and 1


@pytest.mark.parametrize("architecture", ["softmax", "convnet"])
def test_a_network_that_writes_to_its_input_changes_no_image(start, architecture):
    run = start(architecture)
    before = {name: getattr(run.inputs, name).clone() for name in ("train_x", "val_x")}

    def blacken(module, inputs):
        inputs[0].zero_()

    run.network.register_forward_pre_hook(blacken)
    run.epoch()
    run.predict_and_loss(np.zeros((3, 3, 32, 32), dtype=np.uint8), torch.zeros(3, dtype=torch.int64))
    assert all(torch.equal(getattr(run.inputs, name), x) for name, x in before.items())


@pytest.mark.parametrize("last", [False, True])
def test_batches_of_inputs_on_the_host_are_copied_from_pinned_pages(monkeypatch, last):
    x = torch.arange(2.0 * 3 * 4 * 4).view(2, 3, 4, 4)
    x = x.to(memory_format=torch.channels_last) if last else x
    copied = []

    def pin(rows):
        copied.append(rows)
        return rows

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    index = torch.tensor([1])
    assert torch.equal(gather(x, index, torch.device("cpu")), x[1:])
    assert copied == []
    there = gather(x, index, torch.device("meta"))  # stands for a GPU
    assert (there.device.type, there.shape, there.stride()) == ("meta", (1, 3, 4, 4), x[1:].stride())
    assert torch.equal(copied[0], x[1:])
