"""Perplexity, KL and their errors, against independent computations."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from abreast.cli.main import main
from abreast.data import TokenStream
from abreast.demo import model_folder
from abreast.errors import AbreastError
from abreast.evaluate import statistics
from abreast.evaluate.statistics import bootstrap, mcnemar, ratio_of_means, sign_flips
from abreast.evaluate.text import compare, perplexity, sliding_windows
from abreast.model import scores as scoring
from abreast.model.scores import Reference, token_scores

VOCABULARY = 128


def tiny_model(seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # Large weights, so that predictions are far from uniform and context matters.
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def stream_of(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> TokenStream:
    tokens = np.random.default_rng(seed).integers(vocabulary, size=length)
    return TokenStream(tokens, source="random", num_documents=1, num_bytes=3 * length)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def perturbed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        other.lm_head.weight += 0.1 * torch.randn_like(other.lm_head.weight)
    return other


def log_probabilities(model: LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Next-token log-probabilities at every position, by numpy in float64: [length, vocab]."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_one_window_is_the_token_by_token_sum(model: LlamaForCausalLM) -> None:
    stream = stream_of(40)
    losses = [
        -log_probabilities(model, stream.tokens[:end])[-1, stream.tokens[end]]
        for end in range(1, 40)
    ]
    result = perplexity(model, stream, window=64, stride=32)
    assert result.num_tokens == 39
    assert result.nll == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(np.mean(losses) / np.log(2) / 3, abs=1e-5)
    assert math.isnan(result.nll_stderr)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(
    ("length", "window", "stride"), [(75, 16, 5), (75, 16, 16), (76, 16, 8), (65, 16, 16)]
)
def test_sliding_window_against_brute_force(
    model: LlamaForCausalLM, length: int, window: int, stride: int, batch_size: int
) -> None:
    stream = stream_of(length)
    losses = []
    for position in range(1, length):
        begin = 0
        while begin + window <= position:
            begin += stride
        if begin < position:
            context = stream.tokens[begin:position]
            losses.append(-log_probabilities(model, context)[-1, stream.tokens[position]])
    result = perplexity(model, stream, window=window, stride=stride, batch_size=batch_size)
    assert result.num_tokens == len(losses)
    assert result.nll == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.windows["tokens"].sum() == len(losses)
    assert result.windows["nll"].sum() == pytest.approx(np.sum(losses), abs=1e-3)
    assert result.perplexity_stderr == pytest.approx(result.perplexity * result.nll_stderr)


@given(
    st.integers(2, 200),
    st.integers(2, 50).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w))),
)
def test_windows_score_every_token_once(length: int, sizes: tuple[int, int]) -> None:
    window, stride = sizes
    scored: list[int] = []
    windows = sliding_windows(length, window, stride)
    for begin, end, count in windows:
        assert 0 < count < end - begin <= window
        scored += range(end - count, end)
    assert all(end - begin == window for begin, end, _ in windows[:-1])
    assert len(scored) == len(set(scored))
    left_out = set(range(length)) - set(scored)
    assert left_out == ({0} if stride < window else set(range(0, length, window)))


def test_the_window_is_clipped_and_recorded(model: LlamaForCausalLM) -> None:
    stream = stream_of(150)
    result = perplexity(model, stream, window=1024, stride=512)
    assert (result.window, result.stride) == (64, 32)
    assert result == perplexity(model, stream, window=64, stride=32)
    short = tiny_model()
    short.config.max_position_embeddings = 20
    assert compare(model, short, stream).window == 20


def test_a_model_compared_with_itself(model: LlamaForCausalLM) -> None:
    comparison = compare(model, copy.deepcopy(model), stream_of(200), window=32, stride=16)
    assert (
        comparison.kl,
        comparison.kl_stderr,
        comparison.kl_p50,
        comparison.kl_p99,
        comparison.kl_max,
    ) == (0,) * 5
    assert (comparison.nll_difference, comparison.nll_difference_stderr) == (0, 0)
    assert (comparison.top1_agreement, comparison.top1_agreement_stderr) == (1, 0)
    assert comparison.model == comparison.reference


def test_comparison_by_hand(model: LlamaForCausalLM, perturbed: LlamaForCausalLM) -> None:
    stream = stream_of(50)
    ours = log_probabilities(perturbed, stream.tokens)[:-1]
    theirs = log_probabilities(model, stream.tokens)[:-1]
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    agreement = ours.argmax(-1) == theirs.argmax(-1)
    losses = (theirs - ours)[np.arange(49), stream.tokens[1:]]
    assert 0 < agreement.mean() < 1

    comparison = compare(perturbed, model, stream, window=64, stride=64)
    assert comparison.num_tokens == 49
    assert comparison.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert comparison.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert (comparison.kl_p50, comparison.kl_p95, comparison.kl_p99) == pytest.approx(
        np.percentile(kl, [50, 95, 99]), rel=1e-4
    )
    assert comparison.top1_agreement == pytest.approx(agreement.mean())
    assert comparison.nll_difference == pytest.approx(losses.mean(), abs=1e-5)
    # KL is not symmetric: the other direction must be another number.
    assert abs(compare(model, perturbed, stream).kl - comparison.kl) > 1e-3 * comparison.kl


def test_comparison_agrees_with_perplexity_and_its_own_windows(
    model: LlamaForCausalLM, perturbed: LlamaForCausalLM
) -> None:
    stream = stream_of(300)
    comparison = compare(perturbed, model, stream, window=32, stride=16, batch_size=4)
    sizes = {"window": 32, "stride": 16}
    assert comparison.model.nll == pytest.approx(
        perplexity(perturbed, stream, **sizes).nll, abs=1e-6
    )
    assert comparison.reference.nll == pytest.approx(
        perplexity(model, stream, **sizes).nll, abs=1e-6
    )
    assert comparison.nll_difference == pytest.approx(
        comparison.model.nll - comparison.reference.nll
    )
    windows = comparison.windows
    assert len(windows["tokens"]) == len(sliding_windows(300, 32, 16))
    assert ratio_of_means(windows["kl"], windows["tokens"]) == (comparison.kl, comparison.kl_stderr)
    # Pairing is what makes small differences visible.
    assert 0 < comparison.nll_difference_stderr < comparison.model.nll_stderr


@pytest.mark.parametrize("values", [1, 3 * VOCABULARY * 2, 2**30])
def test_chunking_changes_nothing(
    model: LlamaForCausalLM,
    perturbed: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    values: int,
) -> None:
    stream = stream_of(100)
    expected = compare(perturbed, model, stream, window=32, stride=8, batch_size=2)
    monkeypatch.setattr(scoring, "CHUNK_VALUES", {"cpu": values})
    assert compare(perturbed, model, stream, window=32, stride=8, batch_size=2) == expected


def test_a_model_without_logits_to_keep_gives_the_same(model: LlamaForCausalLM) -> None:
    plain = copy.deepcopy(model)
    forward = plain.forward
    plain.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    stream = stream_of(100)
    expected = perplexity(model, stream, window=32, stride=8)
    assert perplexity(plain, stream, window=32, stride=8).nll == pytest.approx(expected.nll)


def test_half_precision_models_are_scored_in_float32(model: LlamaForCausalLM) -> None:
    half = copy.deepcopy(model).bfloat16()
    comparison = compare(half, model, stream_of(100), window=32, stride=16)
    assert 0 < comparison.kl < 0.5
    assert comparison.nll_difference == pytest.approx(0, abs=0.5)


def test_tokens_the_reference_rules_out_add_nothing(model: LlamaForCausalLM) -> None:
    def masked(logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([5, 6]), -math.inf)

    logits = torch.randn(1, 7, VOCABULARY)
    targets = torch.full((1, 7), 9)
    scores = token_scores(masked(logits), targets, masked(logits))
    assert (scores[..., 2] == 0).all()


def test_scores_against_a_prepared_reference_and_with_ties_are_those_of_argmax() -> None:
    logits, theirs = (torch.randn(3, 7, VOCABULARY).mul(4).round() for _ in range(2))  # many ties
    targets = torch.randint(0, VOCABULARY, (3, 7))
    scores = token_scores(logits, targets, theirs)
    assert (scores == token_scores(logits, targets, Reference.of(theirs))).all()
    same = logits.log_softmax(-1).argmax(-1) == theirs.log_softmax(-1).argmax(-1)
    assert (scores[..., 3] == same.numpy()).all()
    kl = functional.kl_div(
        logits.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
    )
    assert scores[..., 2] == pytest.approx(kl.sum(-1).numpy(), abs=1e-5)


def test_stderr_of_single_token_clusters_is_the_ordinary_one() -> None:
    values = np.random.default_rng(0).normal(size=50)
    mean, stderr = ratio_of_means(values, np.ones(50))
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.std(ddof=1) / np.sqrt(50))


def test_stderr_against_monte_carlo_on_correlated_clusters() -> None:
    rng = np.random.default_rng(0)
    means, errors, naive = [], [], []
    for _ in range(1000):
        counts = rng.integers(10, 60, size=80)
        values = np.repeat(rng.normal(size=80), counts) + rng.normal(size=counts.sum())
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        mean, stderr = ratio_of_means(np.add.reduceat(values, starts), counts)
        means.append(mean)
        errors.append(stderr)
        naive.append(values.std() / np.sqrt(len(values)))
    truth = np.std(means)
    assert np.mean(errors) == pytest.approx(truth, rel=0.1)
    # What forgetting the clusters would have claimed.
    assert np.mean(naive) < 0.5 * truth


def test_to_dict_is_json_and_holds_arrays_only_when_asked(model: LlamaForCausalLM) -> None:
    single = compare(model, model, stream_of(30)).to_dict()
    assert json.loads(json.dumps(single, allow_nan=False)) == single
    assert single["kl_stderr"] is None
    assert "windows" not in single
    assert "windows" not in single["model"]
    full = perplexity(model, stream_of(100), window=32, stride=16).to_dict(windows=True)
    assert len(full["windows"]["nll"]) == len(full["windows"]["tokens"]) == 6
    json.dumps(full, allow_nan=False)


def test_training_modes_gradients_and_caller_are_left_alone() -> None:
    trained = tiny_model().train()
    trained.model.layers[0].eval()
    compare(trained, trained, stream_of(30))
    assert trained.training
    assert trained.lm_head.training
    assert not trained.model.layers[0].training
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_scoring() -> None:
    noisy = tiny_model().train()
    for layer in noisy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    stream = stream_of(100)
    assert perplexity(noisy, stream) == perplexity(noisy, stream)


def test_progress_reaches_the_end(model: LlamaForCausalLM) -> None:
    calls: list[tuple[int, int]] = []
    perplexity(
        model,
        stream_of(100),
        window=32,
        stride=16,
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(2, 6), (4, 6), (5, 6), (6, 6)]


def test_models_that_cannot_be_compared_are_refused(model: LlamaForCausalLM) -> None:
    stream = stream_of(30, vocabulary=100)
    with pytest.raises(AbreastError, match=r"different size \(128 and 144\)"):
        compare(model, tiny_model(vocabulary=144), stream)
    with pytest.raises(AbreastError, match=r"vocabulary of the reference model \(90 tokens\)"):
        compare(model, tiny_model(vocabulary=90), stream)


@pytest.mark.parametrize("broken", [0, 1])
def test_nan_logits_name_the_model(model: LlamaForCausalLM, broken: int) -> None:
    bad = copy.deepcopy(model)
    with torch.no_grad():
        bad.lm_head.weight[3, 0] = math.nan
    pair = (bad, model) if broken == 0 else (model, bad)
    with pytest.raises(AbreastError, match=["^the model gives", "^the reference model"][broken]):
        compare(*pair, stream_of(30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window is 1"),
        ({"window": 8, "stride": 9}, "stride is 9"),
        ({"stride": 0}, "stride is 0"),
        ({"batch_size": 0}, "batch size is 0"),
    ],
)
def test_senseless_sizes_are_refused(
    model: LlamaForCausalLM, options: dict[str, int], message: str
) -> None:
    with pytest.raises(AbreastError, match=message):
        perplexity(model, stream_of(30), **options)


def test_a_stream_of_one_token_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(AbreastError, match="1 tokens"):
        perplexity(model, stream_of(1))


def test_bootstrap_agrees_with_the_standard_error() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(10, 60, size=200)
    sums = rng.normal(0.3, 1, size=200) * counts
    mean, stderr = ratio_of_means(sums, counts)
    intervals = bootstrap(
        {"sum": sums, "count": counts},
        {"mean": lambda drawn: drawn["sum"] / drawn["count"]},
    )
    low, high = intervals["mean"]
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * stderr, rel=0.1)


def test_bootstrap_is_paired_seeded_and_covers() -> None:
    rng = np.random.default_rng(1)
    ones = np.ones(40)
    hits = 0
    for trial in range(200):
        common = rng.normal(0, 10, size=40)
        sums = {"a": common + rng.normal(1, 1, size=40), "b": common, "n": ones}
        statistic = {"d": lambda drawn: (drawn["a"] - drawn["b"]) / drawn["n"]}
        low, high = bootstrap(sums, statistic, resamples=400, seed=trial)["d"]
        assert high - low < 1.5  # what both share cancels
        hits += low <= 1 <= high
    assert 180 <= hits <= 198
    again = [bootstrap(sums, statistic, seed=seed) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]


def test_statistics_of_one_and_two_clusters_by_hand() -> None:
    sums, counts = np.array([1.0, 3.0]), np.ones(2)
    assert ratio_of_means(sums, counts) == (2, 1)
    mean, error = ratio_of_means(sums[1:], 2 * counts[1:])
    assert mean == 1.5 and math.isnan(error)
    # Of two clusters the resampled totals are 2, 4 and 6, a quarter of them each end.
    statistic = {"total": lambda drawn: drawn["sum"], "count": lambda drawn: drawn["sum"] / 0}
    intervals = bootstrap({"sum": sums}, statistic)
    assert intervals["total"] == (2, 6) and np.isnan(intervals["count"]).all()
    assert np.isnan(bootstrap({"sum": sums[1:]}, statistic)["total"]).all()


def test_intervals_leave_out_what_is_not_finite() -> None:
    values = np.arange(1001.0)
    assert statistics.interval(values) == (25, 975)
    assert statistics.interval(np.append(values, [math.inf, math.nan])) == (25, 975)


def test_draws_are_the_same_in_number_however_few_are_held_at_once(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "_MAX_DRAWS", 20)  # two at a time of five rows and two columns
    columns = np.stack([np.ones(5), np.arange(5)], 1)
    totals = statistics.resampled(columns, np.random.default_rng(0), 7)
    assert totals.shape == (7, 2) and (totals[:, 0] == 5).all()
    assert len(set(totals[:, 1])) > 2 and totals[:, 1].max() <= 20
    values = np.array([0.5, -0.2, 0.9, 0.4])  # of 16 signs, 4 reach as far
    assert sign_flips(values, resamples=2001) == pytest.approx(4 / 16, abs=0.03)
    assert sign_flips(np.ones(40), resamples=99) == 1 / 100
    monkeypatch.setattr(statistics, "_MAX_DRAWS", 1)  # still one at a time
    assert statistics.resampled(columns, np.random.default_rng(0), 3).shape == (3, 2)
    assert sign_flips(np.ones(40), resamples=9) == 1 / 10


def test_exact_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    # Near the normal approximation where there are many.
    z = (3100 - 2900 - 1) / math.sqrt(6000)
    assert mcnemar(2900, 3100) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_sign_flips_against_all_of_them() -> None:
    values = np.array([0.5, -0.2, 0.9, 0.4, 0.3, -0.1, 0.8, 0.6])
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = (np.abs(signs @ values) >= abs(values.sum()) - 1e-9).mean()
    assert sign_flips(values) == pytest.approx(exact, abs=0.01)
    assert sign_flips(np.zeros(5)) == 1


def test_intervals_hold_what_they_are_of(
    model: LlamaForCausalLM, perturbed: LlamaForCausalLM
) -> None:
    stream = stream_of(600)
    comparison = compare(perturbed, model, stream, window=32, stride=32)
    for name in ("nll_difference", "kl", "top1_agreement"):
        low, high = comparison.bootstrap[name]
        assert low < getattr(comparison, name) < high
        stderr = getattr(comparison, f"{name}_stderr")
        assert high - low == pytest.approx(2 * 1.96 * stderr, rel=0.25)
    ratio = tuple(math.exp(end) for end in comparison.bootstrap["nll_difference"])
    assert comparison.bootstrap["perplexity_ratio"] == pytest.approx(ratio)
    assert comparison == compare(perturbed, model, stream, window=32, stride=32)
    other = compare(perturbed, model, stream, window=32, stride=32, seed=1)
    assert other.bootstrap != comparison.bootstrap and other.kl == comparison.kl
    worse = comparison.windows["nll"] > comparison.windows["reference_nll"]
    assert comparison.windows_worse == worse.mean()


@pytest.mark.parametrize("stride", [32, 12])
def test_kl_by_position_by_hand(
    model: LlamaForCausalLM, perturbed: LlamaForCausalLM, stride: int
) -> None:
    stream = stream_of(150)
    comparison = compare(perturbed, model, stream, window=32, stride=stride)
    sums: dict[int, list[float]] = {}
    for begin, end, scored in sliding_windows(150, 32, stride):
        tokens = stream.tokens[begin:end]
        theirs, ours = (log_probabilities(m, tokens) for m in (model, perturbed))
        kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
        for position in range(len(tokens) - scored, len(tokens)):
            sums.setdefault(position // 4, []).append(kl[position - 1])
    assert [bucket.start // 4 for bucket in comparison.kl_by_position] == sorted(sums)
    for bucket in comparison.kl_by_position:
        assert bucket.end == bucket.start + 3
        assert bucket.kl == pytest.approx(np.mean(sums[bucket.start // 4]), rel=1e-3)
    # Together they are the mean over all tokens.
    sizes = [len(sums[bucket.start // 4]) for bucket in comparison.kl_by_position]
    means = [bucket.kl for bucket in comparison.kl_by_position]
    assert np.average(means, weights=sizes) == pytest.approx(comparison.kl)


def test_one_window_has_no_interval_and_the_json_says_so(
    model: LlamaForCausalLM, perturbed: LlamaForCausalLM
) -> None:
    comparison = compare(perturbed, model, stream_of(30)).to_dict()
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison
    assert comparison["bootstrap"]["kl"] == [None, None]
    assert comparison["kl_by_position"][0]["stderr"] is None
    several = compare(perturbed, model, stream_of(200), window=32, stride=32).to_dict()
    assert set(several["bootstrap"]) == {
        *("nll_difference", "kl", "top1_agreement", "perplexity_ratio"),
    }
    assert set(several["kl_by_position"][0]) == {"start", "end", "kl", "stderr"}
    assert several["kl_by_position"][-1]["end"] == 31


@pytest.mark.slow
def test_several_texts_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["abreast", "eval", str(model_folder()), *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        return capsys.readouterr().out

    names = [str(tmp_path / name) for name in ("one.txt", "two.txt")]
    for name in names:
        Path(name).write_text(f"import {Path(name).stem}\n" * 60)
    texts = [part for name in names for part in ("--data", name)]
    few = ("--max-tokens", "200", "--window", "64", "--stride", "64", "--plan", "2+3")
    against = ("--against", str(model_folder()))
    both = json.loads(run(*texts, *few, *against, "--json", "--per-window"))
    assert [corpus["data"]["source"] for corpus in both["corpora"]] == names
    assert "result" not in both
    single = json.loads(run(*texts[2:], *few, *against, "--json"))
    last = both["corpora"][1]
    assert len(last["result"].pop("windows")["kl"]) > 1
    for part in ("model", "reference"):
        last["result"][part].pop("windows")
    assert (single["data"], single["result"]) == (last["data"], last["result"])
    printed = run(*texts, *few, *against)
    assert "loss increase" in printed and printed.count(".txt") == 2
    assert "±" in run(*texts, *few)
