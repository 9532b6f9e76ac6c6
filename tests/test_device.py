"""How a device is used follows from its flags alone, and no batch is split where that changes the result."""

import json
from dataclasses import asdict

import pytest
import torch

from tests.configs import make_model
from tunefleet.trainables import device as device_module
from tunefleet.trainables.device import MICRO_BATCH_MIN, DeviceSettings, choose, has_convolution, micro_batch

FLOAT_BYTES = 4
IMAGE = torch.zeros(1, 3, 32, 32)


def set_flags(monkeypatch, *, avx512_bf16=False, amx=False, cuda=None):
    """Lets torch see a processor with these flags, and a CUDA device of this capability or none."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: cuda)


def cpu_settings(micro_batch_bytes: int | None = 8 * 2**20) -> DeviceSettings:
    return DeviceSettings("cpu", "fp32", channels_last=True, micro_batch_bytes=micro_batch_bytes)


@pytest.mark.parametrize(
    ("flags", "device", "precision"),
    [
        ({}, "cpu", "fp32"),
        ({"avx512_bf16": True}, "cpu", "bf16"),
        ({"amx": True}, "cpu", "bf16"),
        ({"cuda": (7, 5)}, "cuda", "fp32"),
        ({"cuda": (8, 0)}, "cuda", "bf16"),
        ({"cuda": (12, 0), "avx512_bf16": True}, "cuda", "bf16"),
    ],
)
def test_flags_choose_device_and_precision(monkeypatch, flags, device, precision):
    set_flags(monkeypatch, **flags)
    chosen = choose()
    assert (chosen.device, chosen.precision) == (device, precision)
    assert chosen.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert (chosen.micro_batch_bytes is None) == (device == "cuda")


def test_flags_of_the_cpu_decide_on_a_machine_with_cuda(monkeypatch):
    set_flags(monkeypatch, cuda=(9, 0))
    assert choose("cpu").precision == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_given_precision_is_obeyed(monkeypatch, precision):
    set_flags(monkeypatch, avx512_bf16=precision == "fp32")
    assert choose("cpu", precision).precision == precision


def test_settings_survive_json():
    chosen = choose("cpu")
    assert DeviceSettings(**json.loads(json.dumps(asdict(chosen)))) == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tpu",), "--device=tpu is unknown; choose from: auto, cpu, cuda"),
        (("cuda",), "--device=cuda, but torch sees no CUDA device here; give --device cpu"),
        (("cpu", "fp16"), "--precision=fp16 is unknown; choose from: auto, fp32, bf16"),
    ],
)
def test_impossible_device_or_precision_is_named(monkeypatch, arguments, message):
    set_flags(monkeypatch)
    with pytest.raises(ValueError, match=r"^--") as error:
        choose(*arguments)
    assert str(error.value) == message


def test_networks_with_convolutions_are_known():
    assert has_convolution(make_model("convnet", 10, (3, 32, 32)))
    assert has_convolution(make_model("resnet_softmax", 10, (3, 32, 32)))
    assert not has_convolution(make_model("twolayernn", 10, (3, 32, 32)))


def test_convnet_is_split_into_parts_whose_activations_fit():
    network = make_model("convnet", 10, (3, 32, 32))
    image_bytes = 150 * 28 * 28 * FLOAT_BYTES  # its only convolution's output
    size = micro_batch(cpu_settings(), network, IMAGE, batch_size=512)
    assert size == 16
    assert size * image_bytes <= 8 * 2**20 < 2 * size * image_bytes


def test_the_largest_convolution_counts():
    network = make_model("mymodel", 10, (3, 32, 32), hidden=8, kernel_size=3)
    first = 8 * 32 * 32 * FLOAT_BYTES  # the second has twice the channels on a quarter of the area
    assert micro_batch(cpu_settings(64 * first), network, IMAGE, batch_size=512) == 64


@pytest.mark.parametrize("batch_size", [1, 5, 16, 17])
def test_a_part_never_exceeds_the_batch(batch_size):
    network = make_model("convnet", 10, (3, 32, 32))
    assert micro_batch(cpu_settings(), network, IMAGE, batch_size) == min(batch_size, 16)


def test_parts_do_not_become_tiny():
    network = make_model("convnet", 10, (3, 32, 32))
    assert micro_batch(cpu_settings(1), network, IMAGE, batch_size=512) == MICRO_BATCH_MIN


@pytest.mark.parametrize("name", ["softmax", "twolayernn"])
def test_linear_networks_are_not_split(name):
    assert micro_batch(cpu_settings(1), make_model(name, 10, (3, 32, 32)), IMAGE, batch_size=512) == 512


def test_nothing_is_split_where_the_device_has_no_such_lever():
    network = make_model("convnet", 10, (3, 32, 32))
    assert micro_batch(cpu_settings(None), network, IMAGE, batch_size=512) == 512


@pytest.mark.parametrize("name", ["resnet_softmax_updatable", "resnet_conv_updatable", "resnet_finetune"])
def test_batch_norm_in_training_is_never_split(name):
    network = make_model(name, 10, (3, 32, 32)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert micro_batch(cpu_settings(1), network, IMAGE, batch_size=512) == 512
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_frozen_backbone_may_be_split():
    network = make_model("resnet_conv", 10, (3, 32, 32)).train()
    assert micro_batch(cpu_settings(1), network, IMAGE, batch_size=512) == MICRO_BATCH_MIN


def test_measuring_leaves_no_hook_behind():
    network = make_model("convnet", 10, (3, 32, 32))
    micro_batch(cpu_settings(), network, IMAGE, batch_size=512)
    assert not any(module._forward_hooks for module in network.modules())


def test_capabilities_and_no_clock_decide():
    assert not {"time", "timeit"} & set(vars(device_module))
