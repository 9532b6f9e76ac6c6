import dataclasses
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray import tune
from torch import nn

from tests.configs import make_config, make_options
from tunefleet.models.space import Space
from tunefleet.models.spaces import SPACES
from tunefleet.search import preflight
from tunefleet.search.options import StudyOptions
from tunefleet.search.preflight import (
    Prepared,
    check_disk,
    checkpoint_bytes,
    checkpoint_sizes,
    count_images,
    disk_needed,
    inputs_bytes,
    largest,
    largest_peak,
    settle_image_size,
)
from tunefleet.search.resources import (
    AHEAD,
    Machine,
    Resources,
    Slots,
    check_device,
    find_machine,
    fit_memory,
    place_inputs,
    plan,
    settle,
    waiting,
)
from tunefleet.search.running import default_folder
from tunefleet.trainables.device import CONTEXT_BYTES, DeviceSettings, choose
from tunefleet.trainables.own_images import load_images
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

CPU = DeviceSettings("cpu", "fp32", True, 2**20)
CUDA = DeviceSettings("cuda", "bf16", True, None)


def planned(cpus, gpus, space="resnet_conv", settings=None, trial_slots=None, **options):
    settings, machine = settings or (CUDA if gpus else CPU), Machine(cpus, gpus, trial_slots)
    return plan(settle(make_options(space, **options), settings, machine), settings, machine)


@pytest.mark.parametrize(
    ("cpus", "gpus", "options", "expected"),  # expected: trials at once, CPUs and GPUs of each
    [
        (2, 0, {}, (2, 1.0, 0.0)),  # a laptop
        (96, 8, {}, (16, 6.0, 0.5)),  # an 8-GPU node; a frozen ResNet's head takes half a GPU
        (96, 8, {"space": "resnet_finetune", "workers_per_trial": 2}, (4, 24.0, 2.0, 2)),  # groups of two
        (96, 8, {"space": "resnet_finetune"}, (8, 12.0, 1.0)),
        (96, 8, {"workers_per_trial": 4}, (2, 48.0, 4.0, 4)),
        (96, 1, {"space": "resnet_finetune"}, (1, 96.0, 1.0)),
        (5, 0, {"workers_per_trial": 2}, (2, 2.0, 0.0, 2)),
        (8, 0, {"workers_per_trial": 2, "cpus_per_trial": 4.0}, (2, 4.0, 0.0, 2)),
        (96, 8, {"space": "resnet_finetune", "workers_per_trial": 2, "trial_slots": 3}, (3, 24.0, 2.0, 2)),
        (96, 8, {"gpus_per_trial": 0.25}, (32, 3.0, 0.25)),
        (96, 8, {"gpus_per_trial": 2.0}, (4, 24.0, 2.0)),
        (96, 8, {"gpus_per_trial": 3.0}, (2, 48.0, 3.0)),
        (4, 8, {"space": "resnet_softmax_updatable"}, (4, 1.0, 1.0)),  # fewer CPUs than GPUs
        (8, 0, {"cpus_per_trial": 3.0}, (2, 3.0, 0.0)),
        (8, 0, {"cpus_per_trial": 0.5}, (16, 0.5, 0.0)),
        (8, 0, {"concurrency": 3}, (3, 1.0, 0.0)),
        (96, 0, {"trials": 5}, (5, 1.0, 0.0)),  # no worker without work
        (8, 1, {"settings": CPU}, (8, 1.0, 0.0)),  # --device cpu beside a GPU
    ],
)
def test_resources_are_divided_as_worked_out(cpus, gpus, options, expected):
    assert planned(cpus, gpus, **options) == Resources(*expected)


def test_each_worker_of_a_group_gets_its_share():
    resources = planned(96, 8, space="resnet_finetune", workers_per_trial=2)
    assert resources.of_worker == {"CPU": 12.0, "GPU": 1.0}
    assert resources.threads == 12
    assert planned(8, 0, workers_per_trial=2, cpus_per_trial=6.0).threads == 3


@pytest.mark.parametrize(
    ("options", "pruner"),
    [
        ({}, "promote"),
        ({"workers_per_trial": 2}, "stop"),
        ({"workers_per_trial": 2, "pruner": "promote"}, "promote"),
        ({"pruner": "none"}, "none"),
    ],
)
def test_groups_are_stopped_and_single_workers_promoted_unless_asked_otherwise(options, pruner):
    assert settle(make_options("softmax", **options), CPU, Machine(8)).pruner == pruner


