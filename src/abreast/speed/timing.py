"""Benchmarks as data: jobs, times that can be compared, and what they allow one to say; no torch.

A machine drifts: clocks, caches and neighbours change from minute to minute. So the candidates take
turns within every round, in alternating order (A B, B A, ...), and what is compared is the ratio
within a round, not two averages taken at different times.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

from abreast.errors import AbreastError
from abreast.runs import option
from abreast.targets import Unpaired

# With n rounds the smallest and largest ratio miss the true median 2 * 0.5**n of the time: with
# fewer than 6 rounds more often than the 5 % that a 95 % interval allows.
MIN_ROUNDS = 6
ORIGINAL = "original"
Task = Literal["prefill", "decode", "generate"]
BackendName = Literal["eager", "cudagraphs", "compile", "tp", "vllm"]


@dataclass(frozen=True)
class Contender:
    """One model to time. plan: run it grouped in memory under this plan, shorthand or file.
    unpaired: how the processes of tp hold it, see `engines.torch_tp`."""

    name: str
    model: str
    plan: str | None = None
    unpaired: Unpaired = "shard"


@dataclass(frozen=True)
class Case:
    """One task at one batch size and context (tokens of the prompt). new_tokens: see `bench`."""

    task: Task
    batch_size: int
    context: int
    new_tokens: int

    @property
    def name(self) -> str:
        return f"{self.task} at batch {self.batch_size}, context {self.context}"


@dataclass(frozen=True)
class Job:
    """What to time. The first contender is the original. ranks: processes of the tp back end, and
    tensor-parallel degree of vLLM. vllm: the words of its command, without "bench".

    Fields with a help text are options of `abreast bench`.
    """

    contenders: tuple[Contender, ...] = ()
    cases: tuple[Case, ...] = ()
    backend: BackendName = option(
        "eager",
        "cudagraphs: steps replayed on a GPU; compile: torch.compile, on a GPU with CUDA graphs; "
        "tp: tensor parallel under torchrun.",
    )
    rounds: int = option(20, "Rounds; in each, every model is timed once.")
    warmup: int = option(2, "Warm-up rounds, not counted.")
    seed: int = option(0, "Random seed.")
    device: str = option("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", "float32, bfloat16, float16 or auto.")
    ranks: int = 2
    unpaired: tuple[str, ...] = option(
        ("shard",), "How the processes of tp hold layers in no group: shard or replicate, or both."
    )
    link_delay: int = option(
        0, "Microseconds added to every exchange of tp: a simulated slower link."
    )
    vllm: tuple[str, ...] = ("vllm",)
    trust_remote_code: bool = option(False, "Allow code inside the checkpoints to run.")

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Job:
        """The job of which `row` is `asdict`, after a round trip through JSON."""
        contenders = tuple(Contender(**contender) for contender in row["contenders"])
        cases = tuple(Case(**case) for case in row["cases"])
        lists = {key: tuple(row[key]) for key in ("vllm", "unpaired")}
        return cls(**{**row, **lists, "contenders": contenders, "cases": cases})


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
    where the candidate is faster; ratio_low, ratio_high: 95 % interval of that median, widened to
    the medians of the first and the second half of the rounds, which drift or a neighbour pull
    apart: a difference that only one half shows is none.
    """

    median: float
    min: float
    max: float
    iqr: float
    tokens_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Footprint:
    """Memory of one candidate in one task, in bytes, on the process (rank) that measured it.

    weights: its parameters. kv_cache: keys and values after the task. device_peak: weights plus the
    most that a run added on the accelerator, None on a CPU. host_peak: the same for the host's
    memory, None where the system does not say; without memory that the warm process held already
    from earlier runs. exchanges: with other processes in one run, None where there are none.
    """

    weights: int
    kv_cache: int
    device_peak: int | None
    host_peak: int | None
    exchanges: int | None = None


@dataclass(frozen=True)
class BenchResult:
    """Timings of one task, and the conditions under which they hold.

    timings: per candidate, the original first. new_tokens is 0 for prefill. threads: CPU threads
    of torch. seconds: the raw times, arrays of shape [rounds]. ranks: processes that share the
    work. backend also says what was simulated.
    """

    task: str
    original: str
    batch_size: int
    context: int
    new_tokens: int
    rounds: int
    warmup: int
    seed: int
    device: str
    dtype: str
    threads: int
    timings: dict[str, Timing]
    seconds: dict[str, np.ndarray] = field(repr=False, compare=False)
    backend: str = "eager"
    ranks: int = 1
    memory: dict[str, Footprint] = field(default_factory=dict)

    @property
    def name(self) -> str:
        simulated = "".join(self.backend.partition(", simulated link")[1:])
        return f"{self.task}, batch {self.batch_size}, context {self.context}{simulated}"

    def to_dict(self, *, seconds: bool = False) -> dict[str, Any]:
        """The result as JSON-ready values; `seconds` adds the raw times.

        Every timing also gets `ttft` (prefill) or `tpot` (decode), in seconds: the time to the
        first token, and the time per further token of one row.
        """
        row = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        row["timings"] = {name: self._metrics(timing) for name, timing in self.timings.items()}
        row["memory"] = {name: asdict(memory) for name, memory in self.memory.items()}
        if seconds:
            row["seconds"] = {name: array.tolist() for name, array in self.seconds.items()}
        else:
            del row["seconds"]
        return row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> BenchResult:
        """The inverse of `to_dict(seconds=True)`."""
        known = Timing.__dataclass_fields__
        timings = {
            name: Timing(**{key: value for key, value in timing.items() if key in known})
            for name, timing in row["timings"].items()
        }
        seconds = {name: np.array(times) for name, times in row["seconds"].items()}
        memory = {name: Footprint(**memory) for name, memory in row["memory"].items()}
        return cls(**{**row, "timings": timings, "seconds": seconds, "memory": memory})

    def _metrics(self, timing: Timing) -> dict[str, float]:
        metrics = asdict(timing)
        if self.task == "prefill":
            metrics["ttft"] = timing.median
        elif self.task == "decode":
            metrics["tpot"] = timing.median / self.new_tokens
        return metrics


