"""Are the arms of a benchmark given the same work, and is what they took worked out rightly?"""

import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.configs import make_model
from tunefleet.benchmarks import compare, families, scale
from tunefleet.benchmarks.arms import no_op
from tunefleet.benchmarks.compare import Measured, adopted_orphans, check_same_work, environment
from tunefleet.benchmarks.obvious import obvious_network
from tunefleet.benchmarks.task import Task, no_op_accuracy
from tunefleet.metric import ACCURACY
from tunefleet.models.spaces import SPACES
from tunefleet.trainables.own import OwnRun

ROOT = Path(__file__).parents[1]
STEADY = 10.0  # the machine's speed


def rows(*found):
    """Return rows of (trial, epoch, val_accuracy, seconds)."""
    return [dict(zip(("trial", "epoch", "val_accuracy", "finished_at"), row, strict=True)) for row in found]


def measured(seconds, *found, steady=STEADY):
    return Measured(seconds, 2 * seconds, rows(*found), (STEADY, steady))


def task(**changes):
    values = {
        "arm": "ours",
        "configurations": [{"architecture": "softmax"}] * 2,
        "epochs": 2,
        "pruning": False,
        "no_op": True,
        "data": "digits",
        "data_dir": "",
        "workers": 2,
        "device": "cpu",
        "precision": "fp32",
        "folder": "",
    }
    return Task(**(values | changes))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_configuration_is_a_trial_of_the_family(name):
    family = families.FAMILIES[name]
    configs = [SPACES[c["architecture"]].config(c) for c in families.configurations(family, "none")]
    assert len(configs) == family.trials
    assert {(c.space.name, c.epochs, c.augment, c.schedule) for c in configs} == {
        (family.architecture, family.epochs, "none", "constant")
    }


def test_repetitions_of_a_race_have_the_same_trials_in_another_order():
    first, second, again = (
        families.configurations(families.FAMILIES["study"], "none", repetition) for repetition in (0, 1, 1)
    )
    assert first != second == again
    assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, second))
    unpruned = families.FAMILIES["convnet"]
    assert families.configurations(unpruned, "none", 1) == families.configurations(unpruned, "none")


@pytest.mark.parametrize("name", sorted({f.architecture for f in families.FAMILIES.values()}))
def test_obvious_network_computes_what_ours_does(name):
    family = next(f for f in families.FAMILIES.values() if f.architecture == name)
    config = SPACES[name].config(families.configurations(family, "none")[1])
    ours, obvious = make_model(name, 10, (3, 32, 32), **config.model), obvious_network(config, 10)
    mine, theirs = ([*network.parameters(), *network.buffers()] for network in (ours.eval(), obvious.eval()))
    for one, other in zip(theirs, mine, strict=True):
        one.data.copy_(other)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(obvious(x), ours(x), rtol=1e-4, atol=1e-4)


def test_best_is_of_last_reports_and_the_target_of_any():
    done = measured(9.0, (0, 1, 0.5, 1.0), (0, 2, 0.3, 2.0), (1, 1, 0.4, 3.0), (2, 1, None, 4.0))
    assert done.best == 0.4
    assert done.seconds_until(0.4) == 1.0
    assert done.seconds_until(0.6) == math.inf
    assert done.seconds_until(None) == 9.0
    assert done.to_dict(0.4)["reports_at"] == [1.0, 4.0]
    assert done.to_dict(0.4)["seconds_counted"] == 1.0


def test_ratio_is_taken_within_a_repetition():
    both = {"ours": [measured(2.0), measured(4.0)], "tutorial": [measured(10.0), measured(40.0)]}
    assert compare.ratios(both, "tutorial", None) == [5.0, 10.0]


def test_race_ends_at_the_tutorials_best_which_all_its_runs_reached():
    both = {
        "ours": [measured(9, (0, 1, 0.61, 2.0)), measured(9, (0, 1, 0.5, 1.0), (1, 1, 0.6, 4.0))],
        "tutorial": [measured(9, (0, 1, 0.62, 8.0)), measured(9, (0, 1, 0.6, 6.0))],
    }
    target = compare.target_of(families.FAMILIES["study"], both)
    assert target == 0.6
    assert compare.ratios(both, "tutorial", target) == [4.0, 1.5]
    assert compare.target_of(families.FAMILIES["softmax"], both) is None


