"""The variables that search sets for Ray, whichever of the two is imported first."""

import os
import subprocess
import sys

import pytest


@pytest.mark.ray
@pytest.mark.parametrize("imports", ["tunefleet.search", "ray, tunefleet.search"])
def test_ray_starts_whichever_is_imported_first(imports):
    """Ray chooses its authentication once per process; a server with another mode refuses it later."""
    code = (
        f"import {imports}\n"
        "from tunefleet.search.connection import connect\n"
        "connect()\n"
        "import os, ray\n"
        "print(os.environ['RAY_AUTH_MODE'], ray.cluster_resources()['CPU'] > 0)\n"
    )
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=unset,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["token", "True"]), done.stderr[-500:]


def test_command_imports_nothing_that_only_some_studies_need():
    slow = ("torch", "torchvision", "torch._dynamo", "hyperopt", "scipy.stats", "wandb", "matplotlib")
    code = (
        "import tunefleet.search.run, tunefleet.search.lr_study, sys\n"
        f"print([name for name in {slow} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_user_without_a_home_folder_has_the_temporary_one():
    """As in a container whose user id has no entry in /etc/passwd: Ray's import would fail."""
    code = (
        "import os, pwd, tempfile\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "import tunefleet.search.run\n"
        "print(os.environ['HOME'] == tempfile.gettempdir())"
    )
    unset = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", code], env=unset, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
