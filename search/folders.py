"""Where does a study live? In a folder of its own, new or left by one that was stopped."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from tunefleet.cli import shell
from tunefleet.search.lease import NAME as LEASE
from tunefleet.search.options import RESUMABLE, StudyOptions, flag
from tunefleet.search.study_file import lock_of, read_events, read_study
from tunefleet.store import BRIEF_SECONDS, Store, reason
from tunefleet.trainables.data import BUILT_IN, expanded


def place_of(options: StudyOptions, folder: Path | None, storage: str | None) -> tuple[StudyOptions, Path]:
    """Returns the options with where the study is kept, and its folder.

    Raises:
        ValueError: Something is there already, or nothing can be written there.
    """
    if storage and Store(storage).folder is None:
        options = dataclasses.replace(options, storage=storage)
    elif storage and folder:
        raise ValueError(f"--storage={storage} is a folder, and so is --study-dir={folder}; give one of them")
    under = Path("studies") if options.storage or not storage else expanded("--storage", storage)
    folder = expanded("--study-dir", folder) if folder else default_folder(options.space, options.data, under)
    check_free(folder)
    check_storage(options.storage, folder.name)
    return absolute(options), folder


def absolute(options: StudyOptions) -> StudyOptions:
    """Returns options whose paths are absolute: a node, or a resume, may have another working directory."""
    paths: dict[str, Any] = {"data_dir": str(expanded("--data-dir", options.data_dir).absolute())}
    if options.data not in BUILT_IN and (data := expanded("--data", options.data)).exists():
        paths["data"] = str(data.absolute())
    if (weights := expanded("--weights", options.weights)).is_file():
        paths["weights"] = str(weights.absolute())
    return dataclasses.replace(options, **paths)


def unfinished(folder: Path, changes: dict[str, Any]) -> tuple[StudyOptions, dict[str, Any]]:
    """Returns the options of a study to go on with, and its study.json.

    Args:
        folder: The study's.
        changes: New values of options in RESUMABLE.

    Raises:
        ValueError: No study, one that is done or at work, or a change of what makes its results.
    """
    content = read_study(folder)
    fixed = [flag(name) for name in changes if name not in RESUMABLE]
    if fixed:
        allowed = ", ".join(flag(name) for name in RESUMABLE)
        raise ValueError(f"{', '.join(fixed)} cannot change when a study is resumed; what can: {allowed}")
    if content["status"] == "done":
        raise ValueError(f"{folder} is done; there is nothing to resume")
    lock_of(folder).release()  # before anything slow: another process may be at it
    read_events(folder, content)
    try:
        return absolute(StudyOptions(**(content["options"] | changes))), content
    except TypeError as error:
        raise ValueError(f"{folder / 'study.json'} has options of another version ({error})") from None


def check_free(folder: Path) -> None:
    """Raises ValueError where a new study's folder holds something already, or cannot be made."""
    try:
        if (folder / "study.json").exists():
            raise ValueError(
                f"--study-dir={folder} holds another study; give a new folder, or: "
                f"{shell('tunefleet', 'resume', folder)}"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--study-dir={folder} is no empty folder; give a new one")
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"--study-dir={folder} cannot be made ({error.strerror}); give another") from error


def check_storage(url: str | None, name: str) -> None:
    """Raises ValueError where an object store cannot be written and read, or holds such a study."""
    if url is None:
        return
    store = Store(url).below(name).patient(BRIEF_SECONDS)
    try:
        if set(store.names()) - {LEASE}:
            raise ValueError(
                f"{store.place} holds another study; give another --study-dir name, or: "
                f"{shell('tunefleet', 'resume', store.place)}"
            )
        store.write(b"", "probe")
        store.remove("probe")
    except OSError as error:
        why = reason(error.__cause__ or error)
        raise ValueError(
            f"--storage={url} cannot be used ({why}); check bucket, credentials and AWS_ENDPOINT_URL"
        ) from error


def default_folder(space: str, data: str, under: Path = Path("studies")) -> Path:
    """Returns a new folder's name: space, data and time."""
    name = f"{space}-{Path(data).name.split('.')[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, again = under / name, 2
    while folder.exists():
        folder, again = under / f"{name}-{again}", again + 1
    return folder
