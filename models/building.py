"""Build a head, alone or behind a backbone."""

import torch
from torch import Tensor, nn

from tunefleet.models import backbones, heads
from tunefleet.models.folded import FoldedConv2d, fold_convolutions

# What our layers are forms of that train faster; of torch's own
PLAIN: dict[type[nn.Module], type[nn.Module]] = {FoldedConv2d: nn.Conv2d, heads.FlattenMaps: nn.Flatten}


class Classifier(nn.Module):
    """A head behind a backbone; logits, never probabilities.

    A frozen backbone takes no gradient and stays in eval mode after `train()`: in train mode its BatchNorm
    statistics would follow the images even without a gradient.

    Attributes:
        backbone: a network up to a cut, or `nn.Identity()`.
        head: what is always trained.
        frozen: whether the backbone is fixed.

    Shapes: `(N, C, H, W)` to `(N, num_classes)`.
    """

    backbone: nn.Module
    head: nn.Module

    def __init__(self, backbone: nn.Module, head: nn.Module, *, frozen: bool = False) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(not frozen)
        self.head = head
        self.frozen = frozen
        self.train()

    def train(self, mode: bool = True) -> "Classifier":
        """Set the mode of everything but a frozen backbone."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images `(N, C, H, W)` to logits `(N, num_classes)`."""
        if self.frozen:
            with torch.no_grad():
                features = self.backbone(images)
        else:
            features = self.backbone(images)
        return self.head(features)


def build(
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    head: str,
    cut: str | None = None,
    backbone: str = "",
    frozen: bool = False,
    hidden: int | None = None,
    kernel_size: int | None = None,
    weights: str = "none",
) -> Classifier:
    """Build a network, initialised by torch's defaults from its global generator: seed that first.

    Args:
        num_classes: logits per image, at least 2.
        image_shape: `(C, H, W)` of the images; C is 3 where there is a backbone.
        head: a row of `heads.HEADS`.
        cut: a row of `backbones.CUTS`, where the backbone ends and the head begins; None: no backbone.
        backbone: a network of torchvision or timm, as `backbones.check_backbone` takes it.
        frozen: the backbone gets no gradient and its BatchNorm statistics are fixed.
        hidden: width of the head; None: it has no such argument.
        kernel_size: of the head's convolutions in pixels, likewise.
        weights: of the backbone: "none", "imagenet" or a path, as `backbones.load_network` takes it.

    Returns:
        The model, on the CPU and in train mode.

    Raises:
        ValueError: an argument is out of range or not one that this head takes, or the weights cannot be
            loaded.
    """
    row = heads.HEADS[head]
    _check_int("num_classes", num_classes, at_least=2)
    if len(image_shape) != 3 or not all(isinstance(size, int) and size >= 1 for size in image_shape):
        raise ValueError(f"image_shape={image_shape!r} is not possible; give (C, H, W), each at least 1")
    args = {}
    for arg, value in {"hidden": hidden, "kernel_size": kernel_size}.items():
        if arg in row.args:
            _check_int(arg, value, at_least=1)
            args[arg] = value
        elif value is not None:
            raise ValueError(f"{arg}={value!r} is not possible: the head takes no {arg}; leave it out")
    if cut is None and weights != "none":
        raise ValueError(f"weights={weights!r} is not possible: there is no backbone; give none")
    if cut and image_shape[0] != backbones.IN_CHANNELS:
        raise ValueError(
            f"image_shape={image_shape} is not possible: a backbone takes {backbones.IN_CHANNELS} channels; "
            "repeat a grey channel, or choose a network without a backbone"
        )
    body: nn.Module = nn.Identity()
    features: tuple[int, ...] = image_shape
    if cut:
        body, features = backbones.build_backbone(backbone, cut, image_shape, weights)
    model = Classifier(body, row.build(features, num_classes, **args), frozen=frozen)
    fold_convolutions(model)
    return model


def make_plain(network: nn.Module) -> None:
    """Turn our layers back into torch's, of which they are faster forms: same parameters, same numbers."""
    for module in network.modules():
        module.__class__ = PLAIN.get(type(module), type(module))


def _check_int(arg: str, value: int | None, *, at_least: int) -> None:
    # bool is an int to Python, and a slip here.
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{arg}={value!r} is not possible; give an integer of at least {at_least}")
