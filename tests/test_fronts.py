import math

import numpy as np
import pytest

from sae_lib.fronts import Front, front, lead, sharpest_turn


def of(*points):
    return front(*(np.array(values, dtype=float) for values in zip(*points, strict=True)))


def test_a_front_leaves_out_what_is_beaten_and_what_is_nothing():
    found = of((100, 0.8), (10, 0.5), (20, 0.4), (30, 0.7), (30, 0.6), (50, math.nan), (0, 0.1))
    assert found.l0.tolist() == [10, 30, 100]  # at 20 it is worse than at 10
    assert found.fidelity.tolist() == [0.5, 0.7, 0.8]


def test_between_points_a_front_is_straight_in_the_logarithm_of_l0():
    found = of((10, 0.5), (1000, 0.9)).at(np.array([10.0, 100.0, 1000.0, 5.0, 2000.0]))
    np.testing.assert_allclose(found, [0.5, 0.7, 0.9, math.nan, math.nan])
    assert math.isnan(of((0, 0.5)).at(np.array([3.0]))[0])


def test_a_lead_by_hand():
    # Ours at 100 is 0.75: ahead by 0.1 at 10, behind by 0.15 at 100, and a straight line between.
    found = lead(of((10, 0.6), (1000, 0.9)), of((10, 0.5), (100, 0.9)))
    np.testing.assert_allclose(found, [-0.15, -0.025, 10, 100])


def test_a_dip_between_the_others_points_is_found():
    # The other's middle point is above the straight line of ours: 0.65 there against 0.6.
    found = lead(of((10, 0.4), (1000, 0.8)), of((10, 0.3), (100, 0.65), (1000, 0.7)))
    np.testing.assert_allclose(found, [-0.05, (0.1 - 0.05) / 4 + (-0.05 + 0.1) / 4, 10, 1000])


def test_fronts_that_touch_at_one_point_and_fronts_that_do_not():
    np.testing.assert_allclose(lead(of((10, 0.4), (30, 0.8)), of((30, 0.5), (50, 0.6))), [0.3, 0.3, 30, 30])
    for other in (of((31, 0.5), (50, 0.6)), Front(np.zeros(0), np.zeros(0))):
        assert all(math.isnan(number) for number in lead(of((10, 0.4), (30, 0.8)), other))


@pytest.mark.parametrize(("fidelity", "turn"), [
    ([0, 1, 2, 3, 4], 0.0),  # straight
    ([0, 1, 2, 2.1, 2.2], 1.0),  # a knee: slopes 1, 1, 0.1, 0.1
    ([0, 1, 1.75, 2.25, 2.5], 1 / 3),  # slopes 1, 0.75, 0.5, 0.25
])
def test_the_sharpest_turn(fidelity, turn):
    found = Front(np.exp(np.arange(5.0)), np.array(fidelity, dtype=float))
    assert sharpest_turn(found) == pytest.approx(turn, abs=1e-9)
    assert math.isnan(sharpest_turn(Front(found.l0[:3], found.fidelity[:3])))
