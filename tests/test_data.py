"""The same images become the same arrays however they are packed, and nothing else is written."""

import errno
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.error
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits

from tests.images import CLASSES, SPLIT_TREE, assert_refused, pack, pack_members, save_image, save_tree
from tunefleet.trainables import archives, image_files, preparation
from tunefleet.trainables.data import (
    ImageData,
    check_sha256,
    load_split,
    split_sha256,
    split_validation,
)
from tunefleet.trainables.preparation import prepare


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return save_tree(tmp_path / "pets")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# ---- what is stored


def test_tree_is_stored_in_the_order_of_its_names(tree: Path, cache: Path) -> None:
    data = prepare(str(tree), cache)
    assert (data.name, data.classes, data.image_shape) == ("pets", CLASSES, (3, 8, 8))
    assert (data.train_count, data.test_count) == (7, 3)
    images, labels = load_split(data, "train")
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(tree / "train/dog/1.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(images[5], expected)
    images, labels = load_split(data, "test")
    assert images.shape == (3, 3, 8, 8)
    assert labels.tolist() == [0, 0, 1]


def test_mean_and_std_are_those_of_the_training_images(tree: Path, cache: Path) -> None:
    data = prepare(str(tree), cache)
    fractions = load_split(data, "train")[0] / 255
    np.testing.assert_allclose(data.mean, fractions.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, fractions.std(axis=(0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("value", [0, 1, 77, 85, 200, 255])
def test_channel_of_one_value_has_a_deviation_of_exactly_0(tmp_path: Path, cache: Path, value: int) -> None:
    for number in range(14):
        file = tmp_path / f"pets/{number % 2}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (7, 7), (value, 17 * number, 0)).save(file)
    std = prepare(str(tmp_path / "pets"), cache).std
    assert (std[0], std[2]) == (0, 0)
    assert std[1] > 0.1


def test_image_data_survives_json(tree: Path, cache: Path) -> None:
    data = prepare(str(tree), cache)
    assert ImageData.from_dict(json.loads(json.dumps(asdict(data)))) == data
    assert ImageData.from_dict(json.loads((Path(data.folder) / "data.json").read_text())) == data


@pytest.mark.parametrize("name", ["pets.tar", "pets.tar.gz", "pets.tar.bz2", "pets.tar.xz", "pets.zip"])
@pytest.mark.parametrize("top", ["", "pets-1.0"])
def test_archive_equals_its_folder(tree: Path, cache: Path, tmp_path: Path, name: str, top: str) -> None:
    packed = prepare(str(pack(tmp_path / name, tree, top)), cache)
    folder = prepare(str(tree), cache)
    assert packed.name == name
    assert packed.folder == folder.folder
    assert packed.sha256 == folder.sha256


@pytest.mark.parametrize("name", ["pets.tar.gz", "pets.tar.xz"])
def test_compressed_tar_that_is_decompressed_twice_equals_its_folder(
    tree: Path, cache: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "KEPT_BYTES", 1000)
    archive, sizes = pack(tmp_path / name, tree), []
    with archive.open("ab") as file:  # after the tar's end: is not unpacked
        file.write({".gz": gzip, ".xz": lzma}[archive.suffix].compress(bytes(10_000_000)))

    def watch(phase: str, done: int, total: int) -> None:
        sizes.extend(file.stat().st_size for file in cache.glob("decoded/*.partial/unpacked"))

    packed = prepare(str(archive), cache, progress=watch)
    assert 0 < max(sizes) < 100_000
    assert packed.sha256 == prepare(str(tree), cache / "other").sha256
    assert [file.suffix for file in (cache / "decoded").iterdir()] == [""]


def test_sha256_changes_with_a_pixel_and_with_a_class_name(tmp_path: Path, cache: Path, tree: Path) -> None:
    one_pixel = save_tree(tmp_path / "one_pixel")
    image = Image.open(one_pixel / "test/dog/0.png")
    image.putpixel((3, 3), (0, 0, 0))
    image.save(one_pixel / "test/dog/0.png")
    renamed = save_tree(tmp_path / "renamed")
    for split in ("train", "test"):
        (renamed / split / "dog").rename(renamed / split / "fox")
    assert len({prepare(str(path), cache).sha256 for path in (tree, one_pixel, renamed)}) == 3


def test_one_tree_is_split_by_class(tmp_path: Path, cache: Path) -> None:
    data = prepare(str(save_tree(tmp_path / "pets", {"cat": 20, "dog": 10})), cache)
    assert np.bincount(load_split(data, "train")[1]).tolist() == [16, 8]
    assert np.bincount(load_split(data, "test")[1]).tolist() == [4, 2]


def test_images_of_different_sizes_are_resized(tmp_path: Path, cache: Path) -> None:
    tree = save_tree(tmp_path / "pets")
    pixels = save_image(tree / "train/cat/3.png", seed=9, size=(40, 20))
    data = prepare(str(tree), cache, image_size=16)
    assert data.image_shape == (3, 16, 16)
    expected = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(load_split(data, "train")[0][3].transpose(1, 2, 0), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "stored"), [((8, 8), 8), ((16, 16), 16), ((40, 40), 16), ((8, 12), 16), ((100, 50), 16)]
)
def test_only_small_squares_are_stored_as_they_are(
    tmp_path: Path, cache: Path, size: tuple[int, int], stored: int
) -> None:
    tree = save_tree(tmp_path / "pets", size=size)
    assert prepare(str(tree), cache, image_size=16).image_shape == (3, stored, stored)


def test_large_jpeg_keeps_its_content_when_decoded_smaller(tmp_path: Path, cache: Path) -> None:
    tree = save_tree(tmp_path / "pets")
    ramp = np.linspace(0, 255, 512, dtype=np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (512, 512, 3)).copy()).save(tree / "train/cat/0.jpg")
    image = load_split(prepare(str(tree), cache), "train")[0][0]
    np.testing.assert_allclose(image[0, 10], ramp.reshape(32, 16).mean(axis=1), atol=3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb(tree: Path, cache: Path, mode: str) -> None:
    save_image(tree / "train/cat/0.png", seed=5, mode=mode)
    expected = np.asarray(Image.open(tree / "train/cat/0.png").convert("RGB"))
    stored = load_split(prepare(str(tree), cache), "train")[0][0]
    np.testing.assert_array_equal(stored.transpose(1, 2, 0), expected)


def test_hidden_and_other_files_are_passed_over(tree: Path, cache: Path) -> None:
    before = prepare(str(tree), cache).sha256
    for name in ("README.txt", "train/cat/._0.png", ".thumbnails/cat/0.png", "__MACOSX/train/cat/0.png"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("no image")
    save_image(tree / "train/cat/9.PNG", seed=9)
    after = prepare(str(tree), cache)
    assert after.train_count == 8
    (tree / "train/cat/9.PNG").unlink()
    assert prepare(str(tree), cache).sha256 == before


def test_progress_ends_at_the_number_of_images(tree: Path, cache: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    prepare(str(tree), cache, progress=lambda *call: calls.append(call))
    said = ("writing 0 MB under --data-dir,", 0, 10)  # before anything is
    assert calls == [("listing files", 0, 0), said, ("decoding", 10, 10)]


# ---- built-in sources


def test_digits_are_enlarged_and_span_the_whole_range(cache: Path) -> None:
    data = prepare("digits", cache)
    assert (data.image_shape, data.classes) == ((3, 32, 32), tuple("0123456789"))
    assert data.train_count + data.test_count == 1797
    images, labels = load_split(data, "train")
    assert (images.min(), images.max()) == (0, 255)
    originals = load_digits()
    _, test = split_validation(originals.target, 0.2)
    assert data.test_count == len(test)
    first = np.flatnonzero(~np.isin(np.arange(1797), test))[0]
    assert labels[0] == originals.target[first]
    blocks = images[0, 0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
    assert np.corrcoef(blocks.ravel(), originals.images[first].ravel())[0, 1] > 0.95
    assert prepare("digits", cache, image_size=128) == data


def test_cifar10_without_network_says_how_to_go_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    assert_refused(
        "cifar10",
        cache,
        "Name or service not known",
        "--data PATH",
        f"cifar-10-python.tar.gz into --data-dir={cache}",
    )


def test_cifar10_keeps_torchvisions_images(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cifar10:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, download) == (str(cache), True)
            generator = np.random.default_rng(int(train))
            count = 40 if train else 20
            self.data = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            self.targets = [i % 10 for i in range(count)]
            self.classes = list("abcdefghij")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar10)
    data = prepare("cifar10", cache)
    assert (data.name, data.train_count, data.test_count, data.classes) == (
        "cifar10",
        40,
        20,
        tuple("abcdefghij"),
    )
    images, labels = load_split(data, "train")
    np.testing.assert_array_equal(images.transpose(0, 2, 3, 1), Cifar10(str(cache), True, True).data)
    assert labels.tolist() == [i % 10 for i in range(40)]


# ---- the cache


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images decoded so far."""
    names: list[str] = []
    square = preparation.decoding.square

    def counted(image: Image.Image, size: int) -> bytes:
        names.append(str(image.size))
        return square(image, size)

    monkeypatch.setattr(preparation.decoding, "square", counted)
    return names


def test_second_prepare_decodes_nothing(tree: Path, cache: Path, decodings: list[str]) -> None:
    first = prepare(str(tree), cache)
    assert len(decodings) == 10
    assert prepare(str(tree), cache) == first
    assert len(decodings) == 10


@pytest.mark.parametrize("archive", [None, "pets.tar.gz", "pets.zip"])
def test_unchanged_source_is_not_read_again(
    tree: Path, cache: Path, tmp_path: Path, archive: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "train/cat/unknown").write_text("")
    source = str(pack(tmp_path / archive, tree) if archive else tree)
    first = prepare(source, cache)
    for name in ("list_files", "Archive"):
        monkeypatch.setattr(preparation, name, lambda *_: pytest.fail("read"))
    monkeypatch.setattr(
        preparation, "locked", lambda *_: pytest.fail("locked, so it would have to be writable")
    )
    assert prepare(source, cache) == first


def test_changed_folder_is_decoded_again(tree: Path, cache: Path) -> None:
    first = prepare(str(tree), cache)
    save_image(tree / "train/cat/0.png", seed=99)
    os.utime(tree / "train/cat/0.png", ns=(0, 0))
    assert prepare(str(tree), cache).sha256 != first.sha256


def save_bitmaps(folder: Path, labels: tuple[str, str]) -> Path:
    """Saves light images as one class and dark ones as the other: equal names, sizes and times."""
    for label, value in zip(labels, (10, 240), strict=True):
        for number in range(4):
            file = folder / label / f"{number}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (value + number,) * 3).save(file)
            os.utime(file, (10**9, 10**9))
    return folder


@pytest.mark.parametrize("archive", [None, "pets.tar", "pets.zip"])
def test_content_tells_two_sources_of_equal_names_sizes_and_times_apart(
    tmp_path: Path, cache: Path, archive: str | None
) -> None:
    hashes = []
    for number, labels in enumerate((("cat", "dog"), ("dog", "cat"), ("cat", "dog"))):
        folder = save_bitmaps(tmp_path / str(number) / "pets", labels)
        source = pack(folder.with_name(archive), folder) if archive else folder
        os.utime(source, (10**9, 10**9))
        hashes.append(prepare(str(source), cache).sha256)
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2]


def test_a_file_written_in_place_at_its_old_time_is_noticed(tmp_path: Path, cache: Path) -> None:
    folder = save_bitmaps(tmp_path / "pets", ("cat", "dog"))
    first = prepare(str(folder), cache).sha256
    file = folder / "cat/0.bmp"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, (10**9, 10**9))
    assert prepare(str(folder), cache).sha256 != first


@pytest.mark.parametrize("archive", [None, "pets.tar.xz"])
def test_copied_source_is_found_by_its_content(
    tree: Path, cache: Path, tmp_path: Path, archive: str | None, decodings: list[str]
) -> None:
    first = prepare(str(tree), cache)
    copy = shutil.copytree(tree, tmp_path / "copy" / "animals")
    calls: list[tuple[str, int, int]] = []
    source = pack(copy.with_name(archive), copy) if archive else copy
    second = prepare(str(source), cache, progress=lambda *call: calls.append(call))
    assert (second.folder, second.name) == (first.folder, archive or "animals")
    assert len(decodings) == 10
    assert calls[-1] == ("comparing", 10, 10)
    assert len(list((cache / "decoded").iterdir())) == 1


def test_moved_cache_is_found(tree: Path, cache: Path, tmp_path: Path, decodings: list[str]) -> None:
    first = prepare(str(tree), cache)
    moved = cache.rename(tmp_path / "moved")
    second = prepare(str(tree), moved)
    assert len(decodings) == 10
    assert second.sha256 == first.sha256
    assert Path(second.folder).parent == moved / "decoded"
    assert len(load_split(second, "train")[1]) == 7


def test_home_is_meant_by_a_tilde(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    data = prepare("~/pets", Path("~/cache"))
    assert Path(data.folder).parents[1] == tmp_path / "cache"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("source", "data_dir"), [("~nobody_here/pets", "cache"), ("digits", "~nobody_here/cache")]
)
def test_home_of_nobody_is_refused(
    tmp_path: Path, source: str, data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--data(-dir)?=~nobody_here/\w+ has no home folder; set HOME"):
        prepare(source, Path(data_dir))
    assert not list(tmp_path.iterdir())


def test_importing_needs_no_home() -> None:
    code = (
        "import os, pwd\npwd.getpwuid = lambda uid: {}[uid]\n"
        "import tunefleet.trainables.data as d; print(d.DATA_DIR)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "~/.cache/tunefleet\n"


def test_another_process_that_prepares_is_waited_for_and_it_is_said(tree: Path, cache: Path) -> None:
    cache.mkdir()
    calls: list[tuple[str, int, int]] = []
    waits = threading.Event()

    def show(*call: Any) -> None:
        calls.append(call)
        if call[0].startswith("waiting"):
            waits.set()

    def hold(holds: threading.Event) -> None:
        with FileLock(cache / "prepare.lock"):
            holds.set()
            waits.wait(timeout=30)

    holds = threading.Event()
    with ThreadPoolExecutor(1) as other:
        other.submit(hold, holds)
        holds.wait(timeout=30)
        prepare(str(tree), cache, progress=show)
    assert calls[1] == ("waiting for another process", 0, 0)
    assert calls[-1] == ("decoding", 10, 10)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["data.json", "train_images.npy", "test_labels.npy"])
def test_damaged_cache_is_decoded_again(
    tree: Path, cache: Path, damage: Callable[[Path], object], name: str
) -> None:
    first = prepare(str(tree), cache)
    damage(Path(first.folder) / name)
    assert prepare(str(tree), cache) == first
    assert load_split(first, "train")[0].shape == (7, 3, 8, 8)


def test_array_of_another_shape_is_decoded_again(tree: Path, cache: Path) -> None:
    first = prepare(str(tree), cache)
    np.save(Path(first.folder) / "train_images.npy", np.zeros((6, 3, 8, 8), np.uint8))
    assert prepare(str(tree), cache) == first
    assert load_split(first, "train")[0].shape == (7, 3, 8, 8)


def test_killed_decoding_leaves_no_cache(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "describe", interrupt)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if the process were gone
        with pytest.raises(KeyboardInterrupt):
            prepare(str(tree), cache)
    (left,) = (cache / "decoded").iterdir()
    assert left.suffix == ".partial"
    data = prepare(str(tree), cache)
    assert list((cache / "decoded").iterdir()) == [Path(data.folder)]


# ---- sources that are refused


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ({}, ["no images"]),
        ({"cat": 5}, ["one class only, 'cat'"]),
        ({"train/cat": 2, "train/dog": 3}, ["2 images of class 'cat'", "needs 3 or more"]),
        ({"test/cat": 2, "test/dog": 2}, ["holds test/ but no train/"]),
        (
            {"train/cat": 2, "train/dog": 2, "more/cat": 2, "more/dog": 2},
            ["more/, train/, not train/, val/ and test/"],
        ),
        ({"val/cat": 2, "val/dog": 2}, ["holds val/ but no train/"]),
        (SPLIT_TREE | {"train/fox": 2}, ["0 images of class 'fox' in test/"]),
        (SPLIT_TREE | {"test/fox": 2}, ["0 images of class 'fox' in train/"]),
        (SPLIT_TREE | {"train/dog": 1}, ["1 image of class 'dog' in train/", "needs 2 or more"]),
        ({"cat": 5, "dog": 2}, ["2 images of class 'dog'", "needs 3 or more"]),
        (SPLIT_TREE | {"train/cat/young": 1}, ["'train/cat/young/0.png'", "train/CLASS/FILE"]),
        ({"cat": 5, "dog": 5, ".": 1}, ["'0.png'", "CLASS/FILE"]),
    ],
)
def test_unusable_tree_is_refused(
    tmp_path: Path, cache: Path, counts: dict[str, int], parts: list[str]
) -> None:
    (tmp_path / "pets").mkdir()
    assert_refused(save_tree(tmp_path / "pets", counts), cache, "pets", *parts)


def test_missing_path_is_refused_with_the_nearest_name(tmp_path: Path, cache: Path) -> None:
    assert_refused("cifar-10", cache, "--data=cifar-10 does not exist; did you mean cifar10?")
    assert_refused(tmp_path / "nothing", cache, "nothing does not exist; Give cifar10, digits, the path of a")


@pytest.mark.parametrize("content", [b"", b"no archive", bytes(1000)])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, cache: Path, content: bytes) -> None:
    (tmp_path / "pets.tar").write_bytes(content)
    assert_refused(tmp_path / "pets.tar", cache, "neither a folder nor an archive", ".tar.xz")


def test_corrupt_image_is_named(tree: Path, cache: Path) -> None:
    cut(tree / "train/dog/2.png")
    assert_refused(tree, cache, "'train/dog/2.png'", "cannot be decoded", "replace or remove it")
    (tree / "train/dog/2.png").write_text("no image")
    assert_refused(tree, cache, "'train/dog/2.png'", "not an image")


def test_image_of_16_bits_is_refused(tree: Path, cache: Path) -> None:
    Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16)).save(tree / "train/dog/0.png")
    assert_refused(tree, cache, "'train/dog/0.png'", "more than 8 bits")


def test_unwritable_data_dir_is_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--data-dir=.*file cannot be written \(.*\); give another"):
        prepare(str(tree), tmp_path / "file")


def test_full_disk_is_refused_before_writing(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 1000, 100))
    assert_refused(tree, cache, "needs 1,920 bytes for 10 images of 8 × 8 pixels", "--data-dir has 100 free")


@pytest.mark.parametrize("name", ["pets.tar.gz", "pets.zip"])
def test_archive_without_room_to_unpack_is_refused_before_writing(
    tree: Path, cache: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 1000, 100))
    monkeypatch.setattr(archives.Archive, "unpack", lambda *_: pytest.fail("unpacked"))
    archive = pack(tmp_path / name, tree)
    assert_refused(archive, cache, "bytes to be unpacked, and --data-dir has 100 free")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_meanwhile_is_one_line(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    assert_refused(tree, cache, f"--data-dir={cache} cannot be written (", os.strerror(code))


def test_full_disk_while_unpacking_is_one_line(tree: Path, tmp_path: Path, cache: Path) -> None:
    archive = pack(tmp_path / "pets.tar.gz", tree)
    code = f"""
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
from tunefleet.trainables.preparation import prepare
try:
    prepare({str(archive)!r}, Path({str(cache)!r}))
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        result.stdout == f"--data-dir={cache} cannot be written ([Errno 27] File too large); give another\n"
    )
    assert result.stderr == ""


@pytest.mark.parametrize("image_size", [10**6, 10**12])
def test_impossible_image_size_is_one_line(tree: Path, cache: Path, image_size: int) -> None:
    save_image(tree / "train/cat/0.png", seed=0, size=(9, 8))
    with pytest.raises(ValueError, match=r"^--data=.* needs [\d,]+ bytes .* give .* smaller --image-size$"):
        prepare(str(tree), cache, image_size)


@pytest.mark.parametrize("name", ["x" * 300, "loop", "file/inside"])
def test_path_that_the_system_refuses_is_one_line(
    tmp_path: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / name, cache, "does not exist" if name == "file/inside" else "cannot be read (")


def test_image_size_is_checked(cache: Path) -> None:
    with pytest.raises(ValueError, match="image_size=0 is impossible"):
        prepare("digits", cache, image_size=0)


# ---- archives that are refused


def files_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", ["../cat/0.png", "/tmp/cat/0.png", "train/../../0.png", "..\\cat\\0.png"])
@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_member_outside_the_archive_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    archive = tmp_path / f"pets{suffix}"
    if suffix == ".tar":
        pack_members(archive, [tarfile.TarInfo(name)])
    else:
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr(name, b"")
    before = files_under(tmp_path)
    assert_refused(archive, tmp_path / "a/b/cache", repr(name), "points outside")
    cache = tmp_path / "a/b/cache"
    assert files_under(tmp_path) - before <= {
        *cache.parents,
        cache,
        cache / "decoded",
        cache / "prepare.lock",
    }


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_link_or_device_in_a_tar_is_refused(tmp_path: Path, cache: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("train/cat/0.png")
    member.type, member.linkname = kind, "/etc/passwd"
    assert_refused(
        pack_members(tmp_path / "pets.tar", [member]), cache, "'train/cat/0.png', a link or device"
    )


def test_link_in_a_zip_is_refused(tmp_path: Path, cache: Path) -> None:
    member = zipfile.ZipInfo("train/cat/0.png")
    member.external_attr = 0o120777 << 16  # a symbolic link
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as packed:
        packed.writestr(member, "/etc/passwd")
    assert_refused(tmp_path / "pets.zip", cache, "'train/cat/0.png', a link")


def test_tar_member_with_holes_is_refused(tmp_path: Path, cache: Path) -> None:
    member = tarfile.TarInfo("train/cat/0.png")
    member.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": "8"}
    assert_refused(
        pack_members(tmp_path / "pets.tar", [member]), cache, "'train/cat/0.png' with holes", "--sparse"
    )


def test_encrypted_zip_is_refused(tmp_path: Path, cache: Path) -> None:
    archive = pack(tmp_path / "pets.zip", save_tree(tmp_path / "pets"))
    content = bytearray(archive.read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(start)
        while at >= 0:
            content[at + flags] |= 1
            at = content.find(start, at + 4)
    archive.write_bytes(content)
    assert_refused(archive, cache, "cannot be unpacked", "password")


def test_name_given_twice_is_refused(tmp_path: Path, cache: Path) -> None:
    archive = pack_members(
        tmp_path / "pets.tar", [tarfile.TarInfo("cat/0.png"), tarfile.TarInfo("./cat/0.png")]
    )
    assert_refused(archive, cache, "'cat/0.png' more than once")


def test_decompression_bomb_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED_BYTES", 0)
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb/zeros.bin").write_bytes(bytes(5_000_000))
    for archive in (
        pack(tmp_path / "b.tar.xz", tmp_path / "bomb"),
        pack(tmp_path / "b.zip", tmp_path / "bomb"),
    ):
        assert_refused(
            archive, cache, f"more than {200 * archive.stat().st_size:,} bytes", "decompression bomb"
        )


def test_huge_image_is_refused_unread(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_IMAGE_BYTES", 1000)
    member = tarfile.TarInfo("cat/0.png")
    member.size = 1001
    assert_refused(pack_members(tmp_path / "pets.tar", [member]), cache, "'cat/0.png' of 1,001 bytes")


@pytest.mark.parametrize("name", ["pets.tar", "pets.tar.gz", "pets.tar.bz2", "pets.tar.xz", "pets.zip"])
def test_truncated_archive_is_refused(tmp_path: Path, tree: Path, cache: Path, name: str) -> None:
    archive = pack(tmp_path / name, tree)
    content = archive.read_bytes()
    for tenths in (1, 3, 5):
        archive.write_bytes(content[: len(content) * tenths // 10])
        assert_refused(archive, cache, name, "is truncated or corrupt (", "copy it again")


def test_tar_that_tarfile_takes_for_complete_is_refused(tmp_path: Path, tree: Path, cache: Path) -> None:
    with tarfile.open(tmp_path / "pets.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tree, arcname=".")
    content = (tmp_path / "pets.tar").read_bytes()
    header = content.index(b"./test/dog/0.png")
    damaged = bytearray(content)
    damaged[header] ^= 0xFF  # its checksum no longer fits
    for number, wrong in enumerate((content[:header], content[: header + 100], damaged)):
        archive = tmp_path / f"{number}.tar"
        archive.write_bytes(wrong)
        with tarfile.open(archive) as tar:
            assert "./test/dog/0.png" not in tar.getnames()  # and no exception
        assert_refused(archive, cache, "corrupt (its end is missing or a header is damaged); copy it again")


@pytest.mark.parametrize("name", ["pets.tar.gz", "pets.tar.bz2", "pets.tar.xz", "pets.zip"])
def test_flipped_bit_in_an_archive_is_refused(tmp_path: Path, tree: Path, cache: Path, name: str) -> None:
    archive = pack(tmp_path / name, tree)
    content = bytearray(archive.read_bytes())
    content[len(content) // 3] ^= 0x10
    archive.write_bytes(content)
    assert_refused(archive, cache, "pets")


def test_zip_of_an_impossible_version_is_refused(tmp_path: Path, tree: Path, cache: Path) -> None:
    archive = pack(tmp_path / "pets.zip", tree)
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99
    archive.write_bytes(content)
    assert_refused(archive, cache, "cannot be unpacked (zip file version 9.9)")


# ---- other images than a study's


def test_images_of_an_older_format_are_refused_with_that_reason(tree: Path, cache: Path) -> None:
    data = prepare(str(tree), cache)
    check_sha256(data, "pets", data.sha256, format_version=1)
    with pytest.raises(
        ValueError, match=r"--data=pets is not what the study began with .*was 123456789012.*"
    ) as caught:
        check_sha256(data, "pets", "123456789012345", data.format_version)
    assert "decodes them differently" not in str(caught.value)
    with pytest.raises(
        ValueError, match=r"rotated by their EXIF orientation.* resume with the commit in study.json"
    ):
        check_sha256(data, "pets", "123456789012345", format_version=1)


def test_data_of_an_older_study_is_of_the_first_format(tree: Path, cache: Path) -> None:
    fields = asdict(prepare(str(tree), cache))
    del fields["format_version"], fields["notes"]
    assert ImageData.from_dict(fields).format_version == 1


# ---- the fixed split


def test_split_is_stratified_disjoint_and_complete() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [100, 50, 2]))
    train, val = split_validation(labels, 0.1)
    assert np.bincount(labels[val]).tolist() == [10, 5, 1]  # a tenth, and at least one
    assert sorted([*train, *val]) == list(range(152))
    assert (train.dtype, val.dtype) == (np.int64, np.int64)
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()


def test_split_depends_on_its_seed_alone() -> None:
    labels = np.repeat(np.arange(10), 50)
    first, again, other = split_validation(labels), split_validation(labels), split_validation(labels, seed=1)
    assert split_sha256(*first) == split_sha256(*again)
    assert split_sha256(*first) != split_sha256(*other)
    assert split_sha256(*first) != split_sha256(*reversed(first))


def test_split_is_the_recorded_one() -> None:
    """Studies are comparable only while this code and numpy's generator draw the same split."""
    train, val = split_validation(np.repeat(np.arange(10), 100), 0.1)
    assert (len(train), len(val)) == (900, 100)
    assert split_sha256(train, val) == "95a58b03e62f3aa0845735169ac2a4dfb4a48676f5037ea31bd9ac2d15f56bf6"


@pytest.mark.parametrize(
    ("images", "validation"), [(50_000, 5_000), (10_000, 1_000), (5_000, 1_000), (2_000, 600), (100, 30)]
)
def test_few_images_are_validated_on_a_larger_share(images: int, validation: int) -> None:
    _, val = split_validation(np.repeat(np.arange(10), images // 10))
    assert len(val) == validation


def test_split_of_a_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has one image only"):
        split_validation(np.array([0, 0, 1]))
    with pytest.raises(ValueError, match=r"fraction=1\.0 is impossible"):
        split_validation(np.array([0, 0, 1, 1]), fraction=1.0)
