"""What a file holds decides whether it is an image, and what is skipped is said."""

import io
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.images import assert_refused, pack, save_image, save_tree
from tunefleet.trainables import archives
from tunefleet.trainables.data import ImageData, load_split
from tunefleet.trainables.preparation import prepare

HEIC = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(100)
TREE = {"cat": 4, "dog": 4}
SHARE = "no test/ folder: 20 % of each class's images are used as test images"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return save_tree(tmp_path / "pets", TREE)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def count(data: ImageData) -> int:
    return data.train_count + data.test_count


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("JPEG", "9.jfif"),
        ("JPEG", "9"),
        ("JPEG", "9.upload"),
        ("PNG", "9.jpg"),
        ("BMP", "9.dat"),
        ("GIF", "9.x"),
        ("WEBP", "9.x"),
        ("PPM", "9.pgm"),
        ("PPM", "9.x"),
        ("TIFF", "9.x"),
        ("AVIF", "9.avif"),
        ("AVIF", "9.x"),
        ("JPEG2000", "9.jp2"),
        ("JPEG2000", "9.x"),
    ],
)
@pytest.mark.parametrize("archive", [None, "pets.tar", "pets.tar.gz", "pets.zip"])
def test_content_decides_what_is_an_image(
    tree: Path, cache: Path, tmp_path: Path, kind: str, name: str, archive: str | None
) -> None:
    Image.new("L" if name == "9.pgm" else "RGB", (8, 8), 200).save(tree / "cat" / name, kind)
    data = prepare(str(pack(tmp_path / archive, tree) if archive else tree), cache)
    assert count(data) == 9
    assert data.notes == (SHARE,)


def test_a_class_of_another_suffix_is_a_class(tree: Path, cache: Path) -> None:
    (tree / "dog").rename(tree / "fox")
    for file in (tree / "fox").iterdir():
        file.rename(file.with_suffix(".jfif"))
    assert prepare(str(tree), cache).classes == ("cat", "fox")


@pytest.mark.parametrize("archive", [None, "pets.tar.xz", "pets.zip"])
def test_what_is_skipped_is_counted_by_reason(
    tree: Path, cache: Path, tmp_path: Path, archive: str | None
) -> None:
    before = prepare(str(tree), cache)
    (tree / "cat/phone.heic").write_bytes(HEIC)
    (tree / "dog/phone.HIF").write_bytes(HEIC)
    for name in ("README", "cat/notes.txt", "dog/index.csv", "dog/empty"):
        (tree / name).write_text("P1 is text, as BMP is" * (name != "dog/empty"))
    (tree / "cat/.DS_Store").write_text("")
    data = prepare(str(pack(tmp_path / archive, tree) if archive else tree), cache)
    name = tmp_path / (archive or "pets")
    assert data.notes == (
        f"skipped in {name}: 4 × not an image, 2 × HEIC (not supported; convert to JPEG), 1 × hidden",
        SHARE,
    )
    assert data.sha256 == before.sha256
    assert prepare(str(name), cache) == data  # the notes are remembered


def test_pipes_and_dead_links_are_skipped(tree: Path, cache: Path) -> None:
    os.mkfifo(tree / "cat/pipe.png")
    (tree / "cat/gone.png").symlink_to("nowhere.png")
    (tree / "dog/loop.png").symlink_to("loop.png")
    data = prepare(str(tree), cache)
    assert count(data) == 8
    for reason in (
        "1 × not a regular file",
        "2 × broken link",
    ):
        assert reason in data.notes[0]


def test_folders_that_are_too_deep_are_counted(tree: Path, cache: Path) -> None:
    save_image(tree / "cat/a/b/c/d/e/0.png", seed=1)
    assert "1 × folder nested too deep" in prepare(str(tree), cache).notes[0]


