"""Which architectures are there? Rows of `ARCHITECTURES`, without torch, whose import takes a second.

An architecture is a head, alone or behind a frozen or updatable ResNet-18. `models.building` builds it::

    model = build("resnet_conv", 10, (3, 32, 32), hidden=64, kernel_size=3, weights="imagenet")
    logits = model(images)  # (N, 3, 32, 32) to (N, 10)
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A row of `ARCHITECTURES`.

    Attributes:
        summary: one line for the user.
        head: a row of `heads.HEADS`.
        cut: a row of `resnet.CUTS`, where ResNet-18 ends and the head begins; None: no backbone.
        frozen: the backbone gets no gradient and its BatchNorm statistics are fixed.
        hidden: published width of the head, its default; None: the head has no such argument.
        kernel_size: published kernel of the head's convolutions in pixels, likewise.
    """

    summary: str
    head: str
    cut: str | None = None
    frozen: bool = False
    hidden: int | None = None
    kernel_size: int | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "softmax": Architecture("softmax regression on pixels", "softmax"),
    "twolayernn": Architecture("two linear layers on pixels", "twolayernn", hidden=250),
    "convnet": Architecture("one convolution, one linear layer", "convnet", hidden=50, kernel_size=5),
    "mymodel": Architecture("three convolutions, dropout", "mymodel", hidden=64, kernel_size=5),
    "resnet_softmax": Architecture("frozen ResNet-18, softmax head", "softmax", "pool", frozen=True),
    "resnet_twolayernn": Architecture(
        "frozen ResNet-18, twolayernn head", "twolayernn", "pool", frozen=True, hidden=100
    ),
    "resnet_conv": Architecture(
        "frozen ResNet-18, convnet head", "convnet_padded", "conv4_x", frozen=True, hidden=150, kernel_size=3
    ),
    "resnet_mymodel": Architecture(
        "frozen ResNet-18, mymodel head", "mymodel", "conv2_x", frozen=True, hidden=128, kernel_size=3
    ),
    "resnet_softmax_updatable": Architecture("resnet_softmax, all of it trained", "softmax", "pool"),
    "resnet_twolayernn_updatable": Architecture(
        "resnet_twolayernn, all of it trained", "twolayernn", "pool", hidden=150
    ),
    "resnet_conv_updatable": Architecture(
        "resnet_conv, all of it trained", "convnet_padded", "conv4_x", hidden=64, kernel_size=3
    ),
    "resnet_mymodel_updatable": Architecture(
        "resnet_mymodel, all of it trained", "mymodel", "conv2_x", hidden=128, kernel_size=3
    ),
    "resnet_finetune": Architecture("ResNet-18 with its fc, softmax head, all trained", "softmax", "fc"),
}
