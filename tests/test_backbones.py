"""Networks are cut where they should be, and unusable weights are refused."""

import os
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torchvision.models import get_model

from tests.configs import make_config, make_model, make_options
from tunefleet.models import backbones
from tunefleet.models.backbones import build_backbone, load_network, weights_file
from tunefleet.models.space import IMAGENET

CIFAR10 = (3, 32, 32)
TINY_IMAGENET = Path(__file__).parents[2] / "shared/data/resnet18-tinyimagenet.pth"


@pytest.fixture(autouse=True)
def _forget_weights():
    backbones._load.cache_clear()
    yield
    backbones._load.cache_clear()


@pytest.fixture(scope="module")
def reference() -> torchvision.models.ResNet:
    """A ResNet-18 whose numbers, BatchNorm statistics included, are no initialisation's."""
    torch.manual_seed(5)
    network = torchvision.models.resnet18(weights=None)
    for buffer in network.buffers():
        buffer += 1
    return network.eval()


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(reference.state_dict(), path)
    return path


def error_of(weights: Path | str) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (callers compare the message)
        load_network("resnet18", str(weights))
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"weights={str(weights)!r} ")
    return message


def build(cut: str, weights: Path) -> torch.nn.Module:
    return build_backbone("resnet18", cut, CIFAR10, str(weights))[0]


def load(weights: Path | str) -> dict[str, torch.Tensor]:
    return load_network("resnet18", str(weights)).state_dict()


def save(state: object, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("cut", backbones.CUTS)
@pytest.mark.parametrize("size", [(32, 32), (33, 50), (1, 17)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_output_shape_is_what_the_backbone_puts_out(name, cut, size):
    backbone, shape = build_backbone(name, cut, (3, *size))
    with torch.no_grad():
        assert backbone.eval()(torch.randn(2, 3, *size)).shape == (2, *shape)


def test_output_shapes_at_32_pixels_are_those_of_the_report():
    shapes = {cut: build_backbone("resnet18", cut, CIFAR10)[1] for cut in backbones.CUTS}
    assert shapes == {"conv2_x": (64, 8, 8), "conv4_x": (256, 2, 2), "pool": (512,), "fc": (1000,)}


def test_whole_backbone_equals_torchvisions_network(reference, saved):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone = build("fc", saved).eval()
    with torch.no_grad():
        assert torch.equal(backbone(images), reference(images))


def test_cut_backbone_holds_the_files_numbers_and_nothing_beyond_the_cut(reference, saved):
    given = reference.state_dict()
    state = build("conv4_x", saved).state_dict()
    assert {name.split(".")[0] for name in state} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert all(torch.equal(value, given[name]) for name, value in state.items())


def test_same_seed_gives_the_same_head_whether_weights_are_read_or_cached(saved):
    heads = []
    for _ in range(2):
        torch.manual_seed(0)
        heads.append(make_model("resnet_softmax", 10, (3, 32, 32), weights=str(saved)).head[1].weight)
    assert torch.equal(*heads)


@pytest.mark.parametrize(("name", "frozen"), [("resnet_conv", True), ("resnet_conv_updatable", False)])
def test_loaded_backbone_is_on_the_cpu_and_frozen_as_the_architecture_says(name, frozen, saved):
    model = make_model(name, 10, (3, 32, 32), hidden=2, kernel_size=3, weights=str(saved))
    assert all(parameter.requires_grad != frozen for parameter in model.backbone.parameters())
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}


def test_half_precision_file_gives_a_backbone_in_single_precision(reference, tmp_path):
    path = save({name: value.half() for name, value in reference.state_dict().items()}, tmp_path)
    state = build("pool", path).state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_training_writes_neither_to_the_cached_weights_nor_to_the_file(saved):
    before = saved.read_bytes()
    with torch.no_grad():
        build("pool", saved).conv1.weight.zero_()
    assert load(saved)["conv1.weight"].any()
    assert saved.read_bytes() == before


def test_a_path_is_read_once(saved, monkeypatch):
    load(saved)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read again"))
    load(saved)


def test_old_format_and_absent_batch_counters_are_accepted(reference, tmp_path):
    state = {name: value for name, value in reference.state_dict().items() if "num_batches" not in name}
    assert len(state) == 122 - 20  # one counter for each BatchNorm
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = load(tmp_path / "old.pth")
    assert list(loaded) == list(reference.state_dict())
    assert torch.equal(loaded["layer4.1.bn2.running_mean"], state["layer4.1.bn2.running_mean"])
    assert loaded["bn1.num_batches_tracked"] == 0


def test_every_key_that_does_not_fit_is_counted(reference, tmp_path):
    state = reference.state_dict()
    del state["conv1.weight"]
    state |= {"extra": torch.zeros(1), "fc.weight": torch.zeros(200, 512), "fc.bias": 3}
    assert error_of(save(state, tmp_path)).endswith(
        " does not fit resnet18: 1 missing (conv1.weight), 1 unexpected (extra), 2 of the wrong shape "
        "(fc.weight (200, 512), not (1000, 512); fc.bias int, not (1000,)); "
        "give a state_dict of torchvision's resnet18, whole"
    )


def test_faults_beyond_the_cut_are_errors_too(reference, tmp_path):
    state = {name: value for name, value in reference.state_dict().items() if not name.startswith("fc.")}
    with pytest.raises(ValueError, match=r"2 missing \(fc\.weight; fc\.bias\)"):
        build("conv2_x", save(state, tmp_path))


def test_another_networks_weights_show_only_the_first_keys(tmp_path):
    message = error_of(save({"state_dict": {}, "epoch": 3}, tmp_path))
    assert "102 missing (conv1.weight; bn1.weight; bn1.bias; …), 2 unexpected (state_dict; epoch)" in message


def test_file_of_one_tensor_is_not_a_state_dict(tmp_path):
    assert "holds a Tensor; give a state_dict of torchvision's resnet18" in error_of(
        save(torch.zeros(3), tmp_path)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv1.weight", float("nan")),
        ("fc.bias", float("inf")),
        ("layer4.1.bn2.running_mean", float("-inf")),
        ("bn1.running_var", -1.0),
    ],
)
def test_weights_that_cannot_work_are_refused(reference, tmp_path, name, value):
    state = {key: tensor.clone() for key, tensor in reference.state_dict().items()}
    state[name].view(-1)[-1] = value
    message = error_of(save(state, tmp_path))
    assert f"has NaN, infinite values or negative variances (1 in all: {name}); give" in message


def test_weights_too_large_for_float32_are_refused(reference, tmp_path):
    state = reference.state_dict()
    state["fc.bias"] = torch.full((1000,), 1e300, dtype=torch.float64)
    assert "(1 in all: fc.bias)" in error_of(save(state, tmp_path))


def test_weights_under_a_tilde_are_those_of_the_home(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    under_home = f"~/{saved.name}"
    assert torch.equal(load(under_home)["fc.bias"], load(saved)["fc.bias"])
    assert backbones.weights_signature(under_home) == backbones.weights_signature(str(saved))
    with pytest.raises(ValueError, match=r"^weights=~nobody_here/w\.pth has no home folder; set HOME"):
        load("~nobody_here/w.pth")


def test_a_file_replaced_at_its_old_time_is_loaded_again(reference, tmp_path):
    state = reference.state_dict()
    for scale in (1.0, 2.0):
        path = save(state | {"fc.bias": scale * state["fc.bias"]}, tmp_path)
        os.utime(path, (10**9, 10**9))
        assert torch.equal(load(path)["fc.bias"], scale * state["fc.bias"])


def test_a_path_that_the_system_refuses_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300)):
        assert "cannot be read (" in error_of(path)


