"""Statistics over seeds: mean, standard deviation, Student-t interval, paired t-test, Holm's correction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Differences whose spread is below this share of the values' size differ by rounding alone.
ROUNDING = 1e-12


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
    p = float(stats.ttest_rel(left, right).pvalue)
    return Paired(mean, _half_width(float(difference.std(ddof=1)), n), p, n)


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


def _half_width(std: float, n: int) -> float:
    return float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n)


def _constant(values: np.ndarray, scale_of: np.ndarray) -> bool:
    """Whether values differ by no more than the rounding of numbers of this size."""
    return bool(np.ptp(values) <= ROUNDING * max(float(np.abs(scale_of).max()), 1e-300))