@pytest.mark.parametrize(
    ("cpus", "gpus", "options", "message"),
    [
        (2, 0, {"gpus_per_trial": 1.0}, "--gpus-per-trial=1, but there are 0 GPUs"),
        (
            2,
            0,
            {"concurrency": 3},
            "there are 2 CPUs and 0 GPUs; give --concurrency of at most 2",
        ),
        (2, 0, {"cpus_per_trial": 4.0}, "trials need 4 CPUs, but there are 2 CPUs"),
        (16, 4, {"gpus_per_trial": 1.5}, "above 1 Ray takes whole GPUs only"),
        (
            2,
            0,
            {"workers_per_trial": 3},
            "trials need 3 CPUs (3 workers each), but there are 2 CPUs and 0 GPUs; "
            "give --workers-per-trial of at most 2",
        ),
        (16, 4, {"workers_per_trial": 2, "gpus_per_trial": 1.0}, "give a multiple of 2"),
        (16, 4, {"workers_per_trial": 8}, "--gpus-per-trial=8, but there are 4 GPUs"),
        (
            8,
            0,
            {"workers_per_trial": 2, "trial_slots": 0},
            """ray start --head --resources='{"trial_slot": 4}'""",
        ),
        (16, 4, {"concurrency": 5, "gpus_per_trial": 1.0}, "5 × 1 GPU, but there are 16 CPUs and 4 GPUs"),
    ],
)
def test_impossible_asks_show_the_arithmetic(cpus, gpus, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        planned(cpus, gpus, **options)


def test_a_study_whose_device_is_gone_says_which_and_what_to_do():
    check_device(CPU, Machine(2))
    check_device(CUDA, Machine(2, 1))
    with pytest.raises(ValueError, match=r"trains on cuda, and there is no GPU.*give --device cpu"):
        check_device(CUDA, Machine(2, 0))


def test_full_disk_is_an_error_before_the_study(tmp_path):
    check_disk(tmp_path / "new" / "study", 1000, 2000)
    with pytest.raises(ValueError, match="give --study-dir on a larger disk"):
        check_disk(tmp_path / "new" / "study", 10**18, 10**18)
    assert not (tmp_path / "new").exists()


GB = 10**9


@pytest.mark.parametrize(
    ("share", "peak", "free", "slots", "gpus_per_trial", "gpu_bytes", "said"),
    [
        (0.25, 5 * GB, 79 * GB, 4, 0.25, 79 * GB // 4, ""),
        (
            0.25,
            30 * GB,
            79 * GB,
            2,
            0.5,
            79 * GB // 2,
            "need 30.0 GB each, and 79.0 GB of a GPU are free: 2 at",
        ),
        (0.5, 60 * GB, 79 * GB, 1, 1.0, None, "1 at once on it, not 2"),
        (0.5, 90 * GB, 79 * GB, 2, 0.5, 79 * GB // 2, "need 90.0 GB, and 79.0 GB are free: they will end as"),
        (0.5, None, 79 * GB, 2, 0.5, 79 * GB // 2, "need more than a GPU has"),
        (1.0, 60 * GB, 79 * GB, 1, 1.0, None, ""),
        (0.0, None, None, 4, 0.0, None, ""),  # on CPUs
    ],
)
def test_as_many_trials_share_a_gpu_as_it_holds(share, peak, free, slots, gpus_per_trial, gpu_bytes, said):
    planned = Resources(max(1, int(1 / share)) if share else 4, 4.0, share)
    resources, line = fit_memory(planned, peak, free)
    assert (resources.slots, resources.gpus_per_trial) == (slots, gpus_per_trial)
    assert (resources.gpu_bytes is None) == (gpu_bytes is None)
    if gpu_bytes:  # each has its share of what is free, less what its process takes beside torch
        assert gpu_bytes - CONTEXT_BYTES < resources.gpu_bytes < gpu_bytes
    assert said in line
    assert bool(said) == bool(line)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("settings", "share", "workers", "size", "free", "on_device"),
    [
        (CUDA, 0.5, 1, 19 * GB, 79 * GB, True),  # two trials take 38 GB, less than half of what is free
        (CUDA, 0.5, 1, 20 * GB, 79 * GB, False),
        (CUDA, 0.25, 1, 10 * GB, 79 * GB, False),  # four would take 40 GB
        (CUDA, 1.0, 1, 39 * GB, 79 * GB, True),
        (CUDA, 2.0, 2, 39 * GB, 79 * GB, True),  # each worker of a group has a GPU
        (CUDA, 0.5, 1, 20 * GB, None, True),  # what is free is not known
        (CPU, 0.0, 1, 900 * GB, None, True),
    ],
)
def test_inputs_are_on_the_gpu_where_all_trials_leave_room(settings, share, workers, size, free, on_device):
    resources = Resources(4, 4.0, share, workers)
    placed, line = place_inputs(settings, resources, size, free)
    assert placed == dataclasses.replace(settings, inputs_on_device=on_device)
    assert placed.inputs_device == (settings.device if on_device else "cpu")
    assert bool(line) != on_device
    if line:
        assert line.startswith(f"inputs take {size / GB:.1f} GB for each of")


def test_steps_on_inputs_of_the_host_are_not_captured():
    captured = dataclasses.replace(CUDA, cuda_graph=True)
    space = SPACES["resnet_finetune"]
    assert captured.of(space).cuda_graph
    assert not dataclasses.replace(captured, inputs_on_device=False).of(space).cuda_graph


@pytest.mark.parametrize(
    ("space", "options", "row"),
    [
        ("softmax", {}, 3 * 32 * 32 * 4),  # normalised, fp32
        ("resnet_finetune", {"image_size": 64}, 3 * 32 * 32),  # enlarged on the device: the bytes
        ("resnet_conv", {}, 256 * 2 * 2 * 4),  # features
        ("convnet", {"fix": {"augment": "crop"}}, 3 * 32 * 32),
        ("convnet", {"range": {"augment": "choice('none', 'crop')"}}, 3 * 32 * 32 * 4),  # the larger
    ],
)
def test_the_bytes_of_inputs_are_those_that_a_trial_reads(space, options, row, data_dir):
    options = make_options(space, **({"image_size": 32, "weights": "none"} | options))
    assert inputs_bytes(options, prepare("digits", data_dir), CPU) == 1438 * row


def test_inputs_that_the_disk_cannot_hold_are_refused_before_they_are_written(
    data_dir, tmp_path, monkeypatch
):
    options, data = (
        make_options("softmax", image_size=32, data_dir=str(tmp_path)),
        prepare("digits", data_dir),
    )
    written = 1438 * 3 * 32 * 32 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=written - 1))
    with pytest.raises(ValueError, match=r"^inputs under --data-dir=.* need 18 MB, and 18 MB are free; give"):
        preflight.prepare(options, data, CPU)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=written))
    assert preflight.prepare(options, data, CPU).input_bytes == written
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert preflight.prepare(options, data, CPU).input_bytes == 0  # they are there


