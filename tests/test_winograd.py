import pytest
import torch
from torch.nn import functional as F

from tunefleet.models import winograd


def tensors(images, channels, size, dtype=torch.double):
    """Returns inputs ``(N, C, H, W)`` in channels_last and weights ``(C', C, 3, 3)``."""
    torch.manual_seed(0)
    x = torch.randn(images, channels[0], *size, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels[1], channels[0], 3, 3, dtype=dtype) / (3 * channels[0] ** 0.5)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (7, 10), (3, 3)])
@pytest.mark.parametrize("images", [0, 1, 5])
def test_output_and_gradients_equal_torchs(images, size, padding, monkeypatch):
    monkeypatch.setattr(winograd, "CHUNK_BYTES", 36 * 4 * 7 * 12)  # a few tiles: several chunks
    x, weight = tensors(images, (5, 7), size)
    expected = F.conv2d(x, weight, padding=padding)
    got = winograd.conv2d(x, weight, padding)
    torch.testing.assert_close(got, expected)
    dy = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, weight), dy), torch.autograd.grad(expected, (x, weight), dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_gradient_that_is_wanted_is_computed(wanted):
    both = tensors(2, (3, 4), (8, 8))
    both[1 - wanted].requires_grad_(False)
    expected = torch.autograd.grad(F.conv2d(*both, padding=1).sum(), both[wanted])[0]
    torch.testing.assert_close(
        torch.autograd.grad(winograd.conv2d(*both, 1).sum(), both[wanted])[0], expected
    )


def test_rounding_in_fp32_is_about_that_of_the_direct_sum():
    x, weight = tensors(4, (64, 64), (16, 16))
    exact = F.conv2d(x, weight, padding=1)
    single = (x.float(), weight.float())
    ours = (winograd.conv2d(*single, 1) - exact).pow(2).mean().sqrt()
    direct = (F.conv2d(*single, padding=1) - exact).pow(2).mean().sqrt()
    assert ours < 4 * direct  # 2.0 was seen
    assert ours < 2e-6 * exact.std()


def test_output_is_channels_last():
    x, weight = tensors(2, (3, 4), (8, 8))
    assert winograd.conv2d(x, weight, 1).is_contiguous(memory_format=torch.channels_last)
