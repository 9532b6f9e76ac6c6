"""Studies in an object store: whole files, a copy that follows, and a study that goes on elsewhere."""

import errno
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from tests.made_study import asked
from tests.object_store import faulty_store, object_store
from tests.test_jobs import make_jobs
from tunefleet.analysis.load import load
from tunefleet.analysis.report import main as report
from tunefleet.journal import Journal
from tunefleet.search.failures import cause_of, text_of
from tunefleet.search.mirror import Mirror, bring, main, storage_of
from tunefleet.search.running import check_storage
from tunefleet.study import write_study
from tunefleet.trainables.device import choose
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.storage import Storage, StoreError, is_url
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
    return Storage(f"{bucket}/{request.node.name.partition('[')[0]}/study")


STUDY = asked(space="softmax", status="stopped")


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def start(folder, trials):
    """Writes a journal in which so many trials start."""
    (folder / "reports.jsonl").unlink(missing_ok=True)
    for k in range(trials):
        Journal(folder / "reports.jsonl").append({"trial_id": f"{k:04d}", "epoch": 0, "config": {}})


def test_a_file_comes_back_as_it_was_put(storage, tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    storage.put(tmp_path / "a", "deep/er/a.txt")
    (tmp_path / "a").write_bytes(b"two, longer")
    storage.put(tmp_path / "a", "deep/er/a.txt")
    assert storage.names() == storage.names("deep") == ["deep/er/a.txt"]
    assert storage.get("deep/er/a.txt", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == b"two, longer"
    storage.remove("deep/er/a.txt")
    storage.remove("deep/er/a.txt")
    assert not storage.get("deep/er/a.txt", tmp_path / "b")
    assert storage.names() == []


@pytest.mark.parametrize(
    ("place", "remote"), [("s3://b/p", True), ("gs://b", True), ("/mnt/nfs", False), ("file:///mnt", False)]
)
def test_urls_are_told_from_folders(place, remote):
    assert is_url(place) == remote


def test_unknown_store_is_an_error_that_says_what_is_known():
    with pytest.raises(ValueError, match="give s3://BUCKET/PREFIX"):
        Storage("nfs://host/path").names()


def test_mirror_puts_what_changed_and_only_that(storage, tmp_path, monkeypatch):
    write(tmp_path, {"study.json": "{}", "best/config.json": "1", "checkpoints/0000.pt": "x", "a.tmp": "x"})
    mirror, sent = Mirror(tmp_path, storage), []
    put = Storage.put
    monkeypatch.setattr(Storage, "put", lambda self, file, name: (sent.append(name), put(self, file, name)))
    mirror.update()
    assert sent == storage.names() == ["best/config.json", "study.json"]
    write(tmp_path, {"study.json": '{"a": 1}'})
    mirror.update()
    assert sent[2:] == ["study.json"]
    assert mirror.finish() == ""


def test_store_out_of_reach_is_told_at_the_end(storage, tmp_path, monkeypatch, capsys):
    options = {"epochs": 4, "pruner": "promote", "storage": storage.url.rpartition("/")[0]}
    write_study(tmp_path, asked(options=options))

    def refuse(*arguments):
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", refuse)
        told = Mirror(tmp_path, storage).finish()
        assert "no route to host" in told
        assert f"tunefleet push {tmp_path}" in told
        assert main([str(tmp_path)]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path)]) == 0
    assert Storage(f"{storage.url.rpartition('/')[0]}/{tmp_path.name}").names() == ["study.json"]


