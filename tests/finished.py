"""A finished study without Ray: its winner is trained for an epoch, tested and kept as in a study."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.made_study import write_events
from tunefleet.models.space import Space
from tunefleet.search.execution import Ready, create, keep_best
from tunefleet.search.options import StudyOptions
from tunefleet.search.preflight import Prepared
from tunefleet.search.resources import Machine, Resources, settle
from tunefleet.study import Study
from tunefleet.trainables.data import SPLITS, ImageData
from tunefleet.trainables.device import DeviceSettings, choose
from tunefleet.trainables.evaluate import evaluate_test
from tunefleet.trainables.training import TrainingRun

CLASSES = ("cat", "dog", "eel", "fox")


def made_data(folder: Path, side: int = 32) -> ImageData:
    """Writes 40 training and 23 test images of random pixels."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for split, count in zip(SPLITS, (40, 23), strict=True):
        images = rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", np.arange(count) % 4)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return ImageData("made", str(folder), CLASSES, (3, side, side), 40, 23, mean, std, "2" * 64)


def save_test_images(data: ImageData, folder: Path) -> Path:
    """Saves the test images as PNGs, in their order."""
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(np.load(Path(data.folder) / "test_images.npy")):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:02d}.png")
    return folder


def new_study(
    folder: Path, space: Space, data: ImageData | None, settings: DeviceSettings, **given: Any
) -> StudyOptions:
    """Writes the folder of a study that has no trial yet."""
    options = StudyOptions(space, trials=1, epochs=1, final_seeds=1, **given)
    options = settle(options, settings, Machine(1))
    prepared = Prepared("5" * 64, 30, 10, 0, 0, None)
    create(Ready(options, folder, data, settings, Resources(1, 1, 0)), prepared)
    (folder / "best").mkdir()
    return options


def finished_study(
    folder: Path,
    space: Space,
    data: ImageData,
    data_dir: Path,
    settings: DeviceSettings | None = None,
    **values: Any,
) -> Path:
    """Writes a finished study of a space, with these values of its winner; returns its folder."""
    settings = settings or choose("cpu", "fp32")
    given = {"weights": "none", "image_size": 32, "data_dir": str(data_dir)}
    options = new_study(folder, space, data, settings, **given)
    config = options.fixed_values() | space.start | {"batch_size": 8} | values
    final = config | {"seed": 1, "refit": True}
    run = TrainingRun(space.config(final), data, settings, data_dir)
    run.epoch()
    accuracy = evaluate_test(run, folder / "best", "-final-1")
    end_study(folder, config, final, accuracy)
    return folder


def end_study(folder: Path, config: dict[str, Any], final: dict[str, Any], tested: dict[str, float]) -> None:
    """Writes the journal and the results of a study of one trial and one seed, and fills best/."""
    last = {"epoch": 1, "status": "done", "finished_at": time.time(), "epoch_seconds": 1.0}
    events = [
        {"trial_id": "0000", "epoch": 0, "config": config},
        {"trial_id": "0000", "val_accuracy": 0.5, "val_loss": 1.0, **last},
        {"trial_id": "final-1", "epoch": 0, "config": final},
        {"trial_id": "final-1", **tested, **last},
    ]
    write_events(folder, events, "done")
    keep_best(folder, Study(folder).seeds)
