"""A command at work: what its studies print to, and what a signal does, which depends on how far a study is.

A command runs in a thread, and the main thread listens, and watches what the study cannot do without
(docs/decisions.md).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from tunefleet.cli import NOTHING_WRITTEN, end_at_once
from tunefleet.search.display import print_result

TICK_SECONDS = 0.05  # between looks; Ray (2.60) puts a handler of its own in place when it starts
LEAVE_TICK_SECONDS = 0.002  # the same while Ray shuts down
AFTERMATH_SECONDS = 1.5  # in which a signal, or the end of Ray's processes, explains an exception
SHUTDOWN_SECONDS = 4.0  # for Ray to end its processes; it takes 1
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """End the process; Python's own end, which takes the modules of torch and Ray apart, costs 1.5 s.

    A Ray whose processes are gone may not answer; what is left of it ends with this process. Signals come
    too late: Ray's shutdown (2.60) gives SIGTERM back its default action, by which this process would die.
    """
    import ray

    shutdown = threading.Thread(target=ray.shutdown, daemon=True)
    shutdown.start()
    until = time.monotonic() + SHUTDOWN_SECONDS
    while shutdown.is_alive() and time.monotonic() < until:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        shutdown.join(LEAVE_TICK_SECONDS)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class Stops:
    """What stops one command, and what is then done.

    Attributes:
        was_signalled: Whether a signal ever came.
        stop: Called in the main thread when a signal came, with an empty reason, or when ``watch`` gave one;
            returns the exit code, or None where the command is to end by itself.
        nothing_yet: What ``stop`` is before there is a study.
        watch: Called in the main thread again and again; returns why the command has to stop, or nothing.
    """

    def __init__(self) -> None:
        self.nothing_yet: Callable[[str], int | None] = say_nothing_written
        self.stop: Callable[[str], int | None] = say_nothing_written
        self.watch: Callable[[], str] = str
        self._turn = threading.Lock()
        self._stopping = self._signalled = False
        self.was_signalled = False  # ever

    def run(self, command: Callable[[], int]) -> int:
        """Run a command; return its exit code, or that of what stopped it.

        Raises:
            BaseException: What the command raises.
        """
        ended: list[int | BaseException] = []

        def work() -> None:
            try:
                ended.append(command())
            except BaseException as error:  # noqa: BLE001  raised again below, in the main thread
                ended.append(error)

        works, done = [work], threading.Event()

        def serve() -> None:
            works.pop()()  # and hold no study afterwards
            done.set()
            # the system ends Ray's servers with the thread that started them (PR_SET_PDEATHSIG, Linux), and a
            # second command of this process may find them useful
            threading.Event().wait()

        with self._listening() as listen:
            threading.Thread(target=serve, name="command", daemon=True).start()
            while not ended:
                done.wait(TICK_SECONDS)
                if (code := self._look(listen)) is not None:
                    return code
            if isinstance(ended[0], Exception) and not isinstance(ended[0], ValueError):
                # Ray's calls may fail before this process gets the signal that ended Ray
                until = time.monotonic() + AFTERMATH_SECONDS
                while time.monotonic() < until:
                    time.sleep(TICK_SECONDS)
                    if (code := self._look(listen)) is not None:
                        return code
        if isinstance(ended[0], BaseException):
            raise ended[0]
        return ended[0]

    def _look(self, listen: Callable[[], None]) -> int | None:
        """Answer what has come; return the exit code, None where the command runs on."""
        listen()
        reason = self.watch()
        return self._answer(reason) if self._signalled or reason else None

    def change(self, stop: Callable[[str], int | None], watch: Callable[[], str] = str) -> None:
        """Replace what answers a stop from now on; called by the command.

        Raises:
            SystemExit: It is being stopped, and has no more to do.
        """
        with self._turn:
            if self._stopping:
                raise SystemExit
            self.stop, self.watch = stop, watch

    @contextlib.contextmanager
    def held(self, stop: Callable[[str], int | None]) -> Iterator[None]:
        """Let signals wait for what is done inside; afterwards they have another answer.

        Raises:
            SystemExit: The command is being stopped.
        """
        with self._turn:
            if self._stopping:
                raise SystemExit
            yield
            self.stop = stop

    def _answer(self, reason: str) -> int | None:
        with self._turn:
            code = self.stop(reason)
            self._stopping, self._signalled = code is not None, False
        return code

    @contextlib.contextmanager
    def _listening(self) -> Iterator[Callable[[], None]]:
        """Take signals where this is the main thread; elsewhere they are somebody else's.

        Gives the function that installs the handlers again.
        """

        def note(number: int, frame: Any) -> None:
            self._signalled = self.was_signalled = True

        def listen() -> None:
            for number in SIGNALS:
                signal.signal(number, note)

        if threading.current_thread() is not threading.main_thread():
            yield lambda: None
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            yield listen
        finally:
            for number, handler in before.items():  # a script that ends has nothing more to answer
                signal.signal(number, signal.SIG_IGN if handler is end_at_once else handler)


def say_nothing_written(reason: str) -> int:
    """Answer a signal before there is a study; return the exit code."""
    print(
        f"error: {reason} before the study began; try again" if reason else NOTHING_WRITTEN, file=sys.stderr
    )
    return 3


@dataclass(frozen=True)
class Session:
    """A command at work: what its studies print to, and what a signal does.

    Attributes:
        resume: The words of the command that continues a study.
        finish: Prints the results of a finished study; returns the exit code.
        studies: The folders of those that it has begun.
        forecast: Of a dry run: epochs, final_epochs, and of images seconds and disk bytes.
        location: What is resumed instead of the study itself, such as a folder of several.
    """

    console: Console
    resume: tuple[str, ...] = ("tunefleet", "resume")
    finish: Callable[[Path, Console], int] = print_result
    location: Path | None = None
    studies: list[Path] = field(default_factory=list)
    forecast: dict[str, Any] = field(default_factory=dict)
    stops: Stops = field(default_factory=Stops)
