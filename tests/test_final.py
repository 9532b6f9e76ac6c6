import math

import numpy as np
import pytest
import torch
from scipy import stats

from tests.finished import made_data, new_study
from tests.made_study import write_events
from tunefleet.journal import TrialRecord
from tunefleet.metric import Metric
from tunefleet.models.spaces import SPACES
from tunefleet.search.execution import Ready, keep_best, scheduler_of
from tunefleet.search.resources import Resources
from tunefleet.study import Study, final_results, over_seeds, seeds_of
from tunefleet.trainables.device import choose


def final(k, accuracy, status="done"):
    record = TrialRecord(f"final-{k}", {"seed": k, "lr": 0.1})
    record.take({"epoch": 1, "val_accuracy": 0.5, "status": status, "test_accuracy": accuracy})
    return record


def test_summary_is_student_s_interval_of_the_mean():
    summary = over_seeds([0.70, 0.72, 0.77])
    assert summary["mean"] == pytest.approx(0.73)
    assert summary["sd"] == pytest.approx(0.036056, abs=1e-6)
    expected = stats.t.interval(0.95, 2, loc=0.73, scale=0.036056 / 3**0.5)
    assert summary["interval95"] == pytest.approx(expected, abs=1e-5)


def test_one_seed_has_no_spread():
    assert over_seeds([0.7]) == {"values": [0.7], "mean": 0.7, "sd": None, "interval95": None}


def test_interval_stays_between_zero_and_one():
    low, high = over_seeds([0.9, 1.0])["interval95"]
    assert 0 <= low < high == 1.0


def test_interval_of_a_loss_has_no_bounds_and_no_number_is_too_large():
    assert over_seeds([0.5, 1.5], Metric("val_mse", "min"))["interval95"][0] < 0
    summary = over_seeds([1e200, 3e200], Metric("val_mse", "min"))
    assert (summary["mean"], summary["sd"]) == (pytest.approx(2e200), pytest.approx(math.sqrt(2) * 1e200))


def test_a_diverged_seed_counts_and_a_failed_one_is_named():
    trials = {
        "a": final(1, 0.5),
        "b": final(2, 0.1, status="diverged"),
        "c": TrialRecord("final-3", {"seed": 3}, status="error"),
        "d": TrialRecord("final-4", {"seed": 4}),  # still running
    }
    results = final_results(trials.values())
    assert (results["seeds"], results["diverged"], results["failed"]) == ([1, 2], [2], [3])
    assert results["test_accuracy"]["mean"] == pytest.approx(0.3)


def test_a_seed_without_a_finite_value_leaves_the_others_their_mean():
    seeds = [final(k, value) for k, value in enumerate([0.5, None, 0.7])]
    results = final_results(seeds)
    assert results["test_accuracy"]["values"] == [0.5, 0.7]
    assert seeds_of(results["test_accuracy"], results | {"diverged": [1]}) == (
        "2 of 3 fresh seeds, 1 of them diverged"
    )


def test_study_whose_seeds_all_fail_has_no_accuracy():
    results = final_results([TrialRecord("final-1", {"seed": 1}, status="error")])
    assert (results["failed"], results["test_accuracy"]) == ([1], None)


def test_study_without_an_ended_seed_has_no_final():
    assert final_results([TrialRecord("final-1", {"seed": 1})]) is None


def save_model(file, frozen=False, **network):
    torch.save({"network": network, "frozen": frozen}, file)


def test_best_folder_keeps_the_first_seed_and_may_be_filled_twice(tmp_path):
    best = tmp_path / "best"
    best.mkdir()
    weight = torch.arange(6.0).view(2, 3)
    for k in (1, 2):
        (best / f"predictions-final-{k}.parquet").write_text(str(k))
        (best / f"misclassified-final-{k}.npz").write_text(str(k))
        save_model(best / f"model-final-{k}.pt", **{"0.bias": torch.zeros(2), "0.weight": k * weight})
    seeds = [final(1, 0.5), final(2, 0.7)]
    keep_best(tmp_path, seeds)
    keep_best(tmp_path, seeds)  # a kill in between makes a resumed study do it again
    assert {path.name for path in best.iterdir()} == {
        "config.json",
        "first_layer.npy",
        "misclassified.npz",
        "model.pt",
        "predictions.parquet",
    }
    assert (best / "predictions.parquet").read_text() == "1"
    assert np.array_equal(np.load(best / "first_layer.npy"), weight)
    assert torch.equal(torch.load(best / "model.pt", weights_only=True)["network"]["0.weight"], weight)


def test_the_first_layer_of_a_frozen_backbone_is_the_heads(tmp_path):
    best, ones = tmp_path / "best", torch.ones(2, 2)
    best.mkdir()
    save_model(best / "model.pt", frozen=True, **{"backbone.conv1.weight": ones, "head.1.weight": 3 * ones})
    keep_best(tmp_path, [final(1, 0.5)])
    assert np.load(best / "first_layer.npy").tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_network_of_the_winner_costs_no_result(tmp_path, capsys, damage):
    best = tmp_path / "best"
    best.mkdir()
    file = best / "model-final-1.pt"
    save_model(file, **{"0.weight": torch.arange(600.0).view(2, 300)})
    content = bytearray(file.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[content.index(torch.tensor(299.0).numpy().tobytes())] ^= 8
    file.write_bytes(content)
    (best / "predictions-final-1.parquet").write_text("1")
    keep_best(tmp_path, [final(1, 0.5)])
    assert {path.name for path in best.iterdir()} == {"config.json", "predictions.parquet"}
    assert "best/ has no model.pt: " in capsys.readouterr().out


def test_a_continued_study_knows_which_trials_have_no_checkpoint_any_more(tmp_path):
    space, settings = SPACES["softmax"], choose("cpu", "fp32")
    data = made_data(tmp_path / "arrays")
    options = new_study(tmp_path / "study", space, data, settings, weights="none", image_size=32)
    (tmp_path / "study" / "checkpoints").mkdir()
    (tmp_path / "study" / "checkpoints" / "0002.pt").touch()
    config = options.fixed_values() | space.start
    events = [{"trial_id": f"000{k}", "epoch": 0, "config": config} for k in range(4)]
    events += [{"trial_id": f"000{k}", "epoch": 1, "val_accuracy": 0.5} for k in range(3)]
    events[-3]["status"] = "done"
    write_events(tmp_path / "study", events)
    ready = Ready(options, tmp_path / "study", data, settings, Resources(1, 1, 0))
    assert scheduler_of(ready, Study(tmp_path / "study")).without_checkpoint == {"0001"}
