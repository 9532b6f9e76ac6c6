"""How is a 3×3 convolution computed with a quarter of its multiplications?

Winograd's minimal filtering F(4×4, 3×3) (Lavin & Gray 2016, https://arxiv.org/abs/1509.09308): tiles of 4×4
outputs are products in a transformed space, forward as well as for both gradients. In fp32 oneDNN's
convolutions run at the limit of a processor's multipliers; only fewer multiplications make them faster
(NOTES.md).
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

KERNEL_SIZE = 3
TILE = 4  # outputs a side
SIDE = TILE + KERNEL_SIZE - 1  # inputs of a tile a side
# Where polynomials are evaluated, infinity besides. These keep fp32's error near the direct sum's; the usual
# 0, ±1, ±2 lose four times as much (NOTES.md).
POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
CHUNK_BYTES = 3 * 2**20  # of transformed inputs or outputs at a time: they stay in a processor's caches
CHANNELS_MIN = 32  # in and out; with fewer the transforms take longer than what they save
GAIN_MIN = 2  # fewer multiplications than this factor do not pay for the transforms, either


def gains(size: tuple[int, int], channels: tuple[int, int], padding: int) -> bool:
    """Returns whether a 3×3 convolution of stride 1 is worth computing this way.

    Args:
        size: Height and width of its inputs.
        channels: In and out.
        padding: Zeros on each side.
    """
    rows, columns = (length + 2 * padding - KERNEL_SIZE + 1 for length in size)
    if min(channels) < CHANNELS_MIN or padding >= KERNEL_SIZE or min(rows, columns) < 1:
        return False
    return rows * columns * KERNEL_SIZE**2 >= GAIN_MIN * _tiles(rows) * _tiles(columns) * SIDE**2


def conv2d(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Convolves with stride 1.

    Args:
        x: ``(N, C, H, W)``; fastest in channels_last memory.
        weight: ``(C', C, 3, 3)``.
        padding: Zeros on each side, at most 2.

    Returns:
        ``(N, C', H + 2·padding - 2, …)`` in channels_last memory; differentiable once.
    """
    result: Tensor = _Winograd.apply(x, weight, padding)
    return result


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        y, transformed = _correlate(x, weight, padding)
        ctx.save_for_backward(weight, *transformed)
        ctx.padding = padding
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, *transformed = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(dy, transformed)
        if ctx.needs_input_grad[0]:  # the same, with weights turned around
            turned = weight.flip(2, 3).transpose(0, 1)
            dx, _ = _correlate(dy, turned, KERNEL_SIZE - 1 - ctx.padding)
        return dx, dw, None


def _correlate(x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, list[Tensor]]:
    """Returns the output and the chunks of transformed inputs, each ``(tiles, 36, C)``."""
    channels_out, channels_in = weight.shape[:2]
    to_output, of_weight, of_input = _matrices(x.dtype)
    rows, columns = (length + 2 * padding - KERNEL_SIZE + 1 for length in x.shape[2:])
    down, across = _tiles(rows), _tiles(columns)
    taps = weight.permute(2, 3, 1, 0).reshape(KERNEL_SIZE**2, -1)
    filters = (of_weight @ taps).view(-1, channels_in, channels_out)  # a matrix for each place in a tile
    right = across * TILE - columns + padding
    bottom = down * TILE - rows + padding
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, right, padding, bottom))
    y = x.new_empty(len(x), rows, columns, channels_out)
    transformed = []
    for begin, end in _chunks(len(x), down * across * SIDE**2 * max(channels_in, channels_out) * 4):
        windows = padded[begin:end].unfold(1, SIDE, TILE).unfold(2, SIDE, TILE)  # (N, down, across, C, 6, 6)
        inputs = torch.matmul(of_input, windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, SIDE**2, channels_in))
        products = x.new_empty(len(inputs), SIDE**2, channels_out)
        torch.bmm(inputs.transpose(0, 1), filters, out=products.transpose(0, 1))
        tiles = torch.matmul(to_output, products).view(-1, down, across, TILE, TILE, channels_out)
        whole = tiles.permute(0, 1, 3, 2, 4, 5).reshape(-1, down * TILE, across * TILE, channels_out)
        y[begin:end] = whole[:, :rows, :columns]
        transformed.append(inputs)
    return y.permute(0, 3, 1, 2), transformed


def _weight_gradient(dy: Tensor, transformed: list[Tensor]) -> Tensor:
    """Returns the gradient of the weights ``(C', C, 3, 3)``."""
    to_output, of_weight, _ = _matrices(dy.dtype)
    _, channels_out, rows, columns = dy.shape
    down, across = _tiles(rows), _tiles(columns)
    padded = F.pad(dy.permute(0, 2, 3, 1), (0, 0, 0, across * TILE - columns, 0, down * TILE - rows))
    tiles = padded.reshape(-1, down, TILE, across, TILE, channels_out).permute(0, 1, 3, 2, 4, 5)
    gradient: Tensor | None = None
    begin = 0
    for inputs in transformed:
        images = len(inputs) // (down * across)
        part = tiles[begin : begin + images].reshape(-1, TILE * TILE, channels_out)
        products = torch.matmul(to_output.t(), part)
        left, right = inputs.permute(1, 2, 0), products.transpose(0, 1)
        gradient = torch.bmm(left, right) if gradient is None else gradient.baddbmm_(left, right)
        begin += images
    channels_in = transformed[0].shape[2]
    assert gradient is not None
    taps = of_weight.t() @ gradient.flatten(1)
    return taps.view(KERNEL_SIZE, KERNEL_SIZE, channels_in, channels_out).permute(3, 2, 0, 1)


@lru_cache
def _matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what transforms products to outputs, weights, and inputs, for both axes at once.

    In one dimension y = Aᵀ((G g) ⊙ (Bᵀ d)): A and G evaluate polynomials of 4 and 3 coefficients at six
    points, Bᵀ is the transposed inverse of the evaluation of 6 coefficients (Toom and Cook's product of
    polynomials, transposed). For images, Kronecker products of each with itself: ``(16, 36)``, ``(36, 9)``,
    ``(36, 36)``.
    """

    def evaluation(coefficients: int) -> np.ndarray:
        at_infinity = np.eye(1, coefficients, coefficients - 1)
        return np.concatenate([np.vander(POINTS, coefficients, increasing=True), at_infinity])

    one_axis = (evaluation(TILE).T, evaluation(KERNEL_SIZE), np.linalg.inv(evaluation(SIDE)).T)
    to_output, of_weight, of_input = (torch.tensor(np.kron(m, m), dtype=dtype) for m in one_axis)
    return to_output, of_weight, of_input


def _tiles(length: int) -> int:
    return -(-length // TILE)


def _chunks(images: int, image_bytes: int) -> list[tuple[int, int]]:
    """Returns where chunks of images begin and end; one empty chunk of none."""
    step = max(1, CHUNK_BYTES // image_bytes)
    return list(pairwise([*range(0, images, step), images])) or [(0, 0)]