@dataclass(frozen=True)
class Failure:
    """A case that could not be timed, and what to do about it."""

    case: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that a job measured."""

    job: Job
    results: tuple[BenchResult, ...]
    failures: tuple[Failure, ...]
    hardware: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """What the results allow one to say, and where models were held in several ways, which of
        all was the fastest."""
        won = [fastest(result) for result in self.results] if len(self.job.unpaired) > 1 else []
        return "\n".join([conclusion(self.results), *won])

    def to_dict(self, *, seconds: bool = False) -> dict[str, Any]:
        return {
            "contenders": [asdict(contender) for contender in self.job.contenders],
            "hardware": self.hardware,
            "results": [result.to_dict(seconds=seconds) for result in self.results],
            "failures": [asdict(failure) for failure in self.failures],
            "verdict": self.verdict.splitlines(),
        }


def time_in_turn(
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
    summaries = {}
    for name, seconds in measurement.seconds.items():
        ratio, low, high = ratio_interval(original, seconds)
        halves = [np.median(part) for part in np.array_split(original / seconds, 2) if part.size]
        first, median, third = (float(value) for value in np.percentile(seconds, [25, 50, 75]))
        summaries[name] = Timing(
            median=median,
            min=float(seconds.min()),
            max=float(seconds.max()),
            iqr=third - first,
            tokens_per_second=measurement.tokens[name] / median,
            ratio=ratio,
            ratio_low=float(min(low, *halves)),
            ratio_high=float(max(high, *halves)),
        )
    return summaries


def claim(timing: Timing, rounds: int) -> str:
    """What a timing allows one to say about its candidate.

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


def verdict(result: BenchResult) -> str:
    """What the result allows one to say, one line per candidate but the original (see `claim`).

    With several candidates each line begins with its name.
    """
    others = {name: t for name, t in result.timings.items() if name != result.original}
    if not others:
        return "nothing to compare with"
    if len(others) == 1:
        return "".join(claim(timing, result.rounds) for timing in others.values())
    return "\n".join(f"{name}: {claim(timing, result.rounds)}" for name, timing in others.items())


def fastest(result: BenchResult) -> str:
    """Which contender took least time, and what can be said of it against the next."""
    first, second = sorted(result.timings, key=lambda name: result.timings[name].median)[:2]
    pair = {name: result.seconds[name] for name in (second, first)}
    against = timings(Measurement(pair, dict.fromkeys(pair, 1)))[first]
    return f"fastest in {result.name}: {first} (against {second}: {claim(against, result.rounds)})"


def conclusion(results: Sequence[BenchResult]) -> str:
    """For every contender: in which tasks it is faster, by how much, in which it is not, and
    whether to use it here at all."""
    lines: list[str] = []
    names = list(dict.fromkeys(name for result in results for name in result.timings))
    for name in names[1:]:
        lines += _conclusion(name, [result for result in results if name in result.timings])
    return "\n".join(lines) or "nothing to compare with"


def _conclusion(name: str, results: Sequence[BenchResult]) -> list[str]:
    lines, faster, slower = [], [], []
    for result in results:
        timing = result.timings[name]
        lines.append(f"{name}: {result.name}: {claim(timing, result.rounds)}")
        if result.rounds >= MIN_ROUNDS:
            if timing.ratio_low > 1:
                faster.append((result.task, timing.ratio))
            elif timing.ratio_high < 1:
                slower.append(result.name)
    if all(result.rounds < MIN_ROUNDS for result in results):
        return [*lines, f"{name}: too few rounds for a verdict"]
    if not faster:
        what = "slower" if slower else "no faster"
        return [*lines, f"{name}: {what} in whatever was measured: do not use this here"]
    gains = []
    for task in dict.fromkeys(task for task, _ in faster):
        ratios = sorted(ratio for other, ratio in faster if other == task)
        low, high = f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"
        cases = sum(result.task == task for result in results)
        among = f" ({len(ratios)} of {cases} cases)" if cases > 1 else ""
        gains.append(f"{task} by {low}x" + (f" to {high}x" if high != low else "") + among)
    end = f"; slower, do not use it there: {'; '.join(slower)}"
    return [*lines, f"{name}: faster here in {', '.join(gains)}{end if slower else ''}"]
