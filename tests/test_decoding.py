"""Pixels of an image: turned upright, whatever its metadata, and the same however many processes decode."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from tests.conftest import ROOT
from tests.images import assert_refused, pack, save_image, save_tree
from tunefleet.trainables import decoding, preparation
from tunefleet.trainables.data import load_split
from tunefleet.trainables.preparation import prepare

ORIENTATION = 0x0112


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return save_tree(tmp_path / "pets", {"train/cat": 4, "train/dog": 3, "test/cat": 2, "test/dog": 1})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a few images worth several processes."""
    monkeypatch.setattr(preparation, "PROCESS_BYTES", 1)
    monkeypatch.setattr(preparation, "CHUNK_IMAGES", 3)


# ---- metadata


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright_and_it_is_said(
    tree: Path, cache: Path, kind: str, orientation: int
) -> None:
    ramp = np.zeros((60, 40, 3), np.uint8)
    ramp[:30, :, 0], ramp[:, :20, 1] = 250, 250  # its four quarters differ
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(ramp).save(tree / "train/cat/0.jpg", kind, exif=exif, quality=95)
    (tree / "train/cat/0.png").unlink()
    data = prepare(str(tree), cache)
    with Image.open(tree / "train/cat/0.jpg") as saved:
        upright = ImageOps.exif_transpose(saved).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    stored = load_split(data, "train")[0][0].transpose(1, 2, 0)
    np.testing.assert_allclose(stored.astype(int), np.asarray(upright).astype(int), atol=12)
    if kind not in ("TIFF", "AVIF"):  # those are turned by Pillow itself, as they were before
        said = ("rotated 1 of 10 images by their EXIF orientation",) if orientation > 1 else ()
        assert data.notes == said
        assert prepare(str(tree), cache).notes == said


def test_damaged_exif_leaves_an_image_as_it_is(tree: Path, cache: Path) -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    image.save(tree / "train/cat/0.png", "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff", quality=95)
    data = prepare(str(tree), cache)
    assert data.notes == ()
    np.testing.assert_allclose(load_split(data, "train")[0][0][0], 200, atol=4)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_png_with_two_megabytes_of_metadata_is_read(tree: Path, cache: Path, kind: str) -> None:
    info, options = PngImagePlugin.PngInfo(), {}
    if kind == "zTXt":
        info.add_text("Comment", "x" * 2_000_000, zip=True)
    elif kind == "iTXt":
        info.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    else:
        options = {"icc_profile": bytes(2_000_000)}
    image = Image.open(tree / "train/cat/0.png")
    plain = prepare(str(tree), cache).sha256
    image.save(tree / "train/cat/0.png", pnginfo=info, **options)
    assert prepare(str(tree), cache).sha256 == plain


def test_metadata_that_unpacks_to_too_much_is_refused(tree: Path, cache: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(70_000_000), 9))
    Image.open(tree / "train/cat/0.png").save(tree / "train/cat/0.png", pnginfo=info)
    assert_refused(tree, cache, "'train/cat/0.png', which cannot be decoded (Decompressed data too large")


# ---- several processes


@pytest.mark.parametrize("archive", [None, "pets.tar", "pets.tar.xz", "pets.zip"])
@pytest.mark.parametrize("other_size", [None, (8, 8), (9, 9), (40, 20)])
def test_several_processes_decode_what_one_does(
    tree: Path,
    cache: Path,
    tmp_path: Path,
    archive: str | None,
    other_size: tuple[int, int] | None,
    request: pytest.FixtureRequest,
) -> None:
    if other_size:
        save_image(tree / "train/dog/1.png", seed=9, size=other_size)
    one = prepare(str(tree), cache, processes=1)
    request.getfixturevalue("many")
    source = pack(tmp_path / archive, tree) if archive else tree
    several = prepare(str(source), tmp_path / "other", processes=3)
    assert (several.sha256, several.mean, several.std) == (one.sha256, one.mean, one.std)
    assert Path(several.folder).name == Path(one.folder).name


@pytest.mark.usefixtures("many")
def test_several_processes_read_names_of_any_bytes(tree: Path, cache: Path, tmp_path: Path) -> None:
    one = prepare(str(tree), cache, processes=1)
    for name in (b"\xff", b"line\nbreak", b"a'b\"c"):  # the last of their class's names
        (tree / "train/dog/2.png").replace(tree / "train/dog" / os.fsdecode(b"~" + name))
        assert prepare(str(tree), tmp_path / "other", processes=3).sha256 == one.sha256
        (tree / "train/dog" / os.fsdecode(b"~" + name)).replace(tree / "train/dog/2.png")


