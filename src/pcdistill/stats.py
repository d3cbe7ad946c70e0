"""Statistics over seeds: mean, interval, paired t-test, test of equivalence, power, and a verdict in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

# Differences whose spread is below this share of the values' size differ by rounding alone.
ROUNDING = 1e-12
MARGIN = 0.5  # points: the difference that the verdict takes for one that matters, unless told otherwise
MOST_SEEDS = 1000  # nobody trains more; a number beyond it would only pretend to be exact

Kind = Literal["better", "worse", "no difference", "cannot tell"]


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (n - 1), number of values, half width of the mean's 95 % interval."""

    mean: float
    std: float
    n: int
    ci95: float


@dataclass(frozen=True)
class Paired:
    """Mean of the differences a - b, half width of its 95 % interval, two-sided p of the paired t-test, pairs."""

    mean: float
    ci95: float
    p: float
    n: int


def summary(values: Sequence[float]) -> Summary:
    """Mean over seeds with its 95 % interval by Student's t: mean +- t(0.975, n - 1) * std / sqrt(n).

    Args:
        values: one per seed. A value that is not finite makes mean, std and interval NaN: it is never skipped.

    Returns:
        One value has no spread: std and ci95 are NaN. No value: the mean is NaN too. No warnings in either case.
    """
    found = np.asarray(values, dtype=np.float64)
    n = len(found)
    if n == 0 or not np.isfinite(found).all():
        return Summary(math.nan, math.nan, n, math.nan)
    mean = float(found.mean())
    if n == 1:
        return Summary(mean, math.nan, 1, math.nan)
    std = 0.0 if _constant(found, found) else float(found.std(ddof=1))
    return Summary(mean, std, n, _half_width(std, n))


