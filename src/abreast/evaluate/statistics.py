"""Statistics: standard errors, bootstrap intervals, and tests of two models on the same items.

What both models find hard cancels in a paired difference, which is why it is known far better than
either model's own score (E. Miller, Adding Error Bars to Evals, arXiv 2411.00640, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

RESAMPLES = 2000
_MAX_DRAWS = 2**22  # random numbers held at once, 32 MiB
Sums = Mapping[str, np.ndarray]
Interval = tuple[float, float]


def ratio_of_means(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean per token and its cluster-robust standard error, from sums and counts per cluster.

    With S_c the sum and n_c the tokens of cluster c of C, the mean is R = sum S_c / sum n_c and

        se(R)^2 = C / (C - 1) * sum (S_c - R n_c)^2 / (sum n_c)^2,

    the linearised variance of the ratio estimator (W. G. Cochran, Sampling Techniques, 3rd ed.,
    1977, chapter 6), which for clusters of one token is the ordinary standard error; for language
    model evaluations see E. Miller, Adding Error Bars to Evals, arXiv 2411.00640. It assumes
    clusters independent of each other, so where long documents span many windows it is still
    somewhat too small. sums, counts: shape [num_clusters]. The error of one cluster is NaN.
    """
    total = float(counts.sum())
    mean = float(sums.sum()) / total
    clusters = len(counts)
    if clusters < 2:
        return mean, math.nan
    squares = float(np.square(sums - mean * counts).sum())
    return mean, math.sqrt(clusters / (clusters - 1) * squares) / total


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
    if len(columns) < 2:
        return dict.fromkeys(statistics, (math.nan, math.nan))
    drawn = resampled(columns, np.random.default_rng(seed), resamples)
    totals = dict(zip(sums, drawn.T, strict=True))
    intervals = {}
    for name, statistic in statistics.items():
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values = statistic(totals)
        intervals[name] = interval(values)
    return intervals


def resampled(
    columns: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """Totals, [resamples, columns], of as many rows of [num_clusters, columns], drawn anew."""
    clusters = len(columns)
    chunk = max(1, _MAX_DRAWS // (clusters * columns.shape[1]))
    return np.concatenate(
        [
            columns[rng.integers(clusters, size=(min(chunk, resamples - start), clusters))].sum(1)
            for start in range(0, resamples, chunk)
        ]
    )


def interval(values: np.ndarray) -> Interval:
    """What holds 95 % of the values that are finite; NaN where none is."""
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (math.nan, math.nan)
    return float(low), float(high)


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
    chunk = max(1, _MAX_DRAWS // max(1, len(differences)))
    reached = 0
    for start in range(0, resamples, chunk):
        shape = (min(chunk, resamples - start), len(differences))
        signs = 2.0 * rng.integers(2, size=shape) - 1
        reached += int((np.abs(signs @ differences) >= observed).sum())
    return (reached + 1) / (resamples + 1)


def item_values(items: list[Any]) -> np.ndarray | None:
    """One number per item: the value itself, or the log-likelihood of [log-likelihood, weight].

    None where there are no items, or some are not finite numbers.
    """
    if items and all(isinstance(item, list) and len(item) == 2 for item in items):
        items = [item[0] for item in items]
    if not items or not all(isinstance(item, float) and math.isfinite(item) for item in items):
        return None
    return np.array(items)


def all_binary(values: np.ndarray) -> bool:
    """Whether every value is 0 or 1: right or wrong."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def metric_stderr(value: float, items: list[Any]) -> float | None:
    """Standard error over items of what the harness aggregates by a mean or as perplexity."""
    numbers = item_values(items)
    if numbers is None or len(numbers) < 2:
        return None
    weighted = isinstance(items[0], list)
    weights = np.array([item[1] for item in items]) if weighted else np.ones(len(items))
    mean, stderr = ratio_of_means(numbers, weights)
    for expected, slope in (
        (mean, 1.0),
        (math.exp(min(-mean, 700.0)), value),  # perplexity of log-likelihoods
        (-mean / math.log(2), 1 / math.log(2)),  # bits per byte
    ):
        if math.isclose(value, expected, rel_tol=1e-6):
            error = abs(slope) * stderr
            return error if math.isfinite(error) else None
    return None
