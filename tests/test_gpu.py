"""What GPUs and their errors say, without one: environment, driver and texts are made up."""

import errno

import pytest
import torch

from tunefleet import host as host_module
from tunefleet.search.failures import IN_A_ROW, SAME_EVENT_SECONDS, GpuFailures, cause_of, gpu_named
from tunefleet.trainables.device import BrokenGpuError, choose, is_out_of_memory
from tunefleet.trainables.graph import CaptureError, CaptureMemoryError

ONE = ({"GPU-aaaa": "NVIDIA T4"}, "470.82")


@pytest.fixture
def host(monkeypatch):
    """Makes up a host: whether torch can use its GPU, what the driver lists and CUDA_VISIBLE_DEVICES."""

    def make(*, usable=False, driver=({}, "none"), visible=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(host_module, "driver_gpus", lambda: driver)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


def refusal(device):
    with pytest.raises(ValueError, match="--device cpu") as error:
        choose(device)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_an_empty_variable_means_no_gpu(host, visible):
    host(driver=ONE, visible=visible)
    assert choose("auto").device == "cpu"
    assert f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU" in refusal("cuda")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_no_reason_for_cpus(host, device):
    host(driver=ONE)
    text = refusal(device)
    assert "the driver (470.82) lists 1 × NVIDIA T4, but torch" in text
    assert f"torch {torch.__version__}" in text
    assert choose("cpu").device == "cpu"


@pytest.mark.parametrize("visible", ["GPU-bbbb", "3", "GPU-bbbb,7"])
def test_a_variable_that_names_no_gpu_of_the_host_is_said(host, visible):
    host(driver=ONE, visible=visible)
    assert f"CUDA_VISIBLE_DEVICES={visible} names none of this host's GPUs (GPU-aaaa)" in refusal("auto")


def test_a_host_without_a_gpu_trains_on_cpus(host):
    host()
    assert choose("auto").device == "cpu"
    assert "torch sees no CUDA device here" in refusal("cuda")


def test_the_drivers_list_is_read(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\necho 'GPU-aaaa, NVIDIA H100 80GB HBM3, 580.95'\necho 'GPU-bbbb, NVIDIA T4, 580.95'\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert host_module.driver_gpus() == (
        {"GPU-aaaa": "NVIDIA H100 80GB HBM3", "GPU-bbbb": "NVIDIA T4"},
        "580.95",
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_every_way_to_say_out_of_memory_is_known(error):
    assert is_out_of_memory(error)
    wrapped = ValueError("building failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of range"),
    ],
)
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_a_lost_workers_cause_and_gpu_are_read_from_the_error():
    broken = BrokenGpuError(
        "GPU-0ab1c2d3-4e5f-6071-8293-a4b5c6d7e8f9 cannot be used any more by this process (…)"
    )
    assert (cause_of(broken), gpu_named(broken)) == ("gpu", "GPU-0ab1c2d3-4e5f-6071-8293-a4b5c6d7e8f9")
    remote = RuntimeError(f"ray::Trial.train()\n  …\ntrainables.device.BrokenGpuError: {broken}")
    assert (cause_of(remote), gpu_named(remote)) == ("gpu", "GPU-0ab1c2d3-4e5f-6071-8293-a4b5c6d7e8f9")
    assert cause_of(CaptureError("no")) == "graph"
    assert cause_of(CaptureMemoryError("no")) == "graph_memory"
    assert gpu_named(CaptureError("GPU-0ab1c2d3")) is None


@pytest.fixture
def losses():
    now = [0.0]
    counted = GpuFailures(clock=lambda: now[0])
    counted.now = now
    return counted


def test_neighbours_of_a_cuda_error_are_not_to_blame(losses):
    assert losses.lose("GPU-a", "gpu") == ("gpu", "")
    assert losses.lose("GPU-a", "gpu") == ("neighbour", "")
    assert losses.lose("GPU-a", "worker") == ("neighbour", "")
    assert losses.lose("GPU-b", "worker") == ("worker", "")
    losses.now[0] = SAME_EVENT_SECONDS
    assert losses.lose("GPU-a", "gpu") == ("gpu", "")


def test_losses_in_a_row_on_one_gpu_are_said_with_what_leaves_it_out(losses):
    losses.succeed("GPU-b")
    notes = []
    for _ in range(IN_A_ROW):
        losses.now[0] += SAME_EVENT_SECONDS
        notes.append(losses.lose("GPU-a", "gpu")[1])
    assert notes[:-1] == [""] * (IN_A_ROW - 1)
    assert (
        notes[-1] == "3 workers in a row were lost on GPU-a; to resume without it: CUDA_VISIBLE_DEVICES=GPU-b"
    )


def test_an_epoch_on_a_gpu_ends_the_row(losses):
    for _ in range(2 * IN_A_ROW):
        losses.now[0] += SAME_EVENT_SECONDS
        assert losses.lose("GPU-a", "worker") == ("worker", "")
        losses.succeed("GPU-a")
