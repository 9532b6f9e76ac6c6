"""Fixtures that several files share: a cache folder for the whole run, and studies of digits."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Some tests have clusters of several nodes, which Ray refuses in a process where search has set this to 0
os.environ.setdefault(LOOPBACK_ONLY := "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")

import tunefleet.search  # noqa: F401  sets Ray's variables, which Ray reads when it is imported, here or by a test

ROOT = Path(__file__).parents[1]
os.environ |= {"WANDB_MODE": "disabled", "WANDB_ERROR_REPORTING": "false"}  # tests of W&B say otherwise


def ray_logs(driver):
    """Returns where a driver's own Ray has its logs."""
    words = [word for process in driver.children() for word in process.cmdline()]
    return Path(next(word for word in words if word.startswith("--log_dir=")).partition("=")[2])


@functools.cache
def _with_ray(file):
    """Tells whether tests of a file need Ray, machines or a GPU, of which there is one for all."""
    return file.parent.name == "gpu" or bool(re.search(r"pytest\.mark\.(ray|cluster)\b", file.read_text()))


def pytest_collection_modifyitems(items):
    """The files with Ray come first: they take longest."""
    items.sort(key=lambda item: not _with_ray(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``-n 2`` one process has all files with Ray, the other one file after another of the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = ROOT / nodeid.partition("::")[0]
            return "ray" if _with_ray(file) else str(file)

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_runtest_setup(item):
    """Beside tests with Ray the others come second: Ray's workers run at nice 15 and would starve."""
    if hasattr(item.config, "workerinput") and not _with_ray(item.path):  # a process of xdist's
        os.nice(19)  # the most there is, however often


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on a busy core wait for each other: an epoch of ResNet takes 20 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """One cache for all tests, so that digits are decoded once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def cli(data_dir, tmp_path):
    """Starts ``python search/run.py …`` as a user does, in a folder of its own; returns the process."""
    started = []

    def start(*arguments, before="", **options):
        """Starts it, after a line of Python where one is given."""
        script = str(ROOT / "search" / "run.py")
        run = f"{before}; import runpy; runpy.run_path({script!r}, run_name='__main__')"
        command = [sys.executable, *(["-c", run] if before else [script]), *map(str, arguments)]
        process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a runner started in the background ignores SIGINT, and its children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            env={name: value for name, value in os.environ.items() if name != LOOPBACK_ONLY}
            | {"COLUMNS": "80"},
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def listener():
    """Listens on a port and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"
