"""Timing: what is counted, in what order, and what may be claimed; on an injected clock."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from abreast.errors import AbreastError
from abreast.speed.benchmark import bench
from abreast.speed.timing import (
    BenchResult,
    Measurement,
    claim,
    ratio_interval,
    time_in_turn,
    timings,
    verdict,
)


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: Callable[[], float], tokens: int = 1) -> Callable[[], int]:
        def run() -> int:
            self.now += seconds()
            return tokens

        return run


def tiny_model(seed: int = 0, vocabulary: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def result_of(measurement: Measurement) -> BenchResult:
    return BenchResult(
        task="decode",
        original="original",
        batch_size=1,
        context=8,
        new_tokens=4,
        rounds=len(next(iter(measurement.seconds.values()))),
        warmup=0,
        seed=0,
        device="cpu",
        dtype="float32",
        threads=1,
        timings=timings(measurement),
        seconds=measurement.seconds,
    )


def drifting(factor: float, rounds: int = 20, seed: int = 0, noise: float = 0.02) -> BenchResult:
    """Two candidates, the second `factor` times as fast, on a machine that slows down threefold."""
    rng = np.random.default_rng(seed)
    clock = Clock()
    drift = iter(np.repeat(np.linspace(1, 3, rounds), 2))

    def seconds(speed: float) -> Callable[[], float]:
        return lambda: next(drift) * rng.lognormal(0, noise) / speed

    candidates = {"original": clock.work(seconds(1)), "abreast": clock.work(seconds(factor))}
    return result_of(time_in_turn(candidates, rounds=rounds, warmup=0, clock=clock))


def test_rounds_alternate_and_warmup_is_dropped() -> None:
    clock, order = Clock(), []

    def run(name: str) -> Callable[[], int]:
        def call() -> int:
            order.append(name)
            clock.now += len(order)
            return 7

        return call

    measurement = time_in_turn({name: run(name) for name in "AB"}, rounds=3, warmup=1, clock=clock)
    assert "".join(order) == "ABBAABBA"
    assert measurement.seconds["A"].tolist() == [4, 5, 8]
    assert measurement.seconds["B"].tolist() == [3, 6, 7]
    assert measurement.tokens == {"A": 7, "B": 7}


def test_preparation_is_not_timed_but_queued_work_is() -> None:
    clock, queued = Clock(), []

    def synchronize() -> None:
        clock.now += sum(queued)
        queued.clear()

    def run() -> int:
        queued.append(2.0)
        return 1

    measurement = time_in_turn(
        {"A": run},
        rounds=2,
        warmup=0,
        prepare={"A": lambda: queued.append(100.0)},
        synchronize=synchronize,
        clock=clock,
    )
    assert measurement.seconds["A"].tolist() == [2, 2]


def test_collection_is_off_while_timing_and_on_again_after_failure() -> None:
    seen = []

    def run() -> int:
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise RuntimeError
        return 1

    with pytest.raises(RuntimeError):
        time_in_turn({"A": run}, rounds=5, warmup=0)
    assert seen == [False] * 3
    assert gc.isenabled()


def test_changing_work_is_refused() -> None:
    counts = iter([4, 5])
    with pytest.raises(AbreastError, match="4 tokens in one run and 5"):
        time_in_turn({"A": lambda: next(counts)}, rounds=2, warmup=0)


@pytest.mark.parametrize("factor", [1.25, 0.8])
def test_interval_holds_the_truth_in_spite_of_drift(factor: float) -> None:
    summary = drifting(factor)
    timing = summary.timings["abreast"]
    assert timing.ratio_low < factor < timing.ratio_high
    assert timing.ratio_high - timing.ratio_low < 0.05
    # Unpaired, the drift swamps the difference.
    assert timing.iqr / timing.median > 0.3


def test_a_a_comparisons_claim_a_difference_about_one_time_in_twenty() -> None:
    claims = [verdict(drifting(1, seed=seed)) for seed in range(60)]
    wrong = [claim for claim in claims if not claim.startswith("no difference measured here")]
    assert len(wrong) <= 6


@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_spells_of_noise_widen_the_interval(correlation: float) -> None:
    """First-order autoregressive noise of the logarithm; the truth is 1."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        noise = rng.normal(size=80)
        for index in range(1, 80):
            noise[index] += correlation * noise[index - 1]
        _, low, high = ratio_interval(np.exp(0.02 * noise[40:]), np.ones(40))
        held += low <= 1 <= high
    assert held >= 180  # 90 %; at 0.4 a bootstrap over rounds holds it 84 % of the time


