"""What a free worker does next: whole studies with simulated workers, killed at every event."""

import errno
import json
import math
import os
import random

import pytest
from ray import tune

from tests.configs import least_epochs
from tests.made_study import spec
from tunefleet.journal import FINAL, Journal, records, winner
from tunefleet.metric import ACCURACY
from tunefleet.search.asha import PRUNERS, Asha, rung_epochs
from tunefleet.search.scheduler import Scheduler
from tunefleet.search.suggest import SEARCHERS, Observation, suggest
from tunefleet.study import write_study, write_tables

EPOCHS, ETA, TRIALS, FINAL_SEEDS = 9, 3, 12, 2
RUNGS = rung_epochs(1, ETA, EPOCHS)  # 1 and 3
RANGES = {"lr": tune.loguniform(1e-4, 1e-1), "momentum": tune.choice([0.0, 0.5, 0.9])}
FIRST = {"lr": 0.003, "momentum": 0.9}
FIXED = {"architecture": "softmax", "epochs": EPOCHS, "seed": 7}


def make_jobs(file, *, pruner="promote", searcher="random", trials=TRIALS, values=None, seed=0, **others):
    """Builds a study; `values` are its trials' accuracies at every epoch, in order."""
    seen = []

    def suggestion(number, observations):
        seen.append(observations)
        if values is None:
            return suggest(searcher, RANGES, FIRST, seed, number, observations)
        return {"value": values[number]} if number < len(values) else None

    rungs = () if pruner == "none" else RUNGS
    settings = {"fixed": FIXED, "final_seeds": FINAL_SEEDS, "max_failures": 3, "journal": Journal(file)}
    settings |= others
    jobs = Scheduler(suggest=suggestion, asha=Asha(rungs, ETA), pruner=pruner, trials=trials, **settings)
    jobs.observed = seen
    return jobs


def accuracy(config, epoch):
    """A function of config and epoch whose curves cross: small lr learns slowly and ends higher."""
    if "value" in config:
        return config["value"]
    end = (
        0.9
        - 0.1 * abs(math.log10(config["lr"]) + 3)
        - 0.01 * config["momentum"]
        - 0.001 * (config["seed"] - 7)
    )
    return round(end * (1 - math.exp(-epoch * config["lr"] ** 0.25)), 9)


def outcome(job, epoch):
    """Returns the report of one epoch."""
    report = {"epoch": epoch, "val_accuracy": accuracy(job.config, epoch)}
    if epoch == EPOCHS:
        report["status"] = "done"
        if job.final:
            report["test_accuracy"] = report["val_accuracy"]
    return report


def has_work(jobs):
    """Says whether a free worker could have been given something, by the rules of ASHA."""
    if len(jobs.searched) < jobs.max_trials:
        return True
    return jobs.pruner == "promote" and jobs.asha.promotable() is not None


def work(jobs, workers=1, seed=0, outcome=outcome, reports=None):
    """Runs a study with simulated workers, of which a random one reports next.

    Args:
        reports: Kill the study after so many; None: run to its end.
    """
    rng, at_work = random.Random(seed), {}
    while reports is None or reports > 0:
        while len(at_work) < workers and (job := jobs.next_job()) is not None:
            assert job.trial_id not in at_work
            at_work[job.trial_id] = [job, job.reported]
        assert set(at_work) == jobs.running
        if not at_work:
            assert jobs.finished, "every worker waits and the study is not over"
            return
        assert not jobs.finished
        if len(at_work) < workers and jobs.deadline is None and not jobs.search_is_over:
            assert not has_work(jobs)
        trial_id = rng.choice(sorted(at_work))
        at_work[trial_id][1] += 1
        if not jobs.report(trial_id, outcome(*at_work[trial_id])):
            del at_work[trial_id]
        reports = None if reports is None else reports - 1


def resumed(jobs_of, file, events):
    """Returns the study as a new driver sees it when the old one died after these events."""
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    jobs = jobs_of(file)
    jobs.replay(jobs.journal.read())
    return jobs