def test_a_study_is_brought_back_unless_the_copy_here_knows_more(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "driver").mkdir()
    write_study(tmp_path / "driver", STUDY)
    start(tmp_path / "driver", 2)
    Mirror(tmp_path / "driver", storage).update()
    storage.put(tmp_path / "driver" / "study.json", "checkpoints/0000.pt")
    folder = bring(storage.url + "/")
    assert sorted(file.name for file in folder.iterdir()) == ["reports.jsonl", "study.json"]
    assert len(Journal(folder / "reports.jsonl").read()) == 2
    start(folder, 1)
    bring(storage.url)
    assert len(Journal(folder / "reports.jsonl").read()) == 2
    start(folder, 3)
    bring(storage.url)
    assert len(Journal(folder / "reports.jsonl").read()) == 3
    with pytest.raises(ValueError, match="holds no study"):
        bring(f"{storage.url}/nothing")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in ("study.json", "reports.jsonl"):
        content = storage.read(name)
        storage.write(content.replace(b'"', b"'", 1), name)
        with pytest.raises(ValueError, match=rf"^{storage.url}\S* ({name} line 1 )?(cannot|is)"):
            bring(storage.url)
        storage.write(content, name)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    with pytest.raises(ValueError, match="names no study"):
        bring(f"{storage.url}/..")


@pytest.mark.parametrize("name", ["a#1", "a?b", "two words", "ü中", "100%", "[x] '$(y)' \"z\"", "a%20b"])
def test_name_of_a_study_may_hold_what_a_url_may_not(bucket, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    place = f"{bucket}/names"
    check_storage(place, name)
    write(tmp_path / name, {"n\udcff": "a user's own file"})
    write_study(tmp_path / name, STUDY)
    start(tmp_path / name, 1)
    storage = storage_of(place, tmp_path / name)
    assert not any(character in storage.url for character in " #?\n'\"$")
    with (mirror := Mirror(tmp_path / name, storage)).running():
        assert mirror.finish() == ""
    with pytest.raises(ValueError, match="holds another study"):
        check_storage(place, name)
    folder = bring(storage.url)
    assert folder == Path("studies") / name
    assert len(Journal(folder / "reports.jsonl").read()) == 1
    assert sorted(storage.names()) == ["n\\udcff", "reports.jsonl", "study.json"]


@pytest.mark.parametrize("name", ["%2E%2E", "..%2Fevil", "%2Fetc"])
def test_name_in_a_url_leads_to_no_other_folder(bucket, name):
    with pytest.raises(ValueError, match="names no study"):
        bring(f"{bucket}/{name}")


def test_no_name_in_a_store_leads_out_of_the_folder(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"study.json": "{}"})
    storage.put(tmp_path / "study.json", "study.json")
    monkeypatch.setattr(Storage, "names", lambda *arguments: ["study.json", "best/../../../evil"])
    with pytest.raises(ValueError, match="outside the study"):
        bring(storage.url)
    assert not (tmp_path / "studies").exists()


def test_a_trial_goes_on_upon_another_node(storage, data_dir, tmp_path):
    data, levers = prepare("digits", data_dir), choose("cpu", "fp32")

    def node(name, storage=storage):
        return TrialContext(data, levers, tmp_path / name, tmp_path / "driver" / name, 1, None, storage)

    alone = node("alone", None)
    for folder in ("checkpoints", "best"):
        (alone.study_dir / folder).mkdir(parents=True)

    def report(run):
        return next(report for report in iter(run.report, None) if "phase" not in report)

    whole = JobRun(JOB, alone)
    expected = [report(whole) for _ in range(3)]
    first = JobRun(JOB, node("first"))
    told = [report(first)]
    first.report()  # trained and kept, and the node died before it was told
    second = JobRun(JOB | {"reported": 1}, node("second"))
    told += [report(second), report(second)]
    for got, wanted in zip(told, expected, strict=True):
        assert (got["train_loss"], got["val_accuracy"]) == (wanted["train_loss"], wanted["val_accuracy"])
    assert told[2]["test_accuracy"] == expected[2]["test_accuracy"]
    names = ["best/misclassified-0000.npz", "best/predictions-0000.parquet", "checkpoints/0000.pt"]
    assert storage.names() == names
    left = [file for name in ("first", "second") for file in (tmp_path / name / "studies").rglob("*.*")]
    assert left == []  # no node keeps a copy