def test_an_order_that_matters_hides_no_tie() -> None:
    # Whoever runs second is 10 % slower: the ratios are 1.1 and 1/1.1 in turn.
    ratios = np.tile([1.1, 1 / 1.1], 10)
    _, low, high = ratio_interval(ratios, np.ones(20))
    assert low < 1 < high


def test_summary_by_hand() -> None:
    measurement = Measurement(
        {"original": np.array([2.0, 4.0, 6.0, 8.0]), "abreast": np.array([1.0, 4.0, 3.0, 4.0])},
        {"original": 12, "abreast": 12},
    )
    summary = timings(measurement)
    original, other = summary["original"], summary["abreast"]
    assert (original.median, original.min, original.max, original.iqr) == (5, 2, 8, 3)
    assert (original.ratio, original.ratio_low, original.ratio_high) == (1, 1, 1)
    assert original.tokens_per_second == pytest.approx(12 / 5)
    # Ratios per round are 2, 1, 2, 2; the ratio of the medians would be 5 / 3.5.
    assert other.ratio == 2
    assert 1 <= other.ratio_low <= other.ratio_high == 2


def test_interval_ends_at_the_binomial_ranks() -> None:
    # 20 rounds, no correlation: the 6th smallest and the 6th largest (coverage 95.9 %).
    ratios = np.array([*range(1, 21)], dtype=float)[np.random.default_rng(5).permutation(20)]
    signs = np.sign(ratios - 10.5)
    assert abs(signs[1:] @ signs[:-1]) <= 2
    assert ratio_interval(ratios, np.ones(20)) == (10.5, 6, 15)
    assert ratio_interval(ratios[:6], np.ones(6))[1:] == (ratios[:6].min(), ratios[:6].max())
    with pytest.raises(AbreastError, match="no measurable time"):
        ratio_interval(ratios, np.zeros(20))


def test_verdict_in_words() -> None:
    assert verdict(drifting(1.25)).startswith("faster by 1.2")
    slower = verdict(drifting(0.8))
    assert slower.startswith("slower here by 1.2")
    assert slower.endswith("do not use it for this")
    assert verdict(drifting(1)).startswith("no difference measured here: 1.0")
    assert verdict(drifting(1.25, rounds=5)) == "too few rounds to say: 5; use at least 6"
    alone = result_of(Measurement({"original": np.ones(8)}, {"original": 1}))
    assert verdict(alone) == "nothing to compare with"


def test_verdict_shows_an_interval_that_excludes_1() -> None:
    slower = drifting(1.25)
    barely = replace(slower.timings["abreast"], ratio=1.004, ratio_low=1.001, ratio_high=1.008)
    timing = {**slower.timings, "abreast": barely}
    assert verdict(replace(slower, timings=timing)) == "faster by 1.004x [1.001, 1.008]"


def test_verdict_names_several_candidates() -> None:
    seconds = {"original": np.ones(8), "fast": np.full(8, 0.5), "slow": np.full(8, 2.0)}
    lines = verdict(result_of(Measurement(seconds, dict.fromkeys(seconds, 1)))).splitlines()
    assert lines[0] == "fast: faster by 2.00x [2.00, 2.00]"
    assert lines[1] == "slow: slower here by 2.00x [2.00, 2.00]: do not use it for this"


def ticking(clock: Clock, cost: float, seen: list[torch.Tensor]) -> LlamaForCausalLM:
    """A model whose forward pass moves the clock by `cost` per position fed in."""
    model = tiny_model()

    def tick(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["input_ids"].clone())
        clock.now += cost * kwargs["input_ids"].shape[1]

    model.register_forward_pre_hook(tick, with_kwargs=True)
    return model


