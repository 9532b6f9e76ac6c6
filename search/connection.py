"""Start Ray on this host, or join a cluster; and watch it.

What a study's own Ray needs are arguments of ``ray.init`` and environment variables; nothing is replaced.
It is not started by ``ray start``, whose processes outlive a killed driver, are found by ``ray.init("auto")``
of others, and include a client server, with a port of its own, that cannot be left out (2.60).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import secrets
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from tunefleet.cli import printable, shell
from tunefleet.files import is_full
from tunefleet.host import cpu_count, process_start

PROCESSES = ("gcs_server", "raylet")  # of a Ray on this host, without which there is none
WATCH_SECONDS = 1.0  # between looks at them
CLUSTER_WATCH_SECONDS = 5.0  # between looks at a joined cluster
CONNECT_SECONDS = 2.0
GONE_SECONDS = 45.0  # of silence, after which a cluster is gone; Ray waits 60
ADDRESS_SPACE_MIN = 8 * 10**9  # bytes; with 6 GB Ray's servers do not start (2.60)
JOIN_SECONDS = 10.0  # in which a cluster has to answer, twice
TEMP_LONGEST = 40  # characters of the temporary folder; Ray appends some 65
OBJECT_STORE_BYTES = 256 * 2**20  # of a Ray of our own; a study passes next to nothing through it
TRIAL_SLOT = "trial_slot"  # a resource of the head node: one for each group of workers that fits


_started: set[str] = set()  # addresses of the Rays that this process has started for its studies


def is_local() -> bool:
    """Return whether a study has a Ray of its own: it joins no cluster and no Ray that was there."""
    if ray.is_initialized():
        return ray.get_runtime_context().gcs_address in _started
    return (os.environ.get("RAY_ADDRESS") or "local") == "local"


def connect(trial_slots: int = 0, device: str = "auto") -> None:
    """Start Ray on this host, or join the cluster that RAY_ADDRESS names; silent.

    Args:
        trial_slots: How many groups of workers run at once; 0: trials have one worker each.
        device: ``--device``; with cpu a Ray of our own has no GPUs.

    Raises:
        ValueError: Ray did not start, or the cluster cannot be joined.
    """
    if ray.is_initialized():
        if not trial_slots or TRIAL_SLOT in ray.cluster_resources():
            return
        if not is_local():
            raise ValueError(
                f"Ray was started without the resource {TRIAL_SLOT}, which groups of workers need"
            )
        ray.shutdown()  # a cluster of our own, started for an earlier study
    # one warning that Ray's SIGTERM handler is for the main thread; search/session.py has that signal
    logging.getLogger("ray").setLevel(logging.ERROR)
    local, address = is_local(), os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {}
    variables = _local_variables(trial_slots) if local else {}
    if local:
        import torch  # a study has imported it by now; where a cluster is joined, that takes seconds

        check_limits()
        own = {
            "num_cpus": cpu_count(),
            "num_gpus": 0 if device == "cpu" else torch.cuda.device_count(),  # as trials are planned
            "object_store_memory": OBJECT_STORE_BYTES,
            "resources": {TRIAL_SLOT: trial_slots} if trial_slots else None,
            "include_dashboard": bool(trial_slots),
        }
    else:
        check_answers(str(address))
        check_token_file()
    try:
        with _from_our_code(), environment(variables):
            ray.init(
                # without an address ray.init would join whatever cluster this host happens to run
                address="local" if local else address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **own,
            )
    except Exception as error:  # Ray 2.60 raises ConnectionError, RuntimeError, and Exception itself
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"Ray did not start on this host ({reason}); {_remedy(error, variables)}"
            if local
            else f"RAY_ADDRESS={address} cannot be joined ({reason}); start that cluster, give its token "
            "(RAY_AUTH_MODE=token, ~/.ray/auth_token), or unset RAY_ADDRESS to use this host"
        ) from error
    if local:
        _started.add(ray.get_runtime_context().gcs_address)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # lost workers are in reports.jsonl


def check_limits() -> None:
    """Raise ValueError if ulimit -v ends Ray's servers, which then say it in a page of C++."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_MIN:
        raise ValueError(
            f"ulimit -v allows {limit / 1e9:.1f} GB of addresses to a process, and Ray's servers map "
            f"{ADDRESS_SPACE_MIN / 1e9:.0f} GB, most of which they never use; set ulimit -v unlimited"
        )


def check_answers(address: str) -> None:
    """Raise ValueError if no cluster answers at an address; Ray itself (2.60) tries for 13 minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # auto, or what Ray refuses
        return
    remedy = "start that cluster, or unset RAY_ADDRESS to use this host"
    try:
        with socket.create_connection((host, int(port)), JOIN_SECONDS) as connection:
            tls = os.environ.get("RAY_USE_TLS", "0") != "0"
            answers = _answers_tls(connection) if tls else _answers_grpc(f"{host}:{port}")
    except OSError as error:
        raise ValueError(f"RAY_ADDRESS={address} cannot be reached ({error}); {remedy}") from error
    if not answers:
        raise ValueError(
            f"RAY_ADDRESS={address} is no Ray cluster, or does not answer in {JOIN_SECONDS:g} s; {remedy}"
        )


def _answers_tls(connection: socket.socket) -> bool:
    """Return whether a TLS handshake is answered in time, even by a refusal."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # Ray verifies, with its own files
    try:
        context.wrap_socket(connection).close()
    except OSError as error:
        return not isinstance(error, TimeoutError)
    return True


