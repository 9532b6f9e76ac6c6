"""What is printed of a study: users' names as they are, in every terminal's encoding, 80 columns wide."""

import io

import pytest
from rich.console import Console

from tunefleet.search import collect, lr_study, mirror, run, wandb_sync
from tunefleet.search.printing import phase, print_result
from tunefleet.search.study_file import write_study
from tunefleet.trainables import training

FINAL = {"mean": 0.5, "sd": 0.01, "interval95": [0.4, 0.6], "values": [0.5]}
STUDY = {
    "space": "softmax",
    "status": "done",
    "rungs": [],
    "options": {},
    "statuses": {"error": 1},
    "trials": 1,
    "epochs_spent": 1,
    "epochs_unpruned": 1,
    "seconds": 5,
    "busy_fraction": 1.0,
    "best": {
        "trial_id": "0000",
        "val_accuracy": 0.5,
        "config": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "batch_size": 64, "schedule": "cosine"},
    },
    "final": {"seeds": [1], "diverged": [], "failed": [], "test_accuracy": FINAL},
    "lost_workers": {},
}


def console(encoding="utf-8"):
    """A console, and a function that returns what was printed on it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding)

    def text():
        stream.flush()
        return stream.buffer.getvalue().decode(encoding)

    return Console(file=stream, width=80), text


@pytest.mark.parametrize("name", ["[bold]x", "a b [red]", "[@x]", "a\\", "[red\\", "line\nbreak", "100%"])
def test_a_folder_is_printed_as_it_is_called(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir(parents=True)
    write_study(folder, STUDY)
    screen, text = console()
    print_result(folder, screen)
    shown = name.replace("\n", "\\n")
    assert f"-> {shown}\n" in text()
    assert f"stand in {shown}/reports.jsonl\n" in text()


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+-"), ("latin-1", "\xb1"), ("utf-8", "\xb1")])
def test_a_result_is_printed_in_every_encoding(encoding, sign, tmp_path):
    write_study(tmp_path, STUDY)
    screen, text = console(encoding)
    print_result(tmp_path, screen)
    assert f"0.5000 {sign} 0.0100 sd" in text()


def test_one_is_not_plural(tmp_path):
    write_study(tmp_path, STUDY)
    screen, text = console()
    print_result(tmp_path, screen)
    assert "1 fresh seed\n" in text()
    assert "1 trial, 1 epoch of 1 unpruned" in text()


def test_a_phase_is_one_line_without_markup(monkeypatch):
    screen, text = console()
    monkeypatch.setattr("tunefleet.search.printing.PLAIN_SECONDS", -1)
    with phase(screen, "reading [red]a\nb") as progress:
        progress("decoding\n", 1, 2)
    assert text().startswith("reading [red]a\\nb: decoding\\n 1 of 2 images")
    assert text().count("\n") == 1


@pytest.mark.parametrize("command", [run, lr_study, collect, wandb_sync, mirror, training])
def test_help_fits_eighty_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
