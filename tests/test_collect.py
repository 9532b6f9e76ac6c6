import io
import json
import math
import threading
import time

import pandas as pd
import pytest
from filelock import FileLock

from tests.made_study import spec
from tunefleet.collect import collect, main
from tunefleet.files import write_whole
from tunefleet.journal import Journal, records
from tunefleet.study import Study, busy_fraction, lock_study, write_result, write_study, write_tables

SEED = {"architecture": "softmax", "epochs": 9, "lr": 0.1, "seed": 1, "refit": True}  # of the winner


def report(trial_id, epoch, value, **more):
    return {
        "trial_id": trial_id,
        "epoch": epoch,
        "train_loss": 1.5,
        "train_accuracy": 0.3,
        "val_loss": 1.25,
        "val_accuracy": value,
        "lr": 0.1,
        "epoch_seconds": 2.0,
        "finished_at": 100.0 + 3 * epoch,
        "pid": 7,
        "node": "here",
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    """A study of four trials: done, paused at 1, diverged at 2, lost; and one final seed."""
    journal = Journal(tmp_path / "reports.jsonl")
    for k in range(4):
        config = {"architecture": "softmax", "epochs": 9, "lr": 0.1 * (k + 1), "seed": 0}
        journal.append({"trial_id": f"000{k}", "epoch": 0, "config": config})
    for epoch in range(1, 10):
        more = {"status": "done"} if epoch == 9 else {}
        journal.append(report("0000", epoch, 0.5 + 0.01 * epoch if epoch != 5 else 0.9, **more))
    journal.append(report("0001", 1, 0.4))
    journal.append(report("0002", 1, 0.3))
    journal.append(report("0002", 2, math.nan, status="diverged", val_loss=None))
    journal.append({"trial_id": "0003", "status": "error", "error": "lost"})
    journal.append({"trial_id": "final-1", "epoch": 0, "config": SEED})
    journal.append(report("final-1", 1, 0.8, status="done", test_accuracy=0.75))
    write_study(tmp_path, spec(rungs=[1, 3], options={"epochs": 9, "pruner": "promote"}))
    write_tables(tmp_path, status="done", seconds=5.0)
    for name in ("trials.csv", "epochs.parquet"):
        (tmp_path / name).unlink()
    return tmp_path


def test_trials_csv_has_a_row_per_trial_with_what_it_reached(folder):
    collect(folder, None)
    table = pd.read_csv(folder / "trials.csv", dtype={"trial_id": str})
    assert list(table.trial_id) == ["0000", "0001", "0002", "0003"]
    assert list(table.status) == ["done", "pruned", "diverged", "error"]
    assert list(table.epochs) == [9, 1, 2, 0]
    assert list(table["rung"]) == [2, 1, 1, 0]
    assert table.val_accuracy[0] == pytest.approx(0.59)
    assert table.best_val_accuracy[0] == pytest.approx(0.9)
    assert math.isnan(table.val_accuracy[2])
    assert table.best_val_accuracy[2] == pytest.approx(0.3)
    assert list(table.seconds) == [18.0, 2.0, 4.0, 0.0]
    assert list(table.lr) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_trials_csv_has_a_column_for_each_number_that_is_reported(folder):
    """The last report's; a name that a hyperparameter has stays the hyperparameter's."""
    Journal(folder / "reports.jsonl").append(report("0001", 2, 0.45, f1=0.7, lr=7.0))
    collect(folder, None)
    table = pd.read_csv(folder / "trials.csv")
    assert list(table.train_loss[:3]) == [1.5] * 3
    assert table.f1[1] == 0.7
    assert list(table.f1.isna()) == [True, False, True, True]
    assert table.lr[1] == pytest.approx(0.2)


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "trials.csv").mkdir()
    with pytest.raises(OSError, match=r"trials\.csv"):
        write_whole(tmp_path / "trials.csv", b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["trials.csv"]


def test_a_folder_whose_name_is_not_utf8_is_collected(folder):
    other = folder.rename(folder.with_name("caf\udce9"))
    collect(other, None)
    assert len(pd.read_parquet(io.BytesIO((other / "epochs.parquet").read_bytes()))) == 13


def test_epochs_parquet_has_a_row_per_report_and_repeats_are_replaced(folder):
    Journal(folder / "reports.jsonl").append(report("0001", 1, 0.41))
    collect(folder, None)
    table = pd.read_parquet(folder / "epochs.parquet")
    assert len(table) == 9 + 1 + 2 + 0 + 1
    assert table[table.trial_id == "0001"].val_accuracy.tolist() == [0.41]
    assert table.epoch.dtype == "int64"


def test_result_json_counts_epochs_and_names_the_best(folder):
    study = write_tables(folder, status="done", seconds=5.0).facts
    assert study["trials"] == 4
    assert study["statuses"] == {"done": 1, "pruned": 1, "diverged": 1, "error": 1}
    assert (study["epochs_spent"], study["epochs_unpruned"]) == (12, 36)
    assert study["best"]["trial_id"] == "0000"
    assert study["final"]["test_accuracy"]["values"] == [0.75]
    assert json.loads((folder / "result.json").read_text()).items() >= {"trials": 4, "status": "done"}.items()


def test_live_study_is_collected_and_left_as_it_is(folder):
    write_result(Study(folder), "running", 0.0)
    with (folder / "reports.jsonl").open("a") as stream:
        stream.write('{"trial_id": "0001", "epo')  # being written just now
    before = (folder / "reports.jsonl").read_bytes()
    assert main([str(folder)]) == 0
    assert (folder / "reports.jsonl").read_bytes() == before
    assert pd.read_csv(folder / "trials.csv").status.tolist() == ["done", "paused", "diverged", "error"]


def test_result_json_of_a_running_study_is_left_to_the_process_that_runs_it(folder, capsys):
    write_result(Study(folder), "running", 0.0)
    before = (folder / "result.json").read_bytes()
    lock = lock_study(folder)
    Journal(folder / "reports.jsonl").append(report("0001", 2, 0.5))
    assert main([str(folder)]) == 0
    assert (folder / "result.json").read_bytes() == before
    assert len(pd.read_csv(folder / "trials.csv")) == 4
    assert capsys.readouterr().out.endswith("status running\n")
    lock.release()
    assert main([str(folder)]) == 0
    assert json.loads((folder / "result.json").read_text())["epochs_spent"] == 13


def test_study_json_is_never_written_again(folder):
    before = (folder / "study.json").read_bytes()
    assert main([str(folder)]) == 0
    assert (folder / "study.json").read_bytes() == before


def test_tables_are_written_by_one_process_at_a_time(folder):
    collecting = FileLock(folder / ".collect.lock")
    collecting.acquire()
    thread = threading.Thread(target=collect, args=[folder, None])
    thread.start()
    Journal(folder / "reports.jsonl").append(report("0001", 2, 0.5))  # else it would not be in its tables
    time.sleep(0.2)
    assert not (folder / "trials.csv").exists()
    collecting.release()
    thread.join()
    assert list(pd.read_csv(folder / "trials.csv").epochs) == [9, 2, 2, 0]


def test_status_and_tables_of_a_study_agree(folder):
    write_tables(folder, status="stopped", seconds=7.0)
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["seconds"], result["epochs_spent"]) == ("stopped", 7.0, 12)
    assert list(pd.read_csv(folder / "trials.csv").status) == ["done", "paused", "diverged", "error"]


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_and_no_argument_are_answered_as_everywhere(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr()
    assert (end.value.code, said.err) == (0, "") if arguments else end.value.code == 2
    assert "--keep-lines N" in said.out if arguments else said.err.count("\n") == 1


def test_folder_without_a_study_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no study: there is no study.json in it\n"


def test_busy_fraction_is_epoch_seconds_over_each_workers_span():
    def events(pid, ends):
        yield {"trial_id": str(pid), "epoch": 0, "config": {}}
        for n, end in enumerate(ends, start=1):
            yield {"trial_id": str(pid), "epoch": n, "pid": pid, "epoch_seconds": 2.0, "finished_at": end}

    # worker 1: 2 + 2 s in 0..10, worker 2: 2 s in 3..5
    trials = records([*events(1, [2.0, 10.0]), *events(2, [5.0])])
    assert busy_fraction(trials.values()) == pytest.approx(6 / 12)
