"""The pipeline is the textbook's normalisation, and augmentation the textbook's crop and flip."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.configs import make_config
from tunefleet.models.space import IMAGENET
from tunefleet.trainables import pipeline as pipeline_module
from tunefleet.trainables.data import ImageData
from tunefleet.trainables.device import DeviceSettings
from tunefleet.trainables.pipeline import Pipeline, draw_crops
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.training import TrainingRun

MEAN, STD = (0.1, 0.5, 0.9), (0.2, 0.25, 0.3)
FP32 = DeviceSettings("cpu", "fp32", channels_last=True, micro_batch_bytes=None)
BF16 = dataclasses.replace(FP32, precision="bf16")
DATA = ImageData("made", "/nowhere", ("a", "b"), (3, 32, 32), 8, 2, MEAN, STD, "0" * 64)


def random_images(count: int = 8, size: int = 32) -> torch.Tensor:
    shape = (count, 3, size, size)
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def textbook(images: torch.Tensor) -> torch.Tensor:
    """Returns (x / 255 - mean) / std in double precision."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.double() / 255 - mean) / std


def augment(images: torch.Tensor, generator: torch.Generator, *, flip: bool) -> torch.Tensor:
    crops = draw_crops(len(images), images.shape[-1], generator, flip=flip)
    return pipeline_module.augment(images, crops)


def naive_augment(images: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Crops and flips image by image, with the draws that augment documents: offsets, then flips."""
    count, _, height, width = images.shape
    pad = height // 8
    top, left = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator).squeeze(2).tolist()
    flipped = (torch.rand(count, 1, generator=generator) < 0.5).squeeze(1).tolist()
    out = []
    for image, y, x, flip in zip(images, top, left, flipped, strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        crop = padded[:, y : y + height, x : x + width]
        out.append(crop[:, :, ::-1] if flip else crop)
    return np.stack(out)


def test_normalisation_is_the_textbook_one():
    images = random_images()
    x = Pipeline(MEAN, STD, 32, FP32)(images)
    torch.testing.assert_close(x.double(), textbook(images), rtol=0, atol=2e-6)


def test_one_pixel_worked_out_by_hand():
    images = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    x = Pipeline(MEAN, STD, 1, FP32)(images).flatten()
    torch.testing.assert_close(x, torch.tensor([0.5, -1.2, -7 / 3]))


def test_the_images_are_not_written_to():
    images = random_images()
    before = images.clone()
    Pipeline(MEAN, STD, 32, FP32)(images)
    assert torch.equal(images, before)


def test_enlarging_comes_after_normalising():
    images = random_images()
    x = Pipeline(MEAN, STD, 64, FP32)(images)
    expected = F.interpolate(textbook(images), size=64, mode="bilinear", antialias=True)
    assert x.shape == (8, 3, 64, 64)
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_size", [32, 48])
def test_precision_is_that_of_the_settings(image_size):
    assert Pipeline(MEAN, STD, image_size, FP32)(random_images()).dtype == torch.float32
    assert Pipeline(MEAN, STD, image_size, BF16)(random_images()).dtype == torch.bfloat16


@pytest.mark.parametrize("image_size", [32, 48])
def test_memory_format_is_kept(image_size):
    images = random_images().to(memory_format=torch.channels_last)
    x = Pipeline(MEAN, STD, image_size, FP32)(images)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_channel_without_variance_becomes_0():
    data = dataclasses.replace(DATA, mean=(51 / 255, 0.5, 1.0), std=(0.0, 0.25, 0.0))
    images = random_images()
    images[:, 0], images[:, 2] = 51, 255
    for settings in (FP32, BF16):
        x = Pipeline.of(make_config("softmax"), data, settings)(images)
        assert x.isfinite().all()
        torch.testing.assert_close(x[:, [0, 2]].float(), torch.zeros(8, 2, 32, 32), rtol=0, atol=1e-3)
        assert x[:, 1].std() > 0.9


def test_a_channel_of_little_variance_is_not_blown_up():
    data = dataclasses.replace(DATA, mean=(0.0, 0.5, 0.5), std=(1e-6, 0.25, 0.25))
    assert Pipeline.of(make_config("softmax"), data, FP32)(random_images()).abs().max() <= 255


@pytest.mark.parametrize("architecture", ["softmax", "mymodel"])
def test_images_of_one_channel_are_learnt(architecture, tmp_path):
    for number in range(60):
        file = tmp_path / f"masks/{number % 2}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        blue = np.random.default_rng(number).integers(0, 156, (32, 32), dtype=np.uint8)
        blue[:, : 16 * (number % 2)] += 100
        Image.merge("RGB", [Image.new("L", (32, 32), 77)] * 2 + [Image.fromarray(blue)]).save(file)
    data = prepare(str(tmp_path / "masks"), tmp_path)
    config = make_config(architecture, epochs=8, batch_size=8, lr=0.01, momentum=0.9)
    run = TrainingRun(config, data, FP32, tmp_path)
    reports = [run.epoch() for _ in range(8)]
    assert not any(report["diverged"] for report in reports)
    assert reports[-1]["val_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("architecture", "weights", "statistics"),
    [
        ("convnet", "none", (MEAN, STD)),
        ("resnet_conv", "none", (MEAN, STD)),
        ("resnet_conv", "imagenet", (IMAGENET[0], IMAGENET[1])),
        ("resnet_finetune", "some.pth", (IMAGENET[0], IMAGENET[1])),
    ],
)
def test_weights_bring_their_own_statistics(architecture, weights, statistics):
    pipeline = Pipeline.of(make_config(architecture, weights=weights), DATA, FP32)
    assert (pipeline.mean, pipeline.std) == statistics


@pytest.mark.parametrize("size", [32, 16, 8])
def test_augmentation_is_a_crop_of_the_padded_image_and_a_flip(size):
    images = random_images(64, size)
    ours = augment(images, torch.Generator().manual_seed(3), flip=True)
    naive = naive_augment(images.numpy(), torch.Generator().manual_seed(3))
    assert np.array_equal(ours.numpy(), naive)


def test_augmentation_draws_every_offset_and_both_flips():
    position = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(2000, 3, 8, 8)
    variants = {
        image.numpy().tobytes() for image in augment(position, torch.Generator().manual_seed(0), flip=True)
    }
    assert len(variants) == 3 * 3 * 2  # padding 1: three offsets each way, flipped or not


def test_crops_alone_mirror_nothing():
    position = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(2000, 3, 8, 8)
    crops = augment(position, torch.Generator().manual_seed(0), flip=False)
    assert len({image.numpy().tobytes() for image in crops}) == 3 * 3


def test_augmented_images_are_uint8_in_channels_last():
    x = augment(random_images(), torch.Generator(), flip=True)
    assert x.dtype == torch.uint8
    assert x.shape == (8, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_is_the_same_in_either_memory_format():
    images = random_images()
    a = augment(images, torch.Generator().manual_seed(1), flip=True)
    b = augment(images.to(memory_format=torch.channels_last), torch.Generator().manual_seed(1), flip=True)
    assert torch.equal(a, b)


def test_augmentation_follows_its_generator_alone():
    images = random_images()
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    first = augment(images, generator, flip=True)
    torch.manual_seed(99)
    second = augment(images, generator, flip=True)
    generator.set_state(state)
    assert torch.equal(first, augment(images, generator, flip=True))
    assert not torch.equal(first, second)
