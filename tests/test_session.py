"""What a signal does at each stage of a command, without Ray; tests/test_resume.py has whole studies."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from tests.configs import make_options
from tests.made_study import write_study as make_study
from tunefleet.host import process_start
from tunefleet.search import api, lr_study, wandb_sync
from tunefleet.search import run as search
from tunefleet.search.connection import RayWatch, _children
from tunefleet.search.execution import tell_stopped
from tunefleet.search.running import Request, run
from tunefleet.search.session import NOTHING_WRITTEN, Session, Stops, say_nothing_written
from tunefleet.search.wandb_options import WandbOptions

WAIT = 5.0  # seconds; far more than any stage takes


def send(number=signal.SIGTERM, after=0.1):
    threading.Timer(after, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_study_a_signal_ends_the_command_with_a_line(number, capsys):
    send(number)
    began = time.monotonic()
    assert Stops().run(lambda: time.sleep(WAIT) or 0) == 3
    assert time.monotonic() - began < WAIT / 2
    assert capsys.readouterr().err == NOTHING_WRITTEN + "\n"


def test_a_command_that_is_not_disturbed_gives_its_code_and_its_error():
    assert Stops().run(lambda: 1) == 1
    with pytest.raises(ValueError, match="mine"):
        Stops().run(lambda: int("mine"))


def test_a_stopped_cell_raises_keyboard_interrupt_after_the_folder_is_printed_each_time(tmp_path, capsys):
    def work(session):
        session.stops.change(functools.partial(tell_stopped, tmp_path, session))
        send(signal.SIGINT)
        time.sleep(WAIT)
        return 0

    for _ in range(2):
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            api._run(work)
        assert f"stopped; nothing is lost. To resume: tunefleet resume {tmp_path}" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) == before  # the next cell, too, can be stopped
    assert api._run(lambda session: 0).forecast == {}


def raise_connection_error():
    raise ConnectionError("raylet")


def test_an_exception_just_before_a_signal_is_answered_as_the_signal(capsys):
    def fail():
        send(after=0.5)  # Ray's calls fail at once where its processes were signalled first
        raise ConnectionError("raylet")

    assert Stops().run(fail) == 3
    assert capsys.readouterr().err == NOTHING_WRITTEN + "\n"
    with pytest.raises(ConnectionError, match="raylet"):
        Stops().run(raise_connection_error)


def test_a_mistake_found_beside_ray_is_told_and_not_that_its_ray_then_ends(monkeypatch, capsys, tmp_path):
    up = []
    monkeypatch.setattr("ray.is_initialized", lambda: bool(up))
    session = Session(Console())

    def shutdown():
        up.clear()
        time.sleep(0.3)

    def mistaken(request, session):
        up.append(True)
        session.stops.change(say_nothing_written, lambda: "" if up else "Ray's raylet has ended")
        raise ValueError("mine")

    monkeypatch.setattr("ray.shutdown", shutdown)
    monkeypatch.setattr("tunefleet.search.running._checked", mistaken)
    request = Request(make_options("softmax"), tmp_path, WandbOptions(mode="off"), None)
    with pytest.raises(ValueError, match="mine"):
        session.stops.run(lambda: run(request, session))
    assert capsys.readouterr().err == ""


def test_a_running_study_answers_in_its_own_way_and_once():
    stops, answers = Stops(), []

    def stop(reason):
        answers.append(reason)
        time.sleep(0.3)
        return 3

    stops.change(stop)
    send()
    send(after=0.2)  # while the first is answered
    assert stops.run(lambda: time.sleep(WAIT) or 0) == 3
    assert answers == [""]


def test_what_the_study_cannot_do_without_stops_it_with_a_reason():
    stops, answers = Stops(), []
    stops.change(lambda reason: answers.append(reason) or 3, watch=lambda: "Ray's raylet has ended")
    assert stops.run(lambda: time.sleep(WAIT) or 0) == 3
    assert answers == ["Ray's raylet has ended"]


def test_a_command_at_its_end_is_not_stopped():
    stops = Stops()
    stops.change(lambda reason: None)
    send()
    assert stops.run(lambda: time.sleep(0.5) or 7) == 7


def test_signals_wait_for_what_must_be_whole():
    stops, done = Stops(), []

    def command():
        with stops.held(lambda reason: 3):
            time.sleep(0.5)
            done.append("written")
        time.sleep(WAIT)
        return 0

    send(after=0.2)
    assert stops.run(command) == 3
    assert done == ["written"]


def test_a_command_that_is_being_stopped_does_no_more():
    stops, later = Stops(), []

    def command():
        time.sleep(0.5)
        stops.change(lambda reason: None)
        later.append("went on")
        return 0

    stops.change(lambda reason: time.sleep(1) or 3)
    send()
    assert stops.run(command) == 3
    assert later == []


def test_a_commands_thread_outlives_it_with_the_servers_that_it_started():
    threads = []
    Stops().run(lambda: threads.append(threading.current_thread()) or 0)
    threads[0].join(0.1)
    assert threads[0].is_alive()


def test_handlers_are_afterwards_as_they_were():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    Stops().run(lambda: 0)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    "command",
    [
        lambda folder: search.main(["softmax", "--study-dir", folder]),
        lambda folder: search.resume_main([folder]),
        lambda folder: lr_study.main(["--space", "softmax", "--study-dir", folder]),
        lambda folder: wandb_sync.main([folder]),
    ],
    ids=["search", "resume", "lr-study", "sync"],
)
def test_the_environment_is_afterwards_as_it_was(command, monkeypatch, tmp_path):
    make_study(tmp_path / "study")  # which no new study may overwrite, and which is done
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    before = dict(os.environ)
    assert command(str(tmp_path / "study")) in (1, 2)
    assert dict(os.environ) == before


def test_a_child_is_found_by_its_name_and_seen_to_end():
    import subprocess

    child = subprocess.Popen(["sleep", "60"])
    assert _children(["sleep"]).get(child.pid) == "sleep"
    assert process_start(child.pid)
    child.kill()
    deadline = time.monotonic() + WAIT
    while process_start(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process_start(child.pid)  # a zombie until it is waited for
    child.wait()


def test_rays_processes_are_watched(monkeypatch):
    watch = RayWatch.__new__(RayWatch)
    watch.address, watch.looked_at = None, -100.0
    watch.processes = {os.getpid(): "raylet", 2**22 + 1: "gcs_server"}
    assert watch() == "Ray's gcs_server has ended"
    assert watch() == ""  # looked a moment ago


def test_a_cluster_that_is_silent_for_long_is_gone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tunefleet.search.connection.time.monotonic", lambda: now[0])
    watch = RayWatch.__new__(RayWatch)
    watch.processes, watch.address = {}, "127.0.0.1:1"
    watch.looked_at = watch.reached_at = 0.0
    for now[0] in range(5, 50, 5):
        said = watch()
        assert bool(said) == (now[0] >= 45), (now, said)


END = """
import os, signal, threading, time
import ray
from tunefleet.search.connection import connect
from tunefleet.search.session import leave
connect()
terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
shutdown, ray.shutdown = ray.shutdown, lambda: (shutdown(), time.sleep(0.1), terminate())
leave(0)
"""


@pytest.mark.ray
def test_a_signal_while_ray_shuts_down_does_not_change_the_exit_code():
    ended = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