@pytest.mark.ray
def test_study_in_a_store_is_complete_there_and_goes_on_from_there(bucket, cli, tmp_path, monkeypatch):
    asked = ("--space", "softmax", "--data", "digits", "--trials", 6, "--epochs", 9, "--concurrency", 1)
    asked = (*asked, "--final-seeds", 1, "--wandb", "off")
    whole = cli(*asked, "--study-dir", tmp_path / "local")
    assert whole.wait(120) == 0, whole.stderr.read()
    stopped = cli(*asked, "--study-dir", "there", "--storage", f"{bucket}/all")
    journal = tmp_path / "there" / "reports.jsonl"
    while not journal.exists() or len(Journal(journal).read()) < 8:
        assert stopped.poll() is None, stopped.stderr.read()
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(30) == 3
    assert f"--resume {bucket}/all/there" in stopped.stderr.read()
    shutil.rmtree(tmp_path / "there")  # the driver's machine is gone
    resumed = cli("--resume", f"{bucket}/all/there", "--wandb", "off")
    assert resumed.wait(120) == 0, resumed.stderr.read()
    names = Storage(f"{bucket}/all/there").names()
    assert {"study.json", "reports.jsonl", "trials.csv", "epochs.parquet", "best/checkpoint.pt"} <= set(names)
    assert not [name for name in names if name.startswith(("checkpoints/", "ray/")) or "final-1" in name]
    monkeypatch.chdir(tmp_path)
    there, local = load(f"{bucket}/all/there"), load(tmp_path / "local")
    timeless = [name for name in local.trials.columns if name not in ("seconds", "node")]
    pd.testing.assert_frame_equal(there.trials[timeless], local.trials[timeless])
    assert there.test_accuracy == local.test_accuracy
    assert there.predictions is not None
    assert report([f"{bucket}/all/there"]) == 0
    assert (tmp_path / "there" / "report.html").exists()


def test_storage_that_cannot_be_used_is_one_line_and_begins_nothing(bucket, cli, tmp_path):
    asked = ("--space", "softmax", "--data", "digits", "--trials", 1)
    nothing = cli(*asked, "--storage", "s3://no-such-bucket/all")
    assert nothing.wait(60) == 2
    error = nothing.stderr.read()
    assert error.startswith("error: --storage=s3://no-such-bucket/all cannot be used")
    assert error.count("\n") == 1
    both = cli(*asked, "--storage", tmp_path / "a", "--study-dir", tmp_path / "b")
    assert both.wait(60) == 2
    assert "give one of them" in both.stderr.read()
    assert not (tmp_path / "studies").exists()


@pytest.mark.ray
def test_folder_as_storage_holds_the_study(cli, tmp_path):
    asked = ("--space", "softmax", "--data", "digits", "--trials", 2, "--epochs", 1, "--final-seeds", 0)
    process = cli(*asked, "--storage", tmp_path / "shared", "--wandb", "off")
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
    monkeypatch.setattr("tunefleet.trainables.storage.WAIT_SECONDS", 0.05)


@pytest.mark.parametrize(
    ("fault", "operation"),
    [
        *(("403", operation) for operation in ("put", "get", "names", "remove", "read", "write")),
        *((fault, operation) for fault in ("refused", "503", "hang") for operation in ("put", "get")),
    ],
)
def test_store_that_is_away_for_a_while_is_waited_for(store, hurried, tmp_path, fault, operation):
    store.fault = ""
    (file := tmp_path / "a").write_bytes(b"one")
    storage = Storage(f"{store.url}/{fault}/{operation}", patience=60.0)
    storage.put(file, "a")
    do = {
        "put": lambda: storage.put(file, "b"),
        "get": lambda: storage.get("a", tmp_path / "c"),
        "names": storage.names,
        "remove": lambda: storage.remove("a"),
        "read": lambda: storage.read("a"),
        "write": lambda: storage.write(b"two", "b"),
    }
    store.fault = fault
    threading.Timer(0.5, setattr, [store, "fault", ""]).start()
    result = do[operation]()
    assert store.fault == ""
    expected = {"get": True, "names": ["a"], "read": b"one"}
    assert result == expected.get(operation)
    names = {"put": ["a", "b"], "write": ["a", "b"], "remove": []}
    assert storage.names() == names.get(operation, ["a"])
    assert operation != "get" or (tmp_path / "c").read_bytes() == b"one"
    assert list(tmp_path.glob("*.tmp")) == []


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
def test_store_that_stays_away_is_an_error_that_blames_no_trial(store, hurried, tmp_path, fault, words):
    store.fault = fault
    (file := tmp_path / "a").write_bytes(b"one")
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        Storage(f"{store.url}/away", patience=1.0).put(file, "a")
    store.fault = ""
    assert time.monotonic() - began < 25  # a hang is bounded
    assert str(caught.value) == f"{store.url}/away cannot be used ({words})"
    assert cause_of(pickle.loads(pickle.dumps(caught.value))) == "store"


