"""How does a study's folder get into an object store, and back? Files that changed, every few seconds.

The driver works in a folder of its own disk; what its storage lacks is put there beside the study, so that
the loss of the driver's machine loses seconds of the journal and no epoch (checkpoints are ahead of it, and
``--resume URL`` reads both). By hand, where a store was out of reach at the end::

    tunefleet push studies/NAME
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from tunefleet.cli import Parser, exit_code, printable, shell
from tunefleet.journal import Journal
from tunefleet.search.lease import NAME as LEASE
from tunefleet.search.lease import Lease, check_lease
from tunefleet.study import ASKED, lock_study, parse, read_study
from tunefleet.trainables.storage import BRIEF_SECONDS, Storage, StoreError, url_under, within

PERIOD_SECONDS = 5.0  # between looks at the folder
LOCAL_ONLY = ("checkpoints", "ray")  # Tune's files, and what workers put into the store themselves


class Mirror:
    """Copies one study's folder to its storage, for the driver that has the study's lease.

    Args:
        folder: The driver's.
        storage: The study's; None: the folder is all there is, and nothing is copied.
        say: Tells the user what is waited for.
    """

    def __init__(self, folder: Path, storage: Storage | None, say: Callable[[str], None] = print) -> None:
        self.folder, self.storage, self.say = folder, storage, say
        self.lease = Lease(storage, say) if storage else None
        self._sent: dict[str, tuple[int, int]] = {}  # by name: time of change and size
        self._copying = threading.Lock()

    @property
    def lost(self) -> str:
        """Return who has taken the study over; nothing while it is this driver's."""
        return self.lease.lost if self.lease else ""

    def trouble(self) -> str:
        """Return for how long the store has been out of reach, in a few words; nothing where it is not."""
        return self.lease.trouble() if self.lease else ""

    def update(self, patience: float = 0) -> None:
        """Put what has changed since the last time, unless the study is lost to another driver.

        Args:
            patience: Seconds for which each file is tried while the store is out of reach.

        Raises:
            OSError: The storage cannot be written.
        """
        if self.storage is None or self.lease is None:
            return
        self.lease.check()
        if self.lost:
            return
        if not self._copying.acquire(timeout=max(patience, 1.0)):
            raise StoreError(f"{self.storage.url} does not answer")
        try:
            storage, before = replace(self.storage, patience=patience), _mark(self.folder / "study.json")
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.folder)
                if name.parts[0] in LOCAL_ONLY or name.suffix in (".tmp", ".lock") or file.name == ".lock":
                    continue
                mark = _mark(file)
                if mark in (None, self._sent.get(str(name))) or not file.is_file():
                    continue
                if file.name == "study.json" and mark != before:
                    continue  # the next time: it counts lines that the journal put just now may not have
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    storage.put(file, name.as_posix().encode(errors="backslashreplace").decode())
                    self._sent[str(name)] = mark
        finally:
            self._copying.release()

    def paused(self) -> threading.Lock:
        """Return a context in which nothing is put, for files that the storage is not to keep."""
        return self._copying

    def finish(self, patience: float | None = None) -> str:
        """Put the rest and give the lease back; return what to tell the user, nothing where all is there.

        Args:
            patience: Seconds for which each file is tried; None: the storage's, after a word to the user.
        """
        if self.storage is None or self.lease is None:
            return ""
        left = ""
        try:
            try:
                limit = BRIEF_SECONDS if patience is None else patience
                within(limit, partial(self.update, limit))
            except (StoreError, TimeoutError) as error:
                if patience is not None:
                    raise
                self.say(f"{self.storage.url}: {error}; waiting up to {self.storage.patience:.0f} s")
                self.update(self.storage.patience)
        except OSError as error:
            left = str(error).partition("\n")[0]
        except KeyboardInterrupt:
            left = "interrupted"
        self.lease.release(reachable=not left)
        if self.lost:
            return f"{self.lost}; what is in {self.folder} was not put there"
        if not left:
            return ""
        return (
            f"{self.storage.url} is not complete ({left}); all of it is in {self.folder}. "
            f"To put it there: {shell('tunefleet', 'push', self.folder)}"
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Context manager: take the lease, and keep the storage up to date until ``finish`` puts the rest.

        Raises:
            ValueError: Another driver has the study, or the store knows more of it than the folder.
            StoreError: The store is out of reach.
        """
        if self.storage is None or self.lease is None:
            yield
            return
        self.lease.take()
        try:
            if ahead(self.storage, self.folder) > 0:
                raise ValueError(
                    f"{self.storage.url} knows more of the study than {self.folder}; resume it by its URL"
                )
        except (ValueError, StoreError):
            self.lease.release()
            raise
        ended, lease = threading.Event(), self.lease

        def follow() -> None:
            while not ended.wait(PERIOD_SECONDS):
                try:
                    self.update()
                except StoreError as error:
                    lease.note(error)
                except OSError:
                    continue  # a file of this machine, of which finish() tells

        thread = threading.Thread(target=follow, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(1.0)


def ahead(storage: Storage, folder: Path) -> int:
    """Return how many events more than its folder a study's storage knows; negative: how many fewer.

    Raises:
        ValueError: One of the journals is damaged, or neither continues the other.
        StoreError: The store is out of reach.
    """
    here = Journal(folder / "reports.jsonl").read()
    with tempfile.TemporaryDirectory() as temporary:
        copy = Journal(Path(temporary) / "reports.jsonl")
        storage.get("reports.jsonl", copy.file)
        try:
            there = copy.read()
        except ValueError as error:
            damage = str(error).partition(";")[0].removeprefix(f"{temporary}/")
            raise ValueError(f"{storage.url}: {damage}; restore it from a copy") from None
    common = min(len(here), len(there))
    if here[:common] != there[:common]:
        raise ValueError(
            f"{folder} and {storage.url} differ, and neither continues the other; rename the folder to "
            "resume what the store has"
        )
    return len(there) - len(here)


def bring(url: str) -> Path:
    """Bring a study from its storage into studies/NAME, to continue it there; return that folder.

    A copy that is there already and knows more of the study is left as it is.

    Raises:
        ValueError: There is no study under the URL.
    """
    storage = Storage(url.rstrip("/"), patience=BRIEF_SECONDS)
    name = unquote(storage.url.rpartition("/")[2], errors="surrogateescape")
    folder = Path("studies") / name
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{url} names no study; give s3://BUCKET/PREFIX/NAME")
    try:
        check_lease(storage)
        names = [name for name in storage.names() if not name.startswith(LOCAL_ONLY) and name != LEASE]
        if strange := [name for name in names if ".." in Path(name).parts]:
            raise ValueError(f"{url} holds {strange[0]}, which would lie outside the study; remove it")
        content = storage.read("study.json")
        if content is None:
            raise ValueError(f"{url} holds no study: there is no study.json in it")
        parse(content, f"{storage.url}/study.json", ASKED)
        if ahead(storage, folder) >= 0:
            for name in names:
                storage.get(name, folder / name)
    except StoreError as error:
        raise ValueError(str(error)) from None
    return folder


def storage_of(url: str | None, folder: Path) -> Storage | None:
    """Returns what holds the study of a folder, given its ``--storage``; None: the folder does."""
    return Storage(url_under(url, folder.name)) if url else None


def _mark(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file does; None: it is gone."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size


def main(arguments: list[str] | None = None) -> int:
    """Put a study's folder into its storage; return the exit code."""
    parser = Parser(prog="tunefleet push", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="the study's folder")
    folder = Path(os.path.realpath(parser.parse_args(arguments).study))

    def copy() -> int:
        storage = storage_of(read_study(folder)["options"].get("storage"), folder)
        if storage is None:
            raise ValueError(f"{folder} has no storage; it was begun without --storage URL")
        mirror, lock = Mirror(folder, replace(storage, patience=BRIEF_SECONDS)), lock_study(folder)
        try:
            with mirror.running():
                left = mirror.finish(BRIEF_SECONDS)
        except StoreError as error:
            left = str(error)
        finally:
            lock.release()
        said = f"error: {left}" if left else storage.url
        print(printable(said), file=sys.stderr if left else sys.stdout)
        return int(bool(left))

    return exit_code(copy)


if __name__ == "__main__":
    sys.exit(main())
