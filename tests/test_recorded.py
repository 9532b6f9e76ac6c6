"""Recorded studies, replayed: the same decisions, suggestions, tables and winner, on every machine.

tests/recorded has four studies of digits, of 8 or 12 trials and up to 9 epochs, one for each pruner and
sampler. What a network learns differs from processor to processor; what follows from it does not.
"""

import io
import json
import shutil

import pandas as pd
import pytest

from tests.conftest import ROOT
from tunefleet.journal import Journal
from tunefleet.models.spaces import SPACES
from tunefleet.search.asha import Asha
from tunefleet.search.options import StudyOptions
from tunefleet.search.scheduler import Scheduler
from tunefleet.study import Study, write_tables

RECORDED = ROOT / "tests/recorded"
STUDIES = sorted(folder.name for folder in RECORDED.iterdir())


@pytest.fixture(params=STUDIES)
def recorded(request):
    return Study(RECORDED / request.param)


def test_each_pruner_and_sampler_is_recorded():
    recorded_options = [Study(RECORDED / name).spec["options"] for name in STUDIES]
    assert {options["pruner"] for options in recorded_options} == {"promote", "stop", "none"}
    assert {options["searcher"] for options in recorded_options} == {"random", "tpe", "grid"}


def scheduler_of(study, folder):
    folder.mkdir(exist_ok=True)
    options = StudyOptions(**study.spec["options"] | {"space": SPACES[study.spec["space"]]})
    return Scheduler(
        suggest=options.suggest,
        asha=Asha(options.rungs, options.eta),
        pruner=options.pruner,
        trials=options.trials,
        fixed=options.fixed_values(),
        final_seeds=options.final_seeds,
        journal=Journal(folder / "reports.jsonl"),
        max_failures=options.max_failures,
    )


def events_of(study):
    """Returns a study's events; configs had hidden and kernel_size then, null where there is no such one."""
    events = [event for event in study.events if "run" not in event]
    for event in events:
        for name in ("hidden", "kernel_size"):
            if "config" in event and event["config"].get(name, 0) is None:
                del event["config"][name]
    return events


def decides(event):
    """Whether the scheduler wrote this event; else a worker has reported it."""
    return event.get("epoch") == 0 or "promoted_from" in event


def test_decisions_and_suggestions_are_the_recorded_ones(recorded, tmp_path):
    scheduler = scheduler_of(recorded, tmp_path)
    for event in events_of(recorded):
        if decides(event):
            job = scheduler.next_job()
            assert job is not None
            assert job.trial_id == event["trial_id"]
        else:
            scheduler.report(event["trial_id"], event)
    assert scheduler.journal.read() == events_of(recorded)
    assert scheduler.next_job() is None
    assert scheduler.finished


def test_a_resumed_study_decides_as_if_it_had_not_been_stopped(recorded, tmp_path):
    events = events_of(recorded)
    half = next(k for k in range(len(events) // 2, len(events)) if decides(events[k]))
    old, new = scheduler_of(recorded, tmp_path / "old"), scheduler_of(recorded, tmp_path / "new")
    new.replay(events[:half])
    at_work = sorted(new.interrupted)
    assert sorted(new.next_job().trial_id for _ in at_work) == at_work
    for event in events[:half]:
        if decides(event):
            old.next_job()
        else:
            old.report(event["trial_id"], event)
    assert new.running == old.running
    assert new.next_job() == old.next_job()


def test_tables_and_winner_are_the_recorded_ones(recorded, tmp_path):
    copy = tmp_path / recorded.folder.name
    shutil.copytree(recorded.folder, copy)
    (copy / "trials.csv").unlink()
    study = write_tables(copy)
    assert (copy / "trials.csv").read_bytes() == (recorded.folder / "trials.csv").read_bytes()
    result = json.loads((recorded.folder / "result.json").read_text())
    for name in ("best", "statuses", "epochs_spent", "trials", "busy_fraction"):
        assert study.facts[name] == result[name]
    assert {name: study.facts["final"][name] for name in result["final"]} == result["final"]
    epochs = pd.read_parquet(io.BytesIO((copy / "epochs.parquet").read_bytes()))
    assert len(epochs) == sum(not decides(event) and "epoch" in event for event in events_of(recorded))