def _answers_grpc(address: str) -> bool:
    """Return whether a gRPC server, such as Ray's, answers in time."""
    import grpc  # ray[default] brings it; half a second

    channel = grpc.insecure_channel(address)
    try:
        grpc.channel_ready_future(channel).result(timeout=JOIN_SECONDS)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


def check_token_file() -> None:
    """Let nobody but its owner read the cluster's token, with which anybody may run code as they.

    Raises:
        ValueError: Others can read it, and that cannot be changed.
    """
    with contextlib.suppress(RuntimeError):  # there is no home folder
        default = Path("~/.ray/auth_token").expanduser()
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default)
        if "RAY_AUTH_TOKEN" in os.environ or not file.is_file() or not file.stat().st_mode & 0o077:
            return
        try:
            file.chmod(0o600)
        except OSError as error:
            raise ValueError(
                f"{file}, the cluster's token, can be read by other users, and its mode stays ({error}); "
                f"have its owner run: {shell('chmod', '600', file)}"
            ) from error
        print(printable(f"{file}, the cluster's token, could be read by other users; its mode is now 0600"))


def _local_variables(trial_slots: int) -> dict[str, str]:
    """Return the environment of a Ray of our own.

    With groups of workers it has to be found: Train's actor that gives a stopped group's resources back asks
    the API server, and finds it by RAY_ADDRESS or by guessing among all clusters of the host, which fails if
    there are two (Ray 2.60).
    """
    variables = {
        "RAY_AUTH_TOKEN": _token(),  # in no file, and there may be no home folder to put it in
        "RAY_prestart_worker_first_driver": "0",  # one worker per CPU, none of which Tune's trials can use
    }
    if len(tempfile.gettempdir()) > TEMP_LONGEST:  # sockets lie under it, whose names have 107 bytes at most
        variables["RAY_TMPDIR"] = "/tmp"
    if trial_slots:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = str(probe.getsockname()[1])
        address = f"{ray.util.get_node_ip_address()}:{port}"
        variables |= {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": address}
    return variables


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Context manager: set environment variables, except those that the user has set."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name)


@functools.cache  # Ray reads it once per process
def _token() -> str:
    return secrets.token_hex(32)


@contextlib.contextmanager
def _from_our_code() -> Iterator[None]:
    """Context manager: work in the folder that contains tunefleet while Ray records the working directory.

    Ray (2.60) puts it before all else on its workers' path, and a user's own queue.py there would be taken
    for Python's.
    """
    arguments = sys.argv
    sys.argv = [printable(argument) for argument in arguments]  # Ray notes them, too, and takes UTF-8 only
    try:
        with contextlib.chdir(Path(__file__).parents[2]):
            yield
    finally:
        sys.argv = arguments


def _remedy(error: Exception, variables: Mapping[str, str]) -> str:
    """Return what to do where Ray did not start, given the environment variables that were added for it."""
    text = str(error)
    folder = os.environ.get("RAY_TMPDIR") or variables.get("RAY_TMPDIR") or tempfile.gettempdir()
    if "AF_UNIX path length" in text:
        return "give a shorter path: RAY_TMPDIR=/tmp"
    if "timed out" in text:
        return "wait until it has free CPUs and memory"
    if is_full(error):
        return f"make room in {folder}, or give RAY_TMPDIR on a larger disk"
    if isinstance(error, OSError):
        return f"give a folder that can be written: RAY_TMPDIR (now {folder})"
    return f"its logs are in {folder}/ray/session_latest/logs"


class RayWatch:
    """Detects the end of the Ray that a study runs on, before Ray (2.60) ends this process because of it.

    It does so 13 s after the end of a raylet and 60 s after that of the control server.
    """

    def __init__(self) -> None:
        address = ray.get_runtime_context().gcs_address
        self.address = None if is_local() else address  # of a cluster
        self.processes = _children(PROCESSES) if is_local() else _raylet_of(address)
        self.looked_at = self.reached_at = time.monotonic()

    def __call__(self) -> str:
        """Return why the study has to stop; nothing while all is well."""
        now = time.monotonic()
        if now - self.looked_at < (CLUSTER_WATCH_SECONDS if self.address else WATCH_SECONDS):
            return ""
        self.looked_at = now
        if gone := [name for pid, name in self.processes.items() if process_start(pid) is None]:
            return f"Ray's {gone[0]} has ended"
        if self.address is None:
            return ""
        host, _, port = self.address.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), CONNECT_SECONDS):
            self.reached_at = now
        silent = now - self.reached_at
        return "" if silent < GONE_SECONDS else f"the cluster at {self.address} is silent for {silent:.0f} s"


def _raylet_of(address: str) -> dict[int, str]:
    """Return the raylet of a cluster that runs on this host; none where several do, or it cannot be seen."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().split(b"\0")
            if Path(words[0].decode()).name == "raylet" and any(address.encode() in word for word in words):
                found[int(file.parent.name)] = "raylet"
    return found if len(found) == 1 else {}


def _children(names: Collection[str]) -> dict[int, str]:
    """Return this process's children of these names, by process id; none where there is no /proc."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = file.read_text().partition("(")[2].rpartition(") ")
            if name in names and int(rest.split()[1]) == os.getpid():
                found[int(file.parent.name)] = name
    return found
