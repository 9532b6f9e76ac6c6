"""One worker's work, without Ray: what step() reports, and what a kill between two steps costs."""

import dataclasses
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tests.configs import make_config
from tunefleet.models.spaces import SPACES
from tunefleet.printed import Printed
from tunefleet.store import Store
from tunefleet.trainables.device import BrokenGpuError, choose
from tunefleet.trainables.graph import CaptureError, CaptureMemoryError
from tunefleet.trainables.preparation import prepare
from tunefleet.trainables.trial import Trial, TrialContext


@pytest.fixture
def worker(data_dir, tmp_path):
    """Makes workers of a softmax study of digits; Ray's part of a Trainable is not started."""
    for name in ("checkpoints", "best"):
        (tmp_path / name).mkdir()
    data, settings = prepare("digits", data_dir), choose("cpu", "fp32")
    context = TrialContext(SPACES["softmax"], data, settings, data_dir, tmp_path, Store(str(tmp_path)), 1, 10)

    def make(trial_id="0000", reported=0, final=False, **config):
        trial = Trial.__new__(Trial)
        trial.context, trial.printed = context, Printed()
        values = make_config("softmax", **({"epochs": 3, "lr": 0.01} | config)).to_dict()
        job = {"trial_id": trial_id, "config": values, "reported": reported, "final": final, "eager": False}
        trial.reset_config(job)
        assert trial.step() == {"location": "{}"}
        return trial

    return make


def report_of(trial):
    """Returns the next epoch's report without what differs from run to run."""
    report = json.loads(trial.step()["report"])
    while "phase" in report:
        report = json.loads(trial.step()["report"])
    return {
        name: report[name] for name in report if name not in ("epoch_seconds", "finished_at", "pid", "node")
    }


def test_each_step_is_one_epoch_and_the_last_is_done(worker):
    trial = worker()
    reports = [report_of(trial) for _ in range(3)]
    assert [report["epoch"] for report in reports] == [1, 2, 3]
    assert [report.get("status") for report in reports] == [None, None, "done"]


def test_next_job_of_a_worker_does_not_see_the_last(worker):
    alone = report_of(worker("0001", lr=0.05))
    reused = worker("0002", lr=0.01)
    report_of(reused)
    reused.reset_config(worker("0003", lr=0.05).job)
    reused.step()
    assert report_of(reused) == alone


def test_promoted_trial_goes_on_from_its_checkpoint(worker):
    whole = worker("0000")
    expected = [report_of(whole) for _ in range(3)]
    report_of(worker("0001"))
    resumed = worker("0001", reported=1)
    assert [report_of(resumed) for _ in range(2)] == expected[1:]


def test_report_that_a_kill_swallowed_is_delivered_and_not_repeated(worker):
    first = report_of(worker())  # its checkpoint is written; the report never reached the study
    trial = worker(reported=0)
    assert report_of(trial) == first
    assert report_of(trial)["epoch"] == 2


def test_the_last_epoch_is_kept_only_of_what_is_the_best(worker, tmp_path):
    report_of(worker("0000", epochs=1))
    report_of(worker("final-1", final=True, epochs=1))
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["final-1.pt"]
    assert (tmp_path / "best" / "model-final-1.pt").exists()


def test_a_last_report_that_a_kill_swallowed_is_trained_again(worker):
    trial = worker()
    last = [report_of(trial) for _ in range(3)][-1]
    assert report_of(worker(reported=2)) == last


def test_reports_that_a_groups_death_swallowed_are_all_delivered_in_order(worker):
    first = worker(epochs=4)
    reports = [report_of(first) for _ in range(3)]
    again = worker(epochs=4, reported=1)  # Train had collected the first one only
    assert [report_of(again) for _ in range(3)] == [*reports[1:], report_of(first)]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damaged_checkpoint_means_a_new_beginning(worker, tmp_path, damage):
    trial = worker()
    expected = [report_of(trial) for _ in range(2)]
    file = tmp_path / "checkpoints" / "0000.pt"
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    content = {"truncated": whole[:middle], "flipped": flipped, "empty": b"", "text": b"no checkpoint"}
    file.write_bytes(content[damage])
    again = worker(reported=2)
    assert [report_of(again) for _ in range(2)] == expected


def test_a_missing_checkpoint_means_a_new_beginning(worker, tmp_path):
    trial = worker()
    expected = [report_of(trial) for _ in range(2)]
    (tmp_path / "checkpoints" / "0000.pt").unlink()
    again = worker(reported=2)
    assert [report_of(again) for _ in range(2)] == expected


def test_an_older_checkpoint_means_its_later_epochs_again(worker, tmp_path):
    file, trial = tmp_path / "checkpoints" / "0000.pt", worker(epochs=5)
    expected = [report_of(trial)]
    older = file.read_bytes()
    expected += [report_of(trial) for _ in range(2)]
    file.write_bytes(older)
    again = worker(epochs=5, reported=3)
    assert [report_of(again) for _ in range(3)] == [*expected[1:], report_of(trial)]


