"""What is installed: one import name, whatever lies in the user's folder, editable and from a wheel."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT

OLD_NAMES = ("models", "search", "trainables", "analysis", "benchmarks")
OWN = ("models", "search", "data", "random_utils")  # names of files that users have beside their work


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """An environment with this one's libraries and tunefleet from a wheel; returns its python."""
    folder = tmp_path_factory.mktemp("wheel")
    quiet = {"check": True, "capture_output": True, "text": True}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", "*.egg-info", "__pycache__", "studies", "build"
    )
    shutil.copytree(ROOT, folder / "clone", ignore=left_out, symlinks=True)  # a build writes into its folder
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", folder, folder / "clone"], **quiet)
    (built,) = folder.glob("tunefleet-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], **quiet)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    subprocess.run([*pip, "install", "--no-deps", "-q", "--target", site, built], **quiet)
    mine = Path(sysconfig.get_paths()["purelib"])
    (site / "libraries.pth").write_text(f"{mine}\n")  # its own .pth files are not read
    return folder / "env/bin/python"


def run(python, *arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def refuses_old_names(python, folder):
    code = f"import importlib.util\nprint([n for n in {OLD_NAMES} if importlib.util.find_spec(n)])"
    return run(python, "-c", code, cwd=folder)


def test_no_top_level_name_but_tunefleet_is_taken(tmp_path):
    done = refuses_old_names(sys.executable, tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_wheel_has_the_package_its_templates_and_its_types(wheel, tmp_path):
    done = refuses_old_names(wheel, tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    code = (
        "import tunefleet.search.run, tunefleet.analysis.report as r, tunefleet.benchmarks.families as f\n"
        "from pathlib import Path; import tunefleet\n"
        "assert Path(r.__file__).with_name('report.html.j2').exists() and f.FILE.exists()\n"
        "assert (Path(tunefleet.__file__).parent / 'py.typed').exists()\n"
        "assert not Path(tunefleet.__file__).parent.is_symlink(); print(tunefleet.__file__)"
    )
    done = run(wheel, "-c", code, cwd=tmp_path)
    assert done.stdout.startswith(str(wheel.parents[1])), done.stderr


@pytest.mark.ray
def test_users_own_modules_are_in_nobodys_way(tmp_path, data_dir):
    for name in OWN:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} of the user')\n")
    done = run(
        sys.executable,
        *("-P", "-m", "tunefleet", "search", "softmax", "--data", "digits", "--data-dir", data_dir),
        *("--trials", 2, "--epochs", 1, "--final-seeds", 1, "--wandb", "off"),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "test_accuracy" in done.stdout


def test_a_folder_that_contains_a_clone_imports_the_package_and_not_the_clone(tmp_path):
    (tmp_path / "tunefleet").symlink_to(ROOT)
    done = run(sys.executable, "-c", "from tunefleet import Study; print(Study.__module__)", cwd=tmp_path)
    assert done.stdout == "tunefleet.study\n", done.stderr


@pytest.mark.slow
def test_types_are_known_outside_the_clone(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from tunefleet import Study\nstudy = Study('x')\nreveal_type(study.seconds)\nstudy.nothing\n"
    )
    done = run(sys.executable, "-m", "mypy", "mine.py", cwd=tmp_path)
    assert 'Revealed type is "float"' in done.stdout or 'Revealed type is "builtins.float"' in done.stdout
    assert '"Study" has no attribute "nothing"' in done.stdout


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, tunefleet, tunefleet.study\n"
        "heavy = ('torch', 'ray', 'pandas', 'numpy', 'pyarrow', 'wandb')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).stdout == "[]\n"
