"""One driver per study in a store: whoever comes second waits or is refused, and whoever loses stops."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.made_study import spec
from tests.object_store import faulty_store
from tunefleet import lease as module
from tunefleet.journal import Journal
from tunefleet.lease import NAME, Lease, check_lease, read_lease
from tunefleet.mirror import Mirror
from tunefleet.mirror import main as mirror_command
from tunefleet.store import Store
from tunefleet.study import write_study


@pytest.fixture(scope="module")
def store():
    with faulty_store() as served:
        yield served


@pytest.fixture
def storage(store, request):
    """An empty place for one study; an operation is tried for 2 s."""
    store.fault = ""
    return Store(f"{store.url}/{request.node.name.partition('[')[0]}/study", patience=2.0)


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Heartbeats five times a second; stale after one."""
    for name, seconds in (("BEAT", 0.2), ("STALE", 1.0), ("POLL", 0.05)):
        monkeypatch.setattr(module, f"{name}_SECONDS", seconds)


@pytest.fixture
def elsewhere(monkeypatch):
    """Makes what follows run on another host."""

    def move(name="elsewhere"):
        monkeypatch.setattr(module, "_host", lambda: {"name": name, "host": name})

    return move


def until(what, seconds=5.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def write_lease(storage, **facts):
    found = {
        "id": "other",
        "pid": os.getpid(),
        "started": "1",
        "name": "other",
        "host": "other",
        "at": time.time(),
    }
    storage.write(json.dumps(found | facts).encode(), NAME)


def test_lease_is_renewed_until_it_is_given_back(storage):
    lease = Lease(storage, pytest.fail)
    lease.take()
    first = read_lease(storage)
    assert (first["pid"], first["id"]) == (os.getpid(), lease._identity["id"])
    until(lambda: read_lease(storage)["at"] > first["at"])
    lease.release()
    assert read_lease(storage) is None
    time.sleep(0.5)
    assert read_lease(storage) is None


def test_lease_of_a_dead_process_of_this_host_is_taken_at_once(storage):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lease(storage, **module._host(), pid=process.pid, started=module.process_start(process.pid))
    with pytest.raises(
        ValueError, match=rf"is driven by process {process.pid} on .*; wait for it or stop it"
    ):
        check_lease(storage)
    process.kill()  # and nobody has waited for it: a zombie is dead
    until(lambda: module.process_start(process.pid) is None)
    lease = Lease(storage, pytest.fail)
    lease.take()
    assert not lease.lost
    lease.release()
    process.communicate()


def test_process_with_the_pid_of_a_dead_one_is_another(storage):
    write_lease(storage, **module._host(), pid=os.getppid(), started="1")
    assert check_lease(storage) is None


def test_lease_of_another_host_is_taken_once_it_is_stale_and_that_is_said(storage):
    write_lease(storage, pid=7)
    said = []
    lease = Lease(storage, said.append)
    began = time.monotonic()
    lease.take()
    assert 1.0 <= time.monotonic() - began < 4.0
    assert said == [
        f"{storage.location} is driven by process 7 on other; waiting up to 1 s to see whether it still runs"
    ]
    lease.release()


def test_lease_that_was_left_long_ago_is_not_watched(storage):
    write_lease(storage, at=time.time() - 3600)
    lease = Lease(storage, pytest.fail)
    lease.take()
    lease.release()


def test_lease_of_another_host_whose_owner_lives_is_refused(storage, elsewhere):
    elsewhere()
    first = Lease(storage, pytest.fail)
    first.take()
    elsewhere("here")
    with pytest.raises(ValueError, match="on elsewhere, which still runs"):
        Lease(storage, lambda line: None).take()
    assert not first.lost
    first.release()


def test_lease_given_back_while_another_waits_is_taken(storage, monkeypatch):
    monkeypatch.setattr(module, "STALE_SECONDS", 30.0)
    write_lease(storage)
    lease = Lease(storage, lambda line: storage.remove(NAME))
    lease.take()
    assert read_lease(storage)["id"] == lease._identity["id"]
    lease.release()


def test_driver_that_finds_anothers_lease_has_lost_and_leaves_it_alone(storage):
    lease = Lease(storage, pytest.fail)
    lease.take()
    write_lease(storage, pid=7)
    until(lambda: lease.lost)
    assert lease.lost == f"{storage.location} is now driven by process 7 on other"
    lease.release()
    assert read_lease(storage)["id"] == "other"


def test_of_two_that_start_at_once_at_most_one_stays(storage, monkeypatch):
    """Both see an empty place, and both see their own lease first: the last to write stays."""
    monkeypatch.setattr(module, "check_lease", lambda storage: None)
    first, second = Lease(storage, pytest.fail), Lease(storage, pytest.fail)
    first.take()
    second.take()
    until(lambda: first.lost or second.lost)
    time.sleep(0.5)
    assert [bool(first.lost), bool(second.lost)].count(True) == 1
    for lease in (first, second):
        lease.release()


def test_lease_read_back_as_anothers_is_refused(storage, monkeypatch):
    write = Store.write

    def write_and_lose(self, content, name):
        write(self, content, name)
        write_lease(storage) if b"other" not in content else None

    monkeypatch.setattr(Store, "write", write_and_lose)
    with pytest.raises(ValueError, match="is now driven by process"):
        Lease(storage, pytest.fail).take()


def test_unreadable_lease_is_watched_like_anothers(storage):
    storage.write(b"\0\0", NAME)
    said = []
    lease = Lease(storage, said.append)
    lease.take()
    assert "process ? on another machine" in said[0]
    lease.release()


def test_store_that_goes_away_and_comes_back_costs_no_lease(store, storage):
    lease = Lease(storage, pytest.fail)
    lease.take()
    assert lease.trouble() == ""
    store.fault = "403"
    until(lambda: lease.trouble())
    assert lease.trouble().startswith(f"{storage.location} cannot be used (")
    assert lease.trouble().endswith("; transfers wait")
    store.fault = ""
    until(lambda: not lease.trouble())
    assert not lease.lost
    lease.release()


def write_journal(folder, events):
    folder.mkdir(exist_ok=True)
    for k in range(events):
        Journal(folder / "reports.jsonl").append({"trial_id": f"{k:04d}", "epoch": 0, "config": {}})


def test_driver_that_lost_its_study_puts_nothing_there_any_more(storage, tmp_path):
    write_journal(tmp_path, 1)
    mirror = Mirror(tmp_path, storage)
    with mirror.running():
        mirror.update()
        write_lease(storage, pid=7)
        until(lambda: mirror.lost)
        write_journal(tmp_path, 0)
        Journal(tmp_path / "reports.jsonl").append({"trial_id": "0001", "epoch": 0, "config": {}})
        before = storage.read("reports.jsonl")
    assert "is now driven by process 7 on other; what is in" in mirror.finish()
    assert storage.read("reports.jsonl") == before
    assert read_lease(storage)["id"] == "other"


def test_driver_whose_machine_slept_looks_before_it_puts(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 60.0)
    write_journal(tmp_path, 1)
    mirror = Mirror(tmp_path, storage)
    with mirror.running():
        write_lease(storage)
        mirror.update()
    assert mirror.lost
    assert storage.names() == [NAME]


def test_folder_of_which_the_store_knows_more_is_not_driven(storage, tmp_path):
    write_journal(tmp_path / "new", 3)
    new = Mirror(tmp_path / "new", storage)
    with new.running():
        assert new.finish() == ""
    write_journal(tmp_path / "old", 2)
    with (
        pytest.raises(ValueError, match="knows more of the study"),
        Mirror(tmp_path / "old", storage).running(),
    ):
        pass
    Journal(tmp_path / "old" / "reports.jsonl").append({"trial_id": "0009", "epoch": 0, "config": {}})
    with (
        pytest.raises(ValueError, match="neither continues the other"),
        Mirror(tmp_path / "old", storage).running(),
    ):
        pass
    assert len(storage.names()) == 1


def test_mirror_by_hand_does_not_replace_what_another_driver_has_continued(storage, tmp_path, capsys):
    location = storage.location.rpartition("/")[0]
    for name, events in (("other", 3), ("study", 2)):
        write_journal(tmp_path / name, events)
    options = {"epochs": 4, "pruner": "promote", "storage": location}
    write_study(tmp_path / "study", spec(options=options))
    storage.write((tmp_path / "other" / "reports.jsonl").read_bytes(), "reports.jsonl")
    assert mirror_command([str(tmp_path / "study")]) == 2
    assert "knows more of the study" in capsys.readouterr().err
    write_lease(storage, **module._host(), pid=os.getppid(), started=module.process_start(os.getppid()))
    assert mirror_command([str(tmp_path / "study")]) == 2
    assert "is driven by process" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
def test_second_driver_is_refused_and_a_killed_ones_study_is_resumed_at_once(store, cli, tmp_path):
    store.fault = ""
    flags = ("--space", "softmax", "--data", "digits", "--trials", 3, "--epochs", 60, "--concurrency", 1)
    flags = (*flags, "--pruner", "none", "--fix", "batch_size=2", "--final-seeds", 0, "--wandb", "off")
    first = cli(*flags, "--study-dir", "two", "--storage", f"{store.url}/all")
    journal = tmp_path / "two" / "reports.jsonl"
    until(lambda: journal.exists() and len(Journal(journal).read()) >= 4, 90)
    second = cli("--resume", f"{store.url}/all/two", "--wandb", "off")
    _, err = second.communicate(timeout=60)
    assert (second.returncode, err.count("\n")) == (2, 1)
    assert f"is driven by process {first.pid} on" in err
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    known = len(Journal(journal).read())
    third = cli("--resume", tmp_path / "two", "--wandb", "off")
    until(lambda: len(Journal(journal).read()) > known, 90)
    third.send_signal(signal.SIGINT)
    out, err = third.communicate(timeout=60)
    assert third.returncode == 3, err
    assert "waiting" not in out
    assert NAME not in Store(f"{store.url}/all/two").names()


@pytest.mark.slow
@pytest.mark.ray
def test_driver_whose_study_was_taken_over_stops_with_three(store, cli, tmp_path):
    store.fault = ""
    flags = ("--space", "softmax", "--data", "digits", "--trials", 4, "--epochs", 200, "--concurrency", 1)
    flags = (*flags, "--pruner", "none", "--fix", "batch_size=2", "--final-seeds", 0, "--wandb", "off")
    driver = cli(*flags, "--study-dir", "lost", "--storage", f"{store.url}/all")
    journal = tmp_path / "lost" / "reports.jsonl"
    until(lambda: journal.exists() and len(Journal(journal).read()) >= 4, 90)
    write_lease(Store(f"{store.url}/all/lost"), pid=7)
    began = time.monotonic()
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 3
    assert time.monotonic() - began < 20  # a heartbeat, and what stopping takes
    assert "is now driven by process 7 on other" in err
    assert "Traceback" not in err


TAKES_LONG = """
import time
from tunefleet import mirror as module

take = module.Lease.take

def slowly(self):
    take(self)
    print("taken", flush=True)
    time.sleep(60)

module.Lease.take = slowly
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_ctrl_c_before_the_trials_leaves_no_lease(store, cli, tmp_path):
    """A second one finds the study as it was left, and so does a driver on another host, at once."""
    store.fault = ""
    flags = ("--space", "softmax", "--data", "digits", "--trials", 1, "--epochs", 2, "--concurrency", 1)
    flags = (*flags, "--final-seeds", 0, "--wandb", "off")
    place = Store(f"{store.url}/all/early")
    new = (*flags, "--study-dir", "early", "--storage", f"{store.url}/all")
    for arguments in (new, ("--resume", tmp_path / "early", "--wandb", "off")):
        driver = cli(*arguments, before=TAKES_LONG.strip())
        until(lambda: read_lease(place), 90)
        driver.send_signal(signal.SIGINT)
        _, err = driver.communicate(timeout=30)
        assert driver.returncode == 3
        assert err.strip() == "stopped; nothing is lost. To resume: tunefleet resume early"
        assert NAME not in place.names()
        assert json.loads((tmp_path / "early" / "result.json").read_text())["status"] == "stopped"
    driver = cli("--resume", tmp_path / "early", "--wandb", "off")
    _, err = driver.communicate(timeout=90)
    assert driver.returncode == 0, err
