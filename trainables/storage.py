"""Where is a study kept that its nodes share no disk for? Under a URL of an object store, through pyarrow.

A store has no appending and no renaming that is cheap; a whole file appears at once or not at all. So each
node works on a copy of its own and puts whole files.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pyarrow import fs

ATTEMPTS = 3  # of a transfer; a store that is busy or out of reach for a moment costs no trial
WAIT_SECONDS = 2.0  # after the first failure, twice as long after each


@dataclass(frozen=True)
class Storage:
    """The files of one study in an object store; only the URL travels between processes.

    Args:
        url: ``s3://bucket/prefix/NAME``, ``gs://…`` or another that ``pyarrow.fs`` knows. Credentials and
            AWS_ENDPOINT_URL come from the environment of each node, as for any client.
    """

    url: str

    def put(self, file: Path, name: str) -> None:
        """Puts a file under a name, in place of what was there.

        Raises:
            OSError: The store cannot be written.
        """
        system, root = _open(self.url)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with file.open("rb") as source, system.open_output_stream(f"{root}/{name}") as target:
                    shutil.copyfileobj(source, target)
                return
            except OSError:
                if attempt == ATTEMPTS or not file.exists():
                    raise
                time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))

    def get(self, name: str, file: Path) -> bool:
        """Writes what lies under a name to a file, whole; returns False where nothing does.

        Raises:
            OSError: The store cannot be read.
        """
        system, root = _open(self.url)
        if system.get_file_info(f"{root}/{name}").type != fs.FileType.File:
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.tmp")
        with system.open_input_stream(f"{root}/{name}") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target)
        temporary.replace(file)
        return True

    def names(self, under: str = "") -> list[str]:
        """Returns the names of all files, or of those under a folder's name."""
        system, root = _open(self.url)
        selector = fs.FileSelector(f"{root}/{under}".rstrip("/"), recursive=True, allow_not_found=True)
        found = [info.path for info in system.get_file_info(selector) if info.type == fs.FileType.File]
        return sorted(path.removeprefix(f"{root}/") for path in found)

    def remove(self, name: str) -> None:
        """Removes a file; nothing happens where there is none."""
        system, root = _open(self.url)
        if system.get_file_info(f"{root}/{name}").type == fs.FileType.File:
            system.delete_file(f"{root}/{name}")


def is_url(place: object) -> bool:
    """Returns whether a place is an object store's and no folder of this machine."""
    return "://" in str(place) and not str(place).startswith("file://")


@lru_cache
def _open(url: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system of a URL, and the path in it.

    Raises:
        ValueError: pyarrow knows no such store.
    """
    try:
        system, path = fs.FileSystem.from_uri(url)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{url} is no storage that can be opened ({reason}); give s3://BUCKET/PREFIX, or a folder "
            "that all nodes share"
        ) from error
    return system, path.rstrip("/")
