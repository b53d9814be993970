"""The fits of over-optimisation curves: exact on their own curves, peaks where the derivative is 0."""

import math

import numpy as np
import pytest

from experiments.overoptimisation.fit import BEST_OF_N, RL

CASES = [(law.fit, law.curve, law.peak) for law in (BEST_OF_N, RL)]


@pytest.mark.parametrize(("fit", "curve", "_"), CASES)
@pytest.mark.parametrize(("a", "b"), [(1, 0.3), (2.5, -0.2), (-0.4, 0.1)])
@pytest.mark.parametrize("d", [[0, 0.4, 0.8, 1.35, 1.8], [0.5, 3.0]])
def test_noiseless_points_give_the_curve_back(fit, curve, _, a, b, d):
    assert fit(d, curve(d, a, b)) == pytest.approx((a, b), abs=1e-6)


@pytest.mark.parametrize(("fit", "curve", "_"), CASES)
def test_a_point_at_zero_changes_nothing(fit, curve, _):
    d, r = [0.5, 1.0, 2.0], [0.4, 0.9, 0.8]
    assert curve(0.0, 1, 0.3) == 0
    assert fit([0, *d], [5.0, *r]) == pytest.approx(fit(d, r))


@pytest.mark.parametrize(("fit", "curve", "_"), CASES)
def test_no_other_coefficients_have_a_smaller_error(fit, curve, _):
    rng = np.random.default_rng(0)
    d = np.linspace(0.1, 3, 12)
    r = curve(d, 1, 0.3) + 0.1 * rng.normal(size=12)
    a, b = fit(d, r)
    error = ((r - curve(d, a, b)) ** 2).sum()
    for da, db in rng.normal(size=(50, 2)) * 0.05:
        assert ((r - curve(d, a + da, b + db)) ** 2).sum() > error


@pytest.mark.parametrize(("fit", "curve", "_"), CASES)
def test_whole_numbers_and_half_precision_are_taken_as_floats(fit, curve, _):
    for d in ([1, 2, 4], np.array([1, 2, 4], dtype=np.float16)):
        exact = curve(np.array([1.0, 2.0, 4.0]), 0.3, 0.7)
        found = curve(d, 0.3, 0.7)
        assert found.dtype == np.float64 and found.tolist() == exact.tolist()
        assert fit(d, np.array([0, 1, 1], dtype=np.float16)) == fit([1.0, 2.0, 4.0], [0.0, 1.0, 1.0])


def test_peaks():
    assert BEST_OF_N.peak(1, 0.3) == pytest.approx(1.6667, abs=1e-4)
    assert RL.peak(1, 0.3) == pytest.approx(10.3123, abs=1e-4)


@pytest.mark.parametrize(("_", "curve", "peak"), CASES)
def test_the_peak_is_the_highest_point(_, curve, peak):
    top = peak(1, 0.4)
    assert curve(top, 1, 0.4) > max(curve(top * 0.99, 1, 0.4), curve(top * 1.01, 1, 0.4))


def test_curves_without_a_peak():
    for a, b in [(1, 0), (1, -0.1), (-1, -0.1)]:
        assert BEST_OF_N.peak(a, b) == RL.peak(a, b) == math.inf
    assert BEST_OF_N.peak(-1, 0.1) == BEST_OF_N.peak(-1, 0) == RL.peak(-1, 0) == 0
    assert RL.peak(1, 1e-6) == math.inf


@pytest.mark.parametrize("fit", [BEST_OF_N.fit, RL.fit])
@pytest.mark.parametrize("d", [[0, 1], [1, 1], [-1, 1], [0, 0], [1, 2, 3], [[1, 2]]])
def test_too_few_points(fit, d):
    told = "one reward per distance" if np.shape(d) != (2,) else "two different ones above 0"
    with pytest.raises(ValueError, match=told):
        fit(d, [0.1, 0.2])
