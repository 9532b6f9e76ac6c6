"""An incomplete, damaged or oddly named study is read, or refused in one line that says what to do."""

import io
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest

from tests.made_study import change, edit_events, remove_trials, spec, write_own_study, write_study
from tunefleet.analysis import report, results, wandb_report
from tunefleet.analysis.load import load
from tunefleet.benchmarks import replay

FILES = ("study.json", "result.json", "reports.jsonl", "lr_curve.csv")
BEST = ("best/predictions.parquet", "best/misclassified.npz", "best/first_layer.npy")
COMMANDS = {
    "report": lambda *arguments: report.main([*arguments]),
    "tensorboard": lambda *arguments: report.main([*arguments, "--tensorboard"]),
    "optuna": lambda *arguments: report.main([*arguments, "--optuna", "sqlite://"]),
    "results": lambda *arguments: results.main([*arguments]),
    "wandb_report": lambda *arguments: wandb_report.main([*arguments]),
}


@pytest.fixture
def folder(tmp_path):
    folder = write_study(tmp_path / "made")
    curve = {"lr": [0.01, 0.1], "seeds": 3, "mean": [0.5, 0.6], "low": 0.4, "high": 0.7, "verdict": "done"}
    pd.DataFrame(curve).to_csv(folder / "lr_curve.csv", index=False)
    return folder


def refusal(folder):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the caller looks at its text
        load(folder)
    return str(caught.value)


def as_folder(file):
    file.unlink()
    file.mkdir()


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbage": lambda file: file.write_bytes(bytes(range(256)) * 4),
    "another file": lambda file: file.write_bytes(
        (file.parents[file.parent.name == "best"] / "x").read_bytes()
    ),
    "a folder": as_folder,
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES + BEST)
def test_each_damaged_file_is_named_with_what_to_do(folder, name, how):
    (folder / "x").write_text('[{"not": "a study"}]\n')
    DAMAGE[how](folder / name)
    if how == "missing" and name in (*BEST, "lr_curve.csv", "result.json"):
        load(folder)  # a study need not have it
        return
    said = refusal(folder)
    assert "\n" not in said
    if (how, name) == ("missing", "study.json"):
        assert said == f"{folder} holds no study: there is no study.json in it"
    else:
        assert said.startswith(f"{folder}/{name} ")
        assert "restore " in said


@pytest.mark.parametrize(
    ("facts", "needle"),
    [
        ({"data": {"name": "x", "classes": 5}}, "classes is '5', and has to be a list"),
        ({"data": {"name": "x", "classes": [None]}}, "classes is 'None', and has to be text"),
        ({"rungs": None}, "rungs is 'None', and has to be a list"),
        ({"seed": True}, "seed is 'True', and has to be a whole number"),
        ({"ranges": {"lr": {"low": 0, "high": 1, "log": True}}}, "an impossible range of lr"),
        ({"ranges": {"lr": {"low": 1, "high": 1, "log": False}}}, "an impossible range of lr"),
        ({"ranges": {"hidden": {"values": [1]}}}, "an impossible range of hidden"),
        ({"metric": "val_loss"}, "study.json has an impossible metric"),
        ({"metric": {"name": "val_loss", "mode": "least"}}, "study.json has an impossible metric"),
        ({"metric": {"name": None, "mode": "min"}}, "study.json has an impossible metric"),
        ({"levers": {}}, "levers lacks device"),
        ({"levers": spec()["levers"] | {"channels_last": 1}}, "channels_last is '1', and has to be true or"),
        ({"ranges": []}, "ranges is '[]', and has to be an object"),
        ({"ranges": -0.0}, "ranges is '-0.0', and has to be an object"),
    ],
)
def test_an_impossible_value_is_named(folder, facts, needle):
    change(folder, **facts)
    assert needle in refusal(folder)


@pytest.mark.parametrize(
    ("name", "columns", "needle"),
    [
        ("best/predictions.parquet", {"label": 2}, "has labels of other classes"),
        ("best/predictions.parquet", {"index": 0}, "is of other predictions"),
        ("best/predictions.parquet", {"confidence": np.inf}, "confidence is not a number"),
        ("lr_curve.csv", {"mean": "x"}, "mean is not a number"),
    ],
)
def test_an_impossible_column_is_named(folder, name, columns, needle):
    file = folder / name
    if file.suffix == ".csv":
        pd.read_csv(file).assign(**columns).to_csv(file, index=False)
    else:
        pd.read_parquet(file).assign(**columns).to_parquet(file)
    assert needle in refusal(folder)


def test_tables_that_others_have_changed_are_not_read(folder):
    for name in ("trials.csv", "epochs.parquet"):
        (folder / name).write_text("mine")
    assert len(load(folder).trials) == 12


@pytest.mark.parametrize("command", COMMANDS)
def test_a_study_without_a_trial_has_no_circle_of_advice(folder, command, capsys):
    (folder / "lr_curve.csv").unlink()
    remove_trials(folder)
    assert COMMANDS[command](str(folder)) == 0
    assert capsys.readouterr().err == ""


