"""TensorBoard's own reader finds every trial's reports, times and hyperparameters in what we write."""

import sys

import pytest

from tests.made_study import write_own_study, write_study
from tunefleet.analysis.load import load
from tunefleet.analysis.report import main

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
from tensorboard.plugins.hparams import api_pb2, metadata  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return write_study(tmp_path / "a study")


def read(run):
    """Return the accumulator of one run's event files."""
    found = event_accumulator.EventAccumulator(str(run), size_guidance={"scalars": 0})
    found.Reload()
    return found


def plugin(run, tag):
    """Return the HParams plugin's record of a kind in one run."""
    return metadata.__dict__[f"parse_{tag}_plugin_data"](
        read(run).SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
    )


def test_each_trial_is_a_run_with_its_reports(folder, capsys):
    assert main([str(folder), "--tensorboard"]) == 0
    out = folder / "tensorboard"
    assert capsys.readouterr().out == f"{out}\n"
    assert not (folder / "report.html").exists()
    study = load(folder)
    runs = sorted(run.name for run in out.iterdir() if run.is_dir())
    assert runs == [*study.trials.trial_id, "final-1", "final-2"]
    for run in ("0008", "final-1"):
        rows = {"0008": study.epochs, "final-1": study.finals}[run]
        rows = rows[rows.trial_id == run]
        scalars = read(out / run).Scalars("train_loss")
        assert [event.step for event in scalars] == [1, 2, 3, 4]
        assert [event.value for event in scalars] == pytest.approx(rows.train_loss.tolist())
        assert [event.wall_time for event in scalars] == rows.finished_at.tolist()
    assert "val_accuracy" in read(out / "0008").Tags()["scalars"]
    assert "val_accuracy" not in read(out / "final-1").Tags()["scalars"]  # a fresh seed has none
    assert "val_accuracy" not in read(out / "0005").Tags()["scalars"]  # diverged


def test_every_number_of_an_own_training_is_a_scalar(tmp_path):
    ranges = {"layers": {"values": [[64], [64, 32]]}, "dropout": {"values": [None, 0.5]}}
    folder = write_own_study(tmp_path / "own", ranges=ranges)
    assert main([str(folder), "--tensorboard"]) == 0
    out = folder / "tensorboard"
    assert set(read(out / "0008").Tags()["scalars"]) == {"val_mse", "train_mse", "grad_norm", "epoch_seconds"}
    assert [event.value for event in read(out / "0008").Scalars("val_mse")] == [49.0, 44.0, 39.0, 34.0]
    assert [event.step for event in read(out / "final-1").Scalars("test_mse")] == [4]
    names = [metric.name.tag for metric in plugin(out, "experiment").metric_infos]
    assert names[0] == "val_mse"
    assert "val_loss" not in names
    layers, _ = plugin(out, "experiment").hparam_infos
    assert list(layers.domain_discrete) == ["[64, 32]", "[64]"]


def test_hparams_plugin_gets_ranges_values_and_ends(folder):
    assert main([str(folder), "--tensorboard"]) == 0
    out = folder / "tensorboard"
    lr, schedule = plugin(out, "experiment").hparam_infos
    assert (lr.name, lr.domain_interval.min_value, lr.domain_interval.max_value) == ("lr", 1e-4, 0.1)
    assert (schedule.name, list(schedule.domain_discrete)) == ("schedule", ["constant", "cosine"])
    row = load(folder).trials.set_index("trial_id").loc["0005"]
    start = plugin(out / "0005", "session_start_info")
    assert start.hparams["lr"].number_value == row.lr
    assert start.hparams["schedule"].string_value == row.schedule
    assert start.start_time_secs == 50.0  # its first epoch ended at 51 and took a second
    ended = {run: plugin(out / run, "session_end_info") for run in ("0005", "0008", "0009")}
    assert ended["0005"].status == api_pb2.STATUS_FAILURE  # diverged
    assert ended["0008"].status == api_pb2.STATUS_SUCCESS  # done
    assert ended["0009"].status == api_pb2.STATUS_SUCCESS  # pruned
    assert ended["0008"].end_time_secs == 84.0


def test_writing_again_replaces_event_files_and_nothing_else(folder, tmp_path, capsys):
    for _ in range(2):
        assert main([str(folder), "--tensorboard"]) == 0
    assert len(list((folder / "tensorboard" / "0008").iterdir())) == 1
    other = tmp_path / "mine" / "tensorboard" / "notes.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    assert main([str(folder), "--tensorboard", "--out", str(tmp_path / "mine")]) == 2
    assert "notes.txt is no event file" in capsys.readouterr().err
    assert other.read_text() == "mine"


def test_several_studies_go_into_folders_of_their_own(folder, tmp_path):
    other = write_study(tmp_path / "other")
    assert main([str(folder), str(other), "--tensorboard", "--out", str(tmp_path / "out")]) == 0
    for name in ("a study", "other"):
        assert (tmp_path / "out" / name / "tensorboard" / "0008").is_dir()


def test_studies_of_one_name_do_not_replace_each_other(folder, tmp_path, capsys):
    other = write_study(tmp_path / "elsewhere" / folder.name)
    assert main([str(folder), str(other), "--tensorboard", "--out", str(tmp_path / "out")]) == 2
    assert "several studies have one name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_the_earlier_one_and_nothing_else(folder, monkeypatch, capsys):
    assert main([str(folder), "--tensorboard"]) == 0
    (folder / "tensorboard.tmp").mkdir()  # somebody's own

    def fail(*_):
        raise OSError(28, "No space left on device")

    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("tunefleet.analysis.to_tensorboard._scalars", fail)
    assert main([str(folder), "--tensorboard"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_missing_package_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard.plugins.hparams", None)
    assert main([str(folder), "--tensorboard"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install -c constraints.txt -e '.[reports]'" in error  # the package is on no index
