"""Which folder is a class, and which images test."""

from pathlib import Path

import numpy as np
import pytest

from tests.images import pack, save_tree
from tunefleet.trainables.data import load_split
from tunefleet.trainables.inputs import split_counts
from tunefleet.trainables.preparation import prepare


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "counts",
    [
        {"train": 5, "cat": 5},
        {"train": 5, "test": 5},
        {"train": 5, "test": 5, "cat": 5},
        {"test": 5, "cat": 5},
    ],
)
def test_depth_decides_whether_train_is_a_class(tmp_path: Path, cache: Path, counts: dict[str, int]) -> None:
    data = prepare(str(save_tree(tmp_path / "vehicles", counts)), cache)
    assert data.classes == tuple(sorted(counts))
    assert (data.train_count, data.test_count) == (4 * len(counts), len(counts))


@pytest.mark.parametrize("top", ["", "train", "test", "photos"])
def test_a_folder_around_all_images_may_have_any_name(tmp_path: Path, cache: Path, top: str) -> None:
    counts = {"train/cat": 4, "train/dog": 3, "test/cat": 2, "test/dog": 1}
    archive = pack(tmp_path / "pets.tar", save_tree(tmp_path / "pets", counts), top)
    data = prepare(str(archive), cache)
    assert (data.classes, data.train_count, data.test_count) == (("cat", "dog"), 7, 3)
    assert data.notes == ()


@pytest.mark.parametrize("empty", [None, "test"])
def test_of_train_alone_a_fifth_of_each_class_tests_and_it_is_said(
    tmp_path: Path, cache: Path, empty: str | None
) -> None:
    tree = save_tree(tmp_path / "pets", {"train/cat": 20, "train/dog": 10})
    if empty:
        (tree / empty).mkdir()
    data = prepare(str(tree), cache)
    assert data.notes == ("no test/ folder: 20 % of each class's images are used as test images",)
    assert np.bincount(load_split(data, "train")[1]).tolist() == [16, 8]
    assert np.bincount(load_split(data, "test")[1]).tolist() == [4, 2]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_images_without_test_images_test(tmp_path: Path, cache: Path, name: str) -> None:
    counts = {"train/cat": 10, "train/dog": 10, f"{name}/cat": 3, f"{name}/dog": 2}
    data = prepare(str(save_tree(tmp_path / "images", counts)), cache)
    assert (data.train_count, data.test_count, data.val_count) == (20, 5, 0)
    assert f"{name}/ is the test split, and validation images are drawn from train/" in " ".join(data.notes)


def test_validation_images_beside_test_images_validate(tmp_path: Path, cache: Path) -> None:
    counts = {"train/cat": 10, "train/dog": 10, "val/cat": 3, "val/dog": 2, "test/cat": 4, "test/dog": 4}
    data = prepare(str(save_tree(tmp_path / "images", counts)), cache)
    assert (data.train_count, data.test_count, data.val_count) == (25, 8, 5)
    train, val, _ = split_counts(data)
    assert (train, val) == (20, 5)
    assert load_split(data, "train")[1][-5:].tolist() == [0, 0, 0, 1, 1]
    whole = prepare(str(pack(tmp_path / "images.zip", tmp_path / "images")), cache)
    assert whole.sha256 == data.sha256
    assert whole.val_count == 5


def test_two_folders_of_validation_images_are_refused(tmp_path: Path, cache: Path) -> None:
    counts = {"train/cat": 3, "train/dog": 3, "val/cat": 1, "valid/dog": 1}
    with pytest.raises(ValueError, match=r"not train/, val/ and test/ alone"):
        prepare(str(save_tree(tmp_path / "images", counts)), cache)
