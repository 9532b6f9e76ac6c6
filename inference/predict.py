"""Predict the classes of images with the winner of a study.

The command::

    tunefleet predict STUDY PATH… [--out predictions.csv]

A PATH is an image, a folder or an archive. Prints or writes CSV: path, class, and p_CLASS, the probability of
each class. What cannot be read is skipped with a line; the exit code is then 1, and 2 where nothing is left.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tunefleet.cli import Parser, counted, exit_code, path_argument, printable
from tunefleet.files import write_whole
from tunefleet.inference.images import read_images
from tunefleet.inference.winner import WinnerModel, cache_folder, load_winner
from tunefleet.mirror import fetch_study
from tunefleet.study import Study
from tunefleet.trainables.device import DEVICES

DATA_DIR_HELP = "cache folder (default: the study's, where it is here)"
CLOSE = 0.02  # difference of the two best probabilities that another device's rounding may turn round


def predictions(
    model: WinnerModel, paths: Iterable[Path], skip: Callable[[str], None], data_dir: Path
) -> pd.DataFrame:
    """Return a row per image: path, class, and a column ``p_CLASS`` per class, its probability.

    Args:
        model: The winner.
        paths: Images, folders and archives.
        skip: Gets a line for each file, or kind of file, that is skipped.
        data_dir: Where archives are unpacked meanwhile.

    Raises:
        ValueError: No image could be read.
    """
    names: list[str] = []
    parts: list[np.ndarray] = []
    images = read_images(paths, model.stored_size, data_dir, skip)
    while batch := list(itertools.islice(images, model.batch_size)):
        names += [name for name, _ in batch]
        parts.append(model(model.stack([pixels for _, pixels in batch])).cpu().numpy())
    if not parts:
        raise ValueError("nothing was predicted; give images, or folders or archives of images")
    probabilities = np.concatenate(parts)
    best = [model.classes[k] for k in probabilities.argmax(1)]
    columns = {f"p_{name}": probabilities[:, k] for k, name in enumerate(model.classes)}
    # pandas' own text (3.0) cannot hold a file name that is not UTF-8
    return pd.DataFrame({"path": pd.Series(names, dtype=object), "class": best, **columns})


def close_calls(frame: pd.DataFrame) -> int:
    """Return of how many images the two best probabilities differ by less than CLOSE."""
    probabilities = np.sort(frame.to_numpy()[:, 2:].astype(float), axis=1)
    return int((probabilities[:, -1] - probabilities[:, -2] < CLOSE).sum())


def predict(study: Study, paths: Any, device: str | None = None) -> pd.DataFrame:
    """Predict images; what ``Study.predict`` does."""
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)

    def warn(line: str) -> None:
        warnings.warn(f"skipped: {printable(line)}", stacklevel=2)

    model, data_dir = image_model(study, device), cache_folder(study, None)
    return predictions(model, [Path(path) for path in listed], warn, data_dir)


def image_model(study: Study, device: str | None, **options: Any) -> WinnerModel:
    """Return a study's winner, which has to be a network; takes what ``load_winner`` does.

    Raises:
        ValueError: It is a training of its own, or cannot be loaded.
    """
    if not study.spec["data"]["classes"]:
        raise ValueError(
            f"{study.folder} trains {study.spec['space']}, which has no images; use study.model() in Python"
        )
    model: WinnerModel = load_winner(study, device, **options)
    return model


def main(arguments: list[str] | None = None) -> int:
    """Predict the classes of images with a study's winner; print or write CSV."""
    parser = Parser(prog="tunefleet predict", description=main.__doc__)
    parser.add_argument("study", help="its folder or URL")
    parser.add_argument("paths", nargs="+", type=path_argument, metavar="path", help="image, folder, archive")
    parser.add_argument("--out", type=path_argument, help="file of the CSV, a new one (default: printed)")
    parser.add_argument("--device", choices=DEVICES, help="(default: the study's, where it is here)")
    parser.add_argument("--data-dir", type=Path, help=DATA_DIR_HELP)
    flags = parser.parse_args(arguments)
    return exit_code(lambda: _main(**vars(flags)))


def _main(study: str, paths: list[Path], out: Path | None, device: str | None, data_dir: Path | None) -> int:
    if out:
        check_new("--out", out)
    of_study = Study(fetch_study(study))
    data_dir = cache_folder(of_study, data_dir)
    model = image_model(of_study, device, data_dir=data_dir)
    skipped: list[str] = []

    def skip(line: str) -> None:
        skipped.append(line)
        print(f"skipped: {printable(line)}", file=sys.stderr)

    frame = predictions(model, paths, skip, data_dir)
    text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    if out:
        write_whole(out, text.encode("utf-8", "surrogateescape"))
    else:
        print(text, end="")
    here = f"{model.settings.device} {model.settings.precision}"
    if here != model.tested_on and (close := close_calls(frame)):
        print(
            f"this is {here}, and the study was tested on {model.tested_on}: "
            f"{counted(close, 'class', 'classes')} may differ, where the two best probabilities differ by "
            f"less than {CLOSE}",
            file=sys.stderr,
        )
    return int(bool(skipped))


def check_new(name: str, file: Path) -> None:
    """Raise ValueError where a file that is to be written is there, or its folder is not."""
    if file.exists():
        raise ValueError(f"{name}={file} exists; give a new file, or remove it")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{name}={file} cannot be written: there is no folder {file.parent}; make it first")