@pytest.mark.parametrize("archive", [None, "pets.tar", "pets.zip"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "; add images"),
        ({"0.heic": HEIC, "1.heic": HEIC}, "(2 × HEIC (not supported"),
        ({"0.xcf": b"gimp xcf"}, "(1 × not an image)"),
    ],
)
@pytest.mark.parametrize("split", ["", "train/"])
def test_class_folder_without_a_readable_image_is_refused(
    tmp_path: Path,
    cache: Path,
    archive: str | None,
    content: dict[str, bytes],
    reason: str,
    split: str,
) -> None:
    tree = save_tree(
        tmp_path / "pets", {"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/dog": 1} if split else TREE
    )
    (tree / split / "fox").mkdir()
    for name, written in content.items():
        (tree / split / "fox" / name).write_bytes(written)
    assert_refused(
        pack(tmp_path / archive, tree) if archive else tree,
        cache,
        f"the folder '{split}fox', which has no readable image",
        reason,
    )


def test_the_split_that_lacks_a_class_is_named_as_its_folder_is(tmp_path: Path, cache: Path) -> None:
    tree = save_tree(tmp_path / "pets", {"train/cat": 2, "train/dog": 2, "val/cat": 1})
    assert_refused(tree, cache, "holds 0 images of class 'dog' in val/")


def test_camera_raw_beside_its_jpeg_is_no_second_image(tree: Path, cache: Path) -> None:
    Image.new("RGB", (8, 8)).save(tree / "cat/0.NEF", "TIFF")
    data = prepare(str(tree), cache)
    assert count(data) == 8
    assert "1 × camera raw (not supported; convert to JPEG)" in data.notes[0]


def test_hidden_folders_are_no_classes(tree: Path, cache: Path) -> None:
    for name in (".git", "__MACOSX", ".ipynb_checkpoints"):
        save_image(tree / name / "0.png", seed=1)
    data = prepare(str(tree), cache)
    assert data.classes == ("cat", "dog")
    assert "3 × hidden" in data.notes[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (HEIC, "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        (b"%PDF-1.4", "not an image"),
    ],
)
def test_an_images_suffix_on_something_else_is_refused(
    tree: Path, cache: Path, content: bytes, reason: str
) -> None:
    (tree / "dog/9.jpg").write_bytes(content)
    assert_refused(tree, cache, "holds 'dog/9.jpg', which cannot be decoded", reason)


def test_eps_is_never_opened(tree: Path, cache: Path) -> None:
    Image.new("RGB", (8, 8)).save(tree / "dog/9.eps")
    assert "1 × not an image" in prepare(str(tree), cache).notes[0]


