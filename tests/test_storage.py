"""Studies in an object store: whole files, a copy that follows, and a study continued on another machine."""

import errno
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import tunefleet
from tests.made_study import spec
from tests.object_store import faulty_store, object_store
from tests.test_scheduler import make_jobs
from tunefleet.analysis.load import load
from tunefleet.analysis.report import main as report
from tunefleet.journal import Journal
from tunefleet.mirror import Mirror, fetch_study, main
from tunefleet.models.spaces import SPACES
from tunefleet.search.failures import cause_of, text_of
from tunefleet.search.running import check_storage
from tunefleet.store import Store, StoreError
from tunefleet.study import write_study
from tunefleet.trainables.device import choose
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.trial import JobRun, TrialContext

JOB = {
    "trial_id": "0000",
    "config": {"architecture": "softmax", "epochs": 3, "lr": 0.01},
    "reported": 0,
    "eager": False,
    "final": True,
}


@pytest.fixture(scope="module")
def bucket():
    with object_store() as url:
        yield url


@pytest.fixture
def storage(bucket, request):
    """An empty place for one study."""
    return Store(f"{bucket}/{request.node.name.partition('[')[0]}/study")


STUDY = spec(space="softmax", status="stopped")


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def start(folder, trials):
    """Writes a journal in which so many trials start."""
    (folder / "reports.jsonl").unlink(missing_ok=True)
    for k in range(trials):
        Journal(folder / "reports.jsonl").append({"trial_id": f"{k:04d}", "epoch": 0, "config": {}})


@pytest.mark.parametrize("kind", ["url", "folder", "folder that is no UTF-8"])
def test_a_file_comes_back_as_it_was_written(storage, tmp_path, kind):
    if kind != "url":
        storage = Store(str(tmp_path / ("n\udcff" if "no" in kind else "n")))
    storage.write(b"one", "deep/er/a.txt")
    storage.write(b"two, longer", "deep/er/a.txt")
    assert storage.names() == storage.names("deep") == ["deep/er/a.txt"]
    assert storage.read("deep/er/a.txt") == b"two, longer"
    storage.fetch(["deep/er/a.txt", "none"], tmp_path / "new")
    assert (tmp_path / "new").exists() == (kind == "url")
    assert kind != "url" or (tmp_path / "new" / "deep" / "er" / "a.txt").read_bytes() == b"two, longer"
    storage.remove("deep/er/a.txt")
    storage.remove("deep/er/a.txt")
    assert storage.read("deep/er/a.txt") is None
    assert storage.names() == []


def test_a_write_to_a_folder_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write(b"old", "a")

    def fail(file, content):
        file.open("wb").write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        store.write(b"new", "a")
    assert store.names() == ["a"]
    assert store.read("a") == b"old"


@pytest.mark.parametrize(
    ("location", "remote"),
    [("s3://b/p", True), ("gs://b", True), ("/mnt/nfs", False), ("file:///mnt", False)],
)
def test_a_url_is_no_folder(location, remote):
    assert (Store(location).folder is None) == remote


def test_ground_floor_imports_nothing_heavy():
    heavy = "{*sys.modules} & {'pyarrow', 'torch', 'ray'}"
    code = f"import sys; from tunefleet import cli, files, store; print({heavy})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_unknown_store_is_an_error_that_says_what_is_known():
    with pytest.raises(ValueError, match="give s3://BUCKET/PREFIX"):
        Store("nfs://host/path").names()


def test_mirror_puts_what_changed_and_only_that(storage, tmp_path, monkeypatch):
    write(tmp_path, {"study.json": "{}", "best/config.json": "1", "checkpoints/0000.pt": "x", "a.tmp": "x"})
    mirror, sent = Mirror(tmp_path, storage), []
    put = Store.write
    monkeypatch.setattr(Store, "write", lambda self, data, name: (sent.append(name), put(self, data, name)))
    mirror.update()
    assert sent == storage.names() == ["best/config.json", "study.json"]
    write(tmp_path, {"study.json": '{"a": 1}'})
    mirror.update()
    assert sent[2:] == ["study.json"]
    assert mirror.finish() == ""


