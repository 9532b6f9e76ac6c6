"""All thirteen networks on a GPU: replayed steps, checkpoints, numbers, and two workers of one trial."""

import datetime
import statistics

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from tests.configs import NETWORKS, make_config, own_arguments
from tests.gpu import DEVICE, ON_GPU, on_device
from tests.test_training import assert_same, without_times
from tunefleet.trainables.data import load_split
from tunefleet.trainables.device import choose
from tunefleet.trainables.group import Group
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

pytestmark = on_device

EXACT = ("softmax", "twolayernn", "resnet_softmax", "resnet_twolayernn")  # matrix products alone
OTHERS = [name for name in NETWORKS if name not in EXACT]
SMALL = {"hidden": 16, "kernel_size": 3}
BATCH = 64  # 1,004 training images: 15 full batches, of which 12 are replayed at first, and a short one
LOGITS = 3e-5  # of their norm; TF32 would be 3e-4
GROUPS = {  # a ResNet's small lr keeps rounding from growing, as in tests/test_group.py
    "features": make_config("resnet_softmax", batch_size=100, lr=0.01, seed=1),
    "augmented": make_config(
        "convnet", batch_size=23, lr=0.01, hidden=4, kernel_size=3, augment="crop_flip", seed=1
    ),
    "BatchNorm": make_config("resnet_finetune", batch_size=128, lr=2e-5, momentum=0.9, seed=1),
}


@pytest.fixture(scope="module")
def data(data_dir):
    return prepare("digits", data_dir)


@pytest.fixture
def make(data, data_dir):
    def make_run(name, *, eager=False, device=DEVICE, precision="auto", **values):
        defaults = {"epochs": 3, "batch_size": BATCH, "lr": 0.01, "momentum": 0.9, "seed": 1}
        defaults |= {"schedule": "cosine", "weight_decay": 1e-4} | {
            arg: SMALL[arg] for arg in own_arguments(name)
        }
        if name in OTHERS and not NETWORKS[name].frozen:
            defaults["augment"] = "crop_flip"
        if name in OTHERS and NETWORKS[name].cut:
            defaults["lr"] = 0.001  # a larger one lets rounding grow
        if name == "twolayernn":
            defaults |= {"optimizer": "adam", "momentum": 0.0, "lr": 0.001}
        config = make_config(name, **(defaults | values))
        run = TrainingRun(config, data, choose(device, precision), data_dir)
        if eager:
            run._graph_of_epoch = lambda sizes: None
        return run

    return make_run


def assert_replayed(run):
    assert not ON_GPU or (run.graph is not None and run.graph._graph is not None)


def assert_within_spread(value, like):
    """Asserts that a loss is one of these, within half a percent or 3 standard deviations."""
    mean = statistics.mean(like)
    assert abs(value - mean) <= max(0.005 * mean, 3 * statistics.stdev(like)), (value, like)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
@pytest.mark.parametrize("name", EXACT)
def test_replayed_steps_equal_eager_ones_bit_for_bit(make, name, augment):
    if augment != "none" and NETWORKS[name].frozen:
        pytest.skip("its backbone would convolve in each step")
    eager, graphed = make(name, eager=True, augment=augment), make(name, augment=augment)
    for _ in range(2):
        assert without_times(graphed.epoch()) == without_times(eager.epoch())
    assert_replayed(graphed)
    for part in ("network", "optimizer"):
        assert_same(graphed.state_dict()[part], eager.state_dict()[part])


