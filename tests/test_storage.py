"""Studies in an object store: whole files, a copy that follows, and a study that goes on elsewhere."""

import shutil
import signal
import time

import pandas as pd
import pytest

from analysis.load import load
from analysis.report import main as report
from search.journal import Journal
from search.mirror import Mirror, bring, main
from search.study_file import write_study
from tests.object_store import object_store
from trainables.data import prepare
from trainables.levers import choose
from trainables.storage import Storage, is_url
from trainables.trial import JobRun, TrialContext

JOB = {
    "trial_id": "0000",
    "config": {"architecture": "softmax", "epochs": 3, "lr": 0.01},
    "reported": 0,
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
    options = {"storage": storage.url.rpartition("/")[0]}
    write_study(tmp_path, {"space": "softmax", "status": "done", "options": options, "rungs": []})

    def refuse(*arguments):
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", refuse)
        told = Mirror(tmp_path, storage).finish()
        assert "no route to host" in told
        assert f"python -m search.mirror {tmp_path}" in told
        assert main([str(tmp_path)]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path)]) == 0
    assert Storage(f"{storage.url.rpartition('/')[0]}/{tmp_path.name}").names() == ["study.json"]


def test_a_study_is_brought_back_unless_the_copy_here_knows_more(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "driver", {"study.json": "{}"})
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
    with pytest.raises(ValueError, match="names no study"):
        bring(f"{storage.url}/..")


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
    whole = JobRun(JOB, alone)
    expected = [whole.report() for _ in range(3)]
    first = JobRun(JOB, node("first"))
    told = [first.report()]
    first.report()  # trained and kept, and the node died before it was told
    second = JobRun(JOB | {"reported": 1}, node("second"))
    told += [second.report(), second.report()]
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
