"""Write the winner of a study as a file that torch alone loads.

The command::

    tunefleet export STUDY model.pt2

A program of torch.export, in fp32: uint8 images ``(N, 3, S, S)`` of the stored size to class probabilities
``(N, classes)``, for any N; normalisation and enlargement are inside, the names of the classes beside it in
classes.json. docs/predict.md shows how to load it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunefleet.cli import Parser, exit_code, path_argument, printable
from tunefleet.files import write_whole
from tunefleet.inference.predict import DATA_DIR_HELP, check_new, image_model
from tunefleet.inference.winner import WinnerModel
from tunefleet.mirror import fetch_study
from tunefleet.models.building import make_plain
from tunefleet.study import Study
from tunefleet.trainables.pipeline import normalise

SUFFIX = ".pt2"
CLASSES = "classes.json"  # extra file in the program's archive
REASON_CHARACTERS = 300  # of torch's reason why a network cannot be exported
TRIED = (1, 5)  # images, with which a program is compared with its network
RTOL, ATOL = 1e-3, 1e-5  # of probabilities


class ExportedModel(nn.Module):
    """What a program holds: normalisation, enlargement, network, softmax."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: WinnerModel) -> None:
        super().__init__()
        self.network = model.network.float().to(memory_format=torch.contiguous_format)
        make_plain(self.network)
        self.image_size = model.image_size
        self.register_buffer("scale", model.scale)
        self.register_buffer("shift", model.shift)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities ``(N, classes)`` of uint8 images ``(N, 3, S, S)``."""
        logits: Tensor = self.network(normalise(images, self.scale, self.shift, self.image_size))
        return logits.softmax(1)


def export(model: WinnerModel, name: str) -> bytes:
    """Return a model's program as the content of a file.

    Args:
        model: On the CPU, in fp32; its network's layers become plain ones.
        name: The space's, for errors.

    Raises:
        ValueError: The network cannot be exported; has torch's reason.
    """
    whole, side = ExportedModel(model), model.stored_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (max(TRIED), 3, side, side), dtype=torch.uint8, generator=generator)
    with torch.no_grad(), _silent():
        try:
            program = torch.export.export(
                whole, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
            exported = program.module()
            differs = any(not _same(exported, whole, images[:count]) for count in TRIED)
        except Exception as error:  # torch (2.15) raises many types, and a person's code any
            raise ValueError(
                f"{name} cannot be exported: torch says {_reason(error)}; use study.model()"
            ) from error
    if differs:
        raise ValueError(
            f"{name} cannot be exported: torch's program gives other numbers than the network, whose forward "
            "may draw random numbers or depend on the images; use study.model()"
        )
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={CLASSES: json.dumps(list(model.classes))})
    return stream.getvalue()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Context manager: torch (2.15) logs and prints pages about a failure whose error says the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _same(program: Any, network: nn.Module, images: Tensor) -> bool:
    return torch.allclose(program(images), network(images), rtol=RTOL, atol=ATOL)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return printable(f"{type(error).__name__}: {lines[0] if lines else ''}"[:REASON_CHARACTERS])


def main(arguments: list[str] | None = None) -> int:
    """Write a study's winner as a file that torch.export.load reads, without tunefleet."""
    parser = Parser(prog="tunefleet export", description=main.__doc__)
    parser.add_argument("study", help="its folder or URL")
    parser.add_argument("file", type=path_argument, help=f"a new file, NAME{SUFFIX}")
    parser.add_argument("--data-dir", type=Path, help=DATA_DIR_HELP)
    flags = parser.parse_args(arguments)
    return exit_code(lambda: _main(**vars(flags)))


def _main(study: str, file: Path, data_dir: Path | None) -> int:
    if file.suffix != SUFFIX:
        raise ValueError(f"{file} has not the suffix of torch's programs; give NAME{SUFFIX}")
    check_new("file", file)
    of_study = Study(fetch_study(study))
    model = image_model(of_study, "cpu", precision="fp32", data_dir=data_dir)
    write_whole(file, export(model, of_study.spec["space"]))
    side = model.stored_size
    print(f"{file}: uint8 (N, 3, {side}, {side}) -> probabilities (N, {len(model.classes)}), fp32")
    return 0