def test_zip_with_backslashes_equals_its_folder(tree: Path, cache: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as packed:
        for file in tree.rglob("*"):
            name = str(file.relative_to(tree)).replace("/", "\\")
            if file.is_dir():
                packed.writestr(f"{name}\\", b"")
            else:
                packed.writestr(name, file.read_bytes())
    assert prepare(str(tmp_path / "windows.zip"), cache).sha256 == prepare(str(tree), cache).sha256


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_of_a_zip_is_read(tree: Path, cache: Path, tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w", method) as packed:
        for file in tree.rglob("*.png"):
            packed.write(file, file.relative_to(tree))
    assert prepare(str(tmp_path / "pets.zip"), cache).sha256 == prepare(str(tree), cache).sha256


def test_zip_behind_another_file_is_read(tree: Path, cache: Path, tmp_path: Path) -> None:
    content = pack(tmp_path / "pets.zip", tree).read_bytes()
    (tmp_path / "pets.zip").write_bytes(b"PK self-extracting" + content)
    assert count(prepare(str(tmp_path / "pets.zip"), cache)) == 8


def test_wrong_checksum_in_a_zip_is_refused(tree: Path, cache: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as packed:
        for file in sorted(tree.rglob("*.png")):
            packed.write(file, file.relative_to(tree))
    content = bytearray((tmp_path / "pets.zip").read_bytes())
    content[content.index(b"IDAT") + 6] ^= 1
    (tmp_path / "pets.zip").write_bytes(content)
    assert_refused(tmp_path / "pets.zip", cache, "is truncated or corrupt (Bad CRC-32 for file 'cat/0.png')")


@pytest.mark.parametrize("name", ["pets.tar.gz", "pets.tar.bz2", "pets.tar.xz"])
def test_compressed_archive_is_read_once(tree: Path, cache: Path, tmp_path: Path, name: str) -> None:
    archive = pack(tmp_path / name, tree)

    def remove_archive(phase: str, done: int, total: int) -> None:
        if phase == "decoding":
            archive.unlink(missing_ok=True)

    assert count(prepare(str(archive), cache, progress=remove_archive)) == 8


@pytest.mark.parametrize("name", ["pets.tar", "pets.tar.gz", "pets.zip"])
def test_archive_of_too_many_members_is_refused(
    tree: Path, cache: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    assert_refused(
        pack(tmp_path / name, tree), cache, "holds more than 5 files; unpack it and give the folder"
    )


def test_members_of_a_tar_are_not_kept_in_memory(tmp_path: Path, cache: Path) -> None:
    with tarfile.open(tmp_path / "many.tar", "w") as tar:
        for number in range(4000):
            member = tarfile.TarInfo(f"cat/{number}")
            member.size = 20
            tar.addfile(member, io.BytesIO(bytes(20)))
    calls = []
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"holds no images \(4,000 × not an image\)"):
        prepare(str(tmp_path / "many.tar"), cache, progress=lambda *call: calls.append(call))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000  # a TarInfo takes some 1,200 bytes


def test_reading_an_archive_shows_how_far_it_is(
    tree: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "PROGRESS_MEMBERS", 5)
    archive = pack(tmp_path / "pets.tar.gz", tree)
    calls: list[tuple[str, int, int]] = []
    prepare(str(archive), cache, progress=lambda *call: calls.append(call))
    assert calls[:3] == [("listing files", 0, 0), *2 * [("100 % of the archive", 0, 0)]]
    prepare(str(pack(tmp_path / "pets.zip", tree)), cache, progress=lambda *call: calls.append(call))
    assert 0 < int(calls[-4][0].removesuffix(" % of the archive")) < 100


def test_a_pipe_is_no_archive(tmp_path: Path, cache: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", cache, "cannot be read (not a regular file)")


NAMES = [
    b"caf\xe9",
    "кошка".encode(),
    "猫 🐈".encode(),
    b"a'b\"c $HOME `id` %d [x] \\t",
    b"line\nbreak",
    b"\x1b[31mred",
]


@pytest.mark.parametrize("archive", [None, "pets.tar", "pets.tar.gz"])
def test_names_of_any_bytes_are_read_and_printable(tmp_path: Path, cache: Path, archive: str | None) -> None:
    folder = tmp_path / os.fsdecode(b"p\xe9ts\n")
    for seed, name in enumerate(NAMES):
        save_tree(folder / os.fsdecode(name), {".": 5})
        save_image(folder / os.fsdecode(name) / os.fsdecode(b"\xff.png"), seed)
    (folder / "notes.txt").write_text("skipped, so that the source is named")
    source = pack(folder.with_name(f"{folder.name}{archive}"), folder) if archive else folder
    data = prepare(str(source), cache)
    assert count(data) == 6 * len(NAMES)
    assert len(data.notes) == 2
    assert all(name.isprintable() for name in (data.name, *data.classes, *data.notes))
    assert r"caf\xe9" in data.classes
    assert r"line\nbreak" in data.classes
    assert prepare(str(source), cache) == data
    assert load_split(data, "train")[0].shape[0] == data.train_count
    (folder / os.fsdecode(NAMES[0]) / os.fsdecode(b"\xfe.png")).write_text("")
    assert_refused_printably(folder, cache)
    assert_refused_printably(folder / "nothing", cache)


def assert_refused_printably(source: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"^--data=") as caught:
        prepare(str(source), cache)
    assert str(caught.value).isprintable()
