"""What a trial's code prints: kept, bounded, appended, and never worth a trial."""

import errno
import io
import logging
import sys

import pytest

from tests.object_store import faulty_store
from tunefleet.mirror import Mirror
from tunefleet.printed import CUT, HALF, Printed
from tunefleet.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def printed(monkeypatch):
    """A worker's output; `printed.stream` is what Ray has in its logs."""
    monkeypatch.setattr("sys.stdout", io.StringIO())
    return Printed()


def say(printed, text):
    with printed.recording():
        print(text)


def log_of(store, trial_id="0003"):
    return (store.folder / "logs" / f"{trial_id}.txt").read_text()


def test_both_outputs_and_loggings_are_recorded_and_passed_on(printed, store):
    with printed.recording():
        handler = logging.StreamHandler()  # as basicConfig() at the top of a person's file makes one
    handler.emit(logging.makeLogRecord({"msg": "before recording"}))
    with printed.recording():
        print("out")
        print("err", file=sys.stderr, flush=True)
    print("not the trial's")
    assert printed.save(store, "0003") == "logs/0003.txt"
    assert printed.stream.getvalue() == log_of(store) == "before recording\nout\nerr\n"


def test_nothing_is_written_where_nothing_was_printed(printed, store, tmp_path):
    assert printed.save(store, "0003") == ""
    assert not list(tmp_path.iterdir())


def test_a_log_is_appended_to_and_each_trial_has_its_own(printed, store):
    for trial_id, text in (("0003", "first"), ("0004", "other"), ("0003", "then")):
        say(printed, text)
        printed.save(store, trial_id)
    assert (log_of(store), log_of(store, "0004")) == ("first\nthen\n", "other\n")
    assert printed.save(store, "0003") == "logs/0003.txt"  # a trial that prints no more has its log still


@pytest.mark.parametrize("epochs", [1, 7])
def test_a_long_log_has_its_beginning_and_its_end_and_says_so(printed, store, epochs):
    lines = [f"{number:06d}" for number in range(14 * 3000)]
    for epoch in range(epochs):
        each = len(lines) // epochs
        say(printed, "\n".join(lines[epoch * each : (epoch + 1) * each]))
        assert len(printed.text) <= 2 * HALF + len(CUT)
        printed.save(store, "0003")
    whole = "\n".join(lines) + "\n"
    assert log_of(store) == whole[:HALF] + CUT + whole[-HALF:]


def test_a_log_that_cannot_be_written_is_kept_for_the_next_time(printed, store, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    say(printed, "first")
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        assert printed.save(store, "0003") == ""
    say(printed, "then")
    printed.save(store, "0003")
    assert log_of(store) == "first\nthen\n"


def test_a_study_in_a_store_has_its_logs_there_and_no_driver_copies_an_older_one(printed, tmp_path):
    with faulty_store() as server:
        store = Store(f"{server.url}/study")
        say(printed, "first")
        server.fault = "403"
        assert printed.save(store, "0003") == ""
        server.fault = ""
        assert printed.save(store, "0003") == "logs/0003.txt"
        Store(str(tmp_path)).write(b"older", "logs/0003.txt")
        Mirror(tmp_path, store).update()
        assert store.read("logs/0003.txt") == b"first\n"


def test_a_full_disk_of_rays_logs_fails_no_print(printed, store):
    class Full(io.StringIO):
        def write(self, *text):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = write

    printed.stream = Full()
    say(printed, "\udcff")  # which no UTF-8 has
    printed.flush()
    printed.save(store, "0003")
    assert log_of(store) == "\\udcff\n"
