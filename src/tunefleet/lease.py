"""Who drives a study under a URL? Its lease says: a file beside it that the driver renews while it lives.

An object store has no lock. So a driver writes its lease, reads it back, and does so again every few seconds;
one that finds another's has lost the study and stops. Drivers that start within the same second may each see
their own lease first; all but the last find out at their next heartbeat.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunefleet.host import process_start
from tunefleet.store import BRIEF_SECONDS, Store, StoreError

NAME = "lease.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a heartbeat, while another driver watches
FORGOTTEN_SECONDS = 600.0  # the same without watching: clocks of two machines differ by less
POLL_SECONDS = 2.0


class Lease:
    """The right to drive one study; ``say`` tells the user what is waited for."""

    def __init__(self, store: Store, say: Callable[[str], None]) -> None:
        self.store, self.say = store, say
        self.lost = ""  # to which driver, in a sentence
        self._failing: tuple[float, str] | None = None  # since when the store is out of reach, and why
        pid = os.getpid()
        self._identity = {"id": uuid.uuid4().hex, "pid": pid, "started": process_start(pid), **_host()}
        self._ended, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> None:
        """Take the lease once no other driver has it, and renew it from then on.

        Raises:
            ValueError: Another driver lives.
            StoreError: The store is out of reach.
        """
        try:
            found = check_lease(self.store.patient(BRIEF_SECONDS))
        except StoreError as error:
            self.say(f"{error}; waiting up to {self.store.patience:.0f} s")
            found = check_lease(self.store)
        if found:
            self._wait_until_stale(found)
        self._renew(self.store.patience)
        if self.lost:
            raise ValueError(f"{self.lost}; wait for it or stop it")
        self._thread.start()

    def look(self, patience: float) -> None:
        """Record whether another driver has the lease.

        Raises:
            StoreError: The store is out of reach.
        """
        found = read_lease(self.store.patient(patience))
        if found and found.get("id") != self._identity["id"]:
            self.lost = f"{self.store.location} is now driven by {_named(found)}"

    def release(self, reachable: bool = True) -> None:
        """Stop renewing the lease, and remove it where the store is reachable: none has to wait then."""
        self._ended.set()
        if not reachable or self.lost or not self._writing.acquire(timeout=BRIEF_SECONDS):
            return
        try:
            self.look(BRIEF_SECONDS)
            if not self.lost:
                self.store.patient(BRIEF_SECONDS).remove(NAME)
        except StoreError:
            pass  # it goes stale
        finally:
            self._writing.release()

    def note(self, error: StoreError) -> None:
        """Record that the store is out of reach; the next renewal of the lease records that it is back."""
        self._failing = (self._failing[0] if self._failing else time.monotonic(), str(error))

    def trouble(self) -> str:
        """Return for how long the store has been out of reach, in a few words; nothing where it is not."""
        if self._failing is None:
            return ""
        return f"{self._failing[1]} for {time.monotonic() - self._failing[0]:.0f} s; transfers wait"

    def _wait_until_stale(self, found: dict[str, Any]) -> None:
        """Return once another driver's lease is not renewed for long; a driver that lives is an error."""
        if time.time() - found.get("at", time.time()) > FORGOTTEN_SECONDS:
            return
        driven = f"{self.store.location} is driven by {_named(found)}"
        self.say(f"{driven}; waiting up to {STALE_SECONDS:.0f} s to see whether it still runs")
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            now = read_lease(self.store)
            if now is None:
                return
            if now != found:
                raise ValueError(f"{driven}, which still runs; wait for it or stop it")

    def _keep(self) -> None:
        """Renew the lease until it is lost or released."""
        while not self._ended.wait(BEAT_SECONDS) and not self.lost:
            try:
                self.look(0)
                if not self.lost:
                    self._renew(0)
                self._failing = None
            except StoreError as error:
                self.note(error)

    def _renew(self, patience: float) -> None:
        """Write the lease, unless it has been released."""
        with self._writing:
            if self._ended.is_set():
                return
            content = json.dumps(self._identity | {"at": time.time()}).encode()
            self.store.patient(patience).write(content, NAME)
        self.look(patience)


def read_lease(store: Store) -> dict[str, Any] | None:
    """Return a study's lease as it is in the store; None: there is none."""
    content = store.read(NAME)
    try:
        return None if content is None else dict(json.loads(content))
    except (ValueError, TypeError):
        return {"id": content.hex() if content else ""}  # of no driver that could be asked


def check_lease(store: Store) -> dict[str, Any] | None:
    """Return the lease of a driver that may live, for all that is known on this host; None: there is none.

    Raises:
        ValueError: It is a process of this host, and lives.
        StoreError: The store is out of reach.
    """
    found = read_lease(store)
    if not found or found.get("host") != _host()["host"]:
        return found
    if found["pid"] == os.getpid() or process_start(found["pid"]) != found.get("started"):
        return None  # it has ended, or was this very process, at an earlier attempt
    raise ValueError(f"{store.location} is driven by {_named(found)}; wait for it or stop it")


def _named(found: dict[str, Any]) -> str:
    return f"process {found.get('pid', '?')} on {found.get('name', 'another machine')}"


def _host() -> dict[str, str]:
    """Return what tells this host from others, and this boot and container from others of the host."""
    name = socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"name": name, "host": f"{name} {boot} {Path('/proc/self/ns/pid').readlink()}"}
