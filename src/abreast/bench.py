"""How fast models run beside each other, timed so that a difference means something.

A machine drifts: clocks, caches and neighbours change from minute to minute. So the models take
turns within every round, in alternating order (A B, B A, ...), and what is compared is the ratio
within a round, not two averages taken at different times.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from abreast.errors import AbreastError
from abreast.load import inference, keeps_last

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Task = Literal["prefill", "decode"]

# A bootstrap interval ends at the smallest and largest ratio at the widest, and with n rounds the
# true median lies outside those 2 * 0.5**n of the time: with fewer than 6, more than the 5 % that a
# 95 % interval allows. Simulated coverage: see `ratio_interval`.
MIN_ROUNDS = 6
RESAMPLES = 10_000


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
    where the candidate is faster; ratio_low, ratio_high: 95 % bootstrap interval of that median.
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
class BenchResult:
    """Timings of one task, and under which conditions they hold.

    timings: per candidate, the original first. new_tokens is 0 for prefill. threads: CPU threads
    of torch. seconds: the raw times, arrays of shape [rounds].
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

    def to_dict(self, *, seconds: bool = False) -> dict[str, Any]:
        """The result as JSON-ready values; `seconds` adds the raw times."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found["timings"] = {name: asdict(timing) for name, timing in self.timings.items()}
        if seconds:
            found["seconds"] = {name: array.tolist() for name, array in self.seconds.items()}
        else:
            del found["seconds"]
        return found


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


def ratio_interval(
    original: np.ndarray, candidate: np.ndarray, *, seed: int = 0
) -> tuple[float, float, float]:
    """Median of the ratios original / candidate per round, and its 95 % bootstrap interval.

    original, candidate: seconds, shape [rounds]. Percentile bootstrap over rounds (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13), seeded. In
    simulation with normal and with skewed noise it covers the true median 92 to 94 % of the time
    with 6 to 10 rounds and 94 to 95 % with 20 or 40, so about 1 in 20 to 1 in 15 comparisons of a
    model with itself shows a "difference": repeat what matters.
    Raises AbreastError where the clock did not move during a run.
    """
    if not (original > 0).all() or not (candidate > 0).all():
        raise AbreastError("a run took no measurable time; time longer prompts or more tokens")
    ratios = original / candidate
    picks = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def timings(measurement: Measurement, *, seed: int = 0) -> dict[str, Timing]:
    """Summary of every candidate; the first is the original that the others are compared with."""
    original = next(iter(measurement.seconds.values()))
    found = {}
    for name, seconds in measurement.seconds.items():
        ratio, low, high = ratio_interval(original, seconds, seed=seed)
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


def bench(
    models: Mapping[str, PreTrainedModel],
    *,
    task: Task,
    batch_size: int = 1,
    context: int = 512,
    new_tokens: int = 64,
    rounds: int = 20,
    warmup: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> BenchResult:
    """Time models against the first of them on one task, in interleaved rounds (see `measure`).

    The prompts are batch_size rows of `context` random tokens, the same for all models and rounds.

    prefill: one forward pass over the prompts. Included: making and filling the KV cache, and the
    logits of the last position (of all positions for a model class that knows no `logits_to_keep`).
    Not included: tokenising, copying the prompts to the device, sampling, freeing the cache.
    tokens_per_second counts prompt tokens.

    decode: greedy generation of `new_tokens` per row after the prompt. Included: per token one
    forward pass over [batch_size, 1] with the KV cache growing, and argmax. Not included: the
    prefill, which is done anew before every run and already gives the first token fed in;
    tokenising; stopping at end of text (there is none). tokens_per_second counts generated tokens
    of all rows.

    Plain eager loops over `forward`, not `generate` or a serving engine: they say how models
    compare in this framework on this machine.

    Raises AbreastError for sizes that make no sense or exceed what a model can hold, and for models
    that differ in device, dtype or vocabulary.
    """
    if task not in get_args(Task):
        raise AbreastError(f"unknown task '{task}'; choose one of: {', '.join(get_args(Task))}")
    if min(batch_size, context) < 1 or (task == "decode" and new_tokens < 1):
        raise AbreastError("batch size, context and new tokens must all be at least 1")
    if not models:
        raise AbreastError("there is nothing to time; name at least one model")
    generated = new_tokens if task == "decode" else 0
    for name, model in models.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and context + generated > limit:
            raise AbreastError(
                f"'{name}' holds {limit} tokens, fewer than the {context + generated} asked for; "
                "use a shorter context"
            )
    device = _shared({name: str(model.device) for name, model in models.items()}, "devices")
    dtype = _shared({name: str(model.dtype) for name, model in models.items()}, "dtypes")
    sizes = {name: model.get_input_embeddings().weight.shape[0] for name, model in models.items()}
    vocabulary = int(_shared({name: str(size) for name, size in sizes.items()}, "vocabularies"))
    prompt = np.random.default_rng(seed).integers(vocabulary, size=(batch_size, context))
    ids = torch.from_numpy(prompt).to(device)

    prepare: dict[str, Callable[[], None]] = {}
    candidates: dict[str, Callable[[], int]] = {}
    held: list[Any] = []
    for name, model in models.items():
        if task == "prefill":
            prepare[name], candidates[name] = _prefill_run(model, ids, held)
        else:
            prepare[name], candidates[name] = _decode_run(model, ids, held, new_tokens)

    def synchronize() -> None:
        if torch.device(device).type != "cpu":
            # Every device, because one model may be spread over several.
            for index in range(torch.accelerator.device_count()):
                torch.accelerator.synchronize(index)

    with inference(*models.values()):
        measurement = measure(
            candidates,
            rounds=rounds,
            warmup=warmup,
            prepare=prepare,
            synchronize=synchronize,
            clock=clock,
            progress=progress,
        )
    return BenchResult(
        task=task,
        original=next(iter(models)),
        batch_size=batch_size,
        context=context,
        new_tokens=generated,
        rounds=rounds,
        warmup=warmup,
        seed=seed,
        device=device,
        dtype=dtype.removeprefix("torch."),
        threads=torch.get_num_threads(),
        timings=timings(measurement, seed=seed),
        seconds=measurement.seconds,
    )


def verdict(result: BenchResult) -> str:
    """What the result allows one to say, in words: one line per candidate but the original.

    With several candidates each line begins with its name. A difference is claimed only where the
    95 % interval of the paired ratio excludes 1, and none at all from fewer than MIN_ROUNDS rounds.
    """
    others = {name: t for name, t in result.timings.items() if name != result.original}
    if not others:
        return "nothing to compare with"
    if len(others) == 1:
        return "".join(_claim(timing, result.rounds) for timing in others.values())
    return "\n".join(f"{name}: {_claim(timing, result.rounds)}" for name, timing in others.items())


def _claim(timing: Timing, rounds: int) -> str:
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


def _shared(values: dict[str, str], what: str) -> str:
    """The one value that all models have."""
    if len(set(values.values())) > 1:
        listed = ", ".join(f"'{name}' {value}" for name, value in values.items())
        raise AbreastError(
            f"the models have different {what} ({listed}); timings compare only like with like"
        )
    return next(iter(values.values()))


def _prefill_run(
    model: PreTrainedModel, ids: torch.Tensor, held: list[Any]
) -> tuple[Callable[[], None], Callable[[], int]]:
    """Untimed preparation and timed run; `held` keeps the cache, so freeing it is not timed."""
    options = keeps_last(model, 1)

    def prefill() -> int:
        held.append(model(input_ids=ids, use_cache=True, **options))
        return ids.numel()

    return held.clear, prefill


def _decode_run(
    model: PreTrainedModel, ids: torch.Tensor, held: list[Any], new_tokens: int
) -> tuple[Callable[[], None], Callable[[], int]]:
    """The untimed prefill and the timed decode loop, which find the KV cache in `held`."""
    options = keeps_last(model, 1)

    def prefill() -> None:
        held.clear()
        # The model makes its own cache: a DynamicCache, with sliding layers where it has them.
        output = model(input_ids=ids, use_cache=True, **options)
        held.extend([output.logits[:, -1:].argmax(-1), output.past_key_values])

    def decode() -> int:
        token, cache = held
        for _ in range(new_tokens):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return len(ids) * new_tokens

    return prefill, decode