def test_other_store_that_hangs_is_given_up(hurried, tmp_path, monkeypatch):
    monkeypatch.setattr("tunefleet.trainables.storage.HANG_SECONDS", 0.2)
    released = threading.Event()

    hanging = SimpleNamespace(type_name="other", get_file_info=lambda path: released.wait(30))
    monkeypatch.setattr("tunefleet.trainables.storage._open", lambda url: (hanging, "root"))
    began = time.monotonic()
    with pytest.raises(StoreError, match="no answer within 0 s"):
        Storage("other://root", patience=0.5).get("a", tmp_path / "a")
    assert time.monotonic() - began < 5
    released.set()


def test_full_disk_of_this_machine_is_not_the_stores_fault(store, hurried, tmp_path, monkeypatch):
    store.fault = ""
    (file := tmp_path / "a").write_bytes(b"one")
    storage = Storage(f"{store.url}/full", patience=60.0)
    storage.put(file, "a")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    began = time.monotonic()
    with pytest.raises(OSError, match="No space left") as caught:
        storage.get("a", tmp_path / "b")
    assert not isinstance(caught.value, StoreError)
    with pytest.raises(FileNotFoundError):
        storage.put(tmp_path / "missing", "b")
    assert time.monotonic() - began < 5
    assert sorted(tmp_path.iterdir()) == [file]


def test_lost_store_stops_a_study_and_blames_no_trial(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    first, second = jobs.next_job(), jobs.next_job()
    error = StoreError("s3://b/s cannot be used (Access Denied)")
    text = f"ray::Trial.step() (pid=1)\n  File x\ntrainables.storage.StoreError: {error}"
    jobs.lose(first.trial_id, cause_of(RuntimeError(text)), text_of(RuntimeError(text)))
    assert jobs.gave_up == str(error)
    assert jobs.next_job() is None
    assert not jobs.report(second.trial_id, {"epoch": 1, "val_accuracy": 0.5})
    assert jobs.next_job() is None
    assert jobs.finished
    events = Journal(tmp_path / "reports.jsonl").read()
    assert not [event for event in events if "lost" in event or "status" in event]


@pytest.mark.ray
def test_study_outlives_a_store_that_is_away_and_stops_with_three_where_it_stays_away(store, cli, tmp_path):
    """Patience is cut from 10 minutes to 15 s; the store is away for 5 s, then for good."""
    store.fault = ""
    asked = ("--space", "softmax", "--data", "digits", "--trials", 12, "--epochs", 9, "--concurrency", 2)
    asked = (
        *asked,
        "--final-seeds",
        1,
        "--wandb",
        "off",
        "--study-dir",
        "s",
        "--storage",
        f"{store.url}/all",
    )
    impatient = "from tunefleet.trainables.storage import Storage; Storage.__init__.__defaults__ = (15.0,)"
    study = cli(*asked, before=impatient)
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
    storage = Storage(f"{store.url}/all/s")
    assert storage.read("reports.jsonl") == journal.read_bytes()
    assert "lease.json" not in storage.names()