def test_a_store_out_of_reach_is_reported_at_the_end(storage, tmp_path, monkeypatch, capsys):
    options = {"epochs": 4, "pruner": "promote", "storage": storage.location.rpartition("/")[0]}
    write_study(tmp_path, spec(options=options))

    def refuse(*arguments):
        raise StoreError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", refuse)
        message = Mirror(tmp_path, storage).finish()
        assert "no route to host" in message
        assert f"tunefleet push {tmp_path}" in message
        assert main([str(tmp_path)]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path)]) == 0
    assert Store(f"{storage.location.rpartition('/')[0]}/{tmp_path.name}").names() == ["study.json"]


def test_a_study_is_brought_back_unless_the_copy_here_knows_more(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "driver").mkdir()
    write_study(tmp_path / "driver", STUDY)
    start(tmp_path / "driver", 2)
    Mirror(tmp_path / "driver", storage).update()
    storage.write(b"x", "checkpoints/0000.pt")
    folder = fetch_study(storage.location + "/")
    assert sorted(file.name for file in folder.iterdir()) == ["reports.jsonl", "study.json"]
    assert len(Journal(folder / "reports.jsonl").read()) == 2
    start(folder, 1)
    fetch_study(storage.location)
    assert len(Journal(folder / "reports.jsonl").read()) == 2
    start(folder, 3)
    fetch_study(storage.location)
    assert len(Journal(folder / "reports.jsonl").read()) == 3
    assert tunefleet.load(storage.location).folder == folder
    with pytest.raises(ValueError, match="holds no study"):
        fetch_study(f"{storage.location}/nothing")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in ("study.json", "reports.jsonl"):
        content = storage.read(name)
        storage.write(content.replace(b'"', b"'", 1), name)
        with pytest.raises(ValueError, match=rf"^{storage.location}\S* ({name} line 1 )?(cannot|is)"):
            fetch_study(storage.location)
        storage.write(content, name)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    with pytest.raises(ValueError, match="names no study"):
        fetch_study(f"{storage.location}/..")


@pytest.mark.parametrize("name", ["a#1", "a?b", "two words", "ü中", "100%", "[x] '$(y)' \"z\"", "a%20b"])
def test_name_of_a_study_may_hold_what_a_url_may_not(bucket, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    location = f"{bucket}/names"
    check_storage(location, name)
    write(tmp_path / name, {"n\udcff": "a user's own file"})
    write_study(tmp_path / name, STUDY)
    start(tmp_path / name, 1)
    storage = Store.of_study(location, tmp_path / name)
    assert not any(character in storage.location for character in " #?\n'\"$")
    with (mirror := Mirror(tmp_path / name, storage)).running():
        assert mirror.finish() == ""
    with pytest.raises(ValueError, match="holds another study"):
        check_storage(location, name)
    folder = fetch_study(storage.location)
    assert folder == Path("studies") / name
    assert len(Journal(folder / "reports.jsonl").read()) == 1
    assert sorted(storage.names()) == ["n\\udcff", "reports.jsonl", "study.json"]


@pytest.mark.parametrize("name", ["%2E%2E", "..%2Fevil", "%2Fetc"])
def test_name_in_a_url_leads_to_no_other_folder(bucket, name):
    with pytest.raises(ValueError, match="names no study"):
        fetch_study(f"{bucket}/{name}")


def test_no_name_in_a_store_leads_out_of_the_folder(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"study.json": "{}"})
    storage.write(b"{}", "study.json")
    monkeypatch.setattr(Store, "names", lambda *arguments: ["study.json", "best/../../../evil"])
    with pytest.raises(ValueError, match="outside the study"):
        fetch_study(storage.location)
    assert not (tmp_path / "studies").exists()