def assert_sound(jobs, trials=TRIALS, finals=FINAL_SEEDS):
    """Asserts that no trial is lost, none came twice, and each one's epochs follow on one another."""
    events = jobs.journal.read()
    started = [event["trial_id"] for event in events if event.get("epoch") == 0]
    expected = [f"{number:04d}" for number in range(trials)] + [f"final-{k}" for k in range(1, finals + 1)]
    assert started == expected
    for trial_id in started:
        epochs = [event["epoch"] for event in events if event["trial_id"] == trial_id and "epoch" in event]
        assert epochs == list(range(len(epochs)))
        assert len(epochs) - 1 in {*RUNGS, EPOCHS}
    assert all(len(trial.reports) == EPOCHS for trial in jobs.trials.values() if trial.is_final)
    assert jobs.finished
    assert not jobs.running
    if jobs.pruner == "promote":
        assert jobs.asha.promotable(settled=math.inf) is None


def epochs_spent(jobs):
    return sum(trial.epoch for trial in jobs.searched)


def epochs_of(jobs):
    return [trial.epoch for trial in jobs.searched]


@pytest.mark.parametrize("workers", [1, 3, 20])
@pytest.mark.parametrize("trials", [1, 2, 3, 8, 9, 12, 32])
def test_promote_spends_the_expected_epochs_and_leaves_nobody_waiting(tmp_path, trials, workers):
    jobs = make_jobs(tmp_path / "reports.jsonl", trials=trials)
    work(jobs, workers)
    assert_sound(jobs, trials)
    expected = least_epochs(trials, RUNGS, ETA, EPOCHS)
    beyond_first = expected - trials * RUNGS[0]  # at most as much again, where all who went first were wrong
    assert expected <= epochs_spent(jobs) <= expected + beyond_first


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_pruner_runs_with_every_searcher(tmp_path, pruner, searcher, workers):
    jobs = make_jobs(tmp_path / "reports.jsonl", pruner=pruner, searcher=searcher)
    work(jobs, workers)
    assert_sound(jobs)
    assert jobs.searched[0].config == FIXED | FIRST
    assert EPOCHS in epochs_of(jobs)


def test_promote_trains_the_best_of_each_rung_on_as_worked_out_by_hand(tmp_path):
    jobs = make_jobs(
        tmp_path / "reports.jsonl", values=[0.5, 0.3, 0.8, 0.1, 0.9, 0.2, 0.7, 0.4, 0.6], trials=9
    )
    work(jobs)
    # rung 1 promotes .8 at n=3, .9 at n=6 and .7 at n=9; rung 3 has these three then, and promotes .9
    assert epochs_of(jobs) == [1, 1, 3, 1, 9, 1, 3, 1, 1]
    promotions = [
        (event["trial_id"], event["promoted_from"])
        for event in jobs.journal.read()
        if "promoted_from" in event
    ]
    # .8 continues as it arrives, unpaused; .9 waits for n=6, .7 for n=9, and .9 at rung 3 for n=3
    assert promotions == [("0004", 1), ("0006", 1), ("0004", 3)]


def test_stop_ends_trials_as_they_arrive_as_worked_out_by_hand(tmp_path):
    jobs = make_jobs(
        tmp_path / "reports.jsonl",
        pruner="stop",
        values=[0.5, 0.3, 0.8, 0.1, 0.9, 0.2, 0.7, 0.4, 0.6],
        trials=9,
    )
    work(jobs)
    # .5, .8 and .9 are the best so far at both rungs; .7 and .6 are not among the best 2 of 7 and 3 of 9
    assert epochs_of(jobs) == [9, 1, 9, 1, 9, 1, 1, 1, 1]
    assert not any("promoted_from" in event for event in jobs.journal.read())