def test_absent_file_and_folder_say_what_may_be_given(tmp_path):
    advice = "; give none, imagenet or the path of a state_dict of torchvision's resnet18, whole"
    assert error_of("imagnet").endswith(f"cannot be read (No such file or directory){advice}")
    assert error_of(tmp_path).endswith(f"cannot be read (Is a directory){advice}")


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file_is_damaged(old_format, kept, tmp_path):
    path = tmp_path / "cut.pth"
    torch.save(
        {"a": torch.randn(100, 100), "b": torch.randn(9)}, path, _use_new_zipfile_serialization=not old_format
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert "it is damaged" in error_of(path)


def test_file_that_torch_did_not_write_is_damaged(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    assert "it is damaged" in error_of(tmp_path / "page.pth")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path):
    target = tmp_path / "ran"
    paths = [save({"conv1.weight": Malicious(target)}, tmp_path), tmp_path / "bare.pkl"]
    paths[1].write_bytes(pickle.dumps(Malicious(target), protocol=2))
    for path in paths:
        assert "holds other Python objects than tensors" in error_of(path)
        assert not target.exists()


def test_pickled_module_is_refused(tmp_path):
    assert "torch.save(resnet18.state_dict(), PATH)" in error_of(save(torch.nn.Linear(2, 2), tmp_path))


def test_imagenet_without_a_network_names_the_offline_ways(monkeypatch, tmp_path):
    def no_network(*_args: object, **_kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    message = error_of("imagenet")
    assert "resnet18-f37072fd.pth" in message
    assert "URLError: <urlopen error Name or service not known>" in message
    assert "--weights PATH" in message
    assert message.endswith("or --weights none")


def test_imagenet_is_torchvisions_file_with_its_hash_checked(monkeypatch, reference, tmp_path):
    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        assert (url.rsplit("/")[-1], hash_prefix, progress) == ("resnet18-f37072fd.pth", "f37072fd", False)
        torch.save(reference.state_dict(), path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    assert torch.equal(load("imagenet")["fc.bias"], reference.fc.bias)


@pytest.mark.skipif(not TINY_IMAGENET.exists(), reason=f"no trained weights at {TINY_IMAGENET}")
def test_trained_weights_load_into_every_cut():
    for cut in backbones.CUTS:
        backbone = build(cut, TINY_IMAGENET).eval()
        with torch.no_grad():
            assert backbone(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    "name", ["resnet34", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16", "densenet121"]
)
def test_pooled_features_are_what_torchvisions_last_linear_layer_sees(name, tmp_path):
    torch.manual_seed(3)
    network = get_model(name, weights=None).eval()
    seen = []
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, 224, 224)
    before = torch.get_rng_state()
    backbone, shape = build_backbone(name, "pool", (3, 224, 224), str(save(network.state_dict(), tmp_path)))
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn where the weights are given
    with torch.no_grad():
        network(images)
        assert torch.equal(backbone.eval()(images), seen[0])
    assert seen[0].shape == (1, *shape)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timms_features_are_those_of_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    network = timm.create_model(name).eval()
    path = str(save(network.state_dict(), tmp_path))
    backbone, shape = build_backbone(f"timm:{name}", "pool", (3, 160, 160), path)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
        assert torch.equal(backbone.eval()(images), expected)
    assert expected.shape == (2, *shape)


def test_a_pooled_backbone_has_its_name_in_the_tree_that_the_feature_cache_knows_it_by():
    pytest.importorskip("timm")
    one, other = (
        build_backbone(f"timm:{name}", "pool", (3, 224, 224))[0]
        for name in ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224")
    )
    assert repr(one) != repr(other)


def test_every_network_of_torchvision_names_its_weights():
    names = backbones._torchvision_names()
    assert {"resnet18", "resnet34", "resnet50", "mobilenet_v3_large", "vit_b_16", "swin_t"} <= set(names)
    for name in names:
        mean, std, size = backbones.training_of(name)
        assert len(mean) == len(std) == 3
        assert size >= 224
        assert weights_file(name, "imagenet").name[:4] == name[:4]


def test_mean_and_std_are_those_of_the_weights():
    timm = pytest.importorskip("timm")
    assert backbones.training_of("resnet34")[:2] == IMAGENET
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert backbones.training_of("timm:vit_tiny_patch16_224") == (cfg.mean, cfg.std, 224)
    assert cfg.mean != IMAGENET[0]
    space = make_config("resnet_softmax").space
    assert space.statistics({"backbone": "timm:vit_tiny_patch16_224"}) == (cfg.mean, cfg.std)


@pytest.mark.parametrize(
    ("space", "backbone", "message"),
    [
        (
            "resnet_softmax",
            "resnt34",
            r"=resnt34 is unknown; did you mean resnet34\? Choose from: .*",
        ),
        ("resnet_softmax", "googlenet", r"=googlenet is unknown; .*, or timm:NAME"),
        ("resnet_softmax", 34, "=34 is unknown; .*"),
        (
            "resnet_conv",
            "vit_b_16",
            "=vit_b_16 cannot be cut at conv4_x, only at its pooled features; give one of resnet101, .*, or "
            "a space that takes pooled features, such as resnet_softmax",
        ),
        ("resnet_finetune", "mobilenet_v3_small", "=mobilenet_v3_small cannot be cut at fc, .*"),
        ("resnet_mymodel", "timm:test_resnet", "=timm:test_resnet cannot be cut at conv2_x, .*"),
        ("resnet_softmax", "timm:test_resnt", r"=timm:test_resnt is unknown; did you mean test_resnet\? .*"),
        ("resnet_softmax", "timm:resnet18.a9", r"=timm:resnet18.a9 is unknown; did you mean resnet18.a.*"),
    ],
)
def test_a_backbone_that_cannot_be_is_one_line_before_anything_is_read(space, backbone, message):
    if str(backbone).startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"^backbone{message}$"):
        make_options(space, fix={"backbone": backbone})


def test_a_missing_timm_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^backbone=timm:test_vit needs timm, .*pip install .*\[timm\]'$"):
        make_options("resnet_softmax", fix={"backbone": "timm:test_vit"})


@pytest.mark.parametrize(("name", "size"), [("vit_b_16", 224), ("timm:vit_tiny_patch16_224", 224)])
def test_images_of_a_size_that_a_network_does_not_take_are_one_line(name, size):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(
        ValueError, match=rf"^backbone={name} does not take images of 32×32 \(.*\); give --image-size {size}$"
    ):
        make_model("resnet_softmax", 10, CIFAR10, backbone=name)


@pytest.mark.parametrize(("name", "library"), [("resnet34", "torchvision"), ("timm:test_vit", "timm")])
def test_weights_of_another_network_are_refused(name, library, saved):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    bare = name.removeprefix("timm:")
    with pytest.raises(
        ValueError, match=rf"does not fit {bare}: .*; give a state_dict of {library}'s {bare}, whole$"
    ):
        build_backbone(name, "pool", (3, 160, 160), str(saved))
