"""Images, folders and archives of them, for tests of what reads them."""

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tunefleet.trainables.preparation import prepare

CLASSES = ("cat", "dog")
SPLIT_TREE = {"train/cat": 4, "train/dog": 3, "test/cat": 2, "test/dog": 1}


def save_image(path: Path, seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> np.ndarray:
    """Saves an image of random pixels and returns them as uint8 (H, W, channels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(path)
    return np.asarray(image)


def save_tree(folder: Path, counts: dict[str, int] | None = None, **image: object) -> Path:
    seed = 0
    for subfolder, count in (SPLIT_TREE if counts is None else counts).items():
        for number in range(count):
            save_image(folder / subfolder / f"{number}.png", seed, **image)
            seed += 1
    return folder


def pack(archive: Path, folder: Path, top: str = "") -> Path:
    """Packs a folder into an archive of the kind that its suffix names."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(folder.rglob("*"), reverse=True):
                packed.write(file, Path(top) / file.relative_to(folder))
        return archive
    with tarfile.open(archive, f"w:{archive.suffix[1:].replace('tar', '')}") as tar:
        tar.add(folder, arcname=top or ".")
    return archive


def pack_members(archive: Path, members: Iterable[tarfile.TarInfo]) -> Path:
    with tarfile.open(archive, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return archive


def assert_refused(source: Path | str, data_dir: Path, *parts: str) -> None:
    """Asserts that the source gives one line with these parts, and leaves nothing decoded."""
    with pytest.raises(ValueError, match=r"^--data") as caught:
        prepare(str(source), data_dir)
    message = str(caught.value)
    assert message.isprintable()
    for part in parts:
        assert part in message
    assert not list((data_dir / "decoded").glob("*"))
