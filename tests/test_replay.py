"""Schedulers on hand-written curves: what they spend and pick, counted by hand."""

import math

import numpy as np
import pytest

from tests.configs import least_epochs
from tests.made_study import spec, write_events
from tunefleet.benchmarks.curves import Curves
from tunefleet.benchmarks.replay import (
    EXPLAINED,
    MEASURES,
    RESAMPLES,
    as_text,
    bootstrap_means,
    compare,
    main,
    pick,
    regrets,
    replay,
    reports_of,
)
from tunefleet.benchmarks.schedulers import REFERENCE, SCHEDULERS, simulate
from tunefleet.search.asha import rung_epochs
from tunefleet.study import write_study

NAN = math.nan
A, B, C = (0.1, 0.5, 0.9), (0.3, 0.3, 0.3), (0.2, 0.6, 0.8)  # three epochs; eta 3: the only rung is 1


def curves_of(*seeds, seconds=None):
    """Build curves from each seed's configurations, each of them a list of val_accuracy."""
    accuracy = np.array(seeds, dtype=float)
    took = np.ones_like(accuracy) if seconds is None else np.broadcast_to(seconds, accuracy.shape)
    return Curves("made", tuple(range(len(seeds))), accuracy, 1 - accuracy, took)


def run(name, curves, *, order=None, workers=1, eta=3):
    """Return the epochs that each configuration saw with seed 0, the seconds, and the pick."""
    count, epochs = curves.accuracy.shape[1:]
    order = list(range(count)) if order is None else order
    reports, seconds = reports_of(curves, 0)
    scheduler = SCHEDULERS[name](order, rung_epochs(1, eta, epochs), eta, epochs)
    seen, took = simulate(scheduler, reports, seconds, workers)
    return seen.tolist(), took, pick(seen, reports, order)


def ranked_curves(count, epochs):
    """Configuration 0 is the worst at every epoch, the last one the best."""
    return curves_of(
        [[0.5 + 0.3 * k / count + 0.1 * n / epochs for n in range(1, epochs + 1)] for k in range(count)]
    )


def test_seconds_are_those_of_each_epoch():
    took = [[1.0, 1.0, 1.0], [2.0, 3.0, 4.0], [1.0, 1.0, 1.0]]
    # two workers, nobody pruned: A ends at 3, C follows it until 6; B takes 2 + 3 + 4 = 9
    assert run("random", curves_of([A, B, C], seconds=took), workers=2) == ([3, 3, 3], 9, 0)
    # A until 1, C until 2, B until 2; C made a quota of one, which is B's: it continues for 3 + 4
    assert run("promote", curves_of([A, B, C], seconds=took), workers=2)[1] == 9
    assert run("promote", curves_of([A, B, C], seconds=took), workers=1)[1] == 4 + 7


def test_ray_asha_lets_the_first_pass_and_judges_by_the_others_before():
    # A finds an empty rung; B (.3) meets the cutoff .1; C (.2) falls short of .1 + 2/3 · (.3 - .1) = .233
    assert run("ray_asha", curves_of([A, B, C])) == ([3, 3, 1], 7, 0)


def test_ray_asha_depends_on_the_order():
    # B first; C (.2) falls short of .3; A (.1) of .2 + 2/3 · .1 = .267
    assert run("ray_asha", curves_of([A, B, C]), order=[1, 2, 0]) == ([1, 3, 1], 5, 1)


def test_ray_asha_judges_nobody_at_the_last_epoch():
    assert run("ray_asha", curves_of([C, A, C]), order=[1, 0, 2])[0] == [3, 3, 3]  # .2 is no less than .2


def test_stop_is_ours_and_lets_only_the_best_so_far_pass_among_few():
    # A is the first and so the best of one; B the best of two; C is not the best of three
    assert run("stop", curves_of([A, B, C])) == ([3, 3, 1], 7, 0)


def test_promote_is_ours_and_waits_for_three():
    # C is the third and makes a quota of one, which is B's
    assert run("promote", curves_of([A, B, C])) == ([1, 3, 1], 5, 1)


def test_promote_continues_a_late_best_at_the_end():
    curves = curves_of([A, B, C, (0.9, 0.91, 0.92)])
    # the quota of 4 // 3 went to B when C arrived; D continues when nothing else is left
    assert run("promote", curves) == ([1, 3, 1, 3], 8, 3)


