"""Who drives a study in a store? Its lease says: a file beside it that the driver renews while it lives.

A store has no lock. So a driver writes its lease, reads it back, and does so again every few seconds; whoever
finds another's has lost the study and stops. Drivers that start within the same second may each see their own
lease first; all but the last find out at their next heartbeat.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunefleet.trainables.storage import BRIEF_SECONDS, Storage, StoreError

NAME = "lease.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a heartbeat, while another driver watches
FORGOTTEN_SECONDS = 600.0  # the same without watching: clocks of two machines differ by less
POLL_SECONDS = 2.0


class Lease:
    """The right to drive one study.

    Args:
        storage: Where the study is kept.
        say: Tells the user what is waited for.
    """

    def __init__(self, storage: Storage, say: Callable[[str], None]) -> None:
        self.storage, self.say = storage, say
        self.lost = ""  # to whom, in a sentence
        self._failing: tuple[float, str] | None = None  # since when the store has been out of reach, and why
        pid = os.getpid()
        self._identity = {"id": uuid.uuid4().hex, "pid": pid, "started": _started(pid), **_host()}
        self._seen = 0.0  # when the lease was last found to be ours
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> None:
        """Take the lease once no other driver has it, and renew it from then on.

        Raises:
            ValueError: Another driver lives.
            StoreError: The store is out of reach.
        """
        try:
            found = check_lease(replace(self.storage, patience=BRIEF_SECONDS))
        except StoreError as error:
            self.say(f"{error}; waiting up to {self.storage.patience:.0f} s")
            found = check_lease(self.storage)
        if found:
            self._wait_until_stale(found)
        self._renew(self.storage.patience)
        if self.lost:
            raise ValueError(f"{self.lost}; wait for it or stop it")
        self._thread.start()

    def check(self) -> None:
        """Look whether the lease is still ours, unless it was so recently that no other driver can have it.

        Raises:
            StoreError: The store is out of reach.
        """
        if time.time() - self._seen > STALE_SECONDS / 2:  # this machine slept, or the store was away
            self._look(0)

    def release(self, reachable: bool = True) -> None:
        """Stop renewing the lease, and give it back where the store is reachable: none has to wait then."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(1.0)
        if reachable and not self.lost:
            with contextlib.suppress(StoreError):
                self._look(BRIEF_SECONDS)
                if not self.lost:
                    replace(self.storage, patience=BRIEF_SECONDS).remove(NAME)

    def note(self, error: StoreError) -> None:
        """Take note that the store is out of reach; the next renewal of the lease says that it is back."""
        self._failing = (self._failing[0] if self._failing else time.monotonic(), str(error))

    def trouble(self) -> str:
        """Return for how long the store has been out of reach, in a few words; nothing where it is not."""
        if self._failing is None:
            return ""
        since, why = self._failing
        return f"{why} for {time.monotonic() - since:.0f} s; transfers wait"

    def _wait_until_stale(self, found: dict[str, Any]) -> None:
        """Return once another driver's lease has not been renewed for long.

        Raises:
            ValueError: That driver lives.
        """
        driven = f"{self.storage.url} is driven by {_named(found)}"
        if time.time() - found.get("at", time.time()) > FORGOTTEN_SECONDS:
            return
        self.say(f"{driven}; waiting up to {STALE_SECONDS:.0f} s to see whether it still runs")
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            now = read_lease(self.storage)
            if now is None:
                return
            if now != found:
                raise ValueError(f"{driven}, which still runs; wait for it or stop it")

    def _keep(self) -> None:
        """Renew the lease until it is lost or given back."""
        while not self._ended.wait(BEAT_SECONDS) and not self.lost:
            try:
                self._look(0)
                if not self.lost and not self._ended.is_set():
                    self._renew(0)
                self._failing = None
            except StoreError as error:
                self.note(error)

    def _renew(self, patience: float) -> None:
        content = json.dumps(self._identity | {"at": time.time()}).encode()
        replace(self.storage, patience=patience).write(content, NAME)
        self._look(patience)

    def _look(self, patience: float) -> None:
        """Take note of another driver's lease."""
        found = read_lease(replace(self.storage, patience=patience))
        if found and found.get("id") != self._identity["id"]:
            self.lost = f"{self.storage.url} is now driven by {_named(found)}"
        self._seen = time.time()


def read_lease(storage: Storage) -> dict[str, Any] | None:
    """Return a study's lease as it stands in the store; None: there is none.

    Raises:
        StoreError: The store is out of reach.
    """
    content = storage.read(NAME)
    if content is None:
        return None
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {"id": content.hex()}  # nobody's that could be asked


def check_lease(storage: Storage) -> dict[str, Any] | None:
    """Return the lease of a driver that may live, for all that is known on this host; None: there is none.

    Raises:
        ValueError: It is a process of this host, and lives.
        StoreError: The store is out of reach.
    """
    found = read_lease(storage)
    if not found or found.get("host") != _host()["host"]:
        return found
    if found["pid"] == os.getpid() or _started(found["pid"]) != found.get("started"):
        return None  # it has ended, or was this very process, at an earlier attempt
    raise ValueError(f"{storage.url} is driven by {_named(found)}; wait for it or stop it")


def _named(found: dict[str, Any]) -> str:
    return f"process {found.get('pid', '?')} on {found.get('name', 'another machine')}"


def _host() -> dict[str, str]:
    """Return what tells this host from others, and this boot and container from others of the host."""
    name = socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"name": name, "host": f"{name} {boot} {Path('/proc/self/ns/pid').readlink()}"}


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; None: it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie, dead
