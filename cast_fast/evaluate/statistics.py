"""Means with bootstrap confidence intervals, unpaired and paired."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 1 << 22  # indices drawn at once, so that memory stays below 32 MiB


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; all NaN where there was nothing to average."""

    mean: float
    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes null, which JSON has."""
        values = dataclasses.asdict(self)
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """``0.512 [0.480, 0.545]``; ``scale=100, digits=1`` for percentages."""
        if self.count == 0:
            return "–"
        mean, low, high = (scale * value for value in (self.mean, self.low, self.high))
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def bootstrap_mean(values: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean and percentile bootstrap interval (B. Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979).

    Args:
        values: (n,) one number a sample: a score, or 0/1 for wrong/right.
        resamples: how often n values are drawn with replacement.
        level: of the interval, in (0, 1).
        seed: of the draws; equal seeds give equal intervals.

    Raises:
        ValueError: ``values`` is not one-dimensional or holds NaN, or ``level`` or ``resamples`` is out of range.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or np.isnan(array).any():
        raise ValueError(f"values: got shape {array.shape} (NaN: {np.isnan(array).any()}), expected numbers (n,)")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples {resamples}, level {level}: expected at least 1 and a number in (0, 1)")
    if array.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    means = _resampled_means(array, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = float(array[0]) if array.min() == array.max() else float(array.mean())
    return Interval(mean, float(low), float(high), int(array.size))


def bootstrap_difference(
    first: ArrayLike, second: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Interval of the mean of ``second − first``, which were measured on the same samples (paired).

    Raises:
        ValueError: the two differ in shape; see ``bootstrap_mean`` for the rest.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values: got shapes {a.shape} and {b.shape}, expected equal ones")
    return bootstrap_mean(b - a, resamples=resamples, level=level, seed=seed)


def student_interval(values: ArrayLike, *, level: float = LEVEL) -> Interval:
    """Mean over a few independent runs (seeds) with Student's t interval; the ends are NaN for a single run.

    A bootstrap of three values has at most ten different means, so that its interval would be far too narrow.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values: got shape {array.shape}, expected (n,) with at least one")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = student_quantile((1 + level) / 2, array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half, int(array.size))


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, by bisection of its cumulative density (Simpson's rule)."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def cumulative(bound: float) -> float:
        # substituting x = tan(a)·√freedom turns the heavy tail into a smooth function on a short interval
        angle = np.linspace(0.0, math.atan(bound / math.sqrt(freedom)), 2001)
        values = constant * math.sqrt(freedom) * np.cos(angle) ** (freedom - 1)
        weights = np.ones_like(values)
        weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
        return 0.5 + float((values * weights).sum() * (angle[1] - angle[0]) / 3)

    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cumulative(middle) < probability else (low, middle)
    return (low + high) / 2


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of McNemar's test: ``wins`` and ``losses`` are the discordant pairs."""
    total, extreme = wins + losses, min(wins, losses)
    if total == 0:
        return 1.0
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(extreme + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def _resampled_means(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    if values.min() == values.max():  # rounding of the sum would otherwise make an interval of width 1e-16
        return np.full(resamples, values[0])
    rows = max(1, _CHUNK // values.size)
    means = [
        values[rng.integers(values.size, size=(min(rows, resamples - start), values.size))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)
