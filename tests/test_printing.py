"""What is printed of a study: users' names as they are, in every terminal's encoding, 80 columns wide."""

import io

import pytest
from rich.console import Console

from tests.made_study import edit_events, spec, write_events, write_own_study
from tests.made_study import write_study as write_images_study
from tunefleet import collect, mirror
from tunefleet.inference import export, predict
from tunefleet.search import lr_study, run, wandb_sync
from tunefleet.search.display import phase, print_result
from tunefleet.study import Study, write_study
from tunefleet.trainables import train

CONFIG = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "batch_size": 64, "schedule": "cosine"}


def make_study(folder):
    """A study of which one trial is done and one failed, and a seed that reached 0.5."""
    write_study(folder, spec(space="softmax", rungs=[], options={"epochs": 1, "pruner": "none"}))
    seeds = [{"trial_id": f"final-{k}", "epoch": 0, "config": CONFIG | {"seed": k}} for k in (1, 2)]
    events = [
        {"trial_id": "0000", "epoch": 0, "config": CONFIG},
        {"trial_id": "0000", "epoch": 1, "val_accuracy": 0.5, "status": "done"},
        *seeds,
        {"trial_id": "final-1", "epoch": 1, "test_accuracy": 0.49, "status": "done"},
        {"trial_id": "final-2", "epoch": 1, "test_accuracy": 0.51, "status": "done"},
    ]
    write_events(folder, events)
    return folder


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
    make_study(folder)
    edit_events(
        folder,
        lambda event: (
            event | ({"status": "error"} if event["trial_id"] == "final-2" and event["epoch"] else {})
        ),
    )
    screen, text = console()
    print_result(folder, screen)
    shown = name.replace("\n", "\\n")
    assert f"-> {shown}\n" in text()
    assert f"are in {shown}/reports.jsonl\n" in text()


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+-"), ("latin-1", "\xb1"), ("utf-8", "\xb1")])
def test_a_result_is_printed_in_every_encoding(encoding, sign, tmp_path):
    screen, text = console(encoding)
    print_result(make_study(tmp_path), screen)
    assert f"0.5000 {sign} 0.0141 sd" in text()


@pytest.mark.parametrize(
    "chosen",
    [
        {"options": {"points": [{"lr": 0.1}], "fix": {"momentum": 0.9}}},
        {"options": {"fix": {"momentum": 0.9}}, "ranges": {"lr": {}}},
    ],
)
def test_what_was_sampled_or_fixed_is_printed(chosen, tmp_path):
    options = {"epochs": 1, "pruner": "none"} | chosen["options"]
    make_study(tmp_path)
    write_study(tmp_path, spec(space="softmax", rungs=[], **(chosen | {"options": options})))
    screen, text = console()
    print_result(tmp_path, screen)
    assert "  lr 0.1000\n" in text() or "  lr 0.1\n" in text()
    assert "  momentum 0.9" in text()
    assert "batch_size" not in text()


def test_seeds_of_an_earlier_winner_are_said(tmp_path):
    make_study(tmp_path)
    screen, text = console()
    print_result(tmp_path, screen)
    assert "looked at before" not in text()
    better = CONFIG | {"lr": 0.2}
    events = [
        {"trial_id": "0001", "epoch": 0, "config": better},
        {"trial_id": "0001", "epoch": 1, "val_accuracy": 0.6, "status": "done"},
        {"trial_id": "final-3", "epoch": 0, "config": better | {"seed": 1}},
        {"trial_id": "final-3", "epoch": 1, "test_accuracy": 0.6, "status": "done"},
    ]
    write_events(tmp_path, Study(tmp_path).events + events)
    screen, text = console()
    print_result(tmp_path, screen)
    assert (
        "test_accuracy 0.6000, 1 fresh seed\nThe test images were looked at before, for 2 seeds of an"
        in text()
    )


def test_one_is_not_plural(tmp_path):
    make_study(tmp_path)
    edit_events(tmp_path, lambda event: None if event["trial_id"] == "final-2" else event)
    screen, text = console()
    print_result(tmp_path, screen)
    assert "1 fresh seed\n" in text()
    assert "1 trial, 1 epoch of 1 unpruned" in text()


def test_a_phase_is_one_line_without_markup(monkeypatch):
    screen, text = console()
    monkeypatch.setattr("tunefleet.search.display.PLAIN_SECONDS", -1)
    with phase(screen, "reading [red]a\nb") as progress:
        progress("decoding\n", 1, 2)
    begins, step = text().splitlines()
    assert begins == "reading [red]a\\nb"
    assert step.startswith("reading [red]a\\nb: decoding\\n 1 of 2 images")


@pytest.mark.parametrize("command", [run, lr_study, collect, wandb_sync, mirror, train, predict, export])
def test_help_fits_eighty_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("write", "status", "line"),
    [
        (write_images_study, "diverged", "no trial beat chance (3 diverged)"),
        (write_images_study, "error", "no trial succeeded (3 error)"),
        (write_own_study, "diverged", "no trial succeeded (3 diverged)"),
    ],
)
def test_only_of_images_chance_is_spoken_of(tmp_path, write, status, line):
    def edit(event):
        if event["trial_id"].startswith("final") or event["epoch"] > 1:
            return None
        ended = {"trial_id": event["trial_id"], "status": status, "error": "no"}
        return ended if event["epoch"] == 1 else event

    folder = write(tmp_path / "made", trials=3)
    edit_events(folder, edit)
    screen, text = console()
    print_result(folder, screen)
    assert line in text()