def test_a_trial_continues_on_another_node(storage, data_dir, tmp_path):
    data, settings = prepare("digits", data_dir), choose("cpu", "fp32")

    def node(name, store=storage):
        return TrialContext(
            SPACES["softmax"], data, settings, tmp_path / name, tmp_path / "driver", store, 1, None
        )

    alone = node("alone", Store(str(tmp_path / "driver")))

    def report(run):
        return next(report for report in iter(run.report, None) if "phase" not in report)

    whole = JobRun(JOB, alone)
    expected = [report(whole) for _ in range(3)]
    first = JobRun(JOB, node("first"))
    reports = [report(first)]
    first.report()  # trained and kept, and the node died before the report arrived
    second = JobRun(JOB | {"reported": 1}, node("second"))
    reports += [report(second), report(second)]
    for got, wanted in zip(reports, expected, strict=True):
        assert (got["train_loss"], got["val_accuracy"]) == (wanted["train_loss"], wanted["val_accuracy"])
    assert reports[2]["test_accuracy"] == expected[2]["test_accuracy"]
    best = [
        f"best/{name}" for name in ("misclassified-0000.npz", "model-0000.pt", "predictions-0000.parquet")
    ]
    names = [*best, "checkpoints/0000.pt"]
    assert storage.names() == names
    assert Store(str(tmp_path / "driver")).names() == names  # of the study in a folder
    kept = {file.suffix for file in (tmp_path / "first").rglob("*")}
    assert not kept & {".pt", ".npz", ".parquet"}  # no node keeps a copy


@pytest.mark.ray
@pytest.mark.slow
def test_study_in_a_store_is_complete_there_and_continues_from_there(bucket, cli, tmp_path, monkeypatch):
    arguments = ("--space", "softmax", "--data", "digits", "--trials", 6, "--epochs", 9, "--concurrency", 1)
    arguments = (*arguments, "--final-seeds", 1, "--wandb", "off")
    whole = cli(*arguments, "--study-dir", tmp_path / "local")
    assert whole.wait(120) == 0, whole.stderr.read()
    stopped = cli(*arguments, "--study-dir", "there", "--storage", f"{bucket}/all")
    journal = tmp_path / "there" / "reports.jsonl"
    while not journal.exists() or len(Journal(journal).read()) < 8:
        assert stopped.poll() is None, stopped.stderr.read()
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(30) == 3
    assert f"tunefleet resume {bucket}/all/there" in stopped.stderr.read()
    shutil.rmtree(tmp_path / "there")  # the driver's machine is gone
    resumed = cli("--resume", f"{bucket}/all/there", "--wandb", "off")
    assert resumed.wait(120) == 0, resumed.stderr.read()
    names = Store(f"{bucket}/all/there").names()
    assert {"study.json", "reports.jsonl", "trials.csv", "epochs.parquet", "best/model.pt"} <= set(names)
    assert not [name for name in names if name.startswith(("checkpoints/", "ray/")) or "final-1" in name]
    monkeypatch.chdir(tmp_path)
    remote, local = load(f"{bucket}/all/there"), load(tmp_path / "local")
    timeless = [name for name in local.trials.columns if name not in ("seconds", "node")]
    pd.testing.assert_frame_equal(remote.trials[timeless], local.trials[timeless])
    assert remote.test_accuracy == local.test_accuracy
    assert remote.predictions is not None
    assert report([f"{bucket}/all/there"]) == 0
    assert (tmp_path / "there" / "report.html").exists()


def test_storage_that_cannot_be_used_is_one_line_and_begins_nothing(bucket, cli, tmp_path):
    arguments = ("--space", "softmax", "--data", "digits", "--trials", 1)
    nothing = cli(*arguments, "--storage", "s3://no-such-bucket/all")
    assert nothing.wait(60) == 2
    error = nothing.stderr.read()
    assert error.startswith("error: --storage=s3://no-such-bucket/all cannot be used")
    assert error.count("\n") == 1
    both = cli(*arguments, "--storage", tmp_path / "a", "--study-dir", tmp_path / "b")
    assert both.wait(60) == 2
    assert "give one of them" in both.stderr.read()
    assert not (tmp_path / "studies").exists()


