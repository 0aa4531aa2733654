"""Intervals and curves, against tables and worked cases."""

import math

import numpy as np
import pytest

from benchmarks.quality.statistics import (
    first_reaching,
    interpolate,
    mean_and_interval,
    t_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706), (3, 3.1824), (31, 2.0395), (1000, 1.9623)]
)
def test_quantiles_are_those_of_tables(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, rel=2e-4)


def test_interval_of_a_worked_case():
    # Mean 2, standard deviation 1, three values: 4.3027 / sqrt(3).
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(2.4841, rel=1e-3)
    assert math.isnan(mean_and_interval([5.0])[1])


def test_curves_are_straight_between_points_and_end_with_them():
    values = np.array([[4.0, 40.0], [2.0, 20.0]])
    np.testing.assert_allclose(interpolate(1.5, [2.0, 1.0], values), [3.0, 30.0])
    np.testing.assert_allclose(interpolate(2.0, [2.0, 1.0], values), [4.0, 40.0])
    assert interpolate(0.9, [2.0, 1.0], values) is None
    assert interpolate(2.1, [2.0, 1.0], values) is None


def test_first_place_with_a_level():
    assert first_reaching(15.0, [1.0, 3.0], [10.0, 20.0]) == pytest.approx(2.0)
    assert first_reaching(15.0, [3.0, 1.0], [20.0, 10.0]) == pytest.approx(2.0)
    assert first_reaching(5.0, [1.0, 3.0], [10.0, 20.0]) == 1.0
    assert first_reaching(25.0, [1.0, 3.0], [10.0, 20.0]) is None
