"""Statistics of two models on the same items: intervals of differences, and tests of them.

What both models find hard cancels in a paired difference, which is why it is known far better than
either model's own score (E. Miller, Adding Error Bars to Evals, arXiv 2411.00640, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

RESAMPLES = 2000
_VALUES = 2**22  # random numbers held at once, 32 MiB
Sums = Mapping[str, np.ndarray]
Interval = tuple[float, float]


def bootstrap(
    sums: Sums,
    statistics: Mapping[str, Callable[[Sums], np.ndarray]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % percentile bootstrap intervals of statistics of sums over clusters.

    sums: arrays of shape [num_clusters], what each cluster adds up to. Whole clusters are drawn
    with replacement, the same ones for every array, so that differences stay paired. Each statistic
    gets the drawn clusters' totals, arrays of shape [resamples], and returns as many values; values
    that are not finite are left out. The interval is NaN where there is only one cluster, or where
    no value is finite. See B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993.
    """
    columns = np.stack([np.asarray(values, dtype=np.float64) for values in sums.values()], axis=1)
    clusters = len(columns)
    if clusters < 2:
        return dict.fromkeys(statistics, (math.nan, math.nan))
    rng = np.random.default_rng(seed)
    chunk = max(1, _VALUES // (clusters * columns.shape[1]))
    drawn = np.concatenate(
        [
            columns[rng.integers(clusters, size=(min(chunk, resamples - start), clusters))].sum(1)
            for start in range(0, resamples, chunk)
        ]
    )
    totals = dict(zip(sums, drawn.T, strict=True))
    found = {}
    for name, statistic in statistics.items():
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values = statistic(totals)
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (math.nan, math.nan)
        found[name] = (float(low), float(high))
    return found


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of the exact McNemar test.

    only_first, only_second: items that only the first, only the second model gets right. Were both
    models equally good, each of these would fall to either with probability 1/2, so their number is
    binomial (Q. McNemar, Psychometrika 12, 1947; exact as in A. Agresti, Categorical Data
    Analysis, section on matched pairs).
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    ways = tail = 1
    for k in range(fewer):
        ways = ways * (count - k) // (k + 1)
        tail += ways
    # In whole numbers: 2**count fits no float beyond 1023 items.
    return min(1.0, 2 * tail / 2**count)


def sign_flips(differences: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test of the mean difference.

    differences: one per item. Were both models equally good, each sign would be as likely as its
    opposite (R. A. Fisher, The Design of Experiments, 1935, section 21). The smallest value that it
    can return is 1 / (resamples + 1).
    """
    observed = abs(float(differences.sum())) * (1 - 1e-12)
    rng = np.random.default_rng(seed)
    chunk = max(1, _VALUES // max(1, len(differences)))
    reached = 0
    for start in range(0, resamples, chunk):
        shape = (min(chunk, resamples - start), len(differences))
        signs = 2.0 * rng.integers(2, size=shape) - 1
        reached += int((np.abs(signs @ differences) >= observed).sum())
    return (reached + 1) / (resamples + 1)
