import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from tunefleet.models.backbones import build_backbone
from tunefleet.models.folded import FoldedConv2d, fold_convolutions


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
    folded = FoldedConv2d(5, 4, kernel, stride, padding, bias=bias).double()
    folded.load_state_dict(plain.state_dict())
    assert bool(folded.covered_outputs(*size)) == becomes_linear
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


def test_folded_resnet_equals_torchvisions():
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", "fc", (3, 32, 32))[0].double().eval()
    fold_convolutions(backbone)
    reference = resnet18(weights=None).double().eval()
    reference.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    torch.testing.assert_close(backbone(images), reference(images))


def test_only_plain_convolutions_are_folded():
    network = nn.Sequential(
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
    )
    fold_convolutions(network)
    assert [type(layer) is FoldedConv2d for layer in network] == [True, True, False, False, False]


def test_no_images_are_no_outputs():
    folded = FoldedConv2d(5, 4, 3, 2, 1, bias=False)
    assert folded(torch.zeros(0, 5, 2, 2)).shape == (0, 4, 1, 1)
