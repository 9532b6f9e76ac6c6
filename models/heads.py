"""Classifier heads: from an image or a backbone's features to logits.

A builder takes the shape of one input, `(C, H, W)` or `(F,)`, and works out its linear layers' sizes.

Every convolutional stage is Conv, MaxPool2, ReLU. ReLU never decreases, so it commutes with the maximum:
pooling first gives the same numbers, gradients included, and leaves ReLU a quarter of the work (convnet on
one CPU thread: 62 s per epoch became 49).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

DROPOUT = 0.2  # fraction of mymodel's hidden features, after each hidden linear layer
MYMODEL_LAST_HIDDEN = 50  # features that mymodel's last linear layer sees


class FlattenMaps(nn.Flatten):
    """A Flatten behind a ReLU, which gets its gradient back in the memory format of its output.

    As it comes, the gradient takes ReLU ten times as long on a processor (torch 2.15): 12 % of convnet's
    steps in bf16.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Flatten maps `(N, C, H, W)` to `(N, C·H·W)`."""
        turned = input.device.type == "cpu" and input.is_contiguous(memory_format=torch.channels_last)
        if turned and input.requires_grad:
            input.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return super().forward(input)


@dataclass(frozen=True)
class Head:
    """A kind of head.

    Attributes:
        build: takes the input's shape, the number of classes and `args` by name; returns the layers.
        args: the hyperparameters that `build` takes beyond shapes.
    """

    build: Callable[..., nn.Sequential]
    args: tuple[str, ...] = ()


def softmax(shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Softmax regression: one linear layer. The softmax itself is part of the loss.

    Shapes: `(N, *shape)` to `(N, num_classes)`.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), num_classes))


def twolayernn(shape: tuple[int, ...], num_classes: int, hidden: int) -> nn.Sequential:
    """Two linear layers with a ReLU between them; `hidden` is the number of features there.

    Shapes: `(N, *shape)` to `(N, num_classes)`.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


def convnet(
    shape: tuple[int, ...], num_classes: int, hidden: int, kernel_size: int, padding: int = 0
) -> nn.Sequential:
    """One convolution and one linear layer.

    The convolution has 3·hidden channels whatever comes in, three colours or the 256 channels of a backbone.

    Shapes: `(N, C, H, W)` to `(N, num_classes)`.

    Raises:
        ValueError: the kernel is so large that nothing would be left to pool.
    """
    channels, height, width = shape
    height, width = _pooled_size((height, width), kernel_size, padding, stages=1)
    return nn.Sequential(
        *_conv_stage(channels, 3 * hidden, kernel_size, padding),
        FlattenMaps(),
        nn.Linear(3 * hidden * height * width, num_classes),
    )


def mymodel(shape: tuple[int, ...], num_classes: int, hidden: int, kernel_size: int) -> nn.Sequential:
    """Three convolutions of `hidden`, 2·hidden and 4·hidden channels, then three linear layers with dropout.

    Shapes: `(N, C, H, W)` to `(N, num_classes)`.

    Raises:
        ValueError: the kernel is so large that nothing would be left to pool.
    """
    channels, height, width = shape
    height, width = _pooled_size((height, width), kernel_size, padding=1, stages=3)
    return nn.Sequential(
        *_conv_stage(channels, hidden, kernel_size, padding=1),
        *_conv_stage(hidden, 2 * hidden, kernel_size, padding=1),
        *_conv_stage(2 * hidden, 4 * hidden, kernel_size, padding=1),
        nn.Flatten(),
        nn.Linear(4 * hidden * height * width, 5 * hidden),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(5 * hidden, MYMODEL_LAST_HIDDEN),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(MYMODEL_LAST_HIDDEN, num_classes),
    )


HEADS: dict[str, Head] = {
    "softmax": Head(softmax),
    "twolayernn": Head(twolayernn, ("hidden",)),
    "convnet": Head(convnet, ("hidden", "kernel_size")),
    # Behind a backbone the map may be 2×2 (32×32 images), which a kernel of 3 would not fit without padding.
    "convnet_padded": Head(partial(convnet, padding=1), ("hidden", "kernel_size")),
    "mymodel": Head(mymodel, ("hidden", "kernel_size")),
}


def _pooled_size(size: tuple[int, int], kernel_size: int, padding: int, stages: int) -> tuple[int, int]:
    """Return the size of a map after so many stages; raise ValueError if nothing is left of it."""
    height, width = (_pooled_length(length, kernel_size, padding, stages) for length in size)
    if height and width:
        return height, width
    shorter = min(size)
    fitting = [k for k in range(1, shorter + 2 * padding + 1) if _pooled_length(shorter, k, padding, stages)]
    advice = f"give at most {fitting[-1]}, or larger images" if fitting else "give larger images"
    raise ValueError(
        f"kernel_size={kernel_size} is not possible on a map of {size[0]}×{size[1]}: "
        f"convolution and pooling would leave nothing of it (stages: {stages}); {advice}"
    )


def _pooled_length(length: int, kernel_size: int, padding: int, stages: int) -> int:
    for _ in range(stages):
        length = max(0, length + 2 * padding - kernel_size + 1) // 2
        if length == 0:
            break  # or the next stage would make something of its own padding
    return length


def _conv_stage(
    channels_in: int, channels_out: int, kernel_size: int, padding: int
) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size, padding=padding)
    return convolution, nn.MaxPool2d(2), nn.ReLU()
