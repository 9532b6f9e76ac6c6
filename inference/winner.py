"""Build the winner of a finished study again, from best/model.pt: images in, class probabilities out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tunefleet.cli import expanded, shell, shown
from tunefleet.models.sources import describe
from tunefleet.models.space import Space
from tunefleet.models.spaces import recorded_space
from tunefleet.study import Study
from tunefleet.trainables.data import DATA_DIR, ImageData
from tunefleet.trainables.decoding import Decoder, Entry, SourceError, draft, square, upright
from tunefleet.trainables.device import DeviceSettings, choose, has_convolution, use_exact_fp32
from tunefleet.trainables.evaluate import MODEL_FILE
from tunefleet.trainables.inputs import build_model
from tunefleet.trainables.own import OwnRun
from tunefleet.trainables.pipeline import affine, normalise
from tunefleet.trainables.training import EVAL_BATCH_MAX, DamagedCheckpointError, read_checkpoint

FINAL_SEEDS = 3  # that an error proposes to train, beside those that failed
OF_NETWORKS = {  # what best/model.pt holds of a network; of a training of its own, "state" and "config"
    **dict.fromkeys(("classes", "mean", "std"), list),
    **dict.fromkeys(("config", "network"), Mapping),
    **dict.fromkeys(("device", "precision", "builder"), str),
    **dict.fromkeys(("stored_size", "image_size", "batch_size"), int),
    "channels_last": bool,
}
ALLOWED = "give PIL images, uint8 tensors (N, 3, H, W) or paths of image files, or a list of them"
Images = Any  # what ALLOWED says


class WinnerModel(nn.Module):
    """The winner's network behind the decoding, normalisation and enlargement that it was trained with.

    Args:
        network: With its trained state, on its device.
        saved: The content of best/model.pt.
        settings: Of the device.

    Attributes:
        classes: A name per column of the probabilities.
        stored_size: Pixels per side to which images are decoded.
        batch_size: Images that the network sees at a time.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, saved: Mapping[str, Any], settings: DeviceSettings) -> None:
        super().__init__()
        self.network = network
        self.classes: tuple[str, ...] = tuple(saved["classes"])
        self.stored_size, self.image_size = saved["stored_size"], saved["image_size"]
        self.settings = settings
        self.tested_on = f"{saved['device']} {saved['precision']}"
        most = saved["batch_size"] if settings.device == saved["device"] else EVAL_BATCH_MAX
        self.batch_size = min(saved["batch_size"], most)
        device = torch.device(settings.device)
        for name, tensor in zip(
            ("scale", "shift"), affine(tuple(saved["mean"]), tuple(saved["std"]), device), strict=True
        ):
            self.register_buffer(name, tensor, persistent=False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Images) -> Tensor:
        """Return class probabilities, float32 ``(N, classes)``.

        Args:
            images: A PIL image, a uint8 tensor ``(N, 3, H, W)`` or ``(3, H, W)``, the path of an image file,
                or a list of these.

        Raises:
            ValueError: One of them is none, or cannot be decoded.
        """
        parts = self.decode(images).split(self.batch_size)
        return torch.cat([self._probabilities(part) for part in parts])

    def decode(self, images: Images) -> Tensor:
        """Return images as training had them decoded: upright and resized, uint8 ``(N, 3, S, S)``.

        Raises:
            ValueError: As ``forward``.
        """
        if isinstance(images, Tensor):
            return self._resized(images)
        if isinstance(images, Sequence) and not isinstance(images, str | bytes):
            if not images:
                raise ValueError(f"there are no images; {ALLOWED}")
            return torch.cat([self.decode(image) for image in images])
        if isinstance(images, Image.Image):
            try:
                draft(images, self.stored_size)  # has no effect once it is loaded
                return self.stack([square(upright(images), self.stored_size)])
            except Exception as error:  # of a damaged file Pillow raises many types
                raise ValueError(f"an image cannot be decoded ({error})") from error
        if isinstance(images, str | os.PathLike):
            return self.stack([decode_file(Path(images), self.stored_size)])
        raise ValueError(f"a {type(images).__name__} is no image; {ALLOWED}")

    def stack(self, pixels: Sequence[bytes]) -> Tensor:
        """Return decoded images, each ``3·S·S`` bytes, as a tensor ``(N, 3, S, S)``."""
        side = self.stored_size
        return torch.frombuffer(bytearray(b"".join(pixels)), dtype=torch.uint8).view(-1, 3, side, side)

    def _resized(self, images: Tensor) -> Tensor:
        images = images.unsqueeze(0) if images.dim() == 3 else images
        if images.dtype != torch.uint8:
            raise ValueError(f"the images are {images.dtype}; give uint8, as before any transform")
        if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"the images have the shape {tuple(images.shape)}; give (N, 3, H, W)")
        if images.shape[2:] == (self.stored_size, self.stored_size):
            return images
        rows = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.stack([square(Image.fromarray(row), self.stored_size) for row in rows])

    def _probabilities(self, images: Tensor) -> Tensor:
        device, dtype = self.scale.device, self.settings.dtype
        x = normalise(images.to(device), self.scale, self.shift, self.image_size).to(dtype)
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            logits: Tensor = self.network(x)
        return logits.float().softmax(1)


