"""What one batch shows of a person's network."""

import pytest
import torch
from ray import tune
from torch import nn

from tunefleet import Space
from tunefleet.trainables.examine import examine
from tunefleet.trainables.preparation import prepare

LR = {"lr": tune.loguniform(1e-4, 1e-1)}
UNKNOWN = {"channels_last": None, "micro_batches": None, "feature_cache": None}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare("digits", tmp_path_factory.mktemp("data"))


def look(build, digits):
    space = Space(build, LR, name="mine")
    return examine(space.config({"lr": 0.1, "image_size": 32}), digits).traits


class View(nn.Module):
    """Takes its maps for contiguous, as networks without channels_last in mind do."""

    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 4, 3, stride=8), nn.Linear(64, num_classes)

    def forward(self, x):
        return self.linear(self.convolution(x).view(-1, 64))


class Mixing(nn.Module):
    """Subtracts the batch's mean: the gradient of a batch is not that of its parts."""

    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 4, 3, stride=8), nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.convolution(x).flatten(1)
        return self.linear(x - x.mean(0))


class Behind(nn.Module):
    """A head behind a frozen backbone, or nearly."""

    def __init__(self, num_classes, image_shape, added=0.0):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.Flatten())
        self.head, self.frozen, self.added = nn.Linear(64, num_classes), True, added

    def forward(self, x):
        return self.head(self.backbone(x)) + self.added


def plain(num_classes, image_shape):
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(64, num_classes))


def lazy(num_classes, image_shape):
    return nn.Sequential(nn.LazyConv2d(4, 3, stride=8), nn.Flatten(), nn.LazyLinear(num_classes))


@pytest.mark.parametrize(
    ("build", "traits"),
    [
        (plain, (True, True, False)),
        (lazy, (True, True, False)),
        (View, (False, True, False)),
        (Mixing, (True, False, False)),
        (Behind, (True, True, True)),
        (lambda n, s: Behind(n, s, added=1.0), (True, True, False)),
        (lambda n, s: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, n)), (False, False, False)),
    ],
)
def test_only_what_leaves_loss_and_gradients_alone_is_used(build, traits, digits):
    assert tuple(look(build, digits).values()) == traits


class TwoOutputs(View):
    def forward(self, x):
        return super().forward(x), x


class Detached(View):
    def forward(self, x):
        return super().forward(x).detach()


class OneDimension(nn.Module):
    """A network without a parameter of two dimensions."""

    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes))

    def forward(self, x):
        return x.mean((1, 2, 3)).unsqueeze(1) * self.scale


class NoBackbone(View):
    frozen = True


def broken(num_classes, image_shape):
    return nn.Linear(undefined, num_classes)  # noqa: F821


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (TwoOutputs, r"mine returns a tuple; return logits \(N, 10\), one for each class"),
        (lambda n, s: View(1, s), r"mine returns \(8, 1\) of 8 images; return logits \(N, 10\)"),
        (Detached, "mine returns logits without a gradient"),
        (broken, r"mine cannot be built: .*test_examine\.py line \d+: NameError: name 'undefined'"),
        (
            lambda n, s: nn.Linear(5, n),
            r"mine fails on images \(8, 3, 32, 32\): .*RuntimeError: .*mat1 and mat2",
        ),
        (NoBackbone, "mine cannot be built: .*mine is frozen and has no backbone; call the part that is"),
        (lambda n, s: "network", "mine returns a str; return an nn.Module"),
    ],
)
def test_a_network_that_cannot_be_trained_is_one_line(build, message, digits):
    with pytest.raises(ValueError, match=message) as error:
        look(build, digits)
    assert "\n" not in str(error.value)


def test_a_frozen_network_whose_features_are_not_kept_is_said(digits):
    said, space = [], Space(lambda n, s: Behind(n, s, added=1.0), LR, name="mine")
    examine(space.config({"lr": 0.1}), digits, said.append)
    assert said == ["mine is no head(backbone(x)): its backbone's features are computed in every epoch"]


def test_the_output_is_looked_at_where_all_traits_are_given_too(digits):
    space = Space(TwoOutputs, LR, channels_last=False, micro_batches=True, feature_cache=False)
    with pytest.raises(ValueError, match="TwoOutputs returns a tuple"):
        examine(space.config({"lr": 0.1}), digits)


def test_a_network_without_a_matrix_is_examined(digits):
    assert look(OneDimension, digits)["channels_last"] is False


def test_what_a_space_says_of_itself_is_taken(digits):
    space = Space(plain, LR, channels_last=False, micro_batches=True, feature_cache=False)
    assert examine(space.config({"lr": 0.1}), digits).traits == space.traits
