"""Copy a study's folder to the URL that keeps it, and back: what changed, every few seconds.

The driver works in a folder of its own disk. So the loss of its machine loses seconds of the journal and no
epoch: checkpoints are ahead of it, and ``tunefleet resume URL`` reads both. By hand, where the store was out
of reach when a study ended::

    tunefleet push studies/NAME
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from tunefleet.cli import Parser, exit_code, printable, shell
from tunefleet.journal import Journal
from tunefleet.lease import NAME as LEASE
from tunefleet.lease import Lease, check_lease
from tunefleet.store import BRIEF_SECONDS, Store, StoreError, within
from tunefleet.study import SPEC, lock_study, parse, read_study

PERIOD_SECONDS = 5.0  # between looks at the folder
LOCAL_ONLY = ("checkpoints", "logs", "ray")  # Tune's files, and what workers write to the store themselves


class Mirror:
    """Copies one study's folder to its store, for the driver that has the study's lease.

    Where the store is the folder, nothing is copied. ``say`` tells the user what is waited for.
    """

    def __init__(self, folder: Path, store: Store, say: Callable[[str], None] = print) -> None:
        self.folder, self.store, self.say = folder, store, say
        self.lease = None if store.folder else Lease(store, say)
        self._sent: dict[str, tuple[int, int]] = {}  # by name: time of change and size
        self._copying = threading.Lock()
        self._given_up = threading.Event()

    @property
    def lost(self) -> str:
        """Return which driver has taken the study over; nothing while it is this one's."""
        return self.lease.lost if self.lease else ""

    def trouble(self) -> str:
        """Return for how long the store has been out of reach, in a few words; nothing where it is not."""
        return self.lease.trouble() if self.lease else ""

    def update(self, patience: float = 0) -> None:
        """Copy what has changed since the last time, unless the study is lost to another driver.

        Args:
            patience: Seconds for which each file is tried while the store is out of reach.

        Raises:
            OSError: The store cannot be written.
        """
        if self.lease is None:
            return
        self.lease.look(patience)  # this machine may have slept, or the store been away
        if self.lost:
            return
        if not self._copying.acquire(timeout=max(patience, 1.0)):
            raise StoreError(f"{self.store.location} does not answer")
        try:
            before = None
            with contextlib.suppress(FileNotFoundError):
                before = _mark(self.folder / "result.json")
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.folder)
                if name.parts[0] in LOCAL_ONLY or name.suffix in (".tmp", ".lock") or file.name == ".lock":
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    mark = _mark(file)
                    if mark == self._sent.get(str(name)) or not file.is_file():
                        continue
                    if file.name == "result.json" and mark != before:
                        continue  # the next time: it counts lines that the journal just copied may lack
                    target = name.as_posix().encode(errors="backslashreplace").decode()
                    self.store.patient(patience).write(file.read_bytes(), target)
                    self._sent[str(name)] = mark
        finally:
            self._copying.release()

    def paused(self) -> threading.Lock:
        """Return a context in which nothing is copied, for files that the store is not to keep."""
        return self._copying

    def finish(self, patience: float | None = None) -> str:
        """Copy the rest and release the lease; return what to tell the user, nothing where all is there.

        ``patience``: seconds for which each file is tried; None: the store's, after a word to the user.
        """
        if self.lease is None:
            return ""
        left, limit = "", BRIEF_SECONDS if patience is None else patience
        try:
            try:
                within(limit, partial(self.update, limit))
            except (StoreError, TimeoutError) as error:
                if patience is not None:
                    raise
                self.say(f"{self.store.location}: {error}; waiting up to {self.store.patience:.0f} s")
                within(math.inf, partial(self.update, self.store.patience), self._given_up)
        except OSError as error:
            left = str(error).partition("\n")[0]
        self.lease.release(reachable=not left)
        if self.lost:
            return f"{self.lost}; what is in {self.folder} was not put there"
        return left and (
            f"{self.store.location} is not complete ({left}); all of it is in {self.folder}. "
            f"To put it there: {shell('tunefleet', 'push', self.folder)}"
        )

    def release(self) -> None:
        """Release the lease of a study of which nothing was changed."""
        if self.lease:
            self.lease.release()

    def give_up(self) -> None:
        """Stop waiting for the store in ``finish``; a signal's answer once the study is done."""
        self._given_up.set()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Context manager: take the lease, and keep the store up to date until ``finish`` copies the rest.

        Raises:
            ValueError: Another driver has the study, or the store knows more of it than the folder.
            StoreError: The store is out of reach.
        """
        if self.lease is None:
            yield
            return
        lease, ended = self.lease, threading.Event()
        lease.take()
        try:
            if ahead(self.store, self.folder) > 0:
                raise ValueError(
                    f"{self.store.location} knows more of the study than {self.folder}; resume it by its URL"
                )
        except (ValueError, StoreError):
            lease.release()
            raise

        def follow() -> None:
            while not ended.wait(PERIOD_SECONDS):
                try:
                    self.update()
                except StoreError as error:
                    lease.note(error)
                except OSError:
                    continue  # a file of this machine, which finish() reports

        thread = threading.Thread(target=follow, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(1.0)


def ahead(store: Store, folder: Path) -> int:
    """Return how many events more than its folder a study's URL knows; negative: how many fewer.

    Raises:
        ValueError: One of the journals is damaged, or neither continues the other.
        StoreError: The store is out of reach.
    """
    local = Journal(folder / "reports.jsonl").read()
    with tempfile.TemporaryDirectory() as temporary:
        store.fetch(["reports.jsonl"], Path(temporary))
        try:
            remote = Journal(Path(temporary) / "reports.jsonl").read()
        except ValueError as error:
            damage = str(error).partition(";")[0].removeprefix(f"{temporary}/")
            raise ValueError(f"{store.location}: {damage}; restore it from a copy") from None
    common = min(len(local), len(remote))
    if local[:common] != remote[:common]:
        raise ValueError(
            f"{folder} and {store.location} differ, and neither continues the other; rename the folder to "
            "resume what the store has"
        )
    return len(remote) - len(local)


def fetch_study(location: str) -> Path:
    """Return the folder of a study; one under a URL is copied to studies/NAME first, to continue there.

    A copy that is there already and knows more of the study is left as it is.

    Raises:
        ValueError: There is no study under the URL.
    """
    store = Store(location.rstrip("/"), patience=BRIEF_SECONDS)
    if store.folder:
        return Path(location)
    name = unquote(store.location.rpartition("/")[2], errors="surrogateescape")
    folder = Path("studies") / name
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{location} names no study; give s3://BUCKET/PREFIX/NAME")
    try:
        check_lease(store)
        names = [name for name in store.names() if not name.startswith(LOCAL_ONLY) and name != LEASE]
        if strange := [name for name in names if ".." in Path(name).parts]:
            raise ValueError(f"{location} holds {strange[0]}, which would lie outside the study; remove it")
        content = store.read("study.json")
        if content is None:
            raise ValueError(f"{location} holds no study: there is no study.json in it")
        parse(content, f"{store.location}/study.json", SPEC)
        if ahead(store, folder) >= 0:
            store.fetch(names, folder)
    except StoreError as error:
        raise ValueError(str(error)) from None
    return folder


def _mark(file: Path) -> tuple[int, int]:
    """Return what changes when a file does."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


def main(arguments: list[str] | None = None) -> int:
    """Copy a study's folder to its URL; return the exit code."""
    parser = Parser(prog="tunefleet push", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="the study's folder")
    folder = Path(os.path.realpath(parser.parse_args(arguments).study))

    def push() -> int:
        store = Store.of_study(read_study(folder)["options"].get("storage"), folder).patient(BRIEF_SECONDS)
        if store.folder:
            raise ValueError(f"{folder} has no storage; it was started without --storage URL")
        mirror, lock = Mirror(folder, store), lock_study(folder)
        try:
            with mirror.running():
                left = mirror.finish(BRIEF_SECONDS)
        except StoreError as error:
            left = str(error)
        finally:
            lock.release()
        print(
            printable(f"error: {left}" if left else store.location), file=sys.stderr if left else sys.stdout
        )
        return int(bool(left))

    return exit_code(push)