def decode_file(file: Path, size: int) -> bytes:
    """Return an image file's pixels as uint8 ``(3, size, size)``, decoded as for training.

    Raises:
        ValueError: It cannot be.
    """
    try:
        if not file.is_file():
            raise ValueError(
                f"{file} is no file; {ALLOWED}" if file.exists() else f"{file} does not exist; {ALLOWED}"
            )
        return Decoder(str(file.parent), size=size, resize=True).pixels_of(
            Entry(file.name, file.stat().st_size)
        )
    except SourceError as error:
        raise ValueError(f"{file} {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error


def load_winner(
    study: Study, device: str | None = None, precision: str | None = None, data_dir: Path | None = None
) -> Any:
    """Return a study's winner with its trained state.

    Args:
        study: Finished, with a seed of its winner that is done.
        device: auto, cpu or cuda; None: the study's, where it is here, else the CPU.
        precision: fp32 or bf16; None: the study's, where the device has it.
        data_dir: As for ``cache_folder``; the study's copy of a person's sources is imported below it.

    Returns:
        A ``WinnerModel``; of a space with a ``run`` of its own, an instance of that class.

    Raises:
        ValueError: The study has no such seed, or a file of it is missing or damaged.
    """
    saved, data_dir = read_winner(study), cache_folder(study, data_dir)
    space = space_of(study, data_dir)
    if "state" in saved:
        return _own_run(study, space, saved, device, data_dir)
    settings = _settings(saved, device, precision)
    use_exact_fp32()
    network = _network(study, space, saved).to(settings.device).eval()
    if settings.channels_last and has_convolution(network):
        network.to(memory_format=torch.channels_last)
    return WinnerModel(network, saved, settings)


def cache_folder(study: Study, given: Path | None) -> Path:
    """Return the ``--data-dir`` that is given; else the study's, where it is here, or the default."""
    if given:
        return expanded("--data-dir", given)
    recorded = study.spec["options"].get("data_dir")
    return Path(recorded) if recorded and Path(recorded).is_dir() else DATA_DIR


def read_winner(study: Study) -> dict[str, Any]:
    """Return what best/model.pt holds.

    Raises:
        ValueError: The study has no finished seed, or the file is missing or damaged.
    """
    where, file = shown(study.folder), study.folder / "best" / MODEL_FILE
    seeds = [trial for trial in study.seeds if trial.status == "done"]
    if not seeds:
        advice = shell("tunefleet", "resume", where)
        if study.status == "done":
            if not study.winner:
                raise ValueError(f"{where} has no winner: no trial has succeeded; search again")
            advice += f" --final-seeds {(study.spec['options'].get('final_seeds') or 0) + FINAL_SEEDS}"
        raise ValueError(f"{where} has no finished seed of its winner; train some: {advice}")
    if not file.exists():
        if study.status != "done":
            raise ValueError(f"{where} is not finished; finish it: {shell('tunefleet', 'resume', where)}")
        raise ValueError(
            f"{shown(file)} is missing: it was removed, or the study is of an earlier version; restore it "
            "from a copy, or search again"
        )
    try:
        saved = read_checkpoint(file)
    except DamagedCheckpointError as error:
        raise ValueError(f"{error}; restore it from a copy") from error
    except Exception as error:  # torch.load raises many types for a file that torch did not write (2.15)
        raise ValueError(
            f"{shown(file)} cannot be read ({type(error).__name__}); restore it from a copy"
        ) from error
    wanted: dict[str, Any] = {"config": Mapping, "state": Mapping} if "state" in saved else OF_NETWORKS
    if wrong := [name for name, kind in wanted.items() if not isinstance(saved.get(name), kind)]:
        raise ValueError(f"{shown(file)} is damaged (it lacks {wrong[0]}); restore it from a copy")
    if all(_differs(saved["config"], trial.config) for trial in seeds):  # continued, and stopped or killed
        raise ValueError(
            f"{shown(file)} is of an earlier winner; finish the study: {shell('tunefleet', 'resume', where)}"
        )
    return saved


def _differs(saved: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether a saved config, which has every field, is of another trial."""
    return any(saved[name] != value for name, value in config.items() if name in saved)


def space_of(study: Study, data_dir: Path) -> Space:
    """Return a study's space: a built-in one, or that of the study's copy of a person's sources.

    Raises:
        ValueError: There is none, or it cannot be imported.
    """
    if study.space is not None:
        found: Space = study.space
        return found
    if (study.spec.get("source") or {}).get("pickled"):
        name = study.spec["space"]
        raise ValueError(f"the space {name} is of a notebook and has no file; set study.space = space there")
    space, _ = recorded_space(study.spec, study.folder, str(data_dir))
    return space


def _network(study: Study, space: Space, saved: Mapping[str, Any]) -> nn.Module:
    """Return the network with its trained state, on the CPU.

    Raises:
        ValueError: It cannot be built, or the state is of another one.
    """
    try:
        config = space.config(saved["config"])
        # no weights: the state has all of them, and nothing has to be downloaded
        network = build_model(replace(config, weights="none"), ImageData.from_dict(study.spec["data"]))
    except Exception as error:
        raise ValueError(f"{space.name} cannot be built again: {describe(error)}") from error
    try:
        network.load_state_dict(saved["network"])
    except RuntimeError as error:
        first = " ".join(str(error).split("\n")[:2])
        raise ValueError(
            f"{shown(study.folder)}/best/{MODEL_FILE} does not fit {space.name} as it is now "
            f"({first[:200]}); use the commit in study.json: {study.spec.get('commit') or 'not known'}"
        ) from error
    return network


def _settings(saved: Mapping[str, Any], device: str | None, precision: str | None) -> DeviceSettings:
    if device is None:
        device = "cuda" if saved["device"] == "cuda" and torch.cuda.is_available() else "cpu"
    chosen = choose(device, precision or "auto")
    if precision is None and saved["precision"] == "fp32":
        chosen = replace(chosen, precision="fp32")
    return replace(chosen, channels_last=saved["channels_last"])


def _own_run(study: Study, space: Space, saved: Mapping[str, Any], device: str | None, data_dir: Path) -> Any:
    if device is None:
        device = study.spec["levers"].get("device", "cpu")
        device = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    offered = {
        "device": choose(device).device,
        "threads": torch.get_num_threads(),
        "data_dir": Path(data_dir),
    }
    run = OwnRun(space, saved["config"], study.metric, offered).run
    run.load_state_dict(saved["state"])
    return run
