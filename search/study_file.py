"""What was asked of a study, and how does it stand? study.json, read and written whole.

Imports nothing heavy: the process that feeds W&B beside a study needs it (search/wandb_sync.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from search.journal import finite


def read_study(study_dir: Path) -> dict[str, Any]:
    """Returns study.json.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    file = study_dir / "study.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{study_dir} holds no study: there is no study.json in it") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from None


def write_study(study_dir: Path, study: dict[str, Any]) -> None:
    """Writes study.json, whole or not at all."""
    study = {key: finite(value) for key, value in study.items()}
    write_whole(study_dir / "study.json", (json.dumps(study, indent=2) + "\n").encode())


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(file)
