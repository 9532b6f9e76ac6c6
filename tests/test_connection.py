"""How Ray is reached, and what is said where it is not: addresses, folders and files that are in the way."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tunefleet.search.connection import (
    _from_our_code,
    _local_variables,
    _raylet_of,
    _remedy,
    check_answers,
    check_limits,
    check_token_file,
    environment,
    is_local,
)


def test_an_address_where_nothing_listens_is_refused_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    for given in (address, f"ray://{address}"):
        with pytest.raises(ValueError, match=f"RAY_ADDRESS={given} cannot be reached .*unset RAY_ADDRESS"):
            check_answers(given)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("scheme", "tls"), [("", "0"), ("ray://", "0"), ("", "1"), ("ray://", "1")])
def test_a_port_that_is_no_cluster_is_refused_in_bounded_time(listener, scheme, tls, monkeypatch):
    monkeypatch.setattr("tunefleet.search.connection.JOIN_SECONDS", 1.0)
    monkeypatch.setenv("RAY_USE_TLS", tls)
    address = scheme + listener
    with pytest.raises(
        ValueError, match=f"RAY_ADDRESS={address} is no Ray cluster, or does not answer in 1 s"
    ):
        check_answers(address)


def test_a_left_over_address_is_one_line_with_nothing_of_rays(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, ROOT / "search/run.py", "--space", "softmax", "--data", "digits", "--storage", "s"],
        env=os.environ | {"RAY_ADDRESS": address, "XDG_CACHE_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: RAY_ADDRESS={address} cannot be reached")
    assert done.stderr.count("\n") == 1


def test_too_few_addresses_are_one_line(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda which: (4 * 10**9, -1))
    with pytest.raises(ValueError, match=r"^ulimit -v allows 4\.0 GB .*set ulimit -v unlimited$"):
        check_limits()


@pytest.fixture
def token(tmp_path, monkeypatch):
    file = tmp_path / "auth_token"
    file.write_text("secret")
    file.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return file


def test_a_token_that_others_can_read_is_closed_to_them_and_that_is_said(token, capsys):
    check_token_file()
    assert token.stat().st_mode & 0o777 == 0o600
    assert "its mode is now 0600" in capsys.readouterr().out
    check_token_file()
    assert capsys.readouterr().out == ""


def test_a_token_that_cannot_be_closed_is_refused(token, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    with pytest.raises(ValueError, match=r"can be read by other users.*chmod 600"):
        check_token_file()


def test_a_long_temporary_folder_is_left_for_tmp(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/" + 95 * "x")
    assert _local_variables(0)["RAY_TMPDIR"] == "/tmp"
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    assert "RAY_TMPDIR" not in _local_variables(0)


def test_only_groups_of_workers_need_a_known_address():
    assert "RAY_ADDRESS" not in _local_variables(0)
    variables = _local_variables(2)
    assert variables["RAY_ADDRESS"].endswith(f":{variables['RAY_GCS_SERVER_PORT']}")


@pytest.mark.parametrize(("address", "local"), [(None, True), ("", True), ("local", True), ("auto", False)])
def test_a_study_joins_a_cluster_only_if_an_address_is_given(monkeypatch, address, local):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert is_local() is local


def test_variables_are_set_for_a_time_and_a_users_own_stay(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "mine")
    monkeypatch.delenv("RAY_NEW", raising=False)
    with environment({"RAY_TMPDIR": "ours", "RAY_NEW": "1"}):
        assert (os.environ["RAY_TMPDIR"], os.environ["RAY_NEW"]) == ("mine", "1")
    assert os.environ["RAY_TMPDIR"] == "mine"
    assert "RAY_NEW" not in os.environ


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107"),
            "RAY_TMPDIR=/tmp",
        ),
        (PermissionError(13, "Permission denied"), "that can be written"),
        (OSError(28, "No space left on device"), "make room"),
        (RuntimeError("Failed to start GCS"), "its logs are in"),
        (Exception("The current node timed out during startup."), "free CPUs and memory"),
    ],
)
def test_what_is_advised_fits_the_cause(error, advice):
    assert advice in _remedy(error, {})


def test_advice_names_the_folder_that_ray_was_given(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    assert "/mine/ray/session_latest" in _remedy(RuntimeError("no GCS"), {"RAY_TMPDIR": "/mine"})


def test_workers_look_for_modules_in_our_code_before_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with _from_our_code():
        assert Path.cwd() == ROOT / "src"
    assert Path.cwd() == tmp_path


@pytest.mark.ray
def test_a_users_own_modules_are_in_nobodys_way(tmp_path, data_dir):
    for name in ("models", "search", "trainables", "analysis", "options", "engine"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    done = subprocess.run(
        [
            *(
                sys.executable,
                ROOT / "search/run.py",
                "--space",
                "softmax",
                "--data",
                "digits",
                "--trials",
                "1",
            ),
            *("--epochs", "1", "--final-seeds", "1", "--wandb", "offline", "--study-dir", "study"),
            *("--data-dir", data_dir),
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "WANDB_MODE": "offline"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong module" not in done.stdout + done.stderr
    log = tmp_path / "study/wandb/sync.log"
    assert not log.exists() or "wrong module" not in log.read_text()
    assert "ended with" not in done.stdout


def test_a_call_of_a_study_that_is_being_stopped_starts_no_other_ray():
    call = "import tunefleet.search, ray; ray.put(1)"
    ended = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "ray.init" in ended.stderr


def test_the_raylet_of_a_joined_cluster_is_watched_where_it_is_the_only_one():
    address = "10.0.0.1:6379"
    words = ["raylet", "-c", f"read line # --gcs-address={address}"]
    first, second = (subprocess.Popen(words, executable="/bin/sh", stdin=subprocess.PIPE) for _ in range(2))
    try:
        assert _raylet_of("10.0.0.2:6379") == {}
        assert _raylet_of(address) == {}  # two: which is the driver's?
        second.kill()
        second.wait()
        assert _raylet_of(address) == {first.pid: "raylet"}
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
