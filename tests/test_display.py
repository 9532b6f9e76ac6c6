import functools
import io
import math
import re
import sys
import types

import pytest
from rich.console import Console

from tests.configs import make_options
from tunefleet.journal import Journal
from tunefleet.search.asha import Asha
from tunefleet.search.display import PLAIN_SECONDS, Progress, counts, phase, table
from tunefleet.search.scheduler import Scheduler
from tunefleet.search.suggest import suggest


@pytest.fixture
def jobs(tmp_path):
    """Three trials of a promote study: one paused at epoch 1, one diverged, one starting."""
    from ray import tune

    ranges = {"lr": tune.loguniform(1e-4, 1e-1)}
    jobs = Scheduler(
        suggest=functools.partial(suggest, "random", ranges, {"lr": 0.01}, 0),
        asha=Asha((1, 3), 3),
        pruner="promote",
        trials=9,
        fixed={"seed": 0},
        final_seeds=2,
        max_failures=3,
        journal=Journal(tmp_path / "reports.jsonl"),
    )
    for _ in range(3):
        jobs.next_job()
    jobs.report("0000", {"epoch": 1, "val_accuracy": 0.4321})
    jobs.report("0001", {"epoch": 1, "val_accuracy": None, "status": "diverged"})
    return jobs


def progress(jobs, terminal):
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    return Progress(jobs, make_options("softmax", trials=9, epochs=9, final_seeds=2), console)


def rows(shown, seconds=10):
    """What is shown some seconds after the beginning, by label."""
    return dict(shown.rows(shown.began + seconds))


def test_counts_tell_what_each_trial_is_doing(jobs):
    assert counts(jobs.searched, jobs) == {"paused": 1, "diverged": 1, "starting": 1}
    jobs.starting.discard("0002")  # a worker has it
    assert counts(jobs.searched, jobs) == {"paused": 1, "diverged": 1, "running": 1}
    jobs.search_is_over = True
    assert counts(jobs.searched, jobs)["pruned"] == 1


def test_plain_line_carries_trials_epochs_best_and_time(jobs):
    shown = progress(jobs, terminal=False)
    shown.began -= 10
    shown.update()
    text = shown.console.file.getvalue()
    assert text.startswith(
        "softmax search: trials 3 of 9 started; 1 starting, 1 paused, 1 diverged; no epoch"
    )
    # 9 trials: at least 9·1 + 3·2 + 1·6 = 21 epochs, 22 on average, and 2 seeds of 9; both epochs were
    # reported before this display
    assert "epochs 2 of about 40, 0 a second; time 10 s, left: unknown yet; best val_accuracy 0.4321" in text
    assert "lr 0.01" in text


def test_plain_lines_come_some_seconds_apart(jobs):
    shown = progress(jobs, terminal=False)
    for _ in range(100):
        shown.update()
    assert shown.console.file.getvalue().count("\n") == 1
    shown.shown_at -= PLAIN_SECONDS
    shown.update()
    assert shown.console.file.getvalue().count("\n") == 2


def test_table_fits_eighty_columns_and_names_the_best(jobs):
    shown = progress(jobs, terminal=True)
    shown.console.print(table("softmax search", shown.rows(shown.began + 10)))
    text = shown.console.file.getvalue()
    assert "0.4321 after 1 epoch (" in text
    assert "epoch 1: 2" in text
    with shown:
        shown.update()


