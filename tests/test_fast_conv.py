import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from tunefleet.models.fast_conv import FastConv2d, make_convolutions_fast
from tunefleet.models.resnet import build_backbone


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "becomes_linear"),
    [
        ((1, 1), 3, 1, 1, True),
        ((2, 2), 3, 1, 1, True),
        ((2, 1), 3, 1, 1, True),
        ((2, 2), 3, 2, 1, True),
        ((1, 1), 7, 2, 3, True),
        ((3, 3), 3, 1, 1, False),  # a window at the corner misses the far row
        ((2, 3), 3, 1, 1, False),
        ((2, 2), 3, 1, 0, False),  # no such window at all
        ((1, 1), 1, 1, 0, False),  # has no padding to spare
        ((8, 8), 3, 2, 1, False),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_a_convolutions(
    size, kernel, stride, padding, becomes_linear, channels_last, bias
):
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 4, kernel, stride, padding, bias=bias).double()
    folded = FastConv2d(5, 4, kernel, stride, padding, bias=bias).double()
    folded.load_state_dict(plain.state_dict())
    assert bool(folded._covered(*size)) == becomes_linear
    if size[0] + 2 * padding < kernel:
        return  # both refuse
    inputs = torch.randn(3, 5, *size, dtype=torch.double)
    if channels_last:
        inputs = inputs.to(memory_format=torch.channels_last)
        folded = folded.to(memory_format=torch.channels_last)
    results = []
    for layer in (plain, folded):
        x = inputs.clone().requires_grad_()
        y = layer(x)
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        results.append((y, x.grad, *(parameter.grad for parameter in layer.parameters())))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_fast_resnet_equals_torchvisions():
    torch.manual_seed(0)
    backbone = build_backbone("fc").double().eval()
    make_convolutions_fast(backbone)
    reference = resnet18(weights=None).double().eval()
    reference.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    torch.testing.assert_close(backbone(images), reference(images))


def test_only_plain_convolutions_are_made_fast():
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
    )
    make_convolutions_fast(network)
    assert [type(layer) is FastConv2d for layer in network] == [True, True, False, False, False]


def test_no_images_are_no_outputs():
    folded = FastConv2d(5, 4, 3, 2, 1, bias=False)
    assert folded(torch.zeros(0, 5, 2, 2)).shape == (0, 4, 1, 1)


@pytest.mark.parametrize(
    ("size", "channels", "layer", "transformed"),
    [
        (16, (64, 128), {"kernel_size": 3, "padding": 1}, True),
        (16, (64, 128), {"kernel_size": 3, "padding": 1, "stride": 2}, False),
        (16, (64, 128), {"kernel_size": 5, "padding": 1}, False),
        (16, (3, 64), {"kernel_size": 3, "padding": 1}, False),  # the transforms would cost more
        (5, (64, 64), {"kernel_size": 3, "padding": 1}, False),  # two tiles for five outputs
        (16, (64, 64), {"kernel_size": (1, 3), "padding": (0, 1)}, False),
        (16, (64, 64), {"kernel_size": 3, "padding": (0, 1)}, False),
    ],
)
def test_winograds_way_is_taken_where_it_pays(size, channels, layer, transformed, monkeypatch):
    taken = []
    monkeypatch.setattr("tunefleet.models.winograd.conv2d", lambda *a: taken.append(True) or torch.zeros(()))
    convolution = FastConv2d(*channels, **layer)
    inputs = torch.zeros(1, channels[0], size, size)
    convolution(inputs)
    assert bool(taken) == transformed
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        convolution(inputs)
    assert not taken
