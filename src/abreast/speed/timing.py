"""Times that can be compared: candidates take turns, and what counts is the ratio within a round.

A machine drifts: clocks, caches and neighbours change from minute to minute. So the candidates take
turns within every round, in alternating order (A B, B A, ...), and what is compared is the ratio
within a round, not two averages taken at different times.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from abreast.errors import AbreastError

# With n rounds the smallest and largest ratio miss the true median 2 * 0.5**n of the time: with
# fewer than 6 rounds more often than the 5 % that a 95 % interval allows.
MIN_ROUNDS = 6


@dataclass(frozen=True)
class Measurement:
    """Raw timings. seconds: per candidate an array of shape [rounds], in the order they were run.

    Entry r of every array belongs to round r, so arrays can be compared pairwise. tokens: how many
    tokens one run of the candidate processes.
    """

    seconds: dict[str, np.ndarray]
    tokens: dict[str, int]


@dataclass(frozen=True)
class Timing:
    """One candidate. Times in seconds per run; tokens_per_second from the median.

    iqr: distance between the quartiles. ratio: median over rounds of original / candidate, above 1
    where the candidate is faster; ratio_low, ratio_high: 95 % interval of that median.
    """

    median: float
    min: float
    max: float
    iqr: float
    tokens_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float


def measure(
    candidates: Mapping[str, Callable[[], int]],
    *,
    rounds: int,
    warmup: int = 2,
    prepare: Mapping[str, Callable[[], None]] | None = None,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Time candidates in turn: each once per round, every other round in reverse order.

    A candidate does its work and returns how many tokens that was. The time runs from just before
    its call until synchronize() after it has returned, so work queued on a device is included.
    Not included: prepare[name](), which runs and is synchronised just before each timing; garbage
    collection, which is off while the clock runs; the first `warmup` rounds. An even number of
    rounds gives every candidate both places equally often. progress: called with (rounds done,
    rounds in all), outside the timing.

    Raises AbreastError for no candidates or rounds, and if a candidate's token count changes.
    """
    if not candidates:
        raise AbreastError("there is nothing to time; name at least one model")
    if rounds < 1 or warmup < 0:
        raise AbreastError(f"cannot time {rounds} rounds after {warmup}; use at least 1 and 0")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    tokens: dict[str, int] = {}
    names = list(candidates)
    collecting = gc.isenabled()
    try:
        for turn in range(warmup + rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                if prepare is not None and name in prepare:
                    prepare[name]()
                gc.disable()
                synchronize()
                start = clock()
                done = candidates[name]()
                synchronize()
                elapsed = clock() - start
                if collecting:
                    gc.enable()
                if tokens.setdefault(name, done) != done:
                    raise AbreastError(
                        f"'{name}' processed {tokens[name]} tokens in one run and {done} in "
                        "another; time the same work in every round"
                    )
                if turn >= warmup:
                    seconds[name].append(elapsed)
            if progress is not None:
                progress(turn + 1, warmup + rounds)
    finally:
        if collecting:
            gc.enable()
    return Measurement({name: np.array(times) for name, times in seconds.items()}, tokens)


def ratio_interval(original: np.ndarray, candidate: np.ndarray) -> tuple[float, float, float]:
    """Median of the ratios original / candidate per round, and a 95 % interval of that median.

    original, candidate: seconds, shape [rounds]. The interval ends at two of the ratios: without
    correlation between rounds at those that the binomial distribution names (Conover, Practical
    Nonparametric Statistics, 1999, section 3.2), which holds for any distribution of the noise.
    Noise that comes in spells makes rounds repeat one another. How much is estimated from the signs
    of the distances to the median, with the weights of Newey and West (1987), and the interval
    is widened accordingly, never narrowed.

    Simulated share of intervals that hold the truth, with 6, 10, 20 and 40 rounds: independent
    noise, normal or skewed, 0.98, 0.99, 0.97, 0.97; autocorrelation 0.2 between rounds 0.93, 0.97,
    0.95, 0.97; 0.4: 0.89, 0.95, 0.92, 0.94; 0.6: 0.80, 0.89, 0.90, 0.90. (The percentile bootstrap
    that stood here before: 0.93, 0.80 and 0.73 with 20 rounds and correlation 0, 0.4 and 0.6.)
    Raises AbreastError where the clock did not move during a run.
    """
    if not (original > 0).all() or not (candidate > 0).all():
        raise AbreastError("a run took no measurable time; time longer prompts or more tokens")
    ratios = np.sort(original / candidate)
    rounds = len(ratios)
    middle = float(np.median(ratios))
    spread = (rounds + 1) / 2 - _outer_rank(rounds)
    spread *= math.sqrt(_inflation(np.sign(original / candidate - middle)))
    rank = max(1, math.floor((rounds + 1) / 2 - spread + 1e-9))
    return middle, float(ratios[rank - 1]), float(ratios[rounds - rank])


def _outer_rank(rounds: int) -> int:
    """The largest k for which the k-th smallest and largest enclose the median 95 % of the time."""
    tail = 0.0
    for rank in range(rounds // 2 + 1):
        tail += math.comb(rounds, rank) / 2**rounds
        if tail > 0.025:
            return max(rank, 1)
    return 1


def _inflation(signs: np.ndarray) -> float:
    """How many times the variance of a median grows because rounds resemble their neighbours."""
    rounds = len(signs)
    lags = max(1, round(rounds ** (1 / 3)))
    total = 1.0
    for lag in range(1, min(lags, rounds - 1) + 1):
        # The signs are centred on their own median, which alone makes them correlate by -1/rounds.
        correlation = (float(signs[lag:] @ signs[:-lag]) + 1) / rounds
        total += 2 * (1 - lag / (lags + 1)) * correlation
    return max(1.0, total)


def timings(measurement: Measurement) -> dict[str, Timing]:
    """Summary of every candidate; the first is the original that the others are compared with."""
    original = next(iter(measurement.seconds.values()))
    found = {}
    for name, seconds in measurement.seconds.items():
        ratio, low, high = ratio_interval(original, seconds)
        first, median, third = (float(value) for value in np.percentile(seconds, [25, 50, 75]))
        found[name] = Timing(
            median=median,
            min=float(seconds.min()),
            max=float(seconds.max()),
            iqr=third - first,
            tokens_per_second=measurement.tokens[name] / median,
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
        )
    return found


def claim(timing: Timing, rounds: int) -> str:
    """What a timing allows one to say about its candidate, in words.

    A difference is claimed only where the 95 % interval of the paired ratio excludes 1, and none at
    all from fewer than MIN_ROUNDS rounds.
    """
    if rounds < MIN_ROUNDS:
        return f"too few rounds to say: {rounds}; use at least {MIN_ROUNDS}"
    if timing.ratio_low > 1:
        return f"faster by {_times(timing.ratio, timing.ratio_low, timing.ratio_high)}"
    if timing.ratio_high < 1:
        slower = _times(1 / timing.ratio, 1 / timing.ratio_high, 1 / timing.ratio_low)
        return f"slower here by {slower}: do not use it for this"
    return (
        f"no difference measured here: {timing.ratio:.2f}x "
        f"[{timing.ratio_low:.2f}, {timing.ratio_high:.2f}]"
    )


def _times(ratio: float, low: float, high: float) -> str:
    # A small difference needs more digits, or the interval would seem to include 1.
    digits = next((d for d in (2, 3, 4) if float(f"{low:.{d}f}") > 1), 5)
    return f"{ratio:.{digits}f}x [{low:.{digits}f}, {high:.{digits}f}]"
