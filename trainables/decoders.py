"""Decode on all cores, in processes that run trainables/decoding.py and are fed chunk after chunk.

Pillow holds the GIL for most of a small image, so threads gain nothing; multiprocessing would import the
user's main module in each process.
"""

import contextlib
import json
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tunefleet.trainables import decoding
from tunefleet.trainables.decoding import Decoder, Entry

Chunk = tuple[list[Entry], list[int], list[int]]  # arguments of Decoder.run


def run_chunks(
    arguments: dict[str, Any], chunks: Iterable[slice], chunk_of: Callable[[slice], Chunk], processes: int
) -> Generator[dict[str, Any]]:
    """Yield the result of Decoder.run for each chunk, in order; with one process, in this one.

    Args:
        arguments: Decoder's.
        chunks: Index ranges of images.
        chunk_of: Builds a chunk from its range, when it is sent.
        processes: Number of processes.

    Raises:
        ValueError: A process cannot be started, or died.
    """
    if processes <= 1:
        decoder = Decoder(**arguments)
        with contextlib.closing(decoder):
            yield from (decoder.run(*chunk_of(chunk)) for chunk in chunks)
        return
    idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()

    def ask(chunk: slice) -> dict[str, Any]:
        process = idle.get()
        try:
            return _ask(process, chunk_of(chunk))
        finally:
            idle.put(process)  # a dead one as well: its next chunk fails, and no thread waits forever

    # The processes are killed first, which ends the threads that wait for their answers.
    with ThreadPoolExecutor(processes) as pool, contextlib.ExitStack() as started:
        for _ in range(processes):
            idle.put(started.enter_context(_process(arguments)))
        yield from pool.map(ask, chunks)


@contextlib.contextmanager
def _process(arguments: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Context manager: a process of decoding.py, killed at the end."""
    pipe = subprocess.PIPE
    try:
        # -P keeps the working directory off sys.path. In its own session, Ctrl-C does not reach the process;
        # it exits at the end of its stdin, that is, with this process.
        process = subprocess.Popen(
            [sys.executable, "-P", decoding.__file__],
            stdin=pipe,
            stdout=pipe,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        raise ValueError(f"cannot start processes that decode ({error.strerror}); free memory") from error
    try:
        _send(process, arguments)
        yield process
    finally:
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.__exit__(None, None, None)  # closes the pipes and waits


def _send(process: subprocess.Popen[str], message: Any) -> None:
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):  # it died: it will not answer
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()


def _ask(process: subprocess.Popen[str], chunk: Chunk) -> dict[str, Any]:
    assert process.stdout
    _send(process, chunk)
    if answer := process.stdout.readline():
        return json.loads(answer)
    code = process.wait()
    reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    raise ValueError(
        f"a process that decodes images died ({reason}); free memory, or give a smaller --image-size"
    )
