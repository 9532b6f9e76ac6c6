"""How does a study's folder get into an object store, and back? Files that changed, every few seconds.

The driver works in a folder of its own disk; what its storage lacks is put there beside the study, so that
the loss of the driver's machine loses seconds of the journal and no epoch (checkpoints are ahead of it, and
``--resume URL`` reads both). By hand, where a store was out of reach at the end::

    python -m search.mirror studies/NAME
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from search.journal import Journal
from search.study_file import read_study
from trainables.command_line import Parser, exit_code
from trainables.storage import Storage

PERIOD_SECONDS = 5.0  # between looks at the folder
LOCAL_ONLY = ("checkpoints", "ray")  # Tune's files, and what workers put into the store themselves


class Mirror:
    """Copies one study's folder to its storage.

    Args:
        folder: The driver's.
        storage: The study's; None: the folder is all there is, and nothing is copied.
    """

    def __init__(self, folder: Path, storage: Storage | None) -> None:
        self.folder, self.storage = folder, storage
        self._sent: dict[str, tuple[int, int]] = {}  # by name: time of change and size
        self._copying = threading.Lock()

    def update(self) -> None:
        """Puts what has changed since the last time.

        Raises:
            OSError: The storage cannot be written.
        """
        if self.storage is None:
            return
        with self._copying:
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.folder)
                if name.parts[0] in LOCAL_ONLY or name.suffix in (".tmp", ".lock") or file.name == ".lock":
                    continue
                with contextlib.suppress(FileNotFoundError):  # replaced or removed meanwhile
                    stat = file.stat()
                    mark = (stat.st_mtime_ns, stat.st_size)
                    if file.is_file() and self._sent.get(str(name)) != mark:
                        self.storage.put(file, name.as_posix())
                        self._sent[str(name)] = mark

    def paused(self) -> threading.Lock:
        """Returns a context in which nothing is put, for files that the storage is not to keep."""
        return self._copying

    def finish(self, seconds: float | None = None) -> str:
        """Puts the rest; returns what to tell the user, nothing where all is there.

        Args:
            seconds: How long that may take; None: as long as it does.
        """
        if self.storage is None:
            return ""
        failed: list[str] = []

        def update() -> None:
            try:
                self.update()
            except OSError as error:
                failed.append(str(error).partition("\n")[0])

        thread = threading.Thread(target=update, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            failed.append(f"not done after {seconds:g} s")
        if failed:
            reason = failed[0]
            return (
                f"{self.storage.url} is not complete ({reason}); all of it is in {self.folder}. "
                f"To put it there: python -m search.mirror {self.folder}"
            )
        return ""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keeps the storage up to date while a study runs; a store out of reach is tried again."""
        if self.storage is None:
            yield
            return
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(PERIOD_SECONDS):
                with contextlib.suppress(OSError):  # finish() tells
                    self.update()

        thread = threading.Thread(target=follow, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def bring(url: str) -> Path:
    """Brings a study from its storage into studies/NAME, to go on with it; returns that folder.

    A copy that is there already and knows more of the study is left as it is.

    Raises:
        ValueError: There is no study under the URL.
    """
    storage = Storage(url.rstrip("/"))
    folder = Path("studies") / storage.url.rpartition("/")[2]
    if folder.name in ("", "..", "studies"):
        raise ValueError(f"{url} names no study; give s3://BUCKET/PREFIX/NAME")
    try:
        names = [name for name in storage.names() if not name.startswith(LOCAL_ONLY)]
        if strange := [name for name in names if ".." in Path(name).parts]:
            raise ValueError(f"{url} holds {strange[0]}, which would lie outside the study; remove it")
        if "study.json" not in names:
            raise ValueError(f"{url} holds no study: there is no study.json in it")
        journal = folder / "reports.jsonl"
        known = len(Journal(journal).read())
        fetched = folder / "reports.jsonl.fetched"
        if storage.get("reports.jsonl", fetched) and len(Journal(fetched).read()) < known:
            names = []
        fetched.unlink(missing_ok=True)
        for name in names:
            storage.get(name, folder / name)
    except OSError as error:
        raise ValueError(f"{url} cannot be read ({str(error).partition(chr(10))[0]})") from None
    return folder


def storage_of(url: str | None, folder: Path) -> Storage | None:
    """Returns what holds the study of a folder, given its ``--storage``; None: the folder does."""
    return Storage(f"{url.rstrip('/')}/{folder.name}") if url else None


def main(arguments: list[str] | None = None) -> int:
    """Puts a study's folder into its storage; returns the exit code."""
    parser = Parser(prog="python -m search.mirror", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="the study's folder")
    folder = parser.parse_args(arguments).study.resolve()

    def copy() -> int:
        storage = storage_of(read_study(folder)["options"].get("storage"), folder)
        if storage is None:
            raise ValueError(f"{folder} has no storage; it was begun without --storage URL")
        left = Mirror(folder, storage).finish()
        print(f"error: {left}" if left else storage.url, file=sys.stderr if left else sys.stdout)
        return int(bool(left))

    return exit_code(copy)


if __name__ == "__main__":
    sys.exit(main())