def test_none_trains_every_trial_to_its_end(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl", pruner="none")
    work(jobs, workers=3)
    assert epochs_of(jobs) == [EPOCHS] * TRIALS


def test_suggestion_sees_all_earlier_trials_with_their_latest_values(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl", values=[0.1, 0.2, 0.3, 0.05], trials=4, pruner="none")
    running = [jobs.next_job() for _ in range(2)]
    jobs.report("0000", {"epoch": 1, "val_accuracy": 0.4})
    jobs.report("0000", {"epoch": 2, "val_accuracy": 0.5})
    jobs.report("0001", {"status": "error", "error": "no"})
    running += [jobs.next_job() for _ in range(2)]
    assert [[(o.config["value"], o.value, o.failed) for o in seen] for seen in jobs.observed] == [
        [],
        [(0.1, None, False)],
        [(0.1, 0.5, False), (0.2, None, True)],
        [(0.1, 0.5, False), (0.2, None, True), (0.3, None, False)],
    ]
    assert running[2].config == FIXED | {"value": 0.3}


def test_exhausted_grid_ends_the_search(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl", searcher="grid", trials=100)
    work(jobs, workers=3)
    assert_sound(jobs, trials=1 + 4 * 3)  # the first point is not on the grid


def test_promotable_trial_goes_before_a_new_one(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl", values=[0.9, 0.1, 0.2, 0.3])
    for _ in range(3):
        jobs.report(
            jobs.next_job().trial_id, {"epoch": 1, "val_accuracy": accuracy(jobs.searched[-1].config, 1)}
        )
    job = jobs.next_job()
    assert (job.trial_id, job.reported, job.final) == ("0000", 1, False)
    assert jobs.next_job().trial_id == "0003"


def test_every_decision_is_in_the_journal_before_its_job_is_given_out(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    job = jobs.next_job()
    assert jobs.journal.read() == [{"trial_id": job.trial_id, "epoch": 0, "config": job.config}]


def diverge(*trial_ids, epoch):
    """Returns an outcome in which these trials diverge at this epoch."""

    def diverged(job, now):
        report = outcome(job, now)
        if job.trial_id in trial_ids and now == epoch:
            report |= {"val_accuracy": math.nan, "status": "diverged"}
        return report

    return diverged


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_diverged_trials_are_counted_and_the_others_go_on(tmp_path, pruner, workers, epoch):
    every_second = [f"{number:04d}" for number in range(0, TRIALS, 2)]
    jobs = make_jobs(tmp_path / "reports.jsonl", pruner=pruner, seed=1)
    work(jobs, workers, outcome=diverge(*every_second, epoch=epoch))
    diverged = [trial for trial in jobs.searched if trial.status == "diverged"]
    assert len(jobs.searched) == TRIALS
    assert {trial.epoch for trial in diverged} == {epoch}
    assert all(trial.trial_id in every_second for trial in diverged)
    assert diverged
    assert winner(jobs.trials) not in diverged
    assert jobs.trials["final-1"].config == winner(jobs.trials).config | {"seed": 8, "refit": True}
    assert jobs.finished


@pytest.mark.parametrize("pruner", PRUNERS)
def test_study_whose_trials_all_diverge_has_no_final_and_finishes(tmp_path, pruner):
    jobs = make_jobs(tmp_path / "reports.jsonl", pruner=pruner)
    work(jobs, 3, outcome=diverge(*[f"{number:04d}" for number in range(TRIALS)], epoch=1))
    assert [trial.status for trial in jobs.trials.values()] == ["diverged"] * TRIALS
    assert winner(jobs.trials) is None


@pytest.mark.parametrize("status", ["error", "out_of_memory"])
def test_failed_trial_ends_with_its_error_and_cannot_win(tmp_path, status):
    def failing(job, epoch):
        if job.trial_id == "0004":  # the best
            return {"status": status, "error": "Traceback …"}
        return outcome(job, epoch)

    jobs = make_jobs(tmp_path / "reports.jsonl", values=[0.5, 0.3, 0.8, 0.1, 0.9, 0.2], trials=6)
    work(jobs, outcome=failing)
    failed = jobs.trials["0004"]
    assert (failed.status, failed.error, failed.epoch) == (status, "Traceback …", 0)
    assert records(jobs.journal.read())["0004"].status == status
    assert jobs.trials["final-1"].config["value"] == 0.8


@pytest.mark.parametrize(
    ("causes", "status"),
    [
        (["worker"] * 3, "error"),  # more than max_failures
        (["memory", "memory"], "out_of_memory"),
        (["worker", "memory", "worker"], "error"),
        (["gpu", "worker", "gpu"], "error"),
    ],
)
def test_trial_that_is_lost_too_often_counts_as_last_and_frees_its_slot(tmp_path, causes, status):
    jobs = make_jobs(tmp_path / "reports.jsonl", values=[0.9, 0.1, 0.2, 0.3], max_failures=2)
    for cause in causes:
        assert jobs.next_job().trial_id == "0000"
        jobs.lose("0000", cause, "it is gone")
    assert jobs.running == set()
    assert jobs.trials["0000"].status == status
    assert "it is gone" in jobs.trials["0000"].error
    for _ in range(2):
        trial_id = jobs.next_job().trial_id
        jobs.report(trial_id, outcome_at(jobs, trial_id, 1))
    assert "0002" in jobs.running  # n = 3 with the lost one: 0002, the best, continues


@pytest.mark.parametrize("cause", ["node", "neighbour", "graph", "graph_memory"])
def test_losses_that_are_no_trials_fault_do_not_count_against_it(tmp_path, cause):
    jobs = make_jobs(tmp_path / "reports.jsonl", pruner="none", max_failures=0)
    trial_id = jobs.next_job().trial_id
    jobs.report(trial_id, outcome_at(jobs, trial_id, 1))
    for _ in range(20):
        jobs.lose(trial_id, cause, "it is gone")
        job = jobs.next_job()
        assert (job.trial_id, job.reported) == (trial_id, 1)
    assert jobs.trials[trial_id].status is None


def test_a_lost_worker_names_its_gpu_in_the_journal(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    jobs.lose(jobs.next_job().trial_id, "gpu", "an illegal address", gpu="GPU-1")
    assert jobs.journal.read()[-1]["gpu"] == "GPU-1"


def test_a_step_that_cannot_be_captured_makes_all_trials_eager_after_a_resume_too(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    assert not jobs.next_job().eager
    jobs.lose("0000", "graph", "…\nCaptureError: the step cannot be captured (it synchronises)")
    said = "CaptureError: the step cannot be captured (it synchronises)"
    assert list(jobs.notes) == [f"{said}; all trials train eagerly from now on"]
    assert [jobs.next_job().eager for _ in range(2)] == [True, True]
    again = make_jobs(tmp_path / "reports.jsonl")
    again.replay(again.journal.read())
    assert again.next_job().eager


def test_workers_whose_captures_fail_at_once_are_said_once(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    for trial_id in [jobs.next_job().trial_id, jobs.next_job().trial_id]:
        jobs.lose(trial_id, "graph", "CaptureError: the step cannot be captured")
    assert len(jobs.notes) == 1


def test_a_capture_without_enough_memory_makes_that_trial_eager_alone(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    jobs.next_job()
    jobs.lose("0000", "graph_memory", "CaptureMemoryError: the step cannot be captured")
    assert [jobs.next_job().eager for _ in range(2)] == [True, False]


def test_what_a_trial_does_beside_epochs_is_known_and_not_in_the_journal(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    before = [jobs.next_job().trial_id, len(jobs.journal.read())]
    assert jobs.report("0000", {"phase": "testing"})
    assert jobs.phases == {"0000": "testing"}
    assert len(jobs.journal.read()) == before[1]


def test_a_study_that_gives_up_does_not_wait_for_a_trial_at_its_test(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    jobs.next_job()
    jobs.gave_up = "the disk is full"
    assert not jobs.report("0000", {"phase": "testing"})
    assert jobs.next_job() is None
    assert jobs.finished


def test_losses_are_counted_over_a_resume(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl", max_failures=1)
    jobs.lose(jobs.next_job().trial_id, "worker", "it is gone")
    again = make_jobs(tmp_path / "reports.jsonl", max_failures=1)
    again.replay(again.journal.read())
    assert again.next_job().trial_id == "0000"
    again.lose("0000", "worker", "it is gone")
    assert again.trials["0000"].status == "error"


@pytest.mark.parametrize(
    ("errors", "gives_up"),
    [
        (["Traceback …\nOSError: disk", "other lines\nOSError: disk", "OSError: disk\n"], True),
        (["OSError: disk", "OSError: disk", "ValueError: another"], False),
        (["OSError: disk", None, "OSError: disk", "OSError: disk"], False),  # one trained
    ],
)
def test_study_whose_first_three_trials_fail_alike_ends(tmp_path, errors, gives_up):
    left = iter(errors)

    def failing(job, epoch):
        error = next(left, None) if epoch == 1 and job.trial_id in ("0000", "0001", "0002", "0003") else None
        return {"status": "error", "error": error} if error else outcome(job, epoch)

    jobs = make_jobs(tmp_path / "reports.jsonl", trials=6)
    work(jobs, outcome=failing)
    assert bool(jobs.gave_up) == gives_up
    assert len(jobs.searched) == (3 if gives_up else 6)
    assert jobs.finished
    if gives_up:
        assert "OSError: disk" in jobs.gave_up
        resumed_jobs = make_jobs(tmp_path / "reports.jsonl", trials=6)
        resumed_jobs.replay(resumed_jobs.journal.read())
        work(resumed_jobs)
        assert [trial.status for trial in resumed_jobs.searched][:3] == ["error"] * 3
        assert len(resumed_jobs.searched) == 6


class FullAfter(Journal):
    """A journal whose disk takes so many more lines."""

    def __init__(self, file, lines):
        super().__init__(file)
        self.lines = lines

    def append(self, event):
        if self.lines == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.lines -= 1
        super().append(event)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_full_disk_ends_the_study_at_any_line_and_a_resumed_one_equals_another(tmp_path, pruner):
    whole = make_jobs(tmp_path / "whole.jsonl", pruner=pruner)
    work(whole)
    lines = len(whole.journal.read())
    for fits in range(lines):
        file = tmp_path / f"{fits}.jsonl"
        jobs = make_jobs(file, pruner=pruner, journal=FullAfter(file, fits))
        work(jobs)
        assert "no room" in jobs.gave_up
        assert jobs.finished
        assert len(jobs.journal.read()) == fits
        resumed_jobs = make_jobs(file, pruner=pruner)
        resumed_jobs.replay(resumed_jobs.journal.read())
        work(resumed_jobs)
        assert resumed_jobs.journal.read() == whole.journal.read()


def test_worker_without_room_for_its_checkpoint_ends_the_study_and_no_trial(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl")
    trial_id = jobs.next_job().trial_id
    written = jobs.journal.read()
    jobs.lose(trial_id, "disk", "Traceback …\nOSError: [Errno 28] No space left on device")
    assert "OSError: [Errno 28]" in jobs.gave_up
    assert jobs.next_job() is None
    assert jobs.finished
    assert jobs.trials[trial_id].status is None
    assert jobs.journal.read() == written


def test_what_a_restarted_worker_says_again_is_not_written_again(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl", pruner="none")
    trial_id = jobs.next_job().trial_id
    for epoch in (1, 2):
        assert jobs.report(trial_id, outcome_at(jobs, trial_id, epoch))
    written = jobs.journal.read()
    assert jobs.report(trial_id, outcome_at(jobs, trial_id, 1) | {"pid": 99})
    assert jobs.report(trial_id, outcome_at(jobs, trial_id, 2) | {"pid": 99})
    assert jobs.journal.read() == written
    assert jobs.trials[trial_id].epoch == 2


def outcome_at(jobs, trial_id, epoch):
    return {"epoch": epoch, "val_accuracy": accuracy(jobs.trials[trial_id].config, epoch)}


def test_final_seed_that_fails_does_not_hold_up_the_others(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl", final_seeds=3)
    work(
        jobs,
        2,
        outcome=lambda job, epoch: {"status": "error"} if job.trial_id == "final-1" else outcome(job, epoch),
    )
    assert [trial.status for trial in jobs.trials.values() if trial.is_final] == ["error", "done", "done"]


def test_finals_are_the_winner_with_seeds_that_no_trial_had(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl", final_seeds=3)
    work(jobs, workers=2)
    finals = [trial for trial in jobs.trials.values() if trial.is_final]
    assert [trial.config for trial in finals] == [
        winner(jobs.trials).config | {"seed": seed, "refit": True} for seed in (8, 9, 10)
    ]
    assert {trial.config["seed"] for trial in jobs.searched} == {7}
    assert all("test_accuracy" in trial.reports[EPOCHS] for trial in finals)
    assert not any("test_accuracy" in trial.reports[trial.epoch] for trial in jobs.searched)


def test_study_without_final_seeds_ends_with_its_search(tmp_path):
    jobs = make_jobs(tmp_path / "reports.jsonl", final_seeds=0)
    work(jobs, workers=3)
    assert_sound(jobs, finals=0)


class Clock:
    """Shows the time that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("pruner", PRUNERS)
def test_when_time_is_up_trials_stop_at_their_next_report_and_finals_still_run(tmp_path, pruner):
    clock = Clock()
    jobs = make_jobs(tmp_path / "reports.jsonl", pruner=pruner, seconds=10, clock=clock)
    reported_late = []

    def timed(job, epoch):
        clock.now += 1
        if clock.now >= 110 and not job.final:
            reported_late.append(job.trial_id)
        return outcome(job, epoch)

    work(jobs, workers=3, outcome=timed)
    assert jobs.finished
    assert epochs_spent(jobs) <= 9 + 3  # nine reports in time, then one of each at work
    assert len(reported_late) == len(set(reported_late)) <= 3
    assert len(jobs.searched) < TRIALS
    assert [trial.epoch for trial in jobs.trials.values() if trial.is_final] == [EPOCHS] * FINAL_SEEDS


def test_budget_that_is_not_used_up_changes_nothing(tmp_path):
    limited, free = make_jobs(tmp_path / "a", seconds=1e9), make_jobs(tmp_path / "b")
    work(limited)
    work(free)
    assert limited.journal.read() == free.journal.read()


@pytest.mark.parametrize(("searcher", "every"), [("random", 1), ("grid", 5), ("tpe", 17)])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_study_killed_at_any_event_and_resumed_equals_uninterrupted(tmp_path, pruner, searcher, every):
    def jobs_of(file):
        return make_jobs(file, pruner=pruner, searcher=searcher)

    whole = jobs_of(tmp_path / "whole")
    work(whole)
    events = whole.journal.read()
    for cut in [*range(0, len(events), every), len(events)]:
        jobs = resumed(jobs_of, tmp_path / "cut", events[:cut])
        work(jobs)
        assert jobs.journal.read() == events, f"killed after event {cut} of {len(events)}"
        assert jobs.asha.values == whole.asha.values
        assert jobs.asha.promoted == whole.asha.promoted
        assert winner(jobs.trials).trial_id == winner(whole.trials).trial_id


@pytest.mark.parametrize("pruner", PRUNERS)
def test_diverged_trials_are_resumed_over_as_they_were(tmp_path, pruner):
    half = diverge(*[f"{number:04d}" for number in range(0, TRIALS, 2)], epoch=2)

    def jobs_of(file):
        return make_jobs(file, pruner=pruner)

    whole = jobs_of(tmp_path / "whole")
    work(whole, outcome=half)
    events = whole.journal.read()
    for cut in range(0, len(events), 5):
        jobs = resumed(jobs_of, tmp_path / "cut", events[:cut])
        work(jobs, outcome=half)
        assert jobs.journal.read() == events


@pytest.mark.parametrize(("searcher", "every"), [("random", 2), ("grid", 5), ("tpe", 17)])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_study_of_three_workers_killed_at_any_event_loses_no_trial(tmp_path, pruner, searcher, every):
    def jobs_of(file):
        return make_jobs(file, pruner=pruner, searcher=searcher)

    whole = jobs_of(tmp_path / "whole")
    work(whole, workers=3)
    events = whole.journal.read()
    configs = [trial.config for trial in whole.searched]
    for cut in range(0, len(events), every):
        jobs = resumed(jobs_of, tmp_path / "cut", events[:cut])
        work(jobs, workers=3, seed=cut)
        assert_sound(jobs)
        assert jobs.journal.read()[:cut] == events[:cut]
        if searcher != "tpe":  # whose points depend on the order of the reports
            assert [trial.config for trial in jobs.searched] == configs


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_study_killed_again_and_again_ends_sound(tmp_path, pruner, searcher):
    file = tmp_path / "reports.jsonl"
    for life in range(100):
        jobs = make_jobs(file, pruner=pruner, searcher=searcher)
        jobs.replay(jobs.journal.read())
        work(jobs, workers=3, seed=life, reports=7)
        if jobs.finished:
            break
    assert life > 3
    assert_sound(jobs)


def test_resumed_study_is_finished_when_it_was(tmp_path):
    whole = make_jobs(tmp_path / "whole")
    work(whole, workers=3)
    jobs = resumed(make_jobs, tmp_path / "again", whole.journal.read())
    assert jobs.next_job() is None
    assert jobs.finished
    assert jobs.journal.read() == whole.journal.read()


def test_replay_writes_nothing(tmp_path):
    whole = make_jobs(tmp_path / "whole")
    work(whole, workers=3)
    events = whole.journal.read()[:30]
    assert resumed(make_jobs, tmp_path / "again", events).journal.read() == events


def test_interrupted_trials_go_first_from_where_their_reports_end(tmp_path):
    jobs = make_jobs(tmp_path / "a", pruner="none")
    for _ in range(3):
        jobs.next_job()
    jobs.report("0001", outcome_at(jobs, "0001", 1))
    jobs.report("0001", outcome_at(jobs, "0001", 2))
    again = resumed(lambda file: make_jobs(file, pruner="none"), tmp_path / "b", jobs.journal.read())
    resumed_jobs = [again.next_job() for _ in range(4)]
    assert [(job.trial_id, job.reported) for job in resumed_jobs] == [
        ("0000", 0),
        ("0001", 2),
        ("0002", 0),
        ("0003", 0),
    ]


def test_promotion_without_a_report_after_it_is_resumed(tmp_path):
    whole = make_jobs(tmp_path / "whole")
    work(whole)
    events = whole.journal.read()
    promotions = [number for number, event in enumerate(events) if "promoted_from" in event]
    assert promotions
    for number in promotions:
        jobs = resumed(make_jobs, tmp_path / "cut", events[: number + 1])
        job = jobs.next_job()
        assert (job.trial_id, job.reported) == (events[number]["trial_id"], events[number]["promoted_from"])
        assert jobs.journal.read() == events[: number + 1]  # it is not promoted twice


def test_repeated_report_of_a_restarted_worker_changes_nothing_and_goes_on(tmp_path):
    jobs = make_jobs(tmp_path / "a", values=[0.1, 0.2, 0.9, 0.3])
    for epoch, trial_id in ((1, "0000"), (1, "0001"), (1, "0002"), (2, "0002")):
        if epoch == 1:
            assert jobs.next_job().trial_id == trial_id
        goes_on = jobs.report(trial_id, outcome_at(jobs, trial_id, epoch))
        assert goes_on == (trial_id == "0002")
    values, promoted = str(jobs.asha.values), str(jobs.asha.promoted)
    assert jobs.report("0002", outcome_at(jobs, "0002", 1))  # also at a rung
    assert jobs.report("0002", outcome_at(jobs, "0002", 2))
    assert (str(jobs.asha.values), str(jobs.asha.promoted)) == (values, promoted)
    assert jobs.trials["0002"].epoch == 2
    assert jobs.running == {"0002"}
    again = resumed(
        lambda file: make_jobs(file, values=[0.1, 0.2, 0.9, 0.3]), tmp_path / "b", jobs.journal.read()
    )
    assert (str(again.asha.values), str(again.asha.promoted)) == (values, promoted)
    assert not jobs.report("0002", outcome_at(jobs, "0002", 3))  # a new epoch, at rung 3: pauses there


def test_repeat_of_the_report_that_promoted_a_trial_does_not_pause_it(tmp_path):
    values = [0.1, 0.2, 0.9, 0.3]
    jobs = make_jobs(tmp_path / "a", values=values)
    for _ in range(3):
        trial_id = jobs.next_job().trial_id
        jobs.report(trial_id, outcome_at(jobs, trial_id, 1))
    assert jobs.running == {"0002"}
    assert jobs.report("0002", outcome_at(jobs, "0002", 1))
    again = resumed(lambda file: make_jobs(file, values=values), tmp_path / "b", jobs.journal.read())
    job = again.next_job()
    assert (job.trial_id, job.reported) == ("0002", 1)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_workers_that_repeat_reports_after_every_restart_end_the_same_study(tmp_path, pruner):
    clean = make_jobs(tmp_path / "clean", pruner=pruner)
    work(clean)
    jobs = make_jobs(tmp_path / "repeating", pruner=pruner)

    def repeating(job, epoch):
        if epoch > 1 and epoch % 2 == 0:
            assert jobs.report(job.trial_id, outcome(job, epoch - 1))
        return outcome(job, epoch)

    work(jobs, outcome=repeating)
    without_repeats = records(jobs.journal.read())
    assert without_repeats == records(clean.journal.read())
    assert jobs.asha.values == clean.asha.values


def test_replay_takes_configurations_from_the_journal_and_draws_nothing(tmp_path):
    whole = make_jobs(tmp_path / "whole", searcher="tpe")
    work(whole)
    again = make_jobs(tmp_path / "b", seed=1, searcher="tpe")  # as another version of hyperopt would
    again.replay(whole.journal.read())
    assert [trial.config for trial in again.searched] == [trial.config for trial in whole.searched]
    assert again.observed == []


def test_resume_during_the_finals_searches_no_further(tmp_path):
    jobs = make_jobs(tmp_path / "a", pruner="none", seconds=10, clock=(clock := Clock()))
    for _ in range(2):
        jobs.next_job()
    clock.now += 20
    for trial_id in ("0000", "0001"):
        assert not jobs.report(trial_id, outcome_at(jobs, trial_id, 1))
    assert jobs.next_job().trial_id == "final-1"
    again = resumed(lambda file: make_jobs(file, pruner="none"), tmp_path / "b", jobs.journal.read())
    assert [again.next_job().trial_id for _ in range(2)] == ["final-1", "final-2"]


def test_value_that_is_not_finite_is_the_same_live_and_replayed(tmp_path):
    jobs = make_jobs(tmp_path / "a", values=[0.1, 0.2, 0.3])
    jobs.next_job()
    jobs.report("0000", {"epoch": 1, "val_accuracy": math.nan})
    assert jobs.trials["0000"].value() is None
    assert winner(jobs.trials) is None


def twice_as_many(tmp_path, pruner):
    """Returns a study of 16 trials that was continued to 32, and one of 32, of one worker each."""
    folders = tmp_path / "continued", tmp_path / "whole"
    for folder in folders:
        options = {"epochs": EPOCHS, "pruner": pruner}
        write_study(folder, spec(space="softmax", rungs=list(RUNGS), options=options))
    for folder, trials in ((folders[0], 16), (folders[0], 32), (folders[1], 32)):
        file = folder / "reports.jsonl"
        jobs = make_jobs(file, pruner=pruner, searcher="tpe", trials=trials)
        jobs.replay(jobs.journal.read())
        jobs.search_is_over = False
        jobs.journal.append({"run": {"options": {"trials": trials}}})
        work(jobs)
    return [write_tables(folder, status="done", seconds=1.0) for folder in folders]


@pytest.mark.parametrize("pruner", ["none", "stop"])
def test_a_continued_study_equals_one_of_as_many_trials(tmp_path, pruner):
    continued, whole = twice_as_many(tmp_path, pruner)
    assert len(whole.trials) == 32
    assert (continued.folder / "trials.csv").read_text() == (whole.folder / "trials.csv").read_text()
    assert continued.best == whole.best
    assert len(continued.seeds) == FINAL_SEEDS


def test_a_continued_study_with_promote_suggests_from_what_it_observed(tmp_path):
    continued, whole = twice_as_many(tmp_path, "promote")
    configs, of_whole = ([trial.config for trial in study.searched] for study in (continued, whole))
    assert configs[:16] == of_whole[:16]
    for k, event in enumerate(continued.events):
        if event.get("epoch") != 0 or event["trial_id"].startswith(FINAL):
            continue
        earlier = [trial for trial in records(continued.events[:k]).values() if not trial.is_final]
        observations = [Observation(trial.config, trial.value(ACCURACY)) for trial in earlier]
        expected = suggest("tpe", RANGES, FIRST, 0, len(earlier), observations)
        assert event["config"] == FIXED | expected
    # README says why: the first search promoted the best of 16 at its end
    epochs, of_whole = ([trial.epoch for trial in study.searched[:16]] for study in (continued, whole))
    assert epochs != of_whole
    assert configs != [trial.config for trial in whole.searched]
