"""Which trials continue, worked out by hand on hand-written reports."""

import math
import random

import pytest

from tunefleet.search.asha import WORST, Asha, rung_epochs

WORST_FIRST = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
BEST_FIRST = WORST_FIRST[::-1]
MIXED = [0.5, 0.3, 0.8, 0.1, 0.9, 0.2, 0.7, 0.4, 0.6]


def promoted_on_arrival(values, eta=3):
    """Reports the values at rung 1 in order; returns the numbers of those promoted, in order."""
    asha = Asha((1,), eta)
    promoted = []
    for number, value in enumerate(values):
        asha.record(str(number), 1, value)
        while (found := asha.promotable()) is not None:
            asha.promote(*found)
            promoted.append(int(found[0]))
    return promoted


def survivors_on_arrival(values, eta=3):
    """Reports the values at rung 1 in order; returns the numbers of those that `stop` continues."""
    asha = Asha((1,), eta)
    survivors = []
    for number, value in enumerate(values):
        asha.record(str(number), 1, value)
        if asha.survives(str(number), 1):
            survivors.append(number)
    return survivors


@pytest.mark.parametrize(
    ("grace", "eta", "epochs", "rungs"),
    [
        (1, 3, 9, (1, 3)),
        (1, 3, 10, (1, 3, 9)),
        (1, 3, 27, (1, 3, 9)),
        (2, 4, 40, (2, 8, 32)),
        (1, 2, 2, (1,)),
        (5, 3, 9, (5,)),
    ],
)
def test_rungs_are_grace_times_powers_of_eta_below_epochs(grace, eta, epochs, rungs):
    assert rung_epochs(grace, eta, epochs) == rungs


@pytest.mark.parametrize(
    ("grace", "eta", "epochs", "message"),
    [
        (1, 1, 9, r"^--eta=1 is not possible.*at least 2$"),
        (1, 0, 9, r"^--eta=0 is not possible.*at least 2$"),
        (20, 3, 9, r"^--grace=20 exceeds --epochs=9; .* at most 9, or more --epochs$"),
        (0, 3, 9, r"^--grace=0 is not possible.*at least 1 epoch$"),
    ],
)
def test_impossible_rungs_are_errors_naming_flag_value_and_rule(grace, eta, epochs, message):
    with pytest.raises(ValueError, match=message):
        rung_epochs(grace, eta, epochs)


def test_best_are_best_first_with_ties_in_order_of_arrival():
    asha = Asha((1,), 3)
    for trial_id, value in (("a", 0.1), ("c", 0.9), ("b", 0.9), ("d", None), ("e", 0.5), ("f", math.nan)):
        asha.record(trial_id, 1, value)
    assert asha.best(1, 2) == ["c", "b"]
    assert asha.best(1, 9) == ["c", "b", "e", "a", "d", "f"]


def test_best_are_those_of_a_stable_sort_whatever_comes():
    asha, values, rng = Asha((1,), 3), {}, random.Random(0)
    for number in range(300):
        trial_id, value = f"{rng.randrange(10**6)}-{number}", rng.choice([0.1, 0.2, 0.3, rng.random()])
        asha.record(trial_id, 1, value)
        asha.record(trial_id, 1, 1.0)  # a worker that says something else of the same epoch
        values[trial_id] = value
        count = rng.randrange(number + 2)
        assert asha.best(1, count) == sorted(values, key=lambda one: -values[one])[:count]


def test_one_in_eta_goes_on_when_the_worst_arrive_first():
    # the 3rd, 6th and 9th arrivals raise n // 3, and each is the best so far
    assert promoted_on_arrival(WORST_FIRST) == [2, 5, 8]


def test_one_in_eta_goes_on_when_the_best_arrive_first():
    assert promoted_on_arrival(BEST_FIRST) == [0, 1, 2]


def test_the_best_waiting_trial_goes_on_whenever_the_quota_grows():
    # n=3: best of .5 .3 .8; n=6: .9 of .5 .3 .1 .9 .2; n=9: .7 of those left
    assert promoted_on_arrival(MIXED) == [2, 4, 6]


def test_stop_lets_all_go_on_that_arrive_as_the_best_so_far():
    assert survivors_on_arrival(WORST_FIRST) == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_stop_lets_only_the_first_go_on_when_the_best_arrive_first():
    # the 6th must be among the best 2, the 9th among the best 3; neither is
    assert survivors_on_arrival(BEST_FIRST) == [0]


def test_stop_decides_among_the_reports_so_far():
    assert survivors_on_arrival(MIXED) == [0, 2, 4]


def test_stop_keeps_the_best_n_over_eta_and_not_only_the_best():
    assert survivors_on_arrival([0.9, 0.1, 0.1, 0.1, 0.1, 0.8]) == [0, 5]


@pytest.mark.parametrize(("value", "survivors"), [(0.0, [0]), (math.nan, []), (None, [])])
def test_first_arrival_goes_on_under_stop_unless_it_has_no_value(value, survivors):
    assert survivors_on_arrival([value]) == survivors


def test_of_nine_tied_trials_the_first_three_are_promoted():
    assert promoted_on_arrival([0.5] * 9) == [0, 1, 2]


def test_of_nine_tied_trials_only_the_first_survives_stop():
    assert survivors_on_arrival([0.5] * 9) == [0]


@pytest.mark.parametrize("missing", [math.nan, None, -math.inf])
def test_missing_value_ranks_last_and_counts_in_n(missing):
    assert promoted_on_arrival([missing, 0.1]) == []  # n = 2
    assert promoted_on_arrival([missing, 0.1, missing]) == [1]  # n = 3, the only one with a value
    assert promoted_on_arrival([missing, missing, missing, 0.1]) == [3]


