"""Every architecture keeps its promises, and `build` says plainly what it cannot do."""

import inspect
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.configs import NETWORKS, make_model, own_arguments
from tunefleet.models.building import Classifier

HEAD_ARGS = {"hidden": 4, "kernel_size": 3}
CIFAR10 = (3, 32, 32)
EVERY_ARCHITECTURE = pytest.mark.parametrize("name", NETWORKS)
FROZEN = [name for name, architecture in NETWORKS.items() if architecture.frozen]


def build_small(name: str, seed: int) -> Classifier:
    torch.manual_seed(seed)
    return make_model(name, 10, CIFAR10, **{arg: HEAD_ARGS[arg] for arg in own_arguments(name)})


@cache
def built(name: str) -> Classifier:
    return build_small(name, seed=0)


def fresh(name: str) -> Classifier:
    return deepcopy(built(name))  # a tenth of the time that a ResNet-18's first numbers take


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, *CIFAR10, generator=generator), torch.randint(10, (8,), generator=generator)


def test_there_are_the_thirteen_architectures_of_the_report():
    assert set(NETWORKS) >= {  # more may have been added
        *("softmax", "twolayernn", "convnet", "mymodel"),
        *("resnet_softmax", "resnet_twolayernn", "resnet_conv", "resnet_mymodel"),
        *("resnet_softmax_updatable", "resnet_twolayernn_updatable"),
        *("resnet_conv_updatable", "resnet_mymodel_updatable", "resnet_finetune"),
    }
    assert set(FROZEN) >= {"resnet_softmax", "resnet_twolayernn", "resnet_conv", "resnet_mymodel"}


@EVERY_ARCHITECTURE
def test_output_is_num_classes_logits_that_nothing_has_normalised(name):
    images, _ = batch()
    logits = fresh(name).eval()(images)
    assert logits.shape == (8, 10)
    assert (logits < 0).any()  # probabilities are not
    assert not torch.allclose(logits.exp().sum(dim=1), torch.ones(8))  # log-probabilities would be


@EVERY_ARCHITECTURE
def test_every_parameter_gets_a_gradient_or_is_in_a_frozen_backbone(name):
    images, labels = batch()
    model = fresh(name)
    F.cross_entropy(model(images), labels).backward()
    for parameter_name, parameter in model.named_parameters():
        if NETWORKS[name].frozen and parameter_name.startswith("backbone."):
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.any(), parameter_name