def test_the_largest_trial_of_a_space_has_the_highest_of_everything(data_dir):
    data = prepare("digits", data_dir)
    options = make_options("twolayernn", image_size=32)
    config = largest(options, data)
    assert (config.batch_size, config.model["hidden"], config.augment) == (512, 1000, "crop_flip")
    narrow = make_options("twolayernn", image_size=32, fix={"hidden": 8})
    assert largest(narrow, data).model["hidden"] == 8


def heads(num_classes, image_shape, *, width=4, heads=4):
    if width % heads:
        raise AssertionError("width must be divisible by heads")
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.Linear(width, num_classes))


def test_configs_that_a_builder_refuses_are_left_to_their_trials(data_dir, tmp_path, monkeypatch):
    """The combination of the highest numbers is one of them."""
    space = Space(heads, {"width": tune.choice([4, 6, 8]), "heads": tune.choice([2, 3, 5])}, image_size=32)
    options = StudyOptions(space, image_size=32, data_dir=str(tmp_path), fix={"batch_size": 16})
    data = prepare("digits", data_dir)
    assert largest(options, data).model == {"width": 6, "heads": 3}  # the first trial's
    mean, most = checkpoint_sizes(options, data)
    sizes = [4 * (3072 * width + width + 10 * width + 10) for width in (4, 6, 8)]
    assert sizes[0] < mean < most == sizes[2]
    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1000)
    refused = dataclasses.replace(largest(options, data), model={"width": 8, "heads": 5})
    assert largest_peak(options, data, CPU, sampled=True, config=refused) > 1000


