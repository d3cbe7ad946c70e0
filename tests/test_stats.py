import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pcdistill.stats import (
    detectable_difference,
    holm,
    paired_test,
    seeds_needed,
    summary,
    tost,
    verdicts,
)

VALUES = st.lists(st.floats(0, 100), min_size=2, max_size=12)


def verdict(a, b, **options):
    """The verdict of one comparison."""
    return verdicts({"": (a, b)}, **options)[""]


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


# The test of equivalence, and what could have been seen


def test_tost_worked_out_by_hand():
    # differences 1, 2, 3 and margin 4: t = (2 - 4) / (1 / sqrt(3)).
    # With two degrees of freedom F(t) = 1/2 + t / (2 sqrt(2 + t^2)).
    found = tost([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], 4.0)
    assert found == pytest.approx(0.5 - math.sqrt(12) / (2 * math.sqrt(14)), rel=1e-9)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=12), st.floats(0.1, 50))
def test_tost_agrees_with_scipys_two_tests_and_with_the_90_percent_interval(pairs, margin):
    a, b = np.asarray(pairs).T
    difference = a - b
    if np.ptp(difference) > 1e-6:
        above = stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(difference, margin, alternative="less").pvalue
        found = tost(a, b, margin)
        assert found == pytest.approx(max(above, below), rel=1e-6, abs=1e-12)
        low, high = stats.ttest_1samp(difference, 0).confidence_interval(0.9)
        if abs(found - 0.05) > 1e-9:
            assert (found < 0.05) == (-margin < low and high < margin)


def test_tost_without_a_spread_has_no_p_value():
    assert all(math.isnan(tost(a, b)) for a, b in (([], []), ([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0])))
    assert math.isnan(tost([1.0, math.nan], [1.0, 2.0]))


@pytest.mark.parametrize("n", [2, 3, 5, 10, 34, 200])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 22])
def test_the_detectable_difference_has_the_stated_power_by_scipys_noncentral_t(n, alpha):
    found = detectable_difference(0.7, n, alpha=alpha)
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    assert stats.nct.sf(critical, n - 1, found / 0.7 * math.sqrt(n)) == pytest.approx(0.8, abs=1e-5)


def test_seeds_needed_are_those_of_published_tables():
    # Effect sizes 0.2, 0.5, 0.8 and 1 of a two-sided paired t-test at 5 % and 80 % power: 199, 34, 15 and 10 pairs.
    assert [seeds_needed(effect, 1.0) for effect in (0.2, 0.5, 0.8, 1.0)] == [199, 34, 15, 10]
    assert seeds_needed(0.5, 0.01) == 2
    assert seeds_needed(0.01, 1.0) is None


@pytest.mark.parametrize("std", [0.1, 0.6, 2.0])
def test_seeds_needed_are_the_fewest_that_do(std):
    k = seeds_needed(0.5, std)
    assert detectable_difference(std, k) <= 0.5
    assert k == 2 or detectable_difference(std, k - 1) > 0.5


# The verdict


def draw(seed, gains, n, *, std=0.4, shared=0.5, times=1000):
    """Simulated comparisons of top-1, [times, n]: KD, and a method for each gain; a seed's luck is partly shared."""
    random = np.random.default_rng(seed)
    luck = random.normal(0, shared, (times, n))
    kd = 70 + luck + random.normal(0, std / math.sqrt(2), (times, n))
    return kd, [70 + gain + luck + random.normal(0, std / math.sqrt(2), (times, n)) for gain in gains]


def most_of(times, share=0.05):
    """So many of `times` a rate of `share` exceeds once in 1,000: the slack of a simulation."""
    return stats.binom.ppf(0.999, times, share)


