"""study.model(): the winner as a module, from the study's folder alone."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from ray import tune

import tunefleet
from tests.finished import CLASSES, end_study, finished_study, made_data, new_study, save_test_images
from tests.images import save_image
from tests.made_study import write_events
from tunefleet import Space
from tunefleet.analysis.load import load
from tunefleet.analysis.results import main as results
from tunefleet.collect import main as collect
from tunefleet.inference import winner
from tunefleet.metric import Metric
from tunefleet.models.origin import pickled
from tunefleet.models.spaces import SPACES, find_space
from tunefleet.store import Store
from tunefleet.study import Study
from tunefleet.trainables.data import DATA_DIR
from tunefleet.trainables.device import choose
from tunefleet.trainables.trial import JobRun, TrialContext

SMALL = {"hidden": 4, "kernel_size": 3}
MINE = """
from ray import tune
from torch import nn
import tunefleet
from tunefleet import Space
from tunefleet.analysis.load import load
from tunefleet.analysis.results import main as results
from tunefleet.collect import main as collect
import parts

def build(num_classes, image_shape, width=4):
    return nn.Sequential(parts.stem(width), nn.Flatten(), nn.LazyLinear(num_classes))

space = Space(build, {"lr": tune.loguniform(1e-3, 1e-1), "width": tune.choice([4, 8])})
"""
PARTS = """
from torch import nn

def stem(width):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(4))
"""
RUN = """
import torch
from ray import tune
import tunefleet
from tunefleet import Space
from tunefleet.analysis.load import load
from tunefleet.analysis.results import main as results
from tunefleet.collect import main as collect

class MyRun:
    def __init__(self, config, *, device, seed):
        self.rate, self.device, self.seed, self.weights = config["rate"], device, seed, torch.zeros(3)

    def epoch(self):
        self.weights += self.rate
        return {"val_loss": 1.0}

    def state_dict(self):
        return {"weights": self.weights}

    def load_state_dict(self, state):
        self.weights = state["weights"]

space = Space(run=MyRun, ranges={"rate": tune.uniform(0.0, 1.0)}, metric="val_loss")
"""


def values_of(name):
    return {key: value for key, value in SMALL.items() if key in SPACES[name].arguments}


def shown(folder):
    """Returns the probabilities and classes that the seed's test has written."""
    table = pd.read_parquet(folder / "best" / "predictions.parquet")
    columns = [name for name in table if name[0] == "p" and name[1:].isdigit()]
    return table[columns].to_numpy(), table["predicted"].to_numpy()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_data(tmp_path_factory.mktemp("arrays"))


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory):
    return save_test_images(data, tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def small(data, data_dir, tmp_path_factory):
    """A finished study of the smallest convolutional space."""
    folder = tmp_path_factory.mktemp("small") / "study"
    return finished_study(folder, SPACES["convnet"], data, data_dir, **SMALL)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SPACES)
def test_a_model_gives_the_probabilities_of_the_test(name, precision, data, photos, data_dir, tmp_path):
    if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor does not compute in bf16")
    settings = choose("cpu", precision)
    folder = finished_study(
        tmp_path / "study", SPACES[name], data, data_dir, settings=settings, **values_of(name)
    )
    frame = Study(folder).predict(photos)
    probabilities, predicted = shown(folder)
    assert frame["path"].tolist() == [str(photos / f"{k:02d}.png") for k in range(23)]
    np.testing.assert_allclose(frame.iloc[:, 2:].to_numpy(), probabilities, atol=1e-3)
    best = np.sort(probabilities, axis=1)
    clear = best[:, -1] - best[:, -2] > 2e-3
    assert frame["class"][clear].tolist() == [CLASSES[k] for k in predicted[clear]]


def test_best_holds_the_whole_network_and_no_optimizer(data, data_dir, tmp_path):
    folder = finished_study(tmp_path / "study", SPACES["resnet_softmax"], data, data_dir)
    saved = torch.load(folder / "best" / "model.pt", weights_only=True)
    assert "backbone.conv1.weight" in saved["network"]
    assert "optimizer" not in saved
    assert saved["classes"] == list(CLASSES)
    assert (saved["stored_size"], saved["image_size"], saved["builder"]) == (32, 32, "resnet_softmax")
    assert saved["mean"] == [0.4, 0.5, 0.6]  # without weights the images' own
    assert (saved["device"], saved["precision"]) == ("cpu", "fp32")
    assert saved["config"]["seed"] == 1
    first = np.load(folder / "best" / "first_layer.npy")
    np.testing.assert_array_equal(first, saved["network"]["head.1.weight"])  # the backbone was not trained