@pytest.mark.parametrize(
    ("space", "options", "settings", "gpu_bytes", "size"),
    [
        ("resnet_softmax", {}, CPU, None, 128),
        ("resnet_conv", {}, CPU, None, 32),
        ("resnet_conv", {}, CUDA, 79 * GB, 128),
        ("resnet_conv", {}, CUDA, None, 128),
        ("resnet_conv", {"image_size": 48}, CUDA, 79 * GB, 48),
        ("resnet_mymodel", {}, CUDA, 79 * GB, 64),
        ("resnet_finetune", {}, CUDA, 79 * GB, 64),
        ("resnet_finetune", {}, CPU, None, 32),
        ("resnet_conv", {"weights": "none"}, CUDA, 79 * GB, 32),
        ("softmax", {}, CUDA, 79 * GB, 32),
        # 60,000 images of 256 × 8 × 8 bf16 features: 2 GB for each of two trials; half of 6 GB holds 1.5
        ("resnet_conv", {}, CUDA, 6 * GB, 64),
        ("resnet_conv", {}, CUDA, 1 * GB, 32),
        (Space(heads, image_size=224), {}, CUDA, 79 * GB, 224),
        (Space(heads, image_size=224), {}, CUDA, 10 * GB, 128),
    ],
)
def test_the_image_size_is_the_spaces_best_that_there_is_room_for(
    space, options, settings, gpu_bytes, size, tmp_path
):
    named = make_options if isinstance(space, str) else StudyOptions
    wanted = named(space, data_dir=str(tmp_path), **options)
    machine = Machine(16, 1, gpu_bytes=gpu_bytes)
    assert settle_image_size(wanted, settings, machine, wanted.data).image_size == size


def test_the_images_of_a_function_are_counted_as_they_are(tmp_path):
    images = (np.zeros((30, 8, 8), dtype=np.uint8), np.arange(30) % 2)
    given = load_images("<dict>", {"train": images, "test": images, "classes": ["a", "b"]})
    options = make_options("resnet_conv", data="<dict>", data_dir=str(tmp_path))
    settled = settle_image_size(options, CUDA, Machine(16, 1, gpu_bytes=GB), given)
    assert settled.image_size == 128  # which 60,000 images leave no room for


def test_images_are_counted_without_reading_them_all(tmp_path):
    for k in range(30):
        (tmp_path / "images" / f"class{k % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"class{k % 2}" / f"{k}.png").write_bytes(bytes(200))
    assert count_images(str(tmp_path / "images")) == 30
    for kind in ("zip", "gztar"):
        packed = shutil.make_archive(str(tmp_path / kind), kind, tmp_path / "images")
        assert count_images(packed) in (30, 32, 33)  # folders are members, too


def test_what_is_no_archive_is_left_to_where_images_are_read(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(os.urandom(50_000))
    for kind in ("zip", "gztar"):
        packed = Path(shutil.make_archive(str(tmp_path / kind), kind, tmp_path / "images"))
        packed.write_bytes(packed.read_bytes()[:30_000])
        assert count_images(str(packed)) == 0
    (tmp_path / "notes.txt").write_text("no images")
    assert count_images(str(tmp_path / "notes.txt")) == count_images(str(tmp_path / "nothing")) == 0


def test_the_disk_that_is_asked_for_is_that_of_the_configs_that_are_sampled(data_dir):
    """twolayernn's hidden is one of 100, 250, 500 and 1000; the published one has 250."""
    data = prepare("digits", data_dir)
    options = make_options("twolayernn", image_size=32, trials=30, final_seeds=3)
    weights = {hidden: 4 * (3072 * hidden + hidden + 10 * hidden + 10) for hidden in (100, 250, 500, 1000)}
    mean, most = checkpoint_sizes(options, data)
    assert mean == pytest.approx(3 * sum(weights.values()) / 4, rel=0.1)  # Adam keeps two values of each
    assert most == 3 * weights[1000]
    resources = Resources(slots=2, cpus_per_trial=1.0, gpus_per_trial=0.0)
    prepared = Prepared("", 0, 0, mean, most, None)
    assert disk_needed(options, resources, prepared) == (30 * mean + 5 * most, 35 * most)
    kept = dataclasses.replace(prepared, model_bytes=7)  # of three seeds
    assert disk_needed(options, resources, kept) == (30 * mean + 5 * most + 21, 35 * most + 21)


def test_default_folder_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_folder("softmax", "../some/cifar10-jpeg.tar.xz")
    assert first.name.startswith("softmax-cifar10-jpeg-20")
    first.mkdir(parents=True)
    monkeypatch.setattr("time.strftime", lambda form: first.name.removeprefix("softmax-cifar10-jpeg-"))
    assert default_folder("softmax", "cifar10-jpeg.zip").name == first.name + "-2"


@pytest.mark.parametrize(
    "optimizer", [{"momentum": 0.9}, {"optimizer": "adam"}, {"optimizer": "adamw"}], ids=str
)
def test_checkpoint_takes_what_is_forecast(optimizer, data_dir, tmp_path):
    config = make_config("twolayernn", epochs=1, hidden=100, **optimizer)
    run = TrainingRun(config, prepare("digits", data_dir), choose("cpu", "fp32"), data_dir)
    forecast = checkpoint_bytes(config, run.data)
    run.epoch()
    run.save(tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size == pytest.approx(forecast, rel=0.02)


def test_a_forecast_of_a_gpus_memory_computes_no_features_and_counts_them(data_dir, tmp_path, monkeypatch):
    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1000)
    fix = {"batch_size": 16}
    options = make_options("resnet_softmax", image_size=32, weights="none", data_dir=str(tmp_path), fix=fix)
    peak = largest_peak(options, prepare("digits", data_dir), CPU, sampled=True)
    sample = 88 + 88 * 434 // 1004  # 5.5 batches, and as many to validate as there are in proportion
    assert peak == 1000 + (1438 - sample) * 512 * 4
    assert not (tmp_path / "prepared").exists()


def node(cpus, gpus=0, alive=True, **labels):
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}, "Labels": labels}