def judge(kd, methods):
    """The kinds of verdict, a set for each simulated comparison."""
    for i, base in enumerate(kd):
        pairs = {str(k): (values[i], base) for k, values in enumerate(methods)}
        yield [one.kind for one in verdicts(pairs).values()]


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("methods", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_of_1000_comparisons_without_a_gain_at_most_5_percent_name_a_winner(n, methods):
    kd, drawn = draw(n, [0.0] * methods, n)
    wrong = sum(bool({"better", "worse"} & set(kinds)) for kinds in judge(kd, drawn))
    assert wrong <= most_of(1000)
    if methods > 1:  # what Holm's correction is for: each pair by itself would err in far more tables
        alone = sum(any(paired_test(m[i], kd[i]).p < 0.05 for m in drawn) for i in range(1000))
        assert alone > most_of(1000) * 1.3


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("gain", [0.5, -0.5])
@pytest.mark.parametrize("methods", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_of_1000_comparisons_with_a_gain_of_the_margin_at_most_5_percent_say_no_difference(n, gain, methods):
    kd, drawn = draw(10 + n, [gain] * methods, n, std=0.15)
    wrong = sum("no difference" in kinds for kinds in judge(kd, drawn))
    assert wrong <= most_of(1000)


@pytest.mark.parametrize("n", [3, 5])
def test_a_gain_of_the_detectable_size_is_found_four_times_in_five_and_its_interval_covers_it(n):
    gain = detectable_difference(0.4, n)
    kd, (method,) = draw(20 + n, [gain], n)
    found = [verdict(a, b) for a, b in zip(method, kd, strict=True)]
    assert np.mean([one.kind == "better" for one in found]) == pytest.approx(0.8, abs=0.04)
    assert sum(one.kind == "worse" for one in found) == 0
    missed = sum(not one.interval[0] <= gain <= one.interval[1] for one in found)
    assert missed <= most_of(1000)


def test_equal_methods_with_little_spread_are_said_to_be_equal():
    kd, (method,) = draw(30, [0.0], 5, std=0.1)
    assert np.mean([verdict(a, b).kind == "no difference" for a, b in zip(method, kd, strict=True)]) > 0.9


STEPS = st.integers(0, 6400).map(lambda k: k / 64)  # sums and differences of these are exact
PAIRS = st.lists(st.tuples(STEPS, STEPS), min_size=0, max_size=8)
TURNED = {"better": "worse", "worse": "better"}


@given(PAIRS)
def test_a_verdict_turns_round_when_the_methods_change_places(pairs):
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    one, other = verdict(a, b), verdict(b, a)
    assert other.kind == TURNED.get(one.kind, one.kind)
    assert (other.n, other.seeds_needed, other.within_margin) == (one.n, one.seeds_needed, one.within_margin)
    assert other.difference == pytest.approx(-one.difference, nan_ok=True)
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]), nan_ok=True)
    assert other.detectable == pytest.approx(one.detectable, nan_ok=True)


@given(PAIRS, STEPS, st.randoms(use_true_random=False))
def test_a_constant_added_to_both_and_another_order_of_seeds_change_nothing(pairs, constant, random):
    plain = verdict([p[0] for p in pairs], [p[1] for p in pairs])
    mixed = random.sample(pairs, len(pairs))
    other = verdict([p[0] + constant for p in mixed], [p[1] + constant for p in mixed])
    assert (other.kind, other.n, other.seeds_needed) == (plain.kind, plain.n, plain.seeds_needed)
    assert (*other.interval, other.detectable) == pytest.approx((*plain.interval, plain.detectable), nan_ok=True)


@given(PAIRS)
def test_a_verdict_says_better_only_if_the_paired_test_does(pairs):
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    one, tested = verdict(a, b), paired_test(a, b)
    assert (one.kind in ("better", "worse")) == (tested.p < 0.05)
    if one.kind in ("better", "worse"):
        low, high = one.interval
        assert low > 0 or high < 0
        assert (high - low) / 2 == pytest.approx(tested.ci95)
    if one.kind == "no difference":
        assert tost(a, b) < 0.05 <= tested.p