def test_failure_before_the_first_rung_counts_as_its_last():
    asha = Asha((2, 6), 3)
    asha.record_failure("a", 0)
    asha.record_failure("b", 1)
    asha.record("c", 2, 0.1)
    assert asha.values == {2: {"a": WORST, "b": WORST, "c": 0.1}, 6: {}}
    assert asha.promotable() == ("c", 2)


@pytest.mark.parametrize("epoch", [1, 2])
def test_failure_of_a_promoted_trial_counts_as_last_of_the_next_rung(epoch):
    asha = Asha((1, 3), 3)
    for trial_id in "abc":
        asha.record(trial_id, 1, 0.5)
    asha.promote("a", 1)
    asha.record_failure("a", epoch)
    assert asha.values[3] == {"a": WORST}
    assert asha.promotable() is None  # rung 1's quota of one is used up by the trial that failed


def test_diverged_report_at_a_rung_ranks_last_there():
    asha = Asha((1, 3), 3)
    asha.record_failure("a", 1)
    assert asha.values[1] == {"a": WORST}


def test_diverged_report_at_a_rung_does_not_count_at_the_next():
    asha = Asha((1, 3), 3)
    for trial_id in "abc":
        asha.record_failure(trial_id, 1)  # their reports of epoch 1 said diverged
    assert asha.values[3] == {}
    asha.record("d", 3, 0.1)
    assert asha.promotable() is None  # n = 1 at rung 3


def test_failure_beyond_the_last_rung_changes_no_rung():
    asha = Asha((1, 3), 3)
    asha.record_failure("a", 5)
    assert asha.values == {1: {}, 3: {}}


def test_highest_rung_is_asked_first():
    asha = Asha((1, 3), 3)
    for number in range(12):
        asha.record(str(number), 1, number / 100)
    for number in (9, 10, 11):
        asha.promote(str(number), 1)
        asha.record(str(number), 3, 1 - number / 100)
    assert asha.promotable() == ("9", 3)
    asha.promote("9", 3)
    assert asha.promotable() == ("8", 1)  # 12 // 3 = 4 continue from rung 1, three have


def test_best_of_a_small_rung_waits_until_no_more_trials_come():
    asha = Asha((1, 3), 3)
    asha.record("a", 1, 0.1)
    asha.record("b", 1, 0.2)
    assert asha.promotable() is None
    assert asha.promotable(settled=math.inf) == ("b", 1)
    asha.promote("b", 1)
    assert asha.promotable(settled=math.inf) is None  # one, not all


def test_best_of_a_settled_rung_go_on_whoever_went_before():
    asha = Asha((1,), 3)
    for number, value in enumerate([0.1, 0.2, 0.3, 0.9, 0.8, 0.7]):
        asha.record(str(number), 1, value)
    asha.promote("2", 1)  # best of the first three
    asha.promote("1", 1)
    assert asha.promotable() is None  # 6 // 3 went on
    assert asha.promotable(settled=1) == ("3", 1)
    asha.promote("3", 1)
    assert asha.promotable(settled=1) == ("4", 1)
    asha.promote("4", 1)
    assert asha.promotable(settled=1) is None


def test_rung_is_settled_where_no_trial_can_reach_it_any_more():
    asha = Asha((1, 3, 9), 3)
    for number in range(9):
        asha.record(str(number), 1, number / 10)
    assert asha.settled([0]) == 0  # one has not reported yet
    assert asha.settled([]) == 1  # three wait there, who go to the next
    for trial_id in "678":
        asha.promote(trial_id, 1)
    assert asha.settled([1, 2]) == 1  # they are on their way
    for trial_id in "678":
        asha.record(trial_id, 3, 0.5)
    assert asha.settled([]) == 3  # the best waits there
    asha.promote("6", 3)
    assert asha.settled([7]) == 3
    asha.record("6", 9, 0.5)
    assert asha.settled([9]) == 9


def test_report_beyond_a_rung_says_that_the_trial_was_promoted():
    asha = Asha((1, 3, 9), 3)
    for trial_id, value in (("a", 0.9), ("b", 0.8), ("c", 0.7)):
        asha.record(trial_id, 1, value)
    asha.record("a", 2, 0.9)
    assert asha.promotable() is None
    asha.record("a", 4, 0.9)
    assert asha.promoted == {1: {"a"}, 3: {"a"}, 9: set()}


def test_nothing_is_promoted_twice_in_any_order_of_arrival():
    for seed in range(20):
        values = [0.1 * (number % 7) for number in range(30)]
        random.Random(seed).shuffle(values)
        promoted = promoted_on_arrival(values)
        assert len(promoted) == len(set(promoted)) == 10


def test_rung_where_all_diverged_promotes_nobody():
    asha = Asha((1, 3), 3)
    for number in range(9):
        asha.record(str(number), 1, math.nan)
    assert asha.promotable() is None
    assert asha.promotable(settled=math.inf) is None


def test_state_is_a_function_of_the_reports():
    reports = [("a", 1, 0.3), ("b", 1, None), ("c", 1, 0.5), ("c", 2, 0.5), ("c", 3, 0.6), ("c", 4, 0.7)]
    first, again = Asha((1, 3), 3), Asha((1, 3), 3)
    for report in reports:
        first.record(*report)
    for report in reports + reports:  # a repeated report changes nothing
        again.record(*report)
    assert (first.values, first.promoted) == (again.values, again.promoted)
    assert first.values == {1: {"a": 0.3, "b": WORST, "c": 0.5}, 3: {"c": 0.6}}
