"""Numbers and commands as people read them: nothing breaks a line, and no rounded value lies."""

import pytest

from tunefleet.analysis.text import (
    listed,
    mean_and_spread,
    number,
    percent,
    spread_digits,
    words,
)


def test_words_of_a_command_survive_quotes_that_do_not_match():
    assert words("run.py --data 'a b'") == ["run.py", "--data", "a b"]
    assert words('run.py --data "a') == ['run.py --data "a']


def test_many_names_are_counted():
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcde")) == "a, b, c, d, e"
    assert listed(list("abcdef")) == "a, b, c, d and 2 more"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        *((0.0123456, 4, "0.01235"), (0.9, 4, "0.9"), (1e-6, 4, "1e-06"), (0.0, 4, "0"), (1.0, 4, "1")),
        *((0.9995, 3, "0.9995"), (0.99996, 4, "0.99996"), (12345.678, 4, "12346"), (999.96, 4, "1000")),
        *(
            (2.0833, 2, "2.1"),
            (0.42, 2, "0.42"),
            (99.6, 2, "100"),
            (57.0, 2, "57"),
            (True, 4, "True"),
            ("x", 4, "x"),
        ),
    ],
)
def test_a_number_is_rounded_and_reads_1_only_where_it_is(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("fraction", "digits", "text"),
    [
        *((0.0, 0, "0"), (1.0, 0, "100"), (0.333, 0, "33"), (0.004, 0, "<1"), (0.9996, 0, ">99")),
        *((0.99997, 2, ">99.99"), (0.00003, 2, "<0.01"), (0.6543, 2, "65.43"), (1.0, 2, "100.00")),
    ],
)
def test_only_all_is_100_percent_and_only_none_is_0(fraction, digits, text):
    assert percent(fraction, digits) == text


def test_a_spread_is_0_only_where_all_values_are_equal():
    for sd, digits in ((None, 2), (0.0, 2), (1.23, 2), (0.006, 3), (0.0001, 4)):
        assert spread_digits(sd, 2) == digits
        assert not sd or float(f"{sd:.{digits}f}") > 0


def test_seeds_are_summed_up_in_percent_or_in_plain_numbers():
    def said(mean, sd, ends, *, fraction):
        return mean_and_spread({"mean": mean, "sd": sd, "interval95": ends}, fraction=fraction)

    assert said(0.6543, 0.0123, [0.5438, 0.7648], fraction=True) == ("65.43", " ± 1.23", "54.38 to 76.48")
    assert said(26.3503, 23.0975, [-181.17, 233.87], fraction=False) == ("26.35", " ± 23", "-181.2 to 233.9")
    assert said(1000.25, 0.0125, [1000.1, 1000.4], fraction=False)[:2] == ("1000.25", " ± 0.013")
    assert said(1e29, 0.0, [1e29, 1e29], fraction=False) == ("1e+29", " ± 0", "1e+29 to 1e+29")
    assert said(5.0, None, None, fraction=False) == ("5", "", "")