def test_a_narrower_terminal_keeps_no_rows_of_the_table(jobs):
    shown = progress(jobs, terminal=True)
    file = shown.console.file
    with shown:
        shown.update()
        drawn = [len(row) for row in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", file.getvalue()).split("\n")]
        assert max(drawn) > 2 * 25
        for width in (25, 25, 80):
            before = file.tell()
            shown.console.width = width
            shown.shown_at = -math.inf
            shown.update()
            written = file.getvalue()[before:]
            # CR, then all but the first of the erased rows are reached by going up one
            wrapped = sum(max(1, math.ceil(length / width)) for length in drawn)
            assert written.count("\x1b[1A") == wrapped - 1
            drawn = [len(row) for row in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]|\r", "", written).split("\n")]


def test_a_notebooks_progress_is_one_output_that_is_replaced(jobs, monkeypatch):
    shown, added = [], []

    class Handle:
        def update(self, content, *, raw):
            shown.append(content["text/plain"])

    def display(content, *, raw=False, display_id=False):
        added.append(content)
        return Handle() if display_id else None

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    progress = Progress(
        jobs, make_options("softmax", trials=9, epochs=9, final_seeds=2), Console(force_jupyter=True)
    )
    with progress:
        for trial_id in ("0002", "0003"):
            progress.shown_at = -math.inf
            progress.update()
            jobs.next_job()
            jobs.report(trial_id, {"epoch": 1, "val_accuracy": 0.5})
    assert ["3 of 9 started" in shown[0], "4 of 9 started" in shown[1]] == [True, True]
    assert max(map(len, shown[0].splitlines())) <= 80
    assert shown[2].strip() == ""
    assert len(added) == 1


def test_the_best_that_is_shown_never_falls(jobs):
    """A trial's value may fall by its next epoch; what was seen stays."""
    jobs.report("0002", {"epoch": 1, "val_accuracy": 0.7})
    jobs.trials["0002"].reports[2] = {"epoch": 2, "val_accuracy": 0.2}
    shown = progress(jobs, terminal=False)
    assert "val_accuracy 0.7000 after 1 epoch (trial 0002" in rows(shown)["best"]


def test_a_value_of_zero_is_a_value(jobs):
    jobs.best_yet = None
    jobs.report("0002", {"epoch": 1, "val_accuracy": 0.0})
    assert "0.0000 after 1 epoch (trial 0002" in rows(progress(jobs, terminal=False))["best"]


def test_a_dumb_terminal_gets_lines(jobs, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shown = progress(jobs, terminal=True)
    with shown:
        shown.update()
    assert "softmax search: trials 3 of 9" in " ".join(shown.console.file.getvalue().split())


def test_eta_counts_the_epochs_of_this_run_only(jobs):
    shown = progress(jobs, terminal=False)
    assert rows(shown)["time"] == "10 s, left: unknown yet"  # resumed just now: no rate yet
    jobs.report("0002", {"epoch": 1, "val_accuracy": 0.1})
    assert rows(shown)["epochs"] == "3 of about 40, 0.1 a second"
    assert rows(shown)["time"] == "10 s, left: 6 min 10 s"  # 37 epochs


def test_the_forecast_of_a_continued_study_counts_what_is_trained_again_and_no_earlier_seeds(jobs):
    shown = progress(jobs, terminal=False)

    def epochs():
        done, total = re.match(r"(\d+) of about (\d+)", rows(shown)["epochs"]).groups()
        return int(done), int(total)

    _, total = epochs()
    jobs.without_checkpoint = {"0000"}
    jobs.trials["0000"].reports[6] = {"epoch": 6, "val_accuracy": 0.4}
    assert epochs()[1] == total + 6 // 3  # one of eta is promoted
    jobs._job("0000")  # it is, now
    assert epochs()[1] == total
    jobs.running.clear()
    jobs.report("0000", {"epoch": 9, "val_accuracy": 0.5, "status": "done"})
    jobs.search_is_over = True
    for _ in range(2):
        job = jobs.next_job()
        jobs.report(job.trial_id, {"epoch": 9, "status": "done", "test_accuracy": 0.5})
    assert rows(shown)["final"].startswith("2 of 2 seeds done")
    done, total = epochs()
    jobs.report("0002", {"epoch": 9, "val_accuracy": 0.7, "status": "done"})  # another winner
    assert rows(shown)["final"].startswith("0 of 2 seeds done")
    later, now = epochs()
    assert now - later == total - done + 2 * 9


def test_a_seed_on_the_test_images_counts_in_what_is_left(jobs):
    shown = progress(jobs, terminal=False)
    jobs.report("0002", {"epoch": 9, "val_accuracy": 0.5, "status": "done"})
    jobs.search_is_over = True
    jobs.running.clear()
    first, second = jobs.next_job(), jobs.next_job()
    for job in (first, second):
        for epoch in range(1, 9):
            jobs.report(job.trial_id, {"epoch": epoch, "val_accuracy": None})
    jobs.report(first.trial_id, {"phase": "testing"})
    assert rows(shown)["final"] == "0 of 2 seeds done, 1 training, 1 on the test images"
    assert rows(shown)["time"] == "10 s, left: unknown yet"  # nobody knows how long a test takes
    jobs.report(first.trial_id, {"epoch": 9, "status": "done", "test_accuracy": 0.5})
    # 1 epoch at 26 in 70 s, and the other seed's test, of 60 s
    assert rows(shown, 70)["time"] == "1 min 10 s, left: 1 min 03 s"
    jobs.report(second.trial_id, {"phase": "testing"})
    rows(shown, 80)
    assert rows(shown, 110)["time"] == "1 min 50 s, left: 34 s"  # 1 epoch at 26 in 110 s, 30 s of a test


def test_a_log_says_at_once_what_begins_and_how_much_it_is():
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    with phase(console, "reading photos") as progress:
        progress("listing files", 0, 0)
        progress("writing 184 MB under --data-dir,", 0, 60_000)
        progress("decoding", 10, 60_000)
    said = "reading photos: writing 184 MB under --data-dir, 0 of 60,000 images"
    assert console.file.getvalue().splitlines() == ["reading photos", said]


def test_a_phase_says_in_a_log_when_it_begins():
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    with phase(console, "starting Ray"):
        assert console.file.getvalue() == "starting Ray\n"


@pytest.mark.parametrize(
    ("encoding", "terminal"), [("latin-1", "xterm"), ("ascii", "xterm"), ("utf-8", "dumb")]
)
def test_a_phase_is_shown_on_every_terminal(encoding, terminal, monkeypatch):
    monkeypatch.setenv("TERM", terminal)
    written = io.BytesIO()
    console = Console(file=io.TextIOWrapper(written, encoding), width=80, force_terminal=True)
    with phase(console, "reading digits") as progress:
        progress("decoding", 1, 2)
    console.file.flush()
    assert b"reading digits" in written.getvalue()


def test_the_best_reads_1_only_where_it_is(jobs):
    jobs.report("0002", {"epoch": 1, "val_accuracy": 0.99996})
    assert "0.99996 after 1 epoch" in rows(progress(jobs, terminal=False))["best"]
