"""What reports.jsonl says, and what it says after a kill or a full disk."""

import json
import math
import os
import pickle

import pytest

from tunefleet.journal import Journal, TrialRecord, finite, records, winner

EVENTS = [
    {"trial_id": "0000", "epoch": 0, "config": {"lr": 0.1}},
    {"trial_id": "0000", "epoch": 1, "val_accuracy": 0.5},
    {"trial_id": "0000", "promoted_from": 1},
]


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "reports.jsonl")


def write(journal, events=EVENTS):
    for event in events:
        journal.append(event)


def start(trial_id, **config):
    return {"trial_id": trial_id, "epoch": 0, "config": config}


def report(trial_id, epoch, val_accuracy, **others):
    return {"trial_id": trial_id, "epoch": epoch, "val_accuracy": val_accuracy, **others}


def test_what_is_appended_is_read_in_order(journal):
    write(journal)
    assert journal.read() == EVENTS
    assert len(journal.file.read_text().splitlines()) == 3  # one line per event


def test_journal_of_no_study_is_empty(journal):
    assert journal.read() == []
    journal.drop_torn_line()
    assert not journal.file.exists()


def test_each_event_is_in_the_file_when_append_returns(journal):
    for number, event in enumerate(EVENTS, start=1):
        journal.append(event)
        assert len(Journal(journal.file).read()) == number


def test_pickled_journal_appends_to_the_same_file(journal):
    write(journal, EVENTS[:1])
    pickle.loads(pickle.dumps(journal)).append(EVENTS[1])
    assert journal.read() == EVENTS[:2]


@pytest.mark.parametrize("cut", [1, 10, 38])
def test_torn_last_line_is_left_out_then_cut_off(journal, cut):
    write(journal)
    whole = journal.file.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    assert len(last) > cut
    journal.file.write_bytes(whole[:-cut])  # cut=1: all but its line end
    assert journal.read() == EVENTS[:2]
    journal.drop_torn_line()
    assert journal.file.read_bytes() == whole[: -len(last)]
    journal.append(EVENTS[2])
    assert journal.file.read_bytes() == whole


def test_mending_a_whole_journal_changes_nothing(journal):
    write(journal)
    before = journal.file.read_bytes()
    journal.drop_torn_line()
    assert journal.file.read_bytes() == before


def test_mending_a_journal_of_one_torn_line_empties_it(journal):
    journal.file.write_text('{"trial_id": "00')
    journal.drop_torn_line()
    assert journal.file.read_bytes() == b""


def test_damaged_middle_line_is_an_error_naming_its_number(journal):
    write(journal)
    lines = journal.file.read_text().splitlines(keepends=True)
    journal.file.write_text(lines[0] + lines[1][:20] + "\n" + lines[2])
    with pytest.raises(ValueError, match=r"reports\.jsonl line 2 is damaged .*collect --keep-lines 1 "):
        journal.read()


def test_numbers_that_are_not_finite_are_null(journal):
    journal.append({"trial_id": "0000", "epoch": 1, "train_loss": math.nan, "val_loss": math.inf, "lr": 0.1})
    text = journal.file.read_text()
    assert text.startswith(
        '{"trial_id": "0000", "epoch": 1, "train_loss": null, "val_loss": null, "lr": 0.1, '
    )
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@pytest.mark.parametrize("value", [0, 1.5, True, "nan", None, [1]])
def test_finite_leaves_every_other_value_alone(value):
    assert finite(value) is value


def test_short_write_is_completed(journal, monkeypatch):
    write_all = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write_all(descriptor, data[:10]))
    write(journal)
    assert journal.read() == EVENTS


def test_line_for_which_there_is_no_room_leaves_nothing(journal, monkeypatch):
    journal.append({"trial_id": "0000", "epoch": 0, "config": {}})
    before = journal.file.read_bytes()
    write = os.write

    def half_then_full(descriptor, data):
        if len(data) > 20:
            return write(descriptor, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OSError, match="No space"):
        journal.append({"trial_id": "0000", "epoch": 1})
    assert journal.file.read_bytes() == before


