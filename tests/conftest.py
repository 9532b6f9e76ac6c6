"""Fixtures that several files share: a cache folder for the whole run, and studies of digits."""

import ast
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
WITH_RAY = re.compile(r"pytest\.mark\.(ray|cluster)\b")
os.environ |= {"WANDB_MODE": "disabled", "WANDB_ERROR_REPORTING": "false"}  # tests of W&B say otherwise


def ray_logs(driver):
    """Returns where a driver's own Ray has its logs."""
    words = [word for process in driver.children() for word in process.cmdline()]
    return Path(next(word for word in words if word.startswith("--log_dir=")).partition("=")[2])


@functools.cache
def _tests_with_ray(file):
    """Returns the names of a file's tests that need Ray or machines, of which there is one for all."""
    nodes = ast.parse(file.read_text()).body
    marks = [ast.unparse(node) for node in nodes if isinstance(node, ast.Assign)]
    whole = any(mark.startswith("pytestmark") and WITH_RAY.search(mark) for mark in marks)
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return {
        function.name
        for function in functions
        if whole or any(WITH_RAY.search(ast.unparse(decorator)) for decorator in function.decorator_list)
    }


def _with_ray(nodeid):
    path, _, name = nodeid.partition("::")
    return path.startswith("tests/gpu/") or name.partition("[")[0] in _tests_with_ray(ROOT / path)


def pytest_collection_modifyitems(items):
    """Tests with Ray come first: they take longest."""
    items.sort(key=lambda item: not _with_ray(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``-n 2`` one process has all tests with Ray, the other one file after another of the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "ray" if _with_ray(nodeid) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_runtest_setup(item):
    """Beside tests with Ray the others come second: Ray's workers run at nice 15 and would starve."""
    if hasattr(item.config, "workerinput") and not _with_ray(item.nodeid):  # a process of xdist's
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