def test_images_may_be_paths_tensors_or_of_pillow(small, photos, data):
    model, (probabilities, _) = Study(small).model(), shown(small)
    assert not model.training
    assert model.classes == CLASSES
    files = sorted(photos.iterdir())
    arrays = torch.from_numpy(np.load(Path(data.folder) / "test_images.npy"))
    whole = [Image.open(file) for file in files]
    for images in (
        files,
        [str(file) for file in files],
        arrays,
        list(arrays),
        whole,
        [arrays[:9], *files[9:]],
    ):
        np.testing.assert_allclose(model(images), probabilities, atol=1e-5)
    assert model(files[0]).shape == model(whole[0]).shape == model(arrays[0]).shape == (1, 4)


def test_other_sizes_are_resized_and_photos_are_rotated_as_for_training(small, tmp_path):
    model = Study(small).model()
    save_image(tmp_path / "wide.png", 1, (90, 40))
    image = Image.open(tmp_path / "wide.png")
    resized = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    as_tensor = torch.from_numpy(np.array(image).transpose(2, 0, 1))
    for images in (tmp_path / "wide.png", image, as_tensor):
        assert np.array_equal(model.decode(images)[0], resized)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270).resize((32, 32), Image.Resampling.BICUBIC)
    for images in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert np.array_equal(model.decode(images)[0], np.asarray(upright).transpose(2, 0, 1))


def test_a_large_photo_is_decoded_alike_by_path_and_by_pillow(small, tmp_path):
    model = Study(small).model()
    save_image(tmp_path / "large.jpg", 1, (600, 400))
    by_path = model.decode(tmp_path / "large.jpg")
    assert torch.equal(model.decode(Image.open(tmp_path / "large.jpg")), by_path)
    with Image.open(tmp_path / "large.jpg") as loaded:
        loaded.load()
        assert not torch.equal(model.decode(loaded), by_path)  # a loaded one has all its pixels


def test_small_images_are_stored_small_and_enlarged_by_the_model(data_dir, tmp_path):
    data = made_data(tmp_path / "arrays", side=20)
    folder = finished_study(tmp_path / "study", SPACES["convnet"], data, data_dir, **SMALL)
    model = Study(folder).model()
    assert (model.stored_size, model.image_size) == (20, 32)
    np.testing.assert_allclose(
        model(sorted(save_test_images(data, tmp_path / "photos").iterdir())), shown(folder)[0], atol=1e-5
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images; give PIL images, uint8 tensors"),
        (torch.rand(2, 3, 32, 32), "the images are torch.float32; give uint8, as before any transform"),
        (
            torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
            r"have the shape \(2, 1, 32, 32\); give \(N, 3, H, W\)",
        ),
        (7, "a int is no image; give PIL images"),
        ("nowhere.png", "nowhere.png does not exist"),
        (".", ". is no file"),
        (__file__, r"test_winner.py cannot be decoded \(not an image\)"),
        ("photo.NEF", r"photo.NEF cannot be decoded \(camera raw \(not supported; convert to JPEG\)\)"),
    ],
)
def test_what_is_no_image_is_one_line(small, images, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("photo.NEF", format="tiff")  # as its first bytes have it
    with pytest.raises(ValueError, match=message) as error:
        Study(small).model()(images)
    assert "\n" not in str(error.value)


def test_a_persons_network_is_built_from_the_copy_of_its_two_files(
    data, photos, data_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "parts.py").write_text(PARTS)
    folder = finished_study(tmp_path / "study", find_space("mine.py"), data, data_dir)
    (tmp_path / "mine.py").unlink()
    (tmp_path / "parts.py").unlink()
    np.testing.assert_allclose(Study(folder).model()(sorted(photos.iterdir())), shown(folder)[0], atol=1e-5)
    (folder / "source" / "parts.py").write_text(PARTS + "# edited\n")
    with pytest.raises(ValueError, match=r"parts\.py is not what the study began with; restore it"):
        Study(folder).model()


def test_a_run_of_a_person_has_its_state_loaded(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RUN)
    space = find_space("mine.py")
    study, settings = tmp_path / "study", choose("cpu", "fp32")
    options = new_study(study, space, None, settings, data_dir=str(data_dir))
    (study / "checkpoints").mkdir()
    config = options.fixed_values() | space.start
    final = config | {"seed": 1}
    metric, store = Metric("val_loss", "min"), Store(str(study))
    context = TrialContext(space, None, settings, data_dir, study, store, 1, None, metric)
    job = {"trial_id": "final-1", "config": final, "reported": 0, "final": True, "eager": False}
    run = JobRun(job, context)
    assert run.report()["phase"] == "testing"
    assert run.report()["tested"] is False
    end_study(study, config, final, {"val_loss": 1.0, "tested": False})
    model = Study(study).model()
    assert type(model).__name__ == "MyRun"
    assert (model.rate, model.device, model.seed) == (0.5, "cpu", 1)
    assert model.weights.tolist() == [0.5] * 3
    (study / "source" / "mine.py").write_text("raise RuntimeError('imported')")
    with pytest.raises(ValueError, match=r"trains mine, which has no images; use study.model\(\)"):
        Study(tmp_path / "study").predict("photo.png")


def test_a_space_of_a_notebook_is_given_by_it(data, photos, data_dir, tmp_path):
    def build(num_classes, image_shape):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))

    space = pickled(Space(build, {"lr": tune.uniform(0.0, 1.0)}, name="made"))
    study = Study(finished_study(tmp_path / "study", space, data, data_dir))
    with pytest.raises(ValueError, match="the space made is of a notebook and has no file"):
        study.model()
    study.space = space
    np.testing.assert_allclose(study.model()(sorted(photos.iterdir())), shown(study.folder)[0], atol=1e-5)


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        Study(folder).model()
    assert "\n" not in str(error.value)


