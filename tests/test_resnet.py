"""ResNet-18 is cut where it should be, and unusable weights are refused."""

import os
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

from tests.configs import make_model
from tunefleet.models import resnet
from tunefleet.models.resnet import load_weights

TINY_IMAGENET = Path(__file__).parents[2] / "shared/data/resnet18-tinyimagenet.pth"


@pytest.fixture(autouse=True)
def _forget_weights():
    resnet._load.cache_clear()
    yield
    resnet._load.cache_clear()


@pytest.fixture(scope="module")
def reference() -> torchvision.models.ResNet:
    """A ResNet-18 whose numbers, BatchNorm statistics included, are no initialisation's."""
    torch.manual_seed(5)
    network = torchvision.models.resnet18(weights=None)
    for buffer in network.buffers():
        buffer += 1
    return network.eval()


@pytest.fixture(scope="module")
def weights_file(reference, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(reference.state_dict(), path)
    return path


def error_of(weights: Path | str) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (callers compare the message)
        load_weights(str(weights))
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"weights={str(weights)!r} ")
    return message


def save(state: object, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("cut", resnet.CUTS)
@pytest.mark.parametrize("size", [(32, 32), (33, 50), (1, 17)])
def test_output_shape_is_what_the_backbone_puts_out(cut, size):
    backbone = resnet.build_backbone(cut).eval()
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, *size)).shape == (2, *resnet.output_shape(cut, (3, *size)))


def test_output_shapes_at_32_pixels_are_those_of_the_report():
    shapes = {cut: resnet.output_shape(cut, (3, 32, 32)) for cut in resnet.CUTS}
    assert shapes == {"conv2_x": (64, 8, 8), "conv4_x": (256, 2, 2), "pool": (512,), "fc": (1000,)}


def test_whole_backbone_equals_torchvisions_network(reference, weights_file):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone = resnet.build_backbone("fc", str(weights_file)).eval()
    with torch.no_grad():
        assert torch.equal(backbone(images), reference(images))


def test_cut_backbone_holds_the_files_numbers_and_nothing_beyond_the_cut(reference, weights_file):
    given = reference.state_dict()
    state = resnet.build_backbone("conv4_x", str(weights_file)).state_dict()
    assert {name.split(".")[0] for name in state} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert all(torch.equal(value, given[name]) for name, value in state.items())


def test_same_seed_gives_the_same_head_whether_weights_are_read_or_cached(weights_file):
    heads = []
    for _ in range(2):
        torch.manual_seed(0)
        heads.append(make_model("resnet_softmax", 10, (3, 32, 32), weights=str(weights_file)).head[1].weight)
    assert torch.equal(*heads)


@pytest.mark.parametrize(("name", "frozen"), [("resnet_conv", True), ("resnet_conv_updatable", False)])
def test_loaded_backbone_is_on_the_cpu_and_frozen_as_the_architecture_says(name, frozen, weights_file):
    model = make_model(name, 10, (3, 32, 32), hidden=2, kernel_size=3, weights=str(weights_file))
    assert all(parameter.requires_grad != frozen for parameter in model.backbone.parameters())
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}


def test_half_precision_file_gives_a_backbone_in_single_precision(reference, tmp_path):
    path = save({name: value.half() for name, value in reference.state_dict().items()}, tmp_path)
    state = resnet.build_backbone("pool", str(path)).state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_training_writes_neither_to_the_cached_weights_nor_to_the_file(weights_file):
    before = weights_file.read_bytes()
    with torch.no_grad():
        resnet.build_backbone("pool", str(weights_file)).conv1.weight.zero_()
    assert load_weights(str(weights_file))["conv1.weight"].any()
    assert weights_file.read_bytes() == before


def test_none_is_no_weights_and_a_path_is_read_once(weights_file):
    assert load_weights("none") is None
    assert load_weights(str(weights_file)) is load_weights(str(weights_file))


def test_old_format_and_absent_batch_counters_are_accepted(reference, tmp_path):
    state = {name: value for name, value in reference.state_dict().items() if "num_batches" not in name}
    assert len(state) == 122 - 20  # one counter for each BatchNorm
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = load_weights(str(tmp_path / "old.pth"))
    assert list(loaded) == list(reference.state_dict())
    assert torch.equal(loaded["layer4.1.bn2.running_mean"], state["layer4.1.bn2.running_mean"])
    assert loaded["bn1.num_batches_tracked"] == 0


def test_every_key_that_does_not_fit_is_counted(reference, tmp_path):
    state = reference.state_dict()
    del state["conv1.weight"]
    state |= {"extra": torch.zeros(1), "fc.weight": torch.zeros(200, 512), "fc.bias": 3}
    assert error_of(save(state, tmp_path)).endswith(
        " does not fit ResNet-18: 1 missing (conv1.weight), 1 unexpected (extra), 2 of the wrong shape "
        "(fc.weight (200, 512), not (1000, 512); fc.bias int, not (1000,)); "
        "give a torchvision ResNet-18 state_dict, its 1000-way fc included"
    )


def test_faults_beyond_the_cut_are_errors_too(reference, tmp_path):
    state = {name: value for name, value in reference.state_dict().items() if not name.startswith("fc.")}
    with pytest.raises(ValueError, match=r"2 missing \(fc\.weight; fc\.bias\)"):
        resnet.build_backbone("conv2_x", str(save(state, tmp_path)))


def test_another_networks_weights_show_only_the_first_keys(tmp_path):
    message = error_of(save({"state_dict": {}, "epoch": 3}, tmp_path))
    assert "102 missing (conv1.weight; bn1.weight; bn1.bias; …), 2 unexpected (state_dict; epoch)" in message


def test_file_of_one_tensor_is_not_a_state_dict(tmp_path):
    assert "holds a Tensor; give a torchvision ResNet-18 state_dict" in error_of(
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


def test_weights_under_a_tilde_are_those_of_the_home(weights_file, monkeypatch):
    monkeypatch.setenv("HOME", str(weights_file.parent))
    under_home = f"~/{weights_file.name}"
    assert torch.equal(load_weights(under_home)["fc.bias"], load_weights(str(weights_file))["fc.bias"])
    assert resnet.weights_signature(under_home) == resnet.weights_signature(str(weights_file))
    assert "has no home folder; set HOME" in error_of("~nobody_here/w.pth")


def test_a_file_replaced_at_its_old_time_is_loaded_again(reference, tmp_path):
    state = reference.state_dict()
    for scale in (1.0, 2.0):
        path = save(state | {"fc.bias": scale * state["fc.bias"]}, tmp_path)
        os.utime(path, (10**9, 10**9))
        assert torch.equal(load_weights(str(path))["fc.bias"], scale * state["fc.bias"])


def test_a_path_that_the_system_refuses_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300)):
        assert "cannot be read (" in error_of(path)


def test_absent_file_and_folder_say_what_may_be_given(tmp_path):
    advice = "; give none, imagenet or the path of a torchvision ResNet-18 state_dict"
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
    assert torch.equal(load_weights("imagenet")["fc.bias"], reference.fc.bias)


@pytest.mark.skipif(not TINY_IMAGENET.exists(), reason=f"no trained weights at {TINY_IMAGENET}")
def test_trained_weights_load_into_every_cut():
    for cut in resnet.CUTS:
        backbone = resnet.build_backbone(cut, str(TINY_IMAGENET)).eval()
        with torch.no_grad():
            assert backbone(torch.zeros(1, 3, 32, 32)).isfinite().all()