def test_final_seed_ends_with_the_test_split(worker, tmp_path):
    trial = worker("final-1", final=True, epochs=2)
    assert "test_accuracy" not in report_of(trial)
    last = report_of(trial)
    predictions = pd.read_parquet(tmp_path / "best" / "predictions-final-1.parquet")
    assert len(predictions) == 359
    assert last["test_accuracy"] == pytest.approx((predictions.label == predictions.predicted).mean())


def test_the_test_split_is_announced_before_it_is_opened(worker, tmp_path):
    trial = worker("final-1", final=True, epochs=1)
    assert json.loads(trial.step()["report"])["phase"] == "testing"
    assert not list((tmp_path / "best").iterdir())
    assert json.loads(trial.step()["report"])["status"] == "done"


def on_gpu(trial, monkeypatch, usable):
    """Lets a worker believe that it is on a GPU, which an error leaves usable or not."""
    trial.context = dataclasses.replace(
        trial.context,
        settings=dataclasses.replace(trial.context.settings, device="cuda"),
        gpu_bytes=2 * 10**9,
    )
    monkeypatch.setattr("tunefleet.trainables.device.is_usable", lambda: usable)
    monkeypatch.setattr("tunefleet.trainables.device.gpu_id", lambda: "GPU-1234")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1.5e9)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8 * 10**9)
    )


def failing(error):
    def job_run(*_):
        raise error

    return job_run


def test_out_of_memory_is_one_line_with_what_to_set(worker, monkeypatch):
    trial = worker(batch_size=512)
    on_gpu(trial, monkeypatch, usable=True)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. If reserved but …")
    monkeypatch.setattr("tunefleet.trainables.trial.JobRun", failing(error))
    report = report_of(trial)
    assert (report["status"], report["gpu"]) == ("out_of_memory", "GPU-1234")
    assert report["error"] == (
        "out of memory with batch_size 512, image_size 32: it held 1.5 GB of the 2.0 GB that a trial may "
        "take of the GPU's 8.0 and asked for more (CUDA out of memory. Tried to allocate 1.00 GiB.); give a "
        "larger --gpus-per-trial, or --fix smaller values"
    )
    assert trial.run is None


def test_an_error_that_breaks_the_gpu_replaces_the_worker(worker, monkeypatch):
    trial = worker()
    on_gpu(trial, monkeypatch, usable=False)
    monkeypatch.setattr(
        "tunefleet.trainables.trial.JobRun", failing(RuntimeError("CUDA error: device-side assert"))
    )
    with pytest.raises(
        BrokenGpuError, match=r"^GPU-1234 cannot be used .* \(CUDA error: device-side assert\)"
    ):
        trial.step()


def test_an_error_that_leaves_the_gpu_usable_is_the_trials(worker, monkeypatch):
    trial = worker()
    on_gpu(trial, monkeypatch, usable=True)
    monkeypatch.setattr("tunefleet.trainables.trial.JobRun", failing(RuntimeError("shapes do not match")))
    assert report_of(trial)["status"] == "error"


@pytest.mark.parametrize("kind", [CaptureError, CaptureMemoryError])
def test_a_failed_capture_replaces_the_worker(worker, monkeypatch, kind):
    trial = worker()
    monkeypatch.setattr("tunefleet.trainables.trial.JobRun", failing(kind("no")))
    with pytest.raises(kind):
        trial.step()


def test_a_job_whose_capture_failed_trains_eagerly(worker):
    trial = worker()
    settings = dataclasses.replace(trial.context.settings, cuda_graph=True)
    trial.context = dataclasses.replace(trial.context, settings=settings)
    trial.job["eager"] = True
    report_of(trial)
    assert trial.run.run.graph is None
    assert not trial.run.run.settings.cuda_graph


def test_divergence_is_a_result(worker):
    assert report_of(worker(lr=1e38, momentum=0.9))["status"] == "diverged"


def test_a_seed_that_diverges_is_tested_all_the_same(worker):
    report = report_of(worker("final-1", final=True, lr=1e38, momentum=0.9))
    assert report["status"] == "diverged"
    assert 0 <= report["test_accuracy"] < 0.3


def test_an_error_names_the_log_of_what_the_trial_printed(worker, monkeypatch, tmp_path):
    def job_run(*_):
        print("about to fail")
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("tunefleet.trainables.trial.JobRun", job_run)
    first, *_, last = report_of(worker("0007"))["error"].splitlines()
    assert (first, last) == ("what it printed is in logs/0007.txt", "RuntimeError: shapes do not match")
    assert (tmp_path / "logs" / "0007.txt").read_text() == "about to fail\n"


def test_what_a_trial_prints_before_its_worker_is_replaced_is_kept(worker, monkeypatch, tmp_path):
    def job_run(*_):
        print("capturing")
        raise CaptureError("no")

    monkeypatch.setattr("tunefleet.trainables.trial.JobRun", job_run)
    with pytest.raises(CaptureError):
        worker().step()
    assert (tmp_path / "logs" / "0000.txt").read_text() == "capturing\n"


def test_a_bug_is_reported_with_its_traceback(worker, tmp_path):
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("a file where a folder has to be")
    report = report_of(worker())
    assert report["status"] == "error"
    assert "Traceback" in report["error"]