def test_records_hold_config_and_reports_by_epoch():
    trial = records([*EVENTS, report("0000", 2, 0.6)])["0000"]
    assert trial.config == {"lr": 0.1}
    assert sorted(trial.reports) == [1, 2]
    assert (trial.epoch, trial.value(), trial.status) == (2, 0.6, None)


def test_repeated_trial_and_epoch_replaces_the_earlier_line():
    trial = records([start("0000"), report("0000", 1, 0.5), report("0000", 1, 0.7)])["0000"]
    assert (trial.epoch, trial.value()) == (1, 0.7)


def test_records_are_in_the_order_of_the_trials_starts():
    events = [start("0001"), start("0000"), report("0000", 1, 0.1), start("final-1"), report("0001", 1, 0.2)]
    assert list(records(events)) == ["0001", "0000", "final-1"]


def test_trial_before_its_first_report_has_no_value():
    trial = TrialRecord("0000", {})
    assert (trial.epoch, trial.value(), trial.status) == (0, None, None)


def test_status_comes_with_the_last_report_or_without_one():
    trials = records(
        [
            start("0000"),
            report("0000", 1, 0.5, status="done"),
            start("0001"),
            report("0001", 1, 0.5),
            {"trial_id": "0001", "status": "error", "error": "lost"},
        ]
    )
    assert (trials["0000"].status, trials["0000"].error) == ("done", None)
    assert (trials["0001"].status, trials["0001"].error, trials["0001"].epoch) == ("error", "lost", 1)


def test_winner_has_the_highest_accuracy_at_its_last_report():
    trials = records([start("a"), report("a", 1, 0.9), report("a", 2, 0.5), start("b"), report("b", 1, 0.6)])
    assert winner(trials) is trials["b"]  # a's 0.9 is no more what a has


@pytest.mark.parametrize("status", ["diverged", "error", "out_of_memory"])
def test_trial_that_diverged_or_failed_cannot_win(status):
    trials = records([start("a"), report("a", 1, 0.9, status=status), start("b"), report("b", 1, 0.2)])
    assert winner(trials) is trials["b"]


def test_tie_goes_to_the_earliest():
    events = [start("a"), start("b"), start("c")]
    events += [report("c", 1, 0.5), report("b", 1, 0.5), report("a", 1, 0.4)]
    assert winner(records(events)).trial_id == "b"


def test_paused_and_done_trials_can_win():
    events = [start("a"), report("a", 1, 0.5), start("b"), report("b", 1, 0.6, status="done")]
    assert winner(records(events)).trial_id == "b"
    assert winner(records(events[:2])).trial_id == "a"


def test_finals_cannot_win():
    trials = records([start("a"), report("a", 1, 0.5), start("final-1"), report("final-1", 1, 0.9)])
    assert [trial.is_final for trial in trials.values()] == [False, True]
    assert winner(trials) is trials["a"]


def test_accuracy_of_exactly_zero_is_a_value():
    events = [start("a"), report("a", 1, 0.0, val_loss=2.0), start("b"), report("b", 1, 0.0, val_loss=1.0)]
    assert winner(records(events)).trial_id == "b"


def test_study_without_a_value_has_no_winner():
    assert winner({}) is None
    assert winner(records([start("a"), start("b"), report("b", 1, None, status="diverged")])) is None
    assert winner(records([start("a"), report("a", 1, None)])) is None


def test_the_lower_loss_wins_among_equal_accuracies():
    trials = {}
    for trial_id, loss in (("0000", 0.13), ("0001", 0.10), ("0002", 0.10), ("0003", None)):
        trials[trial_id] = TrialRecord(trial_id, {})
        trials[trial_id].take({"epoch": 1, "val_accuracy": 0.965, "val_loss": loss})
    assert winner(trials).trial_id == "0001"
