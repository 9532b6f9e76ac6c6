"""How is a convolution computed on a processor with fewer multiplications?

Two ways, each with a Conv2d's parameters and its sums up to rounding (figures in NOTES.md):

- ResNet-18 at 32×32, and a head behind it, ends in maps of 2×2 and 1×1, where most taps of a 3×3 kernel
  only meet padding. If every window lies over the whole map, the convolution is one linear layer of the
  taps that meet pixels: 2.5 times faster for a whole ResNet-18 step.
- Other 3×3 convolutions of stride 1 go through models/winograd.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunefleet.models import winograd


class FastConv2d(nn.Conv2d):
    """A Conv2d without groups or dilation that picks the cheapest of three ways.

    Shapes: `(N, C, H, W)` to `(N, C', H', W')`, as of Conv2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolves; on a CUDA device always by cuDNN."""
        if input.device.type != "cpu":
            return super().forward(input)
        if outputs := self._covered(input.shape[2], input.shape[3]):
            return self._linear(input, *outputs)
        if self._transforms(input):
            output = winograd.conv2d(input, self.weight, int(self.padding[0]))
            return output if self.bias is None else output + self.bias.view(1, -1, 1, 1)
        return super().forward(input)

    def _transforms(self, input: Tensor) -> bool:
        """Whether Winograd's way is possible and pays; in bf16 the multipliers are fast enough."""
        form = (self.kernel_size, self.stride, self.padding[0] == self.padding[1])
        if form != ((winograd.KERNEL_SIZE,) * 2, (1, 1), True) or torch.is_autocast_enabled("cpu"):
            return False
        size = (input.shape[2], input.shape[3])
        return winograd.gains(size, (self.in_channels, self.out_channels), int(self.padding[0]))

    def _covered(self, height: int, width: int) -> tuple[int, int] | None:
        """Output size where each window holds the whole map; None where one does not."""
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


def make_convolutions_fast(network: nn.Module) -> None:
    """Turns every plain convolution of a network (no groups, no dilation) into a FastConv2d."""
    for module in network.modules():
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
        if plain and module.groups == 1 and module.dilation == (1, 1):
            module.__class__ = FastConv2d  # the same parameters under the same names