@pytest.mark.parametrize("name", OTHERS)
def test_replayed_epochs_lose_as_eager_ones_do(make, name):
    eager = [make(name, eager=True).epoch()["train_loss"] for _ in range(3)]
    graphed = make(name)
    assert_within_spread(graphed.epoch()["train_loss"], eager)
    assert_replayed(graphed)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_run_continues_as_the_uninterrupted_one(make, name, tmp_path):
    whole, file = make(name), tmp_path / "checkpoint.pt"
    whole.epoch()
    whole.save(file)
    expected = whole.epoch()
    losses = []
    for _ in range(1 if name in EXACT else 3):
        again = make(name)
        again.load(file)
        again.save(tmp_path / "again.pt")
        assert_same(
            *(torch.load(tmp_path / saved, weights_only=True) for saved in ("again.pt", "checkpoint.pt"))
        )
        report = again.epoch()
        losses.append(report["train_loss"])
        assert report["epoch"] == 2
        assert name not in EXACT or without_times(report) == without_times(expected)
    assert_replayed(again)
    if name not in EXACT:
        assert_within_spread(expected["train_loss"], losses)


def test_dropouts_generator_continues(make, tmp_path):
    run = make("mymodel")
    run.epoch()
    run.save(tmp_path / "checkpoint.pt")
    drawn = torch.rand(8, device=DEVICE)
    again = make("mymodel")
    assert not torch.equal(torch.rand(8, device=DEVICE), drawn)
    again.load(tmp_path / "checkpoint.pt")
    assert torch.equal(torch.rand(8, device=DEVICE), drawn)


@pytest.mark.parametrize("name", NETWORKS)
def test_fp32_logits_are_a_processors(make, data, name):
    images = torch.from_numpy(load_split(data, "train")[0][:64].copy())
    logits = []
    for device in (DEVICE, "cpu"):
        run = make(name, device=device, precision="fp32")
        run.model.eval()
        with torch.inference_mode():
            logits.append(run.model(run.pipeline(images.to(device))).double().cpu())
    ours, reference = logits
    assert (ours - reference).norm() <= LOGITS * reference.norm()


@pytest.mark.parametrize("name", ["twolayernn", "mymodel", "resnet_conv"])
def test_a_checkpoint_continues_on_a_processor_and_back(make, name, tmp_path):
    first = make(name, precision="fp32")
    first.epoch()
    first.save(tmp_path / "first.pt")
    on_cpu = make(name, device="cpu", precision="fp32")
    on_cpu.load(tmp_path / "first.pt")
    sums = [run.evaluate(run.inputs.val_x, run.inputs.val_y) for run in (first, on_cpu)]
    assert sums[1][0].item() == pytest.approx(sums[0][0].item(), rel=1e-3)
    second = on_cpu.epoch()
    on_cpu.save(tmp_path / "second.pt")
    back = make(name, precision="fp32")
    back.load(tmp_path / "second.pt")
    third = back.epoch()
    assert [report["epoch"] for report in back.reports] == [1, 2, 3]
    assert second["train_loss"] < first.reports[0]["train_loss"]
    assert third["train_loss"] < second["train_loss"]


def work(rank, folder, data, settings):
    """Is one of two workers on one GPU, which meet over gloo; NCCL wants a GPU for each."""
    torch.set_num_threads(1)
    meeting = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60), **meeting)
    found = {}
    for name, config in GROUPS.items():
        try:
            found[name] = TrainingRun(config, data, settings, folder, group=Group.current()).epoch()
        except RuntimeError as error:
            found[name] = str(error)
    torch.save(found, folder / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(data, data_dir, tmp_path_factory):
    """What two workers of one group report, by case."""
    folder = tmp_path_factory.mktemp("group")
    multiprocessing.spawn(work, (folder, data, choose(DEVICE, "fp32")), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", GROUPS)
def test_two_workers_on_one_gpu_train_as_one_does(two_workers, data, data_dir, name):
    alone = TrainingRun(GROUPS[name], data, choose(DEVICE, "fp32"), data_dir).epoch()
    for found in (worker[name] for worker in two_workers):
        if isinstance(found, str) and "gloo" in found.lower():
            pytest.skip(f"gloo cannot do this on a GPU: {found.splitlines()[0]}")
        assert not isinstance(found, str), found
        for key in ("train_loss", "val_loss"):
            assert found[key] == pytest.approx(alone[key], rel=1e-3)
