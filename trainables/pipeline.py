"""Turn a batch of uint8 images into what the network sees, on the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tunefleet.models.space import TrainConfig
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.device import DeviceSettings

STD_MIN = 1 / 255  # one step of 8 bits; a channel that varies by less, or not at all, is scaled no further
CROP_PADDING = 1 / 8  # of the side: 4 pixels at 32


@dataclass(frozen=True)
class Pipeline:
    """Normalisation and enlargement of a batch."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    settings: DeviceSettings

    @classmethod
    def of(cls, config: TrainConfig, data: ImageData, settings: DeviceSettings) -> Pipeline:
        """Build the pipeline of a config: with its space's statistics, or those of the images.

        Of a backbone that is not trained yet, the images' are as good as those of its weights.
        """
        space, images = config.space, (data.mean, data.std)
        is_untrained = callable(space.normalise) and space.takes_weights and config.weights == "none"
        mean, std = images if is_untrained else space.statistics(config.model) or images
        return cls(mean, tuple(max(value, STD_MIN) for value in std), config.image_size, settings)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise and enlarge uint8 ``(N, 3, H, W)`` to float ``(N, 3, image_size, image_size)``.

        Uses ``x * (1 / (255 std)) - mean / std`` in place: one pass over memory for each half.
        """
        scale, shift = affine(self.mean, self.std, images.device)
        return normalise(images, scale, shift, self.image_size).to(self.settings.dtype)


def normalise(images: Tensor, scale: Tensor, shift: Tensor, image_size: int) -> Tensor:
    """Normalise uint8 images ``(N, 3, H, W)`` and enlarge them to ``(N, 3, image_size, image_size)``.

    ``scale`` and ``shift`` are those of ``affine``.
    """
    x = images.to(torch.float32).mul_(scale).sub_(shift)
    if x.shape[-1] != image_size:
        x = F.interpolate(x, size=image_size, mode="bilinear", antialias=True)
    return x


@functools.lru_cache  # made once per device: a copy to a GPU in each step would wait for it
def affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift ``(1, 3, 1, 1)`` that normalise bytes: ``x · scale - shift``."""
    deviation = torch.tensor(std, device=device).view(1, 3, 1, 1)
    return 1 / (255 * deviation), torch.tensor(mean, device=device).view(1, 3, 1, 1) / deviation


def draw_crops(count: int, side: int, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Draw how to augment each image of a batch.

    Args:
        count: Images.
        side: Their pixels per side.
        generator: CPU generator, part of the checkpoint.
        flip: Whether to mirror half of them.

    Returns:
        int64 ``(count, 3)``: the crop's first row and column in the padded image, and 1 where mirrored.
    """
    offsets = torch.randint(0, 2 * _padding(side) + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
    return torch.stack([*offsets, mirrored.long()], dim=1)


def augment(images: Tensor, crops: Tensor) -> Tensor:
    """Crop zero-padded images and mirror some of them, in one gather.

    Args:
        images: uint8 ``(N, 3, H, W)``.
        crops: Of ``draw_crops``, ``(N, 3)``, on the images' device.

    Returns:
        uint8 ``(N, 3, H, W)`` in channels_last memory.
    """
    count, _, height, width = images.shape
    rows = crops[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = crops[:, 1:2] + torch.where(crops[:, 2:] == 1, columns.flip(1), columns)
    padded = F.pad(images, 4 * (_padding(height),))
    image = torch.arange(count, device=images.device).view(-1, 1, 1)
    # Index tensors around a slice put the slice last: (N, H, W, 3), which is channels_last.
    return padded[image, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def _padding(side: int) -> int:
    return round(side * CROP_PADDING)
