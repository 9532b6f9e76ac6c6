"""The heads, layer by layer."""

import re

import pytest
import torch
from torch import nn

from tunefleet.models import heads


def relu_before_pool(head: nn.Sequential) -> nn.Sequential:
    """The same layers with each MaxPool2, ReLU pair turned round."""
    layers = list(head)
    for i in range(len(layers) - 1):
        if isinstance(layers[i], nn.MaxPool2d) and isinstance(layers[i + 1], nn.ReLU):
            layers[i], layers[i + 1] = layers[i + 1], layers[i]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("kind", ["convnet", "convnet_padded", "mymodel"])
def test_pool_before_relu_equals_relu_before_pool_gradients_included(kind):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 17, 20)
    ours = heads.HEADS[kind].build((3, 17, 20), 10, hidden=3, kernel_size=3).eval()  # eval: no dropout
    usual = relu_before_pool(ours)
    assert [type(layer) for layer in ours] != [type(layer) for layer in usual]
    gradients = []
    for head in (ours, usual):
        head.zero_grad()
        logits = head(images)
        logits.square().sum().backward()
        gradients.append([logits, *(parameter.grad.clone() for parameter in ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_convnets_relu_gets_its_gradient_in_the_format_of_its_output():
    torch.manual_seed(0)
    head = heads.convnet((3, 8, 8), 10, hidden=3, kernel_size=3)
    images = torch.randn(4, 3, 8, 8)
    found = {}
    for form in (torch.contiguous_format, torch.channels_last):
        head.to(memory_format=form).zero_grad()
        maps = head[:3](images.contiguous(memory_format=form))
        loss, gradients = head[3:](maps).square().sum(), []
        maps.register_hook(gradients.append)  # hooks run in the order of their registration
        loss.backward()
        assert maps.is_contiguous(memory_format=form)
        assert gradients[0].is_contiguous(memory_format=form)
        found[form] = [*gradients, *(parameter.grad.clone() for parameter in head.parameters())]
    torch.testing.assert_close(*found.values())
    with torch.inference_mode():
        assert head(images.contiguous(memory_format=torch.channels_last)).shape == (4, 10)


def test_convnet_has_three_times_hidden_channels_whatever_comes_in():
    for channels in (1, 3, 256):
        convolution = heads.convnet((channels, 8, 8), 10, hidden=5, kernel_size=3)[0]
        assert convolution.weight.shape == (15, channels, 3, 3)


def test_mymodel_drops_features_in_train_mode_only():
    torch.manual_seed(0)
    head = heads.mymodel((3, 8, 8), 10, hidden=8, kernel_size=3)
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(head(images), head(images))
    head.eval()
    assert torch.equal(head(images), head(images))


def test_mymodel_is_the_layers_of_the_report():
    kinds = [type(layer).__name__ for layer in heads.mymodel((3, 32, 32), 10, hidden=4, kernel_size=3)]
    stage, hidden_linear = ["Conv2d", "MaxPool2d", "ReLU"], ["Linear", "ReLU", "Dropout"]
    assert kinds == [*stage * 3, "Flatten", *hidden_linear * 2, "Linear"]


@pytest.mark.parametrize(
    ("kind", "shape", "largest"),
    [
        ("convnet", (3, 32, 32), 31),  # 32 - 31 + 1 = 2, pooled 1
        ("convnet_padded", (256, 2, 2), 3),  # 2 + 2 - 3 + 1 = 2, pooled 1
        ("convnet", (3, 40, 9), 8),  # the shorter side decides: 9 - 8 + 1 = 2, pooled 1
        # 32 + 2 - 6 + 1 = 29, pooled 14; 11, pooled 5; 2, pooled 1. With 7: 28, pooled 14; 10, 5; 1, 0.
        ("mymodel", (3, 32, 32), 6),
        # 8 + 2 - 3 + 1 = 8, pooled 4; 4, pooled 2; 2, pooled 1. With 4: 7, pooled 3; 2, pooled 1; 0.
        ("mymodel", (64, 8, 8), 3),
    ],
)
def test_largest_kernel_that_fits_is_built_and_one_more_names_it(kind, shape, largest):
    head = heads.HEADS[kind].build(shape, 10, hidden=1, kernel_size=largest)
    assert head.eval()(torch.randn(1, *shape)).shape == (1, 10)
    for too_large in (largest + 1, largest + 50):
        with pytest.raises(ValueError, match=f"give at most {largest}, or larger images$") as raised:
            heads.HEADS[kind].build(shape, 10, hidden=1, kernel_size=too_large)
        given = f"kernel_size={too_large} is not possible on a map of {shape[1]}×{shape[2]}: "
        assert str(raised.value).startswith(given)


def test_map_too_small_for_any_kernel_asks_for_larger_images():
    with pytest.raises(ValueError, match=re.escape("(stages: 1); give larger images")):
        heads.convnet((3, 1, 1), 10, hidden=1, kernel_size=1)
