"""Images that a function returns are checked in one line, and stored as a folder's are."""

import inspect
import io
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from tests.configs import make_options
from tests.images import save_tree
from tests.test_docs import blocks_of
from tests.test_outside import done, tunefleet
from tunefleet.models.spaces import find_space
from tunefleet.search.run import main
from tunefleet.search.running import _absolute, default_folder
from tunefleet.study import Study
from tunefleet.trainables import own_images
from tunefleet.trainables.data import load_split
from tunefleet.trainables.own_images import is_function, load_images, reference_of
from tunefleet.trainables.preparation import prepare

MINE = """
import numpy as np
import beside

def images():
    with open("calls", "a") as file:
        file.write("x")
    return {"train": beside.split(90), "test": beside.split(30), "classes": ["dark", "light"]}

def fails():
    return {}["train"]
"""
BESIDE = """
import numpy as np

def split(count):
    labels = np.arange(count) % 2
    noise = np.random.default_rng(0).integers(0, 100, (count, 8, 8), dtype=np.uint8)
    return noise + (120 * labels).astype(np.uint8)[:, None, None], labels
"""


def pixels(count=12, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *(shape or (8, 8, 3))), dtype=np.uint8)


def given(**other):
    """Returns a result with which all is well: twelve training images of three classes, six that test."""
    train, test = (pixels(12), np.arange(12) % 3), (pixels(6, seed=1), np.arange(6) % 3)
    return {"train": train, "test": test, "classes": ["a", "b", "c"]} | other


def stored(result, cache, image_size=32):
    data = prepare(load_images("<dict>", result), cache, image_size)
    return data, *load_split(data, "train"), *load_split(data, "test")


