"""Curves of studies: recorded, read and checked."""

import json

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.made_study import write_events, write_own_study, write_study
from tunefleet.analysis.load import load
from tunefleet.benchmarks.curves import read
from tunefleet.benchmarks.replay import main as replay
from tunefleet.benchmarks.replay import pick, reports_of
from tunefleet.benchmarks.schedulers import SCHEDULERS, simulate
from tunefleet.search.run import main as search


@pytest.fixture
def study(tmp_path):
    """Twelve trials of four epochs without pruner; trial 5 diverged at the last one."""
    return write_study(tmp_path / "made", rungs=())


def events_of(folder):
    return [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]


def change_configs(folder, **values):
    """Change values of the trials' configurations, one for each trial."""
    events = [event for event in events_of(folder) if not event["trial_id"].startswith("final")]
    for event in events:
        if event["epoch"] == 0:
            event["config"] |= {name: of[int(event["trial_id"])] for name, of in values.items()}
    write_events(folder, events)


def test_trials_of_one_seed_are_a_configuration_each(study):
    curves = read(str(study))
    assert curves.seeds == (0,)
    assert curves.accuracy.shape == (1, 12, 4)
    assert curves.accuracy[0, 3] == pytest.approx([0.3 + 0.24 * 3 / 12 + 0.05 * n for n in range(1, 5)])
    assert np.isnan(curves.accuracy[0]).sum(axis=1).tolist() == [0] * 5 + [1] + [0] * 6
    assert (curves.seconds == 1).all()


def test_trials_that_differ_in_their_seed_alone_are_one_configuration(study):
    lrs = [0.1 / (k // 2 + 1) for k in range(12)]
    change_configs(study, lr=lrs, schedule=["cosine"] * 12, seed=[k % 2 for k in range(12)])
    curves = read(str(study))
    assert curves.seeds == (0, 1)
    assert curves.accuracy.shape == (2, 6, 4)
    # trials 6 and 7 are configuration 3
    assert curves.accuracy[:, 3, 0] == pytest.approx([0.35 + 0.02 * 6, 0.35 + 0.02 * 7])
    assert np.isnan(curves.accuracy[1, 2, 3])  # trial 5


def test_a_choice_that_was_drawn_twice_is_two_configurations(study):
    change_configs(study, lr=[0.1] * 12, schedule=["cosine"] * 12)
    assert read(str(study)).accuracy.shape == (1, 12, 4)


def test_a_diverged_trial_has_no_value_at_its_last_epoch_though_it_reported_one(study):
    events = events_of(study)
    for event in events:
        if (event["trial_id"], event["epoch"]) == ("0002", 4):
            event["status"] = "diverged"
    write_events(study, events)
    curves = read(str(study))
    assert np.isnan(curves.accuracy[0, 2, 3])
    assert np.isnan(curves.loss[0, 2, 3])
    assert curves.accuracy[0, 2, 2] > 0


def test_a_failed_trial_has_the_epochs_that_it_reported(study):
    kept = {"0003": 2, "0004": 0}
    events = [e for e in events_of(study) if e["epoch"] <= kept.get(e["trial_id"], 9)]
    for trial_id, status in (("0003", "error"), ("0004", "out_of_memory")):
        events.append({"trial_id": trial_id, "status": status, "error": "no"})
    write_events(study, events)
    curves = read(str(study))
    assert np.isfinite(curves.accuracy[0]).sum(axis=1).tolist() == [4, 4, 4, 2, 0, 3] + [4] * 6
    assert curves.seconds[0, 3, :3].tolist() == [1, 1, 0]
    assert curves.seconds[0, 4, 0] == 0


@pytest.mark.parametrize("rungs", [(1,), (1, 2)])
def test_a_pruned_study_is_one_line_that_says_how_to_record_one(tmp_path, rungs, capsys):
    folder = write_study(tmp_path / "pruned", rungs=rungs)
    assert replay([str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "was pruned (--pruner promote)" in err
    assert "--pruner none" in err


def test_a_study_that_is_not_done_has_no_curves(study):
    write_events(study, events_of(study), status="stopped")
    with pytest.raises(ValueError, match=r"is not done; resume it: tunefleet resume"):
        read(str(study))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ({("0001", 4)}, "^made: configuration 1, seed 0 has 3 of 4 epochs and did not diverge; record one"),
        ({("0001", 2)}, "^made: configuration 1, seed 0 lacks an epoch"),
        ({(f"{k:04d}", n) for k in range(12) for n in range(1, 5)}, "has no trial"),
    ],
)
def test_what_cannot_be_replayed_is_named(study, lost, message):
    events = [e for e in events_of(study) if (e["trial_id"], e["epoch"]) not in lost]
    write_events(study, events)
    with pytest.raises(ValueError, match=message):
        read(str(study))


def test_curves_without_seconds_are_named(study):
    events = events_of(study)
    events[2]["epoch_seconds"] = None
    write_events(study, events)
    with pytest.raises(ValueError, match="configuration 0, seed 0 lacks seconds"):
        read(str(study))


def test_a_study_whose_trials_all_diverged_has_no_best(study):
    events = [e | ({"status": "diverged"} if e["epoch"] == 4 else {}) for e in events_of(study)]
    write_events(study, [e for e in events if not e["trial_id"].startswith("final")])
    with pytest.raises(ValueError, match="every configuration diverged"):
        read(str(study))


@pytest.mark.parametrize("name", ["convnet", "twolayernn"])
def test_committed_curves_are_of_64_configurations_with_two_seeds_over_27_epochs(name):
    assert read(str(ROOT / "benchmarks/curves" / name)).accuracy.shape == (2, 64, 27)


@pytest.fixture(scope="module")
def recorded(data_dir, tmp_path_factory):
    """Record six configurations over four epochs, then run the same search with promote."""
    import ray

    folder = tmp_path_factory.mktemp("recorded")
    common = ["--space", "softmax", "--data", "digits", "--trials", "6", "--epochs", "4", "--seed", "3"]
    common += ["--data-dir", str(data_dir), "--searcher", "random", "--final-seeds", "0", "--wandb", "off"]
    try:
        for pruner, concurrency in (("none", "2"), ("promote", "1")):
            flags = ["--pruner", pruner, "--concurrency", concurrency, "--study-dir", str(folder / pruner)]
            assert search([*common, *flags]) == 0
    finally:
        ray.shutdown()
    return folder


@pytest.mark.ray
def test_a_real_search_spends_what_its_replay_does(recorded):
    """The same configurations in the same order, one worker: trial by trial the same epochs, and winner."""
    curves, real = read(str(recorded / "none")), load(recorded / "promote")
    assert curves.accuracy.shape == (1, 6, 4)
    reports, seconds = reports_of(curves, 0)
    order = list(range(6))
    seen, _ = simulate(SCHEDULERS["promote"](order, (1, 3), 3, 4), reports, seconds, workers=1)
    assert seen.tolist() == real.trials.epochs.tolist()
    assert 6 < sum(seen) < 6 * 4
    assert f"{pick(seen, reports, order):04d}" == real.facts["best"]["trial_id"]


def test_an_own_training_has_no_accuracy_to_replay(tmp_path):
    with pytest.raises(ValueError, match="is of an own training"):
        read(str(write_own_study(tmp_path / "own")))
