"""What was asked of a study, and how does it stand? study.json, read and written whole, and its lock.

Imports nothing heavy: the process that feeds W&B beside a study needs it (search/wandb_sync.py).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tunefleet.files import write_whole
from tunefleet.search.journal import Journal, finite

KEYS = {"space": str, "status": str, "options": dict, "rungs": list}  # that every reader relies on
CRC = ',\n  "crc": "'  # the last entry: the CRC-32 of what precedes it; older files have none


class RunningError(ValueError):
    """Another process runs the study."""


def read_study(study_dir: Path) -> dict[str, Any]:
    """Return study.json.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    file = study_dir / "study.json"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{study_dir} holds no study: there is no study.json in it") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error})") from None
    return parse_study(content, str(file))


def parse_study(content: bytes, place: str) -> dict[str, Any]:
    """Return what a study.json says.

    Args:
        content: The file's.
        place: Where it lies, for the error.

    Raises:
        ValueError: It is damaged.
    """
    try:
        text = content.decode()
        study = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} cannot be read ({error})") from None
    crc = _crc(text.rpartition(CRC)[0])
    whole = isinstance(study, dict) and all(isinstance(study.get(key), KEYS[key]) for key in KEYS)
    if not whole or study.pop("crc", crc) != crc:
        raise ValueError(f"{place} is damaged; restore it from a copy")
    return study


def write_study(study_dir: Path, study: dict[str, Any]) -> None:
    """Write study.json, whole or not at all; for the process that holds the study's lock."""
    content = json.dumps({key: finite(value) for key, value in study.items()}, indent=2).removesuffix("\n}")
    write_whole(study_dir / "study.json", f'{content}{CRC}{_crc(content)}"\n}}\n'.encode())


def _crc(content: str) -> str:
    return f"{zlib.crc32(content.encode()):08x}"


def read_events(study_dir: Path, study: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all events of a study.

    Args:
        study_dir: Its folder.
        study: Its study.json.

    Raises:
        ValueError: The journal is damaged, or lacks events that study.json was written from.
    """
    journal = Journal(study_dir / "reports.jsonl")
    events = journal.read()
    journal.check_holds(events, study.get("events", 0))
    return events


def lock_of(folder: Path) -> FileLock:
    """Return a study's lock, held; the system frees it when the process dies.

    Raises:
        RunningError: Another process holds it.
        ValueError: The folder cannot be locked.
    """
    lock = FileLock(folder / ".lock", thread_local=False)  # released by whichever thread ends the study
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunningError(f"another process is running {folder}; wait for it or stop it") from None
    except (OSError, NotImplementedError) as error:
        raise ValueError(f"{folder} cannot be locked ({error}); give a folder on another disk") from None
    return lock