class Pairs:
    """A Dataset: what a DataLoader takes."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, k):
        return self.samples[k]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "beside.py").write_text(BESIDE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine.py"


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((8, 8), None), ((8, 8, 3), (0, 3, 1, 2)), ((3, 8, 8), (0, 1, 2, 3))],
)
@pytest.mark.parametrize("kind", ["numpy", "torch", "mapped", "dataset", "pil"])
def test_images_of_every_shape_and_kind_are_stored_as_they_are(tmp_path, shape, axes, kind):
    images, labels = pixels(12, *shape), np.arange(12) % 3
    expected = images.transpose(axes) if axes else np.stack([images] * 3, axis=1)
    split = (images, labels)
    if kind == "torch":
        split = (torch.from_numpy(images), torch.from_numpy(labels))
    if kind == "mapped":
        np.save(tmp_path / "images.npy", images)
        split = (np.load(tmp_path / "images.npy", mmap_mode="r"), labels.tolist())
    if kind == "dataset":
        split = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    if kind == "pil":
        upright = images.transpose(0, 2, 3, 1) if shape[0] == 3 else images
        split = Pairs(
            *[(Image.fromarray(image), int(label)) for image, label in zip(upright, labels, strict=True)]
        )
    data, train, train_labels, test, _ = stored(given(train=split), tmp_path)
    np.testing.assert_array_equal(train, expected)
    assert train_labels.tolist() == labels.tolist()
    assert (data.image_shape, data.classes, len(test), data.notes) == ((3, 8, 8), ("a", "b", "c"), 6, ())
    np.testing.assert_allclose(data.mean, (expected / 255).mean(axis=(0, 2, 3)))


def test_parts_are_joined_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(own_images, "PART_BYTES", 5 * 8 * 8 * 3)  # 12 images are three parts
    _, train, _, test, _ = stored(given(), tmp_path)
    np.testing.assert_array_equal(train, pixels(12).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(test, pixels(6, seed=1).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "train",
    [
        (pixels(12, 20, 10, 3), np.arange(12) % 3),
        (pixels(12, 64, 64), np.arange(12) % 3),
        Pairs(*[(pixels(1, 8 + k % 2, 8)[0], k % 3) for k in range(12)]),
    ],
    ids=["rectangles", "large", "mixed"],
)
def test_what_is_large_mixed_or_no_square_is_resized_like_files(tmp_path, train):
    data, images, *_ = stored(given(train=train), tmp_path, image_size=16)
    assert data.image_shape == (3, 16, 16)
    image = train[0][0]
    expected = Image.fromarray(image).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images[0].transpose(1, 2, 0), np.asarray(expected))


def test_a_function_stores_what_a_folder_of_its_images_stores(tmp_path):
    tree = save_tree(tmp_path / "pets")
    of_folder = prepare(str(tree), tmp_path)

    def read(split):
        files = sorted((tree / split).rglob("*.png"))
        return Pairs(*[(Image.open(file), ("cat", "dog").index(file.parent.name)) for file in files])

    of_function, *_ = stored(
        {"train": read("train"), "test": read("test"), "classes": ["cat", "dog"]}, tmp_path
    )
    assert of_function.sha256 == of_folder.sha256


def test_without_test_images_some_are_drawn_and_it_is_said(tmp_path):
    images, labels = pixels(30), np.arange(30) % 3
    for train in ((images, labels), Pairs(*zip(images, labels, strict=True))):
        data, kept, _, test, test_labels = stored({"train": train, "classes": ["a", "b", "c"]}, tmp_path)
        assert np.bincount(test_labels).tolist() == [2, 2, 2]
        assert {image.tobytes() for image in [*kept, *test]} == {
            image.tobytes() for image in images.transpose(0, 3, 1, 2)
        }
        assert data.notes == ("no test images: 20 % of each class's images are used as test images",)


def test_val_validates_beside_test_and_tests_without(tmp_path):
    val = (pixels(6, seed=2), np.arange(6) % 3)
    data, train, *_ = stored(given(val=val), tmp_path)
    assert (data.val_count, data.train_count, data.test_count) == (6, 18, 6)
    np.testing.assert_array_equal(train[12:], val[0].transpose(0, 3, 1, 2))
    data, train, _, test, _ = stored(given(val=val, test=None), tmp_path)
    assert (data.val_count, data.train_count) == (0, 12)
    np.testing.assert_array_equal(test, val[0].transpose(0, 3, 1, 2))
    assert "val is the test split" in data.notes[0]


def test_the_key_is_the_content(tmp_path):
    first, *_ = stored(given(), tmp_path)
    equal, *_ = stored(given(train=TensorDataset(*map(torch.from_numpy, given()["train"]))), tmp_path)
    assert equal.folder == first.folder
    changed = pixels(12)
    changed[7, 3, 3, 1] ^= 1
    other, *_ = stored(given(train=(changed, np.arange(12) % 3)), tmp_path)
    validated, *_ = stored(given(train=given()["train"], val=given()["test"], test=given()["test"]), tmp_path)
    assert len({first.folder, other.folder, validated.folder}) == 3
    assert not list((tmp_path / "decoded").glob("*.partial"))


def damaged():
    """Returns a PIL image whose file was cut; PIL finds out when it decodes it."""
    file = io.BytesIO()
    Image.fromarray(pixels()[0]).resize((99, 99)).save(file, "jpeg")
    return Image.open(io.BytesIO(file.getvalue()[:-99]))


class OnGpu:
    """A tensor that numpy cannot read, as one of a GPU."""

    dtype = "uint8"

    def __init__(self, *shape):
        self.shape = shape

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return self

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


LABELS = np.arange(12) % 3
MISTAKES = {
    "no dict": ([1, 2], "gives a list; return a dict with train and classes"),
    "no train": ({"classes": ["a", "b"]}, "gives no train; return a dict"),
    "no classes": ({"train": given()["train"]}, "gives no classes; return a dict"),
    "misspelt": (given(tset=1), "gives 'tset'; did you mean test?"),
    "one class": (given(classes=["a"]), "gives the classes ['a']; give a list of two or more"),
    "numbered": (given(classes=[0, 1, 2]), "gives the classes [0, 1, 2]; give a list"),
    "floats": (given(train=(pixels() / 255, LABELS)), "images as float64; return images before transforms"),
    "float tensors": (given(train=(torch.rand(12, 3, 8, 8), LABELS)), "as float32; return images before"),
    "16 bits": (given(train=(pixels().astype(np.uint16), LABELS)), "train images as uint16; give uint8"),
    "a list": (given(train=([1, 2], [0, 1])), "train images as list; give uint8"),
    "five dimensions": (
        given(train=(pixels(12, 1, 8, 8, 3), LABELS)),
        "in the shape (12, 1, 8, 8, 3); give (N",
    ),
    "four channels": (
        given(test=(pixels(12, 8, 8, 4), LABELS)),
        "test images in the shape (12, 8, 8, 4); give",
    ),
    "no images": (given(train=(pixels(0), [])), "train labels of float64 in the shape (0,); give integers"),
    "no samples": (given(train=[]), "gives no image in train"),
    "lengths": (given(train=(pixels(), LABELS[:7])), "gives 12 train images and 7 labels; give one for each"),
    "float labels": (given(train=(pixels(), LABELS / 1)), "train labels of float64 in the shape (12,); give"),
    "one-hot": (
        given(train=(pixels(), np.eye(12, dtype=int))),
        "labels of int64 in the shape (12, 12); give",
    ),
    "ragged labels": (given(train=(pixels(), [[1], [1, 2]])), "gives train labels that are no array ("),
    "too high": (
        given(train=(pixels(), LABELS + 1)),
        "gives train the label 3, and there are 3 classes; give",
    ),
    "negative": (given(test=(pixels(6), LABELS[:6] - 1)), "gives test the label -1, and there are 3 classes"),
    "no split": (given(train={"x": 1}), "gives train as a dict; give (images, labels), or a Dataset"),
    "an iterator": (
        given(train=iter([])),
        "gives train as a list_iterator; give (images, labels), or a Dataset",
    ),
    "no pairs": (given(train=torch.zeros(12, 3, 8, 8)), "gives train[0] as a Tensor; give (images, labels)"),
    "class unseen": (given(train=(pixels(), LABELS % 2)), "holds 0 images of class 'c' in train/"),
    "val tests": (
        {name: split for name, split in given(val=(pixels(4), LABELS[:4] % 2)).items() if name != "test"},
        "holds 0 images of class 'c' in val/",
    ),
    "a GPU's": (given(train=(OnGpu(12, 8, 8), LABELS)), "TypeError: can't convert cuda:0"),
    "a GPU's image": (given(train=Pairs((OnGpu(8, 8), 0))), "TypeError: can't convert"),
    "paths": (given(train=Pairs(("a.png", 0))), "gives train[0] as str; give PIL images or uint8"),
    "transformed": (
        given(train=Pairs((torch.rand(3, 8, 8), 0))),
        "train[0] as float32; return images before",
    ),
    "image shape": (given(train=Pairs((pixels()[0, 0, 0], 0))), "train[0] in the shape (3,); give (N, H, W)"),
    "label text": (given(train=Pairs((pixels()[0], "a"))), "gives train[0] the label 'a'; give an integer"),
    "label high": (given(train=Pairs((pixels()[0], 9))), "gives train the label 9, and there are 3 classes"),
    "damaged file": (given(train=Pairs((damaged(), 0))), "fails at train[0]: "),
    "deep image": (given(train=Pairs((Image.new("I", (8, 8)), 0))), "more than 8 bits per channel"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_one_line_that_says_what_to_do(name, tmp_path):
    result, said = MISTAKES[name]
    with pytest.raises(ValueError, match=r"^--data=mine.py:images ") as caught:
        prepare(load_images("mine.py:images", result), tmp_path)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert not list((tmp_path / "decoded").glob("*"))


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("mine.py:fails", "fails: mine.py line 11: KeyError: 'train'; fix it"),
        ("mine.py:imagse", ": imagse is no function; did you mean images?"),
        ("nome.py:images", ": there is no such file; give FILE.py:FUNCTION"),
        ("nomodule:images", ": there is no module nomodule here; install it, or give a file"),
        ("mine.py", "is Python; name a function in it that returns images: --data mine.py:FUNCTION"),
        ("<dict>", "was given in Python"),
        ("broken.py:images", "cannot be imported: broken.py line 1: ZeroDivisionError"),
    ],
)
def test_a_function_that_is_not_there_or_fails_is_one_line(reference, said, mine, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"^--data=") as caught:
        prepare(reference, tmp_path / "cache")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_exception_inside_a_dataset_names_the_persons_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "class Data:\n    def __len__(self):\n        return 3\n"
        "    def __getitem__(self, k):\n        return 1 / 0\n"
        "def images():\n    return {'train': Data(), 'classes': ['a', 'b']}\n"
    )
    with pytest.raises(
        ValueError, match=r"mine.py:images fails at train\[0\]: mine.py line 5: ZeroDivisionError"
    ):
        prepare("mine.py:images", tmp_path / "cache")


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=99))
    with pytest.raises(
        ValueError, match=r"needs 3,456 bytes for 18 images of 8 × 8 pixels, and --data-dir has"
    ):
        stored(given(), tmp_path)
    assert not list((tmp_path / "decoded").glob("*"))


def test_the_example_of_the_documentation_gives_images(tmp_path):
    (example,) = (text for _, text in blocks_of("own-network.md") if "def images" in text)
    (tmp_path / "mine.py").write_text(example)
    data = prepare(f"{tmp_path}/mine.py:images", tmp_path / "cache")
    assert (data.train_count, data.test_count, data.image_shape) == (1400, 397, (3, 8, 8))


def test_references_are_told_from_paths(mine, tmp_path):
    (tmp_path / "odd:name").mkdir()
    assert is_function("mine.py:images")
    assert is_function("package.module:images")
    assert not any(
        map(is_function, ("digits", "photos.zip", "odd:name", "s3://bucket/x", "C:/photos", "mine.py"))
    )


def test_a_function_is_recorded_so_that_a_resume_can_call_it(mine, tmp_path, monkeypatch):
    assert reference_of(given) == f"{inspect.getsourcefile(given)}:given"
    assert reference_of(given()) == "<dict>"
    assert reference_of(lambda: given()) == "<lambda>"
    options = _absolute(make_options("softmax", data="mine.py:images"))
    assert options.data == f"{mine}:images"
    assert default_folder("softmax", options.data).name.startswith("softmax-mine-2")
    assert default_folder("softmax", "<dict>").name.startswith("softmax-dict-2")


def test_the_cache_is_used_while_it_is_there_and_then_the_function(mine, tmp_path):
    calls = tmp_path / "calls"
    first = prepare("mine.py:images", tmp_path / "cache")
    assert prepare("mine.py:images", tmp_path / "cache", earlier=first) == first
    assert calls.read_text() == "x"
    shutil.rmtree(first.folder)
    assert prepare("mine.py:images", tmp_path / "cache", earlier=first).sha256 == first.sha256
    assert calls.read_text() == "xx"


def test_a_mistake_ends_the_command_in_one_line_before_ray(mine, tmp_path, capsys):
    arguments = ["softmax", "--data", "mine.py:fails", "--study-dir", "study", "--data-dir", "cache"]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err == f"error: --data={mine}:fails fails: mine.py line 11: KeyError: 'train'; fix it\n"
    assert "Ray" not in out
    assert not (tmp_path / "study").exists()


def test_a_forecast_counts_what_python_gives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = {"trials": 2, "epochs": 1, "dry_run": True, "data_dir": "cache", "wandb": "off", "device": "cpu"}
    space, calls = find_space("softmax"), []

    def images():
        calls.append(1)
        return given()

    assert space.search(data=images, **how)["epochs"] == 2
    assert calls == [1]
    assert space.search(data=given(), **how)["epochs"] == 2
    with pytest.raises(ValueError, match=r"^--data=<list> gives a list; return a dict"):
        space.search(data=[1], **how)
    with pytest.raises(ValueError, match=r"^--data=<lambda> gives no train; return a dict"):
        space.search(data=lambda: {"classes": ["a", "b"]}, **how)


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_calls_its_function_once_and_resumes_without_it(mine, tmp_path):
    study = ["--study-dir", "study", "--trials", 2, "--epochs", 2, "--final-seeds", 1, "--wandb", "off"]
    done(tunefleet(tmp_path, "search", "softmax", "--data", "mine.py:images", *study))
    assert Study(tmp_path / "study").test_accuracy > 0.9
    assert (tmp_path / "calls").read_text() == "x"
    assert Study(tmp_path / "study").spec["options"]["data"] == f"{mine}:images"

    mine.unlink()
    (decoded,) = (tmp_path / "cache/tunefleet/decoded").iterdir()
    decoded.rename(tmp_path / "away")
    gone = tunefleet(tmp_path, "resume", "study", "--trials", 3)
    assert gone.communicate(timeout=180)[1].startswith(
        f"error: --data={mine}:images: there is no such file; give"
    )
    mine.write_text(MINE.replace("split(90)", "split(92)"))
    other = tunefleet(tmp_path, "resume", "study", "--trials", 3)
    assert f"--data={mine}:images is not what the study began with" in other.communicate(timeout=180)[1]
    assert (gone.returncode, other.returncode) == (2, 2)

    (tmp_path / "away").rename(decoded)
    done(tunefleet(tmp_path, "resume", "study", "--trials", 3))
    assert (tmp_path / "calls").read_text() == "xx"  # of the one that differed