@pytest.fixture
def nodes(monkeypatch):
    """A cluster; its nodes may change."""
    up = [node(0), node(4), node(2), node(8, alive=False)]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("tunefleet.search.resources.connect", lambda: None)
    monkeypatch.setattr("ray.nodes", lambda: up)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"trial_slot": 16.0})
    return up


def on_cluster(**options):
    options = settle(make_options("softmax", **options), CPU, machine := find_machine())
    return options, plan(options, CPU, machine)


def test_slots_follow_the_nodes_of_a_cluster(nodes, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tunefleet.search.resources.time.monotonic", lambda: now[0])
    _, resources = on_cluster(trials=9)
    slots = Slots(resources)
    assert (resources.slots, slots()) == (6, 6)
    nodes.append(node(2))
    assert slots() == 6  # looked a moment ago
    now[0] += 60
    assert slots() == 8
    nodes.append(node(64))
    now[0] += 60
    assert slots() == 9  # there are no more trials
    nodes.clear()
    now[0] += 60
    assert slots() == 1


def test_where_an_autoscaler_starts_nodes_a_few_trials_wait_for_them(nodes):
    nodes[0]["Labels"] = {"ray.io/node-group": "head"}
    _, resources = on_cluster(trials=32)
    assert resources.slots == 6
    assert Slots(resources)() == 6 + AHEAD


def test_more_trials_at_once_than_fit_now_are_accepted_on_a_cluster_and_said(nodes):
    options, resources = on_cluster(trials=32, concurrency=16)
    assert resources.slots == Slots(resources)() == 16
    assert waiting(options, resources) == (
        "--concurrency=16, and the nodes that are up have room for 6 trials: the others wait for nodes"
    )
    options, resources = on_cluster(trials=32, concurrency=6)
    assert waiting(options, resources) == ""


def test_groups_of_workers_are_no_more_than_fit_since_they_cannot_wait(nodes):
    options, resources = on_cluster(trials=32, workers_per_trial=2, concurrency=8)
    assert resources.slots == Slots(resources)() == 3
    nodes.append(node(4))
    assert Slots(resources)() == 5
    assert "have room for 5 trials" in waiting(options, resources)


def test_an_autoscaler_starts_the_first_node_and_one_that_a_trial_fits_on(nodes, monkeypatch):
    requested = []

    def start(bundles):
        requested.append(bundles)
        nodes.append(node(sum(bundle["CPU"] for bundle in bundles)))

    monkeypatch.setattr("tunefleet.search.resources._wait_for", start)
    nodes[:] = [node(0, **{"ray.io/node-group": "head"})]
    _, resources = on_cluster(cpus_per_trial=3.0)
    assert requested == [[{"CPU": 1}], [{"CPU": 3.0}]]
    assert resources.slots == 1
    nodes[:] = [node(0)]  # started by hand: nobody starts more
    with pytest.raises(ValueError, match="trials need 1 CPU, but there are 0 CPUs"):
        on_cluster()