def test_interval_covers_the_median_and_nothing_beyond_the_values():
    low, high = compare.interval95([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 1.0 <= low < 3.0 < high <= 5.0
    assert compare.interval95([2.0]) == (2.0, 2.0)


def test_repetitions_of_an_unsteady_machine_have_no_ratio():
    found, slow = (0, 1, 0.5, 1.0), 0.8 * STEADY
    both = {
        "ours": [measured(2.0, found), measured(2.0, found), measured(2.0, found, steady=slow)],
        "tutorial": [measured(10.0, found), measured(12.0, found, steady=slow), measured(14.0, found)],
    }
    family = replace(families.FAMILIES["softmax"], trials=7)
    kept = compare.result(family, compare.parse([]), both)
    assert kept["trials"] == 7  # as run, not as the family has it
    assert kept["ratios"]["tutorial"]["values"] == [5.0]
    assert kept["unsteady"] == [
        "tutorial: 2 of 3 repetitions have no ratio: the machine's speed varied by up to 20%"
    ]
    assert "| 2 | 5.00 (5.00 to 5.00, n = 1) |" in compare.table([kept])
    del both["tutorial"][0], both["ours"][0]
    assert "| 2 | unsteady |" in compare.table([compare.result(family, compare.parse([]), both)])


@pytest.mark.parametrize(
    ("steady_after", "repeat", "runs"), [(0, 1, 1), (0, 3, 3), (1, 3, 4), (99, 3, 5), (99, 1, 1)]
)
def test_unsteady_repetitions_are_made_up_for(steady_after, repeat, runs, tmp_path, monkeypatch):
    order = []

    def stand_in(task, before):
        order.append(task.arm)
        unsteady = task.arm == "ours" and len(order) <= 2 * steady_after
        found = ((trial, 2, 0.5, 1.0) for trial in range(len(task.configurations)))
        return measured(1.0, *found, steady=1.0 if unsteady else STEADY)

    monkeypatch.setattr(compare, "measure", stand_in)
    monkeypatch.setattr(compare, "probe", lambda: STEADY)
    small = f"ours joblib --trials 2 --epochs 2 --repeat {repeat} --data digits".split()
    code = compare.main([*small, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert code == 0
    assert order == (["ours", "joblib", "joblib", "ours"] * 3)[: 2 * runs]
    kept = json.loads((tmp_path / "out" / "softmax.json").read_text())
    assert len(kept["arms"]["ours"]) == runs
    assert bool(kept["ratios"]) == (steady_after < repeat)


def test_allocator_is_that_of_a_study_where_our_code_trains():
    assert environment("joblib")["MALLOC_TRIM_THRESHOLD_"]
    assert not [name for name in environment("tutorial") if name.startswith(("MALLOC_", "RAY_", "TUNE_"))]


def orphan():
    """Return a process whose parent has just ended."""
    return psutil.Process(int(subprocess.check_output("sleep 60 > /dev/null & echo $!", shell=True)))


def test_orphans_are_adopted_only_while_an_arm_runs():
    # a raylet's workers that pytest had adopted stayed for over a minute after it, and then as zombies
    with adopted_orphans():  # and waits for them
        ours = orphan()
        assert ours.ppid() == os.getpid()
        ours.kill()
    assert not ours.is_running()
    others = orphan()
    assert others.ppid() != os.getpid()
    others.kill()


def test_the_machines_speed_varies_by_a_fraction_of_the_median():
    assert compare.variation(measured(1.0, steady=9.0), measured(1.0, steady=11.0)) == pytest.approx(0.2)
    assert compare.probe() > 0


@pytest.mark.parametrize(
    ("found", "pruning", "said"),
    [
        (((0, 2, 0.5, 1), (1, 2, 0.5, 1)), False, None),
        (((0, 2, 0.5, 1), (1, 1, None, 1)), False, None),  # diverged
        (((0, 2, 0.5, 1), (1, 1, 0.5, 1)), True, None),
        (((0, 2, 0.5, 1), (1, 1, 0.5, 1)), False, "2 trials, 1 of them too short"),
        (((0, 2, 0.5, 1),), True, "1 trials"),
    ],
)
def test_arm_that_trained_less_is_refused(found, pruning, said):
    given = task(pruning=pruning)
    if said is None:
        check_same_work(given, rows(*found))
    else:
        with pytest.raises(RuntimeError, match=said):
            check_same_work(given, rows(*found))


def test_time_per_trial_is_that_of_first_reports():
    # 301 trials: a slow start, then 10 ms each, the last hundred 20 ms; second epochs do not count
    times = [1.0 + t * 0.01 for t in range(201)] + [3.0 + 0.02 * t for t in range(1, 101)]
    found = rows(*((t, 1, 0.5, seconds) for t, seconds in enumerate(times)), (0, 2, 0.5, 99.0))
    assert scale.ms_per_trial(found) == pytest.approx((10.0, 20.0))


def test_a_long_study_is_reported_as_medians_of_its_runs(monkeypatch, capsys):
    found = iter(
        [
            scale.numbers((8.0, 12.0), (400.0, 500.0), 2.5),
            scale.numbers((10.0, 10.0), (400.0, 420.0), 2.0),
            scale.numbers((8.0, 9.0), (400.0, 440.0), 3.0),
        ]
    )
    monkeypatch.setattr(scale, "run", lambda trials, data, data_dir: next(found))
    assert scale.main(["--trials", "300"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["1", "8.00", "12.00", "1.50", "400.00", "500.00", "1.25", "2.50"]
    assert lines[-1].split() == ["median", "8.00", "10.00", "1.12", "400.00", "440.00", "1.10", "2.50"]


def test_a_trial_that_trains_nothing_is_a_training_of_its_own():
    space = pickle.loads(pickle.dumps(no_op.SPACE))
    run = OwnRun(space, {"epochs": 2, "seed": 0, "trial": 7}, ACCURACY, {})
    assert [run.epoch()["val_accuracy"] for _ in range(2)] == [no_op_accuracy(7, 1), no_op_accuracy(7, 2)]


def test_no_op_accuracies_differ_between_trials():
    assert len({no_op_accuracy(trial, 1) for trial in range(32)}) == 32
    assert all(0 <= no_op_accuracy(trial, 9) <= 1 for trial in range(2000))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["our"], "did you mean ours?"),
        (["--family", "convnets"], "did you mean convnet?"),
        (["--repeat", "0"], "give an integer of at least 1"),
        (["--data", "digits", "--images", "100000"], "too few"),
    ],
)
def test_wrong_argument_is_one_line(arguments, said, tmp_path, capsys):
    code = compare.main([*arguments, "--data-dir", str(tmp_path / "data")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert said in error


def test_readme_has_the_table_of_the_results_that_are_kept():
    listed = ["git", "-C", str(ROOT), "ls-files", "benchmarks/results/*.json"]  # not a user's own
    files = subprocess.check_output(listed, text=True).split()
    assert files
    assert compare.table([compare.read(ROOT / file) for file in files]) in (ROOT / "README.md").read_text()


def test_table_says_what_was_compared(tmp_path, capsys):
    found = {
        "family": "study",
        "trials": 32,
        "epochs": 9,
        "images": 1800,
        "pruning": True,
        "no_op": False,
        "precision": "bf16",
        "processor": "x86_64, AVX512, 2 cores",
        "arms": {"ours": [{"seconds_counted": 9.6}, {"seconds_counted": 10.6}], "joblib": [], "tutorial": []},
        "ratios": {"tutorial": {"median": 2.0, "interval95": [1.0, 3.0], "values": [1.0, 3.0]}},
    }
    (file := tmp_path / "study.json").write_text(json.dumps(found))
    assert compare.main(["--table", str(file)]) == 0
    head, _, line = capsys.readouterr().out.splitlines()
    assert head == "| trials | numbers | ours, s | tutorial | joblib |"
    assert line == (
        "| study: 32 × at most 9 × 1,800 images, until the tutorial's best | bf16, AVX512 | 10 "
        "| 2.00 (1.00 to 3.00, n = 2) | unsteady |"
    )
    file.write_text("{}")
    assert compare.main(["--table", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{file} is no result" in error


@pytest.mark.slow
@pytest.mark.ray
def test_arms_that_train_by_our_code_find_the_same(tmp_path):
    arms = ["ours", "tutorial", "tune-plain", "joblib", "optuna-halving"]
    small = {"family": "softmax", "data": "digits", "weights": "none", "device": "cpu", "workers": 2}
    small |= {"repeat": 1, "trials": 2, "epochs": 1, "images": 300, "out": tmp_path}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tunefleet.benchmarks.compare",
            *arms,
            *(f"--{name}={value}" for name, value in small.items()),
        ],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "softmax.json").read_text())
    assert {arm: len(runs) for arm, runs in result["arms"].items()} == dict.fromkeys(arms, 1)
    assert all(runs[0]["epochs"] == 2 and runs[0]["cpu_seconds"] > 1 for runs in result["arms"].values())
    ours, plain, pool = (result["arms"][arm][0]["best"] for arm in ("ours", "tune-plain", "joblib"))
    assert ours == plain == pool