def test_a_verdict_worked_out_by_hand():
    # differences 1, 2, 3: mean 2, se 1 / sqrt(3), t(0.975, 2) = 4.303: half width 2.484, so 0 is inside.
    found = verdict([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found.kind == "cannot tell"
    assert found.interval == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert found.detectable == pytest.approx(3.264, abs=1e-3)
    assert found.seeds_needed == 34  # an effect of 0.5 standard deviations
    assert found.sentence("pcd", "kd") == (
        "pcd against kd: cannot tell: with 3 seeds a difference under 3.26 points would not be seen; "
        "about 34 seeds would show one of 0.5."
    )


def test_better_worse_and_no_difference_in_words():
    kd = [90.0, 90.5, 91.0, 90.2, 90.8]
    pcd = [91.1, 91.5, 91.9, 91.2, 91.8]
    assert verdict(pcd, kd).sentence("pcd", "kd") == "pcd against kd: better by 1.00 points (0.91 to 1.09)."
    assert verdict(kd, pcd).words() == "worse by 1.00 points (0.91 to 1.09)"
    near = [90.1, 90.4, 91.1, 90.1, 90.8]
    assert verdict(near, kd).words("points of AP") == "no difference greater than 0.5 points of AP, tested as such"
    assert verdict(near, kd, margin=0.05).kind == "cannot tell"


def test_a_gain_below_the_margin_is_named_and_said_to_be_small():
    kd = [90.0, 90.5, 91.0, 90.2, 90.8]
    found = verdict([90.2, 90.69, 91.21, 90.42, 90.98], kd)
    assert found.words() == "better by 0.20 points (0.18 to 0.22), which is less than 0.5 points, tested as such"


def test_enough_seeds_and_still_between_none_and_the_margin():
    a = [0.25 + x for x in (-0.44, -0.36, -0.28, 0.28, 0.36, 0.44, -0.36, 0.36)]
    found = verdict(a, [0.0] * 8)
    assert (found.kind, found.seeds_needed) == ("cannot tell", 7)
    assert found.words().endswith(
        "; the one measured, 0.25 (-0.08 to 0.58), is too small to be told from 0 and too large to be told from 0.5"
    )


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([], [], "they have no seed in common"),
        ([91.0], [90.0], "one seed shows nothing of the spread between seeds"),
        ([91.0, math.nan], [90.0, 90.0], "a value is not a finite number"),
        ([91.0, 92.0], [90.0, math.inf], "a value is not a finite number"),
        ([91.0, 92.0, 93.0], [90.0, 91.0, 92.0], "the difference is 1.00 at each of 3 seeds, and equal ones do not"),
        ([91.0, 92.0], [91.0, 92.0], "the difference is 0.00 at each of 2 seeds, and equal ones do not"),
    ],
)
def test_what_shows_no_spread_allows_no_verdict_and_says_why(a, b, words):
    found = verdict(a, b)
    assert found.kind == "cannot tell"
    assert found.words().startswith(f"cannot tell: {words}")
    assert found.seeds_needed is None
    assert math.isnan(found.detectable)


def test_two_seeds_of_huge_spread():
    found = verdict([90.0, 50.0], [50.0, 90.0])
    assert found.words().endswith("would not be seen; more than 1,000 seeds would be needed to show one of 0.5")


def test_the_correction_counts_every_pair_with_a_p_value():
    kd, better = [90.0, 90.5, 91.0], [91.0, 91.6, 92.4]
    alone = verdict(better, kd)
    assert alone.kind == "better"
    many = verdicts({"better": (better, kd), **{str(i): ([90.1, 90.4, 91.0], kd) for i in range(9)}})
    assert many["better"].kind == "cannot tell"  # p is below 0.05, and ten times p is not
    assert many["better"].interval == alone.interval
    std = np.std([1.0, 1.1, 1.4], ddof=1)
    assert many["better"].detectable == pytest.approx(detectable_difference(std, 3, alpha=0.005))
    single = {str(i): ([1.0], [2.0]) for i in range(9)}  # no p-value, no comparison
    without = verdicts({"better": (better, kd), **single})
    assert without["better"] == alone


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan, math.inf])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(ValueError, match="margin must be a finite number above 0"):
        verdict([1.0, 2.0], [1.0, 3.0], margin=margin)


def test_options_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="0 < alpha < power < 1"):
        verdict([1.0, 2.0], [1.0, 3.0], alpha=0.9, power=0.8)
    with pytest.raises(ValueError, match="n at least 2"):
        detectable_difference(1.0, 1)
    with pytest.raises(ValueError, match="one value per pair, got 2 and 1"):
        verdict([1.0, 2.0], [1.0])