def test_prefill_times_one_pass_over_the_prompt() -> None:
    clock, seen = Clock(), []
    models = {"original": ticking(clock, 2.0, seen), "abreast": ticking(clock, 1.0, seen)}
    result = bench(
        models, task="prefill", batch_size=3, context=11, rounds=6, warmup=1, clock=clock
    )
    assert result.seconds["original"].tolist() == [22] * 6
    assert result.timings["original"].tokens_per_second == pytest.approx(33 / 22)
    assert verdict(result) == "faster by 2.00x [2.00, 2.00]"
    assert len(seen) == 2 * (7 + 1)  # and one untimed pass each, for the memory
    assert all(torch.equal(ids, seen[0]) for ids in seen)
    assert result.new_tokens == 0


def test_decode_times_only_the_new_tokens() -> None:
    clock, seen = Clock(), []
    result = bench(
        {"original": ticking(clock, 1.0, seen)},
        task="decode",
        batch_size=2,
        context=11,
        new_tokens=5,
        rounds=2,
        warmup=1,
        clock=clock,
    )
    assert result.seconds["original"].tolist() == [5, 5]
    assert result.timings["original"].tokens_per_second == pytest.approx(2)
    assert [ids.shape[1] for ids in seen] == [11, 1, 1, 1, 1, 1] * 4


def test_decode_generates_what_generate_does() -> None:
    clock, seen = Clock(), []
    model = ticking(clock, 1.0, seen)
    bench(
        {"m": model},
        task="decode",
        batch_size=2,
        context=9,
        new_tokens=6,
        rounds=1,
        warmup=0,
        clock=clock,
    )
    prompt, fed = seen[0], torch.cat(seen[1:7], dim=1)
    model.generation_config.eos_token_id = None
    expected = model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(fed, expected[:, 9:])


def test_prompts_depend_on_the_seed_and_modes_are_restored() -> None:
    clock, seen = Clock(), []
    model = ticking(clock, 1.0, seen).train()
    model.model.layers[0].eval()
    for seed in (0, 0, 1):
        bench({"m": model}, task="prefill", context=20, rounds=1, warmup=0, seed=seed, clock=clock)
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[-1])
    assert model.training
    assert not model.model.layers[0].training


def test_result_is_json() -> None:
    result = bench({"m": tiny_model()}, task="decode", context=4, new_tokens=2, rounds=2)
    dumped = result.to_dict()
    assert json.loads(json.dumps(dumped)) == dumped
    assert "seconds" not in dumped
    assert dumped["dtype"] == "float32"
    assert len(result.to_dict(seconds=True)["seconds"]["m"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "train"}, "unknown task 'train'"),
        ({"task": "prefill", "context": 0}, "at least 1"),
        ({"task": "decode", "context": 4, "new_tokens": 0}, "at least 1"),
        ({"task": "decode", "context": 60, "new_tokens": 5}, "'m' holds 64 tokens, fewer than"),
        ({"task": "prefill", "context": 4, "rounds": 0}, "cannot time 0 rounds"),
    ],
)
def test_senseless_requests_are_refused(options: dict, message: str) -> None:
    with pytest.raises(AbreastError, match=message):
        bench({"m": tiny_model()}, **options)


def test_unlike_models_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(AbreastError, match="different dtypes"):
        bench({"a": model, "b": tiny_model().bfloat16()}, task="prefill", context=4)
    with pytest.raises(AbreastError, match="different vocabularies"):
        bench({"a": model, "b": tiny_model(vocabulary=64)}, task="prefill", context=4)
    with pytest.raises(AbreastError, match="nothing to time"):
        bench({}, task="prefill")


def test_a_difference_that_half_of_the_rounds_show_is_none() -> None:
    def said(other: np.ndarray) -> str:
        seconds = {"original": np.ones(14), "abreast": other}
        summary = timings(Measurement(seconds, dict.fromkeys(seconds, 1)))
        return claim(summary["abreast"], rounds=14)

    both = np.full(14, 0.8)
    assert said(both).startswith("faster by 1.25x")
    # the interval of the median alone is [1.25, 1.25]
    first = np.where(np.arange(14) < 10, 0.8, 1.01)
    assert said(first).startswith("no difference measured here: 1.25x [0.99, 1.25]")
