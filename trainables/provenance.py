"""With what was a study run? The code, the libraries and the machine, as study.json names them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from tunefleet.cli import counted, shell
from tunefleet.host import contents_of, cpu_count

PACKAGES = ("torch", "torchvision", "ray", "hyperopt", "numpy")  # a result may depend on these
EXTRAS = ("timm",)  # and on these, where they are installed


def versions() -> dict[str, str]:
    """Return the version of Python and of each of PACKAGES, in which all nodes of a cluster must agree."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | {"python": platform.python_version()}


def versions_of_extras() -> dict[str, str]:
    """Return the version of each of EXTRAS that is installed."""
    found = {}
    for name in EXTRAS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def command_line() -> str:
    """Return the command of this process, as it can be pasted."""
    program = Path(sys.argv[0]).name
    ours = program in ("tunefleet", "__main__.py")
    return shell("tunefleet", *sys.argv[1:]) if ours else shell("python", *sys.argv)


def commit() -> str | None:
    """Return the commit of this code, with -dirty where files differ.

    Outside a checkout it is what TUNEFLEET_COMMIT says, or None.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        described = answer.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        described = ""
    return described or os.environ.get("TUNEFLEET_COMMIT") or None


def code_sha256() -> str:
    """Return a hash of the code that a trial runs; a cluster's nodes must have the same."""
    root = Path(__file__).parents[1]  # of the package
    files = sorted(
        file for part in (".", "models", "trainables", "search") for file in (root / part).glob("*.py")
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def machine_name() -> str:
    """Return what a study's times are to be read with: its GPUs, or its CPUs."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    names = re.findall(r"^model name\s*: (.*)$", contents_of(Path("/proc/cpuinfo")), re.MULTILINE)
    return (
        f"{counted(cpu_count(), 'CPU')}, {names[0] if names else platform.processor() or platform.machine()}"
    )
