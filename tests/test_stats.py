import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pcdistill.stats import holm, paired_test, summary

VALUES = st.lists(st.floats(0, 100), min_size=2, max_size=12)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_summary_of_three_values_worked_out_by_hand():
    found = summary([1.0, 2.0, 3.0])
    assert (found.mean, found.std, found.n) == (2.0, 1.0, 3)
    # For two degrees of freedom the quantile has a closed form: t(q) = (2 q - 1) / sqrt(2 q (1 - q)).
    assert found.ci95 == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3), rel=1e-12)


@given(VALUES)
def test_summary_agrees_with_scipy(values):
    found = summary(values)
    if np.ptp(values) > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert found.mean - found.ci95 == pytest.approx(low, rel=1e-9, abs=1e-9)
        assert found.mean + found.ci95 == pytest.approx(high, rel=1e-9, abs=1e-9)


def test_interval_covers_the_true_mean_in_95_of_100_experiments():
    draws = np.random.default_rng(0).normal(70.0, 2.0, size=(2000, 5))
    covered = np.mean([abs(s.mean - 70.0) <= s.ci95 for s in map(summary, draws)])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_summary_of_none_one_and_equal_values():
    none, one, equal = summary([]), summary([95.0]), summary([0.1 + 0.2, 0.3, 0.3])
    assert none.n == 0
    assert math.isnan(none.mean)
    assert math.isnan(none.ci95)
    assert (one.mean, one.n) == (95.0, 1)
    assert math.isnan(one.std)
    assert math.isnan(one.ci95)
    assert (equal.std, equal.ci95) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_never_skipped(bad):
    assert math.isnan(summary([90.0, bad, 91.0]).mean)
    found = paired_test([90.0, bad], [89.0, 88.0])
    assert math.isnan(found.mean)
    assert math.isnan(found.p)
    assert found.n == 2


def test_paired_test_worked_out_by_hand():
    # differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = sqrt(12); with two degrees of freedom p = 1 - t / sqrt(2 + t^2)
    found = paired_test([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found.mean == pytest.approx(2.0)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=12))
def test_paired_test_agrees_with_scipy_and_turns_its_sign_when_the_methods_change_places(pairs):
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    found, turned = paired_test(a, b), paired_test(b, a)
    assert found.mean == pytest.approx(-turned.mean, abs=1e-12)
    assert found.p == pytest.approx(turned.p, nan_ok=True)
    if np.ptp(np.subtract(a, b)) > 1e-6:
        expected = stats.ttest_rel(a, b)
        low, high = expected.confidence_interval(0.95)
        assert found.p == pytest.approx(expected.pvalue)
        assert (found.mean - found.ci95, found.mean + found.ci95) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_paired_test_of_equal_methods_gives_one():
    found = paired_test([91.0, 92.0], [91.0, 92.0])
    assert (found.mean, found.ci95, found.p, found.n) == (0.0, 0.0, 1.0, 2)


def test_differences_that_are_all_the_same_have_no_p_value():
    found = paired_test([90.1, 91.2, 92.3], [90.0, 91.1, 92.2])  # equal up to rounding
    assert found.mean == pytest.approx(0.1)
    assert found.ci95 == 0.0
    assert math.isnan(found.p)


def test_paired_test_of_no_pair_and_of_one():
    assert math.isnan(paired_test([], []).mean)
    one = paired_test([92.0], [91.0])
    assert (one.mean, one.n) == (1.0, 1)
    assert math.isnan(one.ci95)
    assert math.isnan(one.p)


def test_values_without_partners_are_refused():
    with pytest.raises(ValueError, match="one value per pair, got 2 and 1"):
        paired_test([1.0, 2.0], [1.0])


def test_holm_worked_out_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, and none below the one before
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]


def test_holm_leaves_out_what_has_no_p_value_and_stops_at_one():
    found = holm({"a": 0.4, "b": math.nan, "c": 0.7})
    assert (found["a"], found["c"]) == (0.8, 0.8)
    assert math.isnan(found["b"])
    assert holm({"a": 0.9, "c": 0.7}) == {"a": 1.0, "c": 1.0}
    assert holm({}) == {}