@pytest.mark.parametrize(("count", "epochs"), [(9, 9), (27, 27), (64, 27)])
@pytest.mark.parametrize("workers", [1, 2])
def test_promote_spends_the_expected_epochs_where_the_best_come_first(count, epochs, workers):
    curves = ranked_curves(count, epochs)
    seen, _, picked = run("promote", curves, order=list(range(count))[::-1], workers=workers)
    assert sum(seen) == least_epochs(count, rung_epochs(1, 3, epochs), 3, epochs)
    assert picked == count - 1


def test_promote_spends_little_more_than_halving_would_and_ray_asha_more():
    curves, spent = ranked_curves(27, 27), {}
    order = np.random.default_rng(0).permutation(27).tolist()
    for name in ("promote", "ray_asha"):
        spent[name] = sum(run(name, curves, order=order)[0])
    halving = 27 + 9 * 2 + 3 * 6 + 18
    assert halving <= spent["promote"] <= halving + 26
    assert spent["ray_asha"] > spent["promote"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_diverged_curve_ends_and_is_not_picked(name):
    # the best of the first epoch diverges in the second, where the recording ends
    curves = curves_of([(0.9, NAN, NAN), B, (0.2, 0.2, 0.2), (0.1, 0.1, 0.1)])
    seen, took, picked = run(name, curves)
    assert seen[0] <= 2
    assert picked != 0 or seen[0] == 1
    assert took == sum(seen)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_a_curve_that_diverges_at_once_ranks_last(name, workers):
    lost = (NAN, NAN, NAN)
    seen, _, picked = run(name, curves_of([lost, lost, B, A, C, lost]), workers=workers)
    assert [seen[k] for k in (0, 1, 5)] == [1, 1, 1]
    assert picked in (2, 3, 4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nothing_is_picked_where_all_diverged(name):
    assert run(name, curves_of([[(NAN, NAN, NAN)] * 4][0])) == ([1, 1, 1, 1], 4, None)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("workers", [1, 3, 50])
def test_everyone_is_seen_in_every_order_and_no_worker_does_two_things(name, workers):
    rng = np.random.default_rng(1)
    curves = curves_of(rng.random((20, 9)), seconds=rng.random((20, 9)))
    _, seconds = reports_of(curves, 0)
    seen, took, _ = run(name, curves, order=rng.permutation(20).tolist(), workers=workers)
    assert min(seen) >= 1
    assert max(seen) == 9
    busy = sum(sum(seconds[k][:n]) for k, n in enumerate(seen))
    assert busy / workers <= took + 1e-9
    if workers == 1:
        assert took == pytest.approx(busy)


def test_ties_are_picked_by_val_loss_as_in_a_study():
    curves = curves_of([B, B, B])
    curves.loss[0, 1] = 0.1
    assert run("random", curves)[2] == 1


def test_regret_is_of_the_last_epoch_on_the_same_seed_and_on_the_others():
    curves = curves_of([A, B, C], [(0.0, 0.0, 0.2), (0.0, 0.0, 0.7), (0.0, 0.0, NAN)])
    assert regrets(curves, 0, 0) == pytest.approx((0.0, 0.5))
    assert regrets(curves, 0, 1) == pytest.approx((0.6, 0.0))
    assert regrets(curves, 0, 2) == pytest.approx((0.1, 0.7))  # diverged there: it reached 0
    assert regrets(curves, 1, 0) == pytest.approx((0.5, 0.0))
    assert regrets(curves, 0, None) == pytest.approx((0.9, 0.7))
    assert math.isnan(regrets(curves_of([A, B]), 0, 0)[1])


def test_without_pruning_there_is_no_regret_and_every_epoch_is_spent():
    curves = curves_of([A, B, C], [C, A, B])
    orders = np.array([[0, 1, 2], [2, 0, 1]])
    found = replay(curves, ["random"], orders, workers=2, grace=1, eta=3)
    assert found.shape == (1, 2, 2, 4)
    assert (found[..., MEASURES.index("epochs")] == 9).all()
    assert (found[..., MEASURES.index("regret")] == 0).all()
    # configuration 0 is the best of seed 0 and ends at .8 with seed 1, where configuration 1 ends at .9
    assert found[0, 0, 0, MEASURES.index("regret_other")] == pytest.approx(0.9 - 0.8)


def test_comparison_is_paired_by_order():
    rng = np.random.default_rng(0)
    luck = rng.normal(100, 30, 50)  # of the order, the same for both
    found = np.zeros((2, 1, 50, 4))
    found[0, 0, :, 0], found[1, 0, :, 0] = luck, luck / 2
    found[0, 0, :, 2], found[1, 0, :, 2] = luck / 1000, luck / 1000 + 0.01
    found[..., 3] = NAN
    found[..., 1] = 1
    table = compare(found, [REFERENCE, "half"], np.random.default_rng(0))
    one, half = table.to_dict("records")
    assert half["epochs_ratio"] == half["epochs_ratio_low"] == half["epochs_ratio_high"] == pytest.approx(0.5)
    assert (one["epochs_ratio_low"], one["epochs_ratio_high"]) == (1, 1)
    above = [half[f"regret_above{end}"] for end in ("", "_low", "_high")]
    assert above == pytest.approx([0.01] * 3)
    assert math.isnan(half["regret_other_above_low"])


def test_text_fits_80_columns():
    rng = np.random.default_rng(0)
    found = rng.uniform(-0.99, 0.99, (3, 2, 10, 4))
    found[..., 0] = 172_800
    found[..., 1] = 3_600_000
    text = as_text(compare(found, [REFERENCE, "promote", "random"], rng))
    assert all(len(line) <= 80 for line in [*text.splitlines(), *EXPLAINED.splitlines()])
    assert text.splitlines()[1].startswith("ray_asha  172800  1.00 1.00..1.00 3600000")


def write_curves(folder, seeds=2):
    """Write a study without pruner of configurations A, B and C; returns its place."""
    write_study(folder, spec(rungs=[], options={"epochs": 3, "pruner": "none"}))
    events = []
    for seed in range(seeds):
        for configuration, curve in enumerate([A, B, C]):
            trial_id = f"{len(events) // 4:04d}"
            config = {"lr": configuration, "seed": seed}
            events.append({"trial_id": trial_id, "epoch": 0, "config": config})
            for epoch, value in enumerate(curve, start=1):
                report = {"val_accuracy": value, "val_loss": 1.0, "epoch_seconds": 0.5}
                events.append({"trial_id": trial_id, "epoch": epoch, **report})
            events[-1]["status"] = "done"
    write_events(folder, events)
    return str(folder)


def test_command_prints_a_table_per_number_of_workers(tmp_path, capsys):
    few = ["--orders", "5", "--workers", "1", "2", "--schedulers", "random"]
    assert main([write_curves(tmp_path / "three", seeds=1), *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "three: 3 configurations, 3 epochs, 1 seed, 2 workers, 5 orders" in lines
    assert [line.split()[0] for line in lines if line.startswith(("ray", "ran"))] == [
        "ray_asha",
        "random",
    ] * 2
    # 9 epochs of half a second; no regret, and with one seed none on others
    _, epochs, _, _, seconds, regret, _, other, above = lines[3].split()
    assert (epochs, seconds, regret, other, above) == ("9", "4.5", "0.00", "-", "-")


def test_same_seed_gives_the_same_results(tmp_path, capsys):
    location = write_curves(tmp_path / "three")
    texts = []
    for _ in range(2):
        assert main([location, "--orders", "4", "--workers", "2"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (
            ["--schedulers", "promot"],
            "--schedulers=promot is unknown; did you mean promote?",
        ),
        (["--orders", "0"], "--orders=0 is not possible"),
        (["--seed", "-1"], "--seed=-1 is not possible; give at least 0"),
        (["--workers", "2", "-1"], "--workers=-1 is not possible"),
        (["--eta", "1"], "--eta=1 is not possible"),
        (["--grace", "4"], "--grace=4 exceeds"),
    ],
)
def test_bad_input_is_one_line(arguments, needle, tmp_path, capsys):
    location = write_curves(tmp_path / "three")
    assert main([location, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert needle in err


def test_ray_asha_is_rays_own_class_and_starts_no_cluster():
    import ray
    from ray.tune.schedulers import AsyncHyperBandScheduler

    scheduler = SCHEDULERS[REFERENCE]([0], (1,), 3, 3)
    assert type(scheduler._ray) is AsyncHyperBandScheduler
    assert not ray.is_initialized()


def test_bootstrap_draws_rows_whole_and_spreads_as_the_standard_error():
    values = np.random.default_rng(1).normal(5, 2, 400)
    samples = bootstrap_means(np.column_stack([values, 2 * values]), np.random.default_rng(0))
    assert samples.shape == (RESAMPLES, 2)
    assert samples[:, 1] == pytest.approx(2 * samples[:, 0])
    error = values.std() / math.sqrt(400)
    assert samples[:, 0].std() == pytest.approx(error, rel=0.03)
    low, high = np.percentile(samples, (2.5, 97.5), axis=0)
    assert (high - low)[0] == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert low[0] < values.mean() < high[0]
