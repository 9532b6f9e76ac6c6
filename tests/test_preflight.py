import re

import pytest

from search.folders import default_folder
from search.options import StudyOptions
from search.preflight import check_disk, checkpoint_bytes
from search.printing import clock
from search.resources import Machine, Resources, plan, settle
from trainables.config import TrainConfig
from trainables.data import prepare
from trainables.levers import Levers, choose
from trainables.training import TrainingRun

CPU = Levers("cpu", "fp32", True, 2**20)
CUDA = Levers("cuda", "bf16", True, None)


def planned(cpus, gpus, space="resnet_conv", levers=None, trial_slots=None, **options):
    levers, there = levers or (CUDA if gpus else CPU), Machine(cpus, gpus, trial_slots)
    return plan(settle(StudyOptions(space=space, **options), levers, there), levers, there)


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
        (8, 1, {"levers": CPU}, (8, 1.0, 0.0)),  # --device cpu beside a GPU
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
    assert settle(StudyOptions("softmax", **options), CPU, Machine(8)).pruner == pruner


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
        (16, 4, {"concurrency": 5, "gpus_per_trial": 1.0}, "5 × 1 GPUs, but there are 16 CPUs and 4 GPUs"),
    ],
)
def test_impossible_asks_show_the_arithmetic(cpus, gpus, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        planned(cpus, gpus, **options)


def test_full_disk_is_an_error_before_the_study(tmp_path):
    check_disk(tmp_path / "new" / "study", 1000)
    with pytest.raises(ValueError, match="give --study-dir on a larger disk"):
        check_disk(tmp_path / "new" / "study", 10**18)
    assert not (tmp_path / "new").exists()


def test_clock_speaks_of_seconds_minutes_and_hours():
    assert [clock(s) for s in (4.4, 75, 3725)] == ["4 s", "1 min 15 s", "1 h 02 min"]


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
    config = TrainConfig("twolayernn", epochs=1, hidden=100, **optimizer)
    run = TrainingRun(config, prepare("digits", data_dir), choose("cpu", "fp32"), data_dir)
    forecast = checkpoint_bytes(run)
    run.epoch()
    run.save(tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size == pytest.approx(forecast, rel=0.02)
