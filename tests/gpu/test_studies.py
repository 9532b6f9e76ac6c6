"""Whole studies on a GPU: several trials at once, a killed driver, hidden and named GPUs."""

from collections import Counter

import pytest

from tests.compared import measured, result, table
from tests.gpu import ON_GPU, on_device, only_on_gpu
from tests.gpu.started import KILLED_AFTER, uuid
from tunefleet.journal import records

pytestmark = [on_device, pytest.mark.ray]


@pytest.fixture(scope="module")
def four_ended(four):
    return four.finish()


@pytest.fixture(scope="module")
def undisturbed_ended(undisturbed):
    return undisturbed.finish()


def test_a_promoting_study_shares_a_gpu_among_four_trials(four, four_ended):
    code, out, err = four_ended
    assert code == 0, err
    slots = 4 if ON_GPU else four.content()["resources"]["slots"]
    assert four.content()["resources"]["slots"] == slots
    events = four.events()
    reports = [event for event in events if "pid" in event]
    assert len({report["pid"] for report in reports if not report["trial_id"].startswith("final")}) == slots
    assert any("promoted_from" in event for event in events)
    assert not [event for event in events if "lost" in event]
    for trial in records(events).values():
        assert sorted(trial.reports) == list(range(1, trial.epoch + 1))
    assert "test_accuracy" in out


def test_the_driver_holds_no_memory_of_a_gpu(four_ended):
    assert "\ncontexts 0\n" in four_ended[1]


@only_on_gpu
def test_a_gpu_may_be_named_by_its_uuid_and_each_report_names_its_gpu(undisturbed, undisturbed_ended):
    code, _, err = undisturbed_ended
    assert code == 0, err
    assert {event["gpu"] for event in undisturbed.events() if "pid" in event} == {uuid()}


def test_a_killed_drivers_study_resumes_as_if_undisturbed(killed, undisturbed, undisturbed_ended):
    assert undisturbed_ended[0] == 0, undisturbed_ended[2]
    code, _, err = killed.finish()
    assert code == 0, err
    said = Counter((e["trial_id"], e["epoch"]) for e in killed.events() if e.get("epoch"))
    assert set(said.values()) == {1}
    assert said.keys() == measured(undisturbed.study).keys()
    assert table(killed.study, ("seconds", "node")) == table(undisturbed.study, ("seconds", "node"))
    assert measured(killed.study) == measured(undisturbed.study)
    assert result(killed.study) == result(undisturbed.study)
    best, test = killed.content()["best"], killed.content()["final"]["test_accuracy"]["mean"]
    print(
        f"\nkill -9 after {KILLED_AFTER} reports, --resume: {len(said)} epochs, each recorded once, equal to "
        f"the undisturbed study's; winner {best['trial_id']} in both (val {best['val_accuracy']:.4f}, test "
        f"{test:.4f})"
    )


def test_hidden_gpus_are_not_used_and_that_is_said(hidden):
    code, out, err = hidden.finish()
    assert code == 0, err
    assert "CUDA_VISIBLE_DEVICES hides every GPU: training on CPUs" in out
    assert hidden.content()["levers"]["device"] == "cpu"


def test_a_hidden_gpu_is_refused_where_one_is_asked_for(refused):
    code, _, err = refused.finish()
    assert code == 2, err
    assert "CUDA_VISIBLE_DEVICES='' hides every GPU; give --device cpu" in err
