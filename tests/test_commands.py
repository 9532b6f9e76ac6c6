"""What the commands about a study's folder say of places that hold none, or that they may not write."""

import errno
import os
import subprocess

import pytest

from tests.test_wandb_sync import STUDY_JSON, write_study
from tunefleet.collect import main as collect
from tunefleet.mirror import main as mirror
from tunefleet.search.wandb_sync import main as wandb_sync
from tunefleet.study import write_study as write_study_json

COMMANDS = {"collect": collect, "mirror": mirror, "wandb_sync": wandb_sync}


@pytest.fixture(params=COMMANDS)
def command(request, monkeypatch, capsys, tmp_path):
    """Runs one of the commands on a folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments):
        if request.param == "wandb_sync" and "--help" not in arguments:
            arguments = (*arguments, "--offline")
        try:
            code = COMMANDS[request.param](list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def make_file(location):
    location.write_text("mine")


def make_study(location):
    write_study(location)


def study_without(name):
    def make(location):
        make_study(location)
        (location / name).unlink()

    return make


def study_with_a_folder_for(name):
    def make(location):
        study_without(name)(location)
        (location / name).mkdir()

    return make


PLACES = {
    "nothing": lambda location: None,
    "file": make_file,
    "empty": lambda location: location.mkdir(),
    "link to nothing": lambda location: location.symlink_to(location.parent / "nowhere"),
    "no study.json": study_without("study.json"),
    "no journal": study_without("reports.jsonl"),
    "study.json is a folder": study_with_a_folder_for("study.json"),
    "journal is a folder": study_with_a_folder_for("reports.jsonl"),
}
NAMES = ("study", "a 'b' \"c\" $(d) %s [e]", "two\nlines", "no \udcff UTF-8")


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*") if path.suffix != ".lock" and path.name != ".lock")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_place_that_holds_no_whole_study_is_one_line_and_left_as_it_is(command, tmp_path, make, name):
    make(location := tmp_path / name)
    before = listing(tmp_path)
    code, out, err = command(location)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert listing(tmp_path) == before


def test_path_that_no_system_takes_is_one_line(command, tmp_path):
    code, _, err = command(tmp_path / ("n" * 300))
    assert code == 2
    assert err.count("\n") == 1


def test_help_is_no_error(command):
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert "usage: tunefleet " in out


def test_no_folder_and_an_unknown_flag_are_one_line(command, tmp_path):
    for arguments in ((), ("--nonsense", tmp_path)):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1


@pytest.fixture
def read_only(tmp_path):
    """Makes a folder read-only, for root, too."""
    mounted = []

    def make(folder):
        command = ["mount", "--bind", str(folder), str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a read-only folder needs root, and mount")
        mounted.append(folder)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_read_only_study_is_one_line(command, tmp_path, read_only):
    make_study(folder := tmp_path / "study")
    options = STUDY_JSON["options"] | {"storage": "s3://bucket/prefix"}
    write_study_json(folder, STUDY_JSON | {"options": options})
    for lock in folder.glob(".*lock"):
        lock.unlink()
    read_only(folder)
    code, out, err = command(folder)
    assert (code, out) == (2, "")
    assert "Read-only file system" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_name_of_a_study_is_no_obstacle(tmp_path, name, capsys):
    make_study(folder := tmp_path / name)
    assert collect([str(folder)]) == 0
    assert capsys.readouterr().out.endswith("4 trials, 12 epochs, status done\n")


def test_table_that_is_a_folder_is_one_line(tmp_path, capsys):
    make_study(folder := tmp_path / "study")
    (folder / "trials.csv").unlink()
    (folder / "trials.csv").mkdir()
    assert collect([str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "trials.csv" in err


def test_a_file_system_without_locks_is_one_line(command, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    make_study(tmp_path / "study")
    monkeypatch.setattr("fcntl.flock", refuse)
    code, _, err = command("study")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