@pytest.mark.ray
def test_folder_as_storage_holds_the_study(cli, tmp_path):
    arguments = ("--space", "softmax", "--data", "digits", "--trials", 2, "--epochs", 1, "--final-seeds", 0)
    process = cli(*arguments, "--storage", tmp_path / "shared", "--wandb", "off")
    assert process.wait(90) == 0, process.stderr.read()
    (folder,) = (tmp_path / "shared").iterdir()
    assert folder.name.startswith("softmax-digits-")
    assert (folder / "trials.csv").exists()


@pytest.fixture(scope="module")
def store():
    with faulty_store() as served:
        yield served


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr("tunefleet.store.WAIT_SECONDS", 0.05)


@pytest.mark.parametrize(
    ("fault", "operation"),
    [
        *(("403", operation) for operation in ("names", "remove", "read", "write")),
        *((fault, operation) for fault in ("refused", "503", "hang") for operation in ("write", "read")),
    ],
)
def test_store_that_is_away_for_a_while_is_waited_for(store, hurried, fault, operation):
    store.fault = ""
    storage = Store(f"{store.url}/{fault}/{operation}", patience=60.0)
    storage.write(b"one", "a")
    operations = {
        "names": storage.names,
        "remove": lambda: storage.remove("a"),
        "read": lambda: storage.read("a"),
        "write": lambda: storage.write(b"two", "b"),
    }
    store.fault = fault
    threading.Timer(0.5, setattr, [store, "fault", ""]).start()
    result = operations[operation]()
    assert store.fault == ""
    expected = {"names": ["a"], "read": b"one"}
    assert result == expected.get(operation)
    names = {"write": ["a", "b"], "remove": []}
    assert storage.names() == names.get(operation, ["a"])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("refused", "Could not connect to server"),
        ("403", "Access Denied"),
        ("read-only", "Access Denied"),
        ("503", "Please reduce your rate"),
        ("hang", "Timeout was reached"),
    ],
)
def test_store_that_stays_away_is_an_error_that_blames_no_trial(store, hurried, fault, words):
    store.fault = fault
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        Store(f"{store.url}/away", patience=1.0).write(b"one", "a")
    store.fault = ""
    assert time.monotonic() - began < 25  # a hang is bounded
    assert str(caught.value) == f"{store.url}/away cannot be used ({words})"
    assert cause_of(pickle.loads(pickle.dumps(caught.value))) == "store"


def test_other_store_that_hangs_is_given_up(hurried, monkeypatch):
    monkeypatch.setattr("tunefleet.store.HANG_SECONDS", 0.2)
    released = threading.Event()

    hanging = SimpleNamespace(type_name="other", get_file_info=lambda path: released.wait(30))
    monkeypatch.setattr("tunefleet.store._open", lambda url: (hanging, "root"))
    began = time.monotonic()
    with pytest.raises(StoreError, match="no answer within 0 s"):
        Store("other://root", patience=0.5).read("a")
    assert time.monotonic() - began < 5
    released.set()


def test_full_disk_of_this_machine_is_not_the_stores_fault(store, hurried, tmp_path, monkeypatch):
    store.fault = ""
    storage = Store(f"{store.url}/full", patience=60.0)
    storage.write(b"one", "a")

    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    began = time.monotonic()
    with pytest.raises(OSError, match="No space left") as caught:
        storage.fetch(["a"], tmp_path / "copy")
    assert not isinstance(caught.value, StoreError)
    assert time.monotonic() - began < 5
    assert list((tmp_path / "copy").iterdir()) == []


