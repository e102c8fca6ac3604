"""Verdicts at their edges."""

import math

import pytest

from sae_lib.metrics import Interval
from sae_lib.study.verdicts import at_least, at_most, numbers_of


@pytest.mark.parametrize(("value", "low", "high", "fair", "expected"), [
    (0.4, 0.3, 0.5, None, "reproduced"), (0.5, 0.4, 0.51, None, "partly"), (0.51, 0.4, 0.6, None, "not"),
    (0.7, 0.6, 0.8, 0.7, "partly"), (0.71, 0.6, 0.8, 0.7, "not"), (0.4, 0.3, 0.6, 0.7, "partly")])
def test_the_whole_interval_has_to_be_on_the_right_side(value, low, high, fair, expected):
    assert at_most(Interval(value, low, high), 0.5, fair) == expected
    assert at_least(Interval(-value, -high, -low), -0.5, None if fair is None else -fair) == expected


def test_what_was_not_measured_is_not_reproduced():
    unknown = Interval(math.nan, math.nan, math.nan)
    assert at_most(unknown, 1.0) == at_least(unknown, 0.0) == "not"


def test_rows_have_no_number_for_what_was_not_measured():
    assert numbers_of(Interval(0.5, 0.25, 1)) == {"ours": 0.5, "low": 0.25, "high": 1.0}
    assert numbers_of(Interval(0.5, 0.6, 0.7)) == {"ours": 0.5, "low": 0.5, "high": 0.7}
    assert numbers_of(Interval(1.0, math.nan, 2.0)) == {"ours": None, "low": None, "high": None}
    assert numbers_of(Interval(math.nan, math.nan, math.nan)) == {"ours": None, "low": None, "high": None}