def test_a_study_without_a_trial_has_nothing_to_replay(folder, capsys):
    remove_trials(folder, status="done")
    options = json.loads((folder / "study.json").read_text())["options"]
    change(folder, options=options | {"pruner": "none"})
    assert replay.main([str(folder)]) == 2
    assert "has no trial" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sound", "untested", "all diverged", "all failed", "no trial"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_own_training_is_read_with_and_without_a_success(tmp_path, command, kind, capsys):
    ranges = {"layers": {"values": [[64], [64, 32], None]}, "lr": {"low": 0.01, "high": 1.0, "log": True}}
    folder = write_own_study(tmp_path / "made", ranges=ranges, tested=kind == "sound")

    def edit(event):
        if event["epoch"] == 0 or event["trial_id"].startswith("final"):
            return None if event["trial_id"].startswith("final") else event
        if kind == "all failed":
            return (
                {"trial_id": event["trial_id"], "status": "error", "error": "no"}
                if event["epoch"] == 1
                else None
            )
        return event | {"status": "diverged", "val_mse": None} if event["epoch"] == 1 else None

    if kind.startswith("all"):
        edit_events(folder, edit)
    if kind == "no trial":
        edit_events(folder, lambda event: None)
    assert COMMANDS[command](str(folder)) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_study_that_is_running_is_read_as_far_as_it_is(folder, command, capsys):
    (folder / "result.json").unlink()
    with (folder / "reports.jsonl").open("a") as stream:
        stream.write('{"trial_id": "0001", "epo')  # being written just now
    assert COMMANDS[command](str(folder)) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_reader_takes_a_folder_of_any_name(folder, command, capsys):
    odd = folder.rename(folder.with_name("it's 100% $x$ [bold] `id`\n caf\udce9 猫 {}"))
    assert COMMANDS[command](str(odd)) == 0
    assert capsys.readouterr().err == ""


def test_advice_for_a_folder_of_any_name_can_be_pasted(folder):
    odd = folder.rename(folder.with_name("it's\n$x"))
    (odd / "reports.jsonl").write_text("damaged\n")
    with pytest.raises(ValueError, match=r"tunefleet collect") as caught:
        load(odd)
    assert f"$'{odd.parent}/it\\'s\\n$x'" in str(caught.value)


def test_names_of_classes_and_data_are_printable_and_utf8(folder):
    change(folder, data={"name": "caf\udce9\n", "classes": ["a\nb", "\udcff"]})
    study = load(folder)
    assert study.classes == [r"a\nb", r"\xff"]
    assert study.facts["data"]["name"] == r"caf\xe9\n"


@pytest.mark.parametrize("location", [".", "..", "sub/.."])
def test_a_study_is_named_by_its_folder_however_that_is_given(folder, location, monkeypatch):
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / "sub" if location == ".." else folder)
    assert load(location).name == "made"


def test_only_what_a_report_needs_is_read_of_a_thousand_classes(tmp_path):
    study = load(write_study(tmp_path / "made", classes=tuple(f"class {k}" for k in range(1000))))
    assert list(study.predictions.columns) == ["index", "label", "predicted", "confidence"]
    assert isinstance(study.first_layer, np.memmap)


def test_a_terminal_of_another_encoding_ends_no_command(folder, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    odd = folder.rename(folder.with_name("猫\udcff"))
    for command in ("results", "report"):
        assert COMMANDS[command](str(odd)) == 0
    out.flush()
    assert rb"\u732b\xff/report.html" in out.buffer.getvalue()


def test_a_pipe_that_is_closed_ends_a_command_without_a_traceback(folder, tmp_path):
    import subprocess

    command = f"{sys.executable} -m tunefleet.analysis.results {' '.join(['made'] * 1000)} | head -c 1"
    shutil.copytree(folder, tmp_path / "x" / "made")
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={"PYTHONPATH": str(report.__file__).rpartition("/tunefleet/")[0]},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout == "|"


@pytest.mark.parametrize("command", ["report", "tensorboard", "wandb_report"])
@pytest.mark.parametrize("out", ["/dev/null", "/dev/null/x", "/proc/none", "x" * 300])
def test_an_impossible_out_is_one_line(folder, command, out, capsys):
    assert COMMANDS[command](str(folder), "--out", out) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out} cannot be written to (")
    assert said.endswith("; give another folder: --out\n")


@pytest.mark.parametrize("flags", [["--out", ""], ["--optuna", ""]])
def test_an_empty_value_is_refused_and_not_taken_for_none(folder, flags, capsys):
    try:
        code = report.main([str(folder), *flags])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_out_knows_a_home_as_a_shell_does(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert wandb_report.main([str(folder), "--out=~/x"]) == 0
    assert (tmp_path / "home" / "x" / "wandb_report.json").exists()


@pytest.mark.parametrize("module", [report, results, wandb_report, replay])
def test_help_fits_80_columns_and_a_wrong_flag_is_one_line(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    with pytest.raises(SystemExit) as caught:
        module.main(["--nosuch"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