def paired_test(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Paired t-test of a - b, pair by pair, with the mean difference's 95 % interval.

    Args:
        a: one value per seed.
        b: the other method's value at the same seeds, in the same order.

    Returns:
        Fewer than two pairs: interval and p are NaN. Differences that are all zero: p = 1. Differences that are all the
        same but not zero: the interval has width 0 and p is NaN, because t is a division by zero there, and no number
        of equal differences says how much the next would differ. A value that is not finite: all NaN but n.

    Raises:
        ValueError: a and b are not of one length.
    """
    if len(a) != len(b):
        raise ValueError(f"a and b must have one value per pair, got {len(a)} and {len(b)}")
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    difference, n = left - right, len(left)
    if n == 0 or not (np.isfinite(left).all() and np.isfinite(right).all()):
        return Paired(math.nan, math.nan, math.nan, n)
    mean = float(difference.mean())
    if n == 1:
        return Paired(mean, math.nan, math.nan, 1)
    if _constant(difference, np.concatenate([left, right])):
        same = _constant(np.append(difference, 0.0), np.concatenate([left, right]))
        return Paired(0.0 if same else mean, 0.0, 1.0 if same else math.nan, n)
    std = float(difference.std(ddof=1))
    p = 2 * float(stdtr(n - 1, -abs(mean) / (std / math.sqrt(n))))
    return Paired(mean, _half_width(std, n), p, n)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of several p-values: sorted, p_(i) * (m - i + 1), made monotone, at most 1.

    Args:
        p_values: name to p. A NaN stays NaN and does not count as a comparison.

    Returns:
        The corrected p-values under the same names, in the same order.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979), section 3.
    """
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    corrected = dict.fromkeys(p_values, math.nan)
    largest = 0.0
    for position, (p, name) in enumerate(known):
        largest = max(largest, min(p * (len(known) - position), 1.0))
        corrected[name] = largest
    return corrected


def tost(a: Sequence[float], b: Sequence[float], margin: float = MARGIN) -> float:
    """Two one-sided paired t-tests: p of the claim that the mean of a - b lies between -margin and margin.

        p = max(P(t > (mean + margin) / se), P(t < (mean - margin) / se)),   se = std / sqrt(n),   n - 1 degrees

    Below 5 %, the 90 % interval of the mean difference lies inside the margin, and the other way round.

    Args:
        a: [n], one value per seed.
        b: [n], the other method's value at the same seeds, in the same order.
        margin: above 0, in the values' unit.

    Returns:
        p in [0, 1]; NaN where there is no spread to test with: fewer than two pairs, a value that is not finite, or
        differences that are all the same.

    Raises:
        ValueError: a and b are not of one length, or the margin is not a finite number above 0.

    Source:
        Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the
        equivalence of average bioavailability", J. Pharmacokinetics and Biopharmaceutics 15 (1987), 657-680.
    """
    _check_margin(margin)
    found, std = paired_test(a, b), _spread(a, b)
    if not std > 0:
        return math.nan
    # |mean| + margin is always the easier side: p is that of the harder one.
    return float(stdtr(found.n - 1, (abs(found.mean) - margin) / (std / math.sqrt(found.n))))


def detectable_difference(std: float, n: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference that a two-sided paired t-test of n pairs finds with probability `power`.

        d = delta * std / sqrt(n),   P(t'(n - 1, delta) > t(1 - alpha / 2, n - 1)) = power

    t' is the noncentral t. The tail of the wrong sign is left out; it is below 1e-5 where power is 0.8.

    Args:
        std: standard deviation of the differences, at least 0, in the values' unit.
        n: pairs, at least 2.
        alpha: level of the test, in (0, 1).
        power: in (alpha, 1); customary: 0.8.

    Returns:
        d in the values' unit. As exact as std is: from three pairs that is known to a factor of two at best.

    Raises:
        ValueError: an argument outside its range.

    Source:
        Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd edition (1988), sections 2.3 and 12.
    """
    if not std >= 0 or n < 2 or not 0 < alpha < power < 1:
        raise ValueError(
            f"std must be at least 0, n at least 2 and 0 < alpha < power < 1, got {std}, {n}, {alpha}, {power}"
        )
    return _noncentrality(n, alpha, power) * std / math.sqrt(n)


def seeds_needed(difference: float, std: float, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """The fewest pairs whose :func:`detectable_difference` is no greater than `difference`.

    Args:
        difference: above 0, in the values' unit.
        std: standard deviation of the differences, at least 0, in the same unit.
        alpha: level of the test, in (0, 1).
        power: in (alpha, 1).

    Returns:
        At least 2; None if even 1,000 are too few.

    Raises:
        ValueError: an argument outside its range.
    """
    _check_margin(difference)
    low, high = 2, MOST_SEEDS
    if detectable_difference(std, high, alpha=alpha, power=power) > difference:
        return None
    while low < high:
        middle = (low + high) // 2
        if detectable_difference(std, middle, alpha=alpha, power=power) <= difference:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True)
class Verdict:
    """What paired seeds say of method a against method b.

    Attributes:
        kind: "better" and "worse": a - b differs from 0; "no difference": it is shown to lie within the margin.
        n: pairs.
        difference: mean of a - b, in the metric's points; NaN if a value is not finite or there is no pair.
        interval: its interval at level 1 - alpha, uncorrected (low, high); NaN where there is none.
        margin: the difference that matters, in points.
        within_margin: whether the two one-sided tests hold too; "better" can be by less than the margin.
        detectable: the true difference that n pairs find with the stated power, in points; NaN without a spread.
        seeds_needed: pairs that would find one of `margin`; None without a spread, or above 1,000.
        reason: why nothing can be calculated, as part of a sentence; "" otherwise.
    """

    kind: Kind
    n: int
    difference: float
    interval: tuple[float, float]
    margin: float
    within_margin: bool
    detectable: float
    seeds_needed: int | None
    reason: str = ""

    def words(self, unit: str = "points") -> str:
        """The verdict without the names: "better by 1.02 points (0.50 to 1.54)"."""
        low, high = self.interval
        margin = f"{self.margin:g} {unit}"
        if self.kind in ("better", "worse"):
            low, high = (low, high) if self.kind == "better" else (-high, -low)
            tail = f", which is less than {margin}, tested as such" if self.within_margin else ""
            return f"{self.kind} by {_points(abs(self.difference))} {unit} ({_points(low)} to {_points(high)}){tail}"
        if self.kind == "no difference":
            return f"no difference greater than {margin}, tested as such"
        if self.reason:
            return f"cannot tell: {self.reason}"
        seen = (
            f"cannot tell: with {self.n} seeds a difference under {_points(self.detectable)} {unit} would not be seen"
        )
        if self.seeds_needed is None:
            return f"{seen}; more than {MOST_SEEDS:,} seeds would be needed to show one of {self.margin:g}"
        if self.seeds_needed > self.n:
            return f"{seen}; about {self.seeds_needed} seeds would show one of {self.margin:g}"
        return (
            f"{seen}; the one measured, {_points(self.difference)} ({_points(low)} to {_points(high)}), is too small "
            f"to be told from 0 and too large to be told from {self.margin:g}"
        )

    def sentence(self, name_a: str, name_b: str, unit: str = "points") -> str:
        """ "pcd against kd: better by 1.02 points (0.50 to 1.54)."."""
        return f"{name_a} against {name_b}: {self.words(unit)}."


def verdicts(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    margin: float = MARGIN,
    alpha: float = 0.05,
    power: float = 0.8,
) -> dict[str, Verdict]:
    """What paired seeds say of several methods, each against its own partner, with the errors of all held together.

    "Better" or "worse": the paired t-test's p, after Holm over all pairs, is below alpha. Otherwise "no difference":
    the p of :func:`tost`, after Holm over all pairs, is below alpha. Otherwise "cannot tell". So the probability that
    any "better" or "worse" is wrong is at most alpha, however many pairs there are, and so is that of any wrong "no
    difference". What could have been seen is calculated at alpha / pairs, the level that Holm asks first.

    Args:
        pairs: name to (a, b), each [n]: one value per seed, in the same order, in points of the metric.
        margin: the difference that matters, above 0, in points.
        alpha: level of the tests and of the intervals, in (0, 1).
        power: at which `detectable` and `seeds_needed` are stated, in (alpha, 1).

    Returns:
        The verdicts under the same names, in the same order. "Cannot tell", with a reason in place of numbers: no pair,
        one pair, a value that is not finite, or differences that are all the same and so show no spread.

    Raises:
        ValueError: a and b are not of one length, or an option outside its range.

    Source:
        Schuirmann 1987 (tost), Holm 1979 (holm), Cohen 1988 (detectable_difference). Our choice: a significant
        difference is named before equivalence, because who reads the table asks first which method is better.
    """
    _check_margin(margin)
    if not 0 < alpha < power < 1:
        raise ValueError(f"alpha and power must keep 0 < alpha < power < 1, got {alpha} and {power}")
    tested = {name: paired_test(a, b) for name, (a, b) in pairs.items()}
    differs = holm({name: found.p for name, found in tested.items()})
    equal = holm({name: tost(a, b, margin) for name, (a, b) in pairs.items()})
    level = alpha / max(sum(not math.isnan(found.p) for found in tested.values()), 1)
    decided = {}
    for name, (a, b) in pairs.items():
        found, std = tested[name], _spread(a, b)
        half = -float(stdtrit(found.n - 1, alpha / 2)) * std / math.sqrt(found.n) if found.n > 1 else math.nan
        kind: Kind = "cannot tell"
        if std > 0 and differs[name] < alpha:
            kind = "better" if found.mean > 0 else "worse"
        elif std > 0 and equal[name] < alpha:
            kind = "no difference"
        decided[name] = Verdict(
            kind=kind,
            n=found.n,
            difference=found.mean,
            interval=(found.mean - half, found.mean + half),
            margin=margin,
            within_margin=std > 0 and equal[name] < alpha,
            detectable=detectable_difference(std, found.n, alpha=level, power=power) if std > 0 else math.nan,
            seeds_needed=seeds_needed(margin, std, alpha=level, power=power) if std > 0 else None,
            reason="" if std > 0 else _why_not(found),
        )
    return decided


def _why_not(found: Paired) -> str:
    """Why differences without a spread allow no verdict."""
    if found.n == 0:
        return "they have no seed in common"
    if math.isnan(found.mean):
        return "a value is not a finite number"
    if found.n == 1:
        return "one seed shows nothing of the spread between seeds"
    return (
        f"the difference is {_points(found.mean)} at each of {found.n} seeds, and equal ones do not show by how much "
        "the next would differ"
    )


@lru_cache(maxsize=1024)
def _noncentrality(n: int, alpha: float, power: float) -> float:
    """Delta at which the two-sided t-test of n pairs at level alpha has the power."""
    return float(nctdtrinc(n - 1, 1 - power, -stdtrit(n - 1, alpha / 2)))


def _spread(a: Sequence[float], b: Sequence[float]) -> float:
    """Standard deviation of a - b over pairs; 0 if they differ by rounding alone, NaN if there is none."""
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(left) < 2 or not (np.isfinite(left).all() and np.isfinite(right).all()):
        return math.nan
    difference = left - right
    return 0.0 if _constant(difference, np.concatenate([left, right])) else float(difference.std(ddof=1))


def _points(value: float) -> str:
    """Two decimals; a small number that is not 0 keeps its first digit."""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.005 else f"{value:.1g}"


def _check_margin(margin: float) -> None:
    if not 0 < margin < math.inf:
        raise ValueError(f"margin must be a finite number above 0, got {margin}")


def _half_width(std: float, n: int) -> float:
    return float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)


def _constant(values: np.ndarray, scale_of: np.ndarray) -> bool:
    """Whether values differ by no more than the rounding of numbers of this size."""
    return bool(np.ptp(values) <= ROUNDING * max(float(np.abs(scale_of).max()), 1e-140))