def test_a_study_without_a_finished_seed_is_refused_with_what_to_do(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small, "study")
    events = [event for event in Study("study").events if not event.get("trial_id", "").startswith("final")]
    for event in events:
        event.pop("crc", None)
    write_events(Path("study"), events, "done")
    refused(
        "study",
        "^study has no finished seed of its winner; train some: tunefleet resume study --final-seeds 4$",
    )
    write_events(
        Path("study"), [event | ({"status": "error"} if event.get("epoch") else {}) for event in events]
    )
    refused("study", "^study has no winner: no trial has succeeded; search again$")
    write_events(Path("study"), events, "stopped")
    refused("study", "train some: tunefleet resume study$")


def test_the_network_of_an_earlier_winner_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small, "study")
    file = Path("study/best/model.pt")
    saved = torch.load(file, weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"lr": 0.5}}, file)
    refused("study", "model.pt is of an earlier winner; finish the study: tunefleet resume study$")


def test_a_missing_damaged_or_strange_file_is_one_line(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small, "study")
    file = Path("study/best/model.pt")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused("study", "model.pt cannot be read: .*; restore it from a copy")
    saved = torch.load(small / "best" / "model.pt", weights_only=True)
    torch.save({name: value for name, value in saved.items() if name != "mean"}, file)
    refused("study", "model.pt is damaged .it lacks mean.; restore it from a copy")
    torch.save({"path": Path("x")}, file)  # an object of Python, whose class is not imported
    refused("study", "model.pt cannot be read .UnpicklingError.; restore it")
    torch.save(saved | {"network": {"x": torch.ones(1)}}, file)
    refused("study", "does not fit convnet as it is now .*; use the commit in study.json")
    file.unlink()
    refused("study", "model.pt is missing: it was removed, or the study is of an earlier version")


def test_the_cache_is_the_one_given_the_studys_or_the_default(small, data_dir, tmp_path):
    study = Study(small)
    assert winner.cache_folder(study, tmp_path) == tmp_path
    assert winner.cache_folder(study, None) == data_dir
    study.spec["options"]["data_dir"] = str(tmp_path / "elsewhere")  # on another machine
    assert winner.cache_folder(study, None) == DATA_DIR


def test_another_device_than_the_studys_is_chosen_by_what_is_here(small):
    saved = winner.read_winner(Study(small)) | {"device": "cuda", "precision": "bf16"}
    settings = winner._settings(saved, None, None)
    assert (settings.device, settings.precision) == ("cpu", choose("cpu").precision)
    assert winner._settings(saved | {"precision": "fp32"}, None, None).precision == "fp32"


def test_reading_a_study_imports_nothing_of_a_persons(data, data_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "parts.py").write_text(PARTS)
    finished_study(tmp_path / "study", find_space("mine.py"), data, data_dir)
    marker = tmp_path / "imported"
    for name in ("mine.py", "parts.py"):
        (tmp_path / "study" / "source" / name).write_text(f"open({str(marker)!r}, 'w')\n")
        (tmp_path / name).unlink()
    assert tunefleet.load("study").best
    assert load("study").predictions is not None
    assert collect(["study"]) == 0
    assert results(["study"]) == 0
    with pytest.raises(ValueError, match="is not what the study began with"):
        tunefleet.load("study").model()
    assert not marker.exists()