@EVERY_ARCHITECTURE
def test_loss_falls_on_one_batch(name):
    images, labels = batch()
    model = fresh(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its noise would hide a fall this short
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.005)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@EVERY_ARCHITECTURE
def test_same_seed_gives_same_numbers_and_another_seed_others(name):
    images, _ = batch()
    once, again, other = (
        model.eval()(images) for model in (fresh(name), build_small(name, 0), build_small(name, 1))
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@EVERY_ARCHITECTURE
def test_batch_norm_statistics_move_in_train_mode_unless_frozen(name):
    images, _ = batch()
    model = fresh(name).train()
    statistics = {key: value for key, value in model.backbone.state_dict().items() if "running" in key}
    before = {key: value.clone() for key, value in statistics.items()}
    model(images)
    moved = {key for key, value in statistics.items() if not torch.equal(value, before[key])}
    assert moved == (set() if NETWORKS[name].frozen else set(statistics))
    assert bool(statistics) == (NETWORKS[name].cut is not None)


def test_train_leaves_only_a_frozen_backbone_in_eval_mode():
    frozen, updatable = fresh("resnet_mymodel"), fresh("resnet_mymodel_updatable")
    assert not any(module.training for module in frozen.backbone.modules())  # as built
    for model in (frozen, updatable):
        assert model.eval().train() is model
        assert all(module.training for module in model.head.modules())
    assert not any(module.training for module in frozen.backbone.modules())
    assert all(module.training for module in updatable.backbone.modules())


@pytest.mark.parametrize("name", FROZEN)
def test_head_on_a_frozen_backbones_features_is_the_model(name):
    images, _ = batch()
    model = fresh(name).eval()
    features = model.backbone(images)
    assert not features.requires_grad
    assert torch.equal(model.head(features), model(images))


@pytest.mark.parametrize(
    ("name", "args", "parameters"),
    [
        ("softmax", {}, 3072 * 10 + 10),
        ("twolayernn", {"hidden": 250}, (3072 * 250 + 250) + (250 * 10 + 10)),
        # 32 - 5 + 1 = 28, pooled 14
        ("convnet", {"hidden": 50, "kernel_size": 5}, (3 * 25 * 150 + 150) + (150 * 14 * 14 * 10 + 10)),
        # 32 + 2 - 5 + 1 = 30, pooled 15; 13, pooled 6; 4, pooled 2
        (
            "mymodel",
            {"hidden": 64, "kernel_size": 5},
            (3 * 25 * 64 + 64)
            + (64 * 25 * 128 + 128)
            + (128 * 25 * 256 + 256)
            + (256 * 2 * 2 * 320 + 320)
            + (320 * 50 + 50)
            + (50 * 10 + 10),
        ),
    ],
)
def test_published_plain_architecture_has_the_parameters_counted_by_hand(name, args, parameters):
    assert parameter_count(make_model(name, 10, CIFAR10, **args)) == parameters


def test_finetune_keeps_the_1000_way_fc_and_adds_one_linear_layer():
    model = fresh("resnet_finetune")
    assert parameter_count(model.backbone) == 11_689_512  # torchvision's count for all of ResNet-18
    assert parameter_count(model.head) == 1000 * 10 + 10
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (3, 37, 50)])
@pytest.mark.parametrize("name", ["softmax", "twolayernn", "convnet", "mymodel"])
def test_plain_architectures_take_other_images_and_classes(name, image_shape):
    model = make_model(name, 7, image_shape, **{arg: HEAD_ARGS[arg] for arg in own_arguments(name)})
    assert model(torch.randn(2, *image_shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet_softmax", "resnet_conv", "resnet_mymodel", "resnet_finetune"])
def test_resnet_architectures_take_images_of_any_size(name):
    model = make_model(name, 7, (3, 50, 65), **{arg: HEAD_ARGS[arg] for arg in own_arguments(name)})
    assert model.eval()(torch.randn(1, 3, 50, 65)).shape == (1, 7)


@EVERY_ARCHITECTURE
def test_build_args_are_exactly_what_build_takes(name):
    for arg in ("hidden", "kernel_size"):
        if arg in own_arguments(name):
            with pytest.raises(
                ValueError, match=rf"^{arg}=0 is not possible; give an integer of at least 1$"
            ):
                make_model(name, 10, CIFAR10, **{arg: 0})
        else:
            with pytest.raises(ValueError, match=rf"^{arg}=4 is not possible: the head takes no {arg}"):
                make_model(name, 10, CIFAR10, **{arg: 4})


def test_an_argument_left_out_is_the_published_one():
    assert make_model("convnet", 10, CIFAR10).head[0].out_channels == 3 * 50
    assert make_model("mymodel", 10, CIFAR10).head[0].kernel_size == (5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 is not possible; give an integer of at least 2"),
        ({"hidden": 0}, "hidden=0 is not possible; give an integer of at least 1"),
        ({"hidden": 2.5}, "hidden=2.5 is not possible; give an integer of at least 1"),
        ({"hidden": True}, "hidden=True is not possible; give an integer of at least 1"),
        ({"kernel_size": -3}, "kernel_size=-3 is not possible; give an integer of at least 1"),
        ({"image_shape": (3, 32)}, "image_shape=(3, 32) is not possible; give (C, H, W), each at least 1"),
        (
            {"image_shape": (3, 0, 32)},
            "image_shape=(3, 0, 32) is not possible; give (C, H, W), each at least 1",
        ),
        ({"weights": "imagenet"}, "weights='imagenet' is not possible: there is no backbone; give none"),
        (
            {"name": "resnet_conv", "image_shape": (1, 28, 28)},
            "image_shape=(1, 28, 28) is not possible: a backbone takes 3 channels; ",
        ),
    ],
)
def test_error_says_what_was_given_and_what_to_give(change, message):
    good = {"name": "mymodel", "num_classes": 10, "image_shape": CIFAR10, "hidden": 4, "kernel_size": 3}
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the whole message is compared)
        make_model(**(good | change))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("softmax", []),
        ("convnet", ["hidden", "kernel_size"]),
        ("resnet_conv", ["hidden", "kernel_size", "backbone", "weights"]),
    ],
)
def test_a_network_names_the_arguments_that_it_takes(name, own):
    assert list(inspect.signature(NETWORKS[name]).parameters) == ["num_classes", "image_shape", *own]