def test_lost_store_stops_a_study_and_blames_no_trial(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    first, second = jobs.next_job(), jobs.next_job()
    error = StoreError("s3://b/s cannot be used (Access Denied)")
    text = f"ray::Trial.step() (pid=1)\n  File x\ntunefleet.store.StoreError: {error}"
    jobs.lose(first.trial_id, cause_of(RuntimeError(text)), text_of(RuntimeError(text)))
    assert jobs.gave_up == str(error)
    assert jobs.next_job() is None
    assert not jobs.report(second.trial_id, {"epoch": 1, "val_accuracy": 0.5})
    assert jobs.next_job() is None
    assert jobs.finished
    events = Journal(tmp_path / "reports.jsonl").read()
    assert not [event for event in events if "lost" in event or "status" in event]


@pytest.mark.slow
@pytest.mark.ray
def test_study_outlives_a_store_that_is_away_and_stops_with_three_where_it_stays_away(store, cli, tmp_path):
    """Patience is cut from 10 minutes to 15 s; the store is away for 5 s, then for good."""
    store.fault = ""
    arguments = ("--space", "softmax", "--data", "digits", "--trials", 12, "--epochs", 9, "--concurrency", 2)
    arguments = (
        *arguments,
        "--final-seeds",
        1,
        "--wandb",
        "off",
        "--study-dir",
        "s",
        "--storage",
        f"{store.url}/all",
    )
    impatient = "from tunefleet.store import Store; Store.__init__.__defaults__ = (15.0,)"
    study = cli(*arguments, before=impatient)
    journal = tmp_path / "s" / "reports.jsonl"

    def reports():
        return [event for event in Journal(journal).read() if event.get("epoch")]

    def wait_for(count):
        deadline = time.monotonic() + 90
        while len(reports()) < count:
            assert study.poll() is None, study.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    wait_for(3)
    store.fault = "refused"
    time.sleep(5)
    known = len(reports())
    store.fault = ""
    wait_for(known + 3)
    store.fault = "read-only"
    out, err = study.communicate(timeout=90)
    store.fault = ""
    assert study.returncode == 3, err
    assert "all/s cannot be used (Access Denied)" in err
    assert err.strip().endswith("tunefleet resume s")  # the store lacks the last reports
    assert "transfers wait" in out
    assert "is not complete" in out
    events = Journal(journal).read()
    assert not [event for event in events if "lost" in event or event.get("status") not in (None, "done")]
    resumed = cli("--resume", "s", "--wandb", "off")
    _, err = resumed.communicate(timeout=120)
    assert (resumed.returncode, err) == (0, "")
    storage = Store(f"{store.url}/all/s")
    assert storage.read("reports.jsonl") == journal.read_bytes()
    assert "lease.json" not in storage.names()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_shared_folder_that_is_away_for_a_while_is_waited_for(number, tmp_path, monkeypatch):
    monkeypatch.setattr("tunefleet.store.WAIT_SECONDS", 0.01)
    store, failing = Store(str(tmp_path)), [3]
    read_bytes = Path.read_bytes

    def fail(self):
        failing[0] -= 1
        if failing[0] >= 0:
            raise OSError(number, "away", str(self))
        return read_bytes(self)

    store.write(b"epoch 1", "checkpoints/0000.pt")
    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    assert store.read("checkpoints/0000.pt") == b"epoch 1"
    failing[0] = 10**6
    with pytest.raises(StoreError, match="cannot be used"):
        store.patient(0.1).read("checkpoints/0000.pt")


def test_a_journal_in_a_shared_folder_that_is_away_stops_the_study_resumable(tmp_path, monkeypatch):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    jobs.next_job()

    def fail(event):
        raise OSError(errno.ESTALE, "Stale file handle", "reports.jsonl")

    monkeypatch.setattr(jobs.journal, "append", fail)
    assert not jobs.report("0000", {"epoch": 1, "val_accuracy": 0.5})
    assert "Stale file handle" in jobs.gave_up


def test_a_signal_ends_the_wait_for_a_store_at_the_end_of_a_study(tmp_path, monkeypatch):
    write(tmp_path / "study", {"study.json": "{}"})
    monkeypatch.setattr("tunefleet.mirror.BRIEF_SECONDS", 0.1)
    monkeypatch.setattr("tunefleet.lease.Lease.look", lambda self, patience: None)
    monkeypatch.setattr("tunefleet.lease.Lease.release", lambda self, reachable: None)
    mirror = Mirror(tmp_path / "study", Store("s3://nowhere/study"), lambda line: None)
    monkeypatch.setattr("tunefleet.store.Store.write", lambda *arguments: time.sleep(60))
    threading.Timer(0.5, mirror.give_up).start()
    began = time.monotonic()
    assert "is not complete (interrupted)" in mirror.finish()
    assert time.monotonic() - began < 10