@pytest.mark.usefixtures("many")
def test_several_processes_name_the_first_damaged_image(tree: Path, cache: Path) -> None:
    for name in ("train/dog/2.png", "train/cat/1.png", "test/dog/0.png"):
        (tree / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"'test/dog/0.png', which cannot be decoded"):
        prepare(str(tree), cache, processes=3)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("code", "reason"),
    [("import os; os.kill(os.getpid(), 9)", "SIGKILL"), ("raise SystemExit(7)", "exit code 7")],
)
def test_a_process_that_ends_is_one_line(
    tree: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    (tmp_path / "ends.py").write_text(code)
    monkeypatch.setattr(decoding, "__file__", str(tmp_path / "ends.py"))
    with pytest.raises(ValueError, match=rf"a process that decodes images died \({reason}\); free memory"):
        prepare(str(tree), cache, processes=2)
    assert not list((cache / "decoded").iterdir())


SCRIPT = """
import sys
from pathlib import Path
print("main", flush=True)
sys.path.insert(0, {root!r})
from tunefleet.trainables import preparation
from tunefleet.trainables.preparation import prepare
preparation.PROCESS_BYTES, preparation.CHUNK_IMAGES = 1, 3
data = prepare(sys.argv[1], Path(sys.argv[2]), processes=2)
print(data.train_count)
"""


def test_no_process_runs_the_users_files(tree: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/main.py").write_text(SCRIPT.format(root=str(ROOT)))
    for name in ("PIL", "json", "zlib", "hashlib", "decoding", "trainables"):
        (tmp_path / "mine" / f"{name}.py").write_text(f"print({name!r})")
    command = [sys.executable, "-P", "main.py", str(tree), str(cache)]
    result = subprocess.run(
        command, cwd=tmp_path / "mine", capture_output=True, text=True, timeout=60, check=True
    )
    assert (result.stdout, result.stderr) == ("main\n7\n", "")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_killed_command(tmp_path: Path, cache: Path, sent: signal.Signals) -> None:
    save_image(tmp_path / "0.png", seed=0, size=(1000, 1000))
    for number in range(80):  # 2 s of work for two
        link = tmp_path / "pets" / str(number % 2) / f"{number}.png"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(tmp_path / "0.png")
    (tmp_path / "main.py").write_text(SCRIPT.format(root=str(ROOT)))
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py", str(tmp_path / "pets"), str(cache)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    began, children = time.monotonic(), []
    while len(children) < 2:
        assert process.poll() is None
        assert time.monotonic() - began < 30
        children = psutil.Process(process.pid).children()
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    stderr = process.communicate(timeout=30)[1]
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert stderr.count("Traceback") == (sent == signal.SIGINT)  # the script's own


# ---- how it is called


def test_a_process_answers_every_other_line(tree: Path, tmp_path: Path) -> None:
    name = "train/cat/0.png"
    entry = [name, (tree / name).stat().st_size, 0]
    lines = [{"source": str(tree)}, [[entry, 0, 0]], [[entry, 0, 0]], [[["gone.png", 1, 0], 0, 0]]]
    (tmp_path / "chunks").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = subprocess.run(
        [sys.executable, "-P", decoding.__file__, tmp_path / "chunks", "0", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first, third = map(json.loads, result.stdout.splitlines())
    assert len(first["sha256"][0]) == 64
    assert third == {"refused": "cannot be read (No such file or directory: 'gone.png')"}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_square_is_pillows_resize_in_planes(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    expected = np.asarray(image.convert("RGB").resize((7, 7), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    found = np.frombuffer(decoding.square(image, 7), np.uint8).reshape(3, 7, 7)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 20, 163, 170, 300, 0.5, 0.99])
def test_a_truncated_jpeg_is_refused(tree: Path, cache: Path, kept: float) -> None:
    file = tree / "train/cat/0.jpg"
    Image.effect_noise((8, 8), 100).convert("RGB").save(file)
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_refused(tree, cache, "'train/cat/0.jpg', which cannot be decoded")


def test_a_multi_picture_jpeg_is_its_first_picture(tree: Path, cache: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), color) for color in ((200, 0, 0), (0, 0, 200)))
    content = io.BytesIO()
    first.save(content, "MPO", save_all=True, append_images=[second], quality=95)
    (tree / "train/cat/0.png").write_bytes(content.getvalue())
    np.testing.assert_allclose(load_split(prepare(str(tree), cache), "train")[0][0][0], 200, atol=4)
