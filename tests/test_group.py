"""Several workers that train one trial compute what one worker would."""

import dataclasses
import datetime

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from tests.configs import make_config
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.group import Group
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

FP32 = DeviceSettings("cpu", "fp32", channels_last=True, micro_batch_bytes=8 * 2**20)
IN_PARTS = dataclasses.replace(FP32, micro_batch_bytes=2**16)  # 8 images of the small convnet
EPOCHS = 1
# A small lr for the ResNet: with 1e-3, two threads instead of one change its loss by half a percent, while
# at 2e-5 a gradient of double the size would still change it by 0.2 %.
CASES = {
    "finetune": (
        2,
        FP32,
        make_config("resnet_finetune", batch_size=128, lr=2e-5, momentum=0.9, image_size=16, seed=1),
    ),
    "features": (2, FP32, make_config("resnet_softmax", batch_size=100, lr=0.01, seed=1)),
    "in parts, augmented": (
        2,
        IN_PARTS,
        make_config("convnet", batch_size=23, lr=0.01, hidden=4, kernel_size=3, augment="crop_flip", seed=1),
    ),
    # 1004 = 3 · 334 + 2 images: two workers of four have none of the last batch
    "a worker without images": (
        4,
        FP32,
        make_config("convnet", batch_size=334, lr=0.01, hidden=4, kernel_size=3, seed=1),
    ),
}
STATISTICS = (3, 4, 2)  # images, channels, side: of the layer that is compared with torch's own


def train(run: TrainingRun) -> dict:
    """Trains, and returns what workers must agree on, and the images that this one saw."""
    seen, step = [], run.train_step

    def watched(indices: torch.Tensor, crops: torch.Tensor | None) -> None:
        seen.append(run.group.share(indices))
        step(indices, crops)

    run.train_step = watched
    reports = [run.epoch() for _ in range(EPOCHS)]
    sums = run.evaluate(run.inputs.val_x, run.inputs.val_y)
    return {
        "reports": reports,
        "network": run.network.state_dict(),
        "sums": [value.tolist() for value in sums],
        "seen": torch.cat(seen),
    }


def normalised(layer: nn.BatchNorm2d, x: torch.Tensor, share: slice) -> dict:
    """Returns a layer's output, statistics and gradients for these rows of a batch."""
    mine = x[share].clone().requires_grad_()
    (layer(mine) ** 3).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"x": mine.grad, **gradients, **dict(layer.named_buffers())}


def layer_and_batch() -> tuple[nn.BatchNorm2d, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count, channels, side = STATISTICS
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(channels, generator=generator))
        layer.bias.copy_(torch.rand(channels, generator=generator))
    return layer, torch.randn(count, channels, side, side, generator=generator) * 3 + 1


def work(rank: int, size: int, folder, data: ImageData, names: list[str]) -> None:
    """Is one worker; leaves what it found in folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet{size}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=120),
    )
    found = {}
    for name in names:
        _, settings, config = CASES[name]
        run = TrainingRun(config, data, settings, folder, group=Group.current())
        found[name] = train(run)
        if rank == 0:
            run.save(folder / f"{name}.pt")
    layer, x = layer_and_batch()
    Group.current().synchronise_batchnorm(layer)
    found["statistics"] = normalised(layer, x, slice(rank, None, size))
    torch.save(found, folder / f"{size}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(data_dir) -> ImageData:
    return prepare("digits", data_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    """Holds what the workers of every case found."""
    folder = tmp_path_factory.mktemp("groups")
    for size in sorted({size for size, *_ in CASES.values()}):
        names = [name for name, case in CASES.items() if case[0] == size]
        multiprocessing.spawn(work, (size, folder, data, names), nprocs=size)
    return folder


def found_by(folder, size: int) -> list[dict]:
    return [torch.load(folder / f"{size}-{rank}", weights_only=True) for rank in range(size)]


@pytest.mark.parametrize("name", CASES)
def test_a_group_trains_as_one_worker_does(folder, data, name):
    size, settings, config = CASES[name]
    alone = train(TrainingRun(config, data, settings, folder))
    for found in (worker[name] for worker in found_by(folder, size)):
        for ours, theirs in zip(found["reports"], alone["reports"], strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
            assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
            # an image on the border may fall to either side by rounding
            assert ours["train_accuracy"] == pytest.approx(theirs["train_accuracy"], abs=0.005)
            assert ours["val_accuracy"] == pytest.approx(theirs["val_accuracy"], abs=0.005)
        for key, tensor in alone["network"].items():
            torch.testing.assert_close(found["network"][key], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_each_image_is_seen_by_one_worker_in_an_epoch(folder, data, name):
    size, settings, config = CASES[name]
    seen = torch.cat([worker[name]["seen"] for worker in found_by(folder, size)])
    count = len(TrainingRun(config, data, settings, folder).inputs.train_y)
    assert sorted(seen.tolist()) == list(range(count))


@pytest.mark.parametrize("name", CASES)
def test_one_worker_continues_from_a_groups_checkpoint_and_counts_the_same(folder, data, name):
    size, settings, config = CASES[name]
    alone = TrainingRun(config, data, settings, folder)
    alone.load(folder / f"{name}.pt")
    loss_sum, confusion = (value.tolist() for value in alone.evaluate(alone.inputs.val_x, alone.inputs.val_y))
    for found in found_by(folder, size):
        assert found[name]["sums"][1] == confusion
        assert found[name]["sums"][0] == pytest.approx(loss_sum, rel=1e-5)
    assert alone.epoch()["epoch"] == EPOCHS + 1


@pytest.mark.parametrize("size", sorted({size for size, *_ in CASES.values()}))
def test_synchronised_batchnorm_is_batchnorm_of_the_whole_batch(folder, size):
    whole = normalised(*layer_and_batch(), slice(None))
    found = [worker["statistics"] for worker in found_by(folder, size)]
    for rank, worker in enumerate(found):
        torch.testing.assert_close(worker["x"], whole["x"][rank::size], rtol=1e-4, atol=1e-5)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(worker[name], whole[name])
    for name in ("weight", "bias"):  # each worker's own images; DDP adds them up
        torch.testing.assert_close(sum(worker[name] for worker in found), whole[name], rtol=1e-4, atol=1e-4)


def test_a_frozen_layer_keeps_its_statistics_when_it_is_synchronised():
    layer, x = layer_and_batch()
    expected = layer.eval()(x)
    Group(rank=0, size=2).synchronise_batchnorm(layer)
    assert not layer.training
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_and_stretches_hold_every_row_once(count, size):
    x = torch.arange(count)
    for part in (Group.share, Group.stretch):
        rows = torch.cat([part(Group(rank, size), x) for rank in range(size)])
        assert sorted(rows.tolist()) == list(range(count))
