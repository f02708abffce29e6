"""Refitting in closed form: the regression itself, whole models, and what it must leave alone."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abreast.data import CALIBRATION, HELD_OUT, load_tokens
from abreast.demo import model_folder
from abreast.errors import AbreastError
from abreast.evaluate.text import compare
from abreast.heal import least_squares
from abreast.heal.least_squares import _check_memory, memory_needed, refit
from abreast.heal.ridge import RIDGES, Moments, moments_pair, ridge_solution, solve
from abreast.model.grouping import decoder_layers, grouped, load
from abreast.plan import Plan

PLAN = Plan.parse("1+2 3|4", 6)
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def words(windows: int, window: int, seed: int = 0, vocabulary: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (windows, window))


def moments(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[Moments, Moments]:
    pair = moments_pair(inputs.shape[1], targets.shape[1], torch.device("cpu"))
    third = len(inputs) // 3
    pair[0].add(inputs[:third], targets[:third])
    pair[1].add(inputs[third:], targets[third:])
    return pair


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 40),
    inputs=st.integers(1, 12),
    targets=st.integers(1, 6),
    ridge=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**16),
)
def test_ridge_is_the_least_squares_solution(tokens, inputs, targets, ridge, seed):
    """Against numpy's least squares on the same problem, with a row per penalised weight.

    Small integers, whose sums of products float32 holds exactly: what is left is the algebra.
    """
    generator = torch.Generator().manual_seed(seed)
    u, t, start = (
        torch.randint(-8, 9, shape, generator=generator).float()
        for shape in ((tokens, inputs), (tokens, targets), (targets, inputs))
    )
    sums = Moments(inputs, targets, torch.device("cpu"))
    sums.add(u, t)
    weight = ridge_solution(sums, start.double(), ridge)
    rows = np.concatenate([u.double(), math.sqrt(ridge) * np.eye(inputs)])
    right = np.concatenate([t.double(), math.sqrt(ridge) * start.double().T])
    expected = np.linalg.lstsq(rows, right, rcond=None)[0].T
    assert np.allclose(weight, expected, rtol=1e-8, atol=1e-8)
    direct = float((t.double() - u.double() @ weight.T).square().sum())
    assert sums.error(weight) == pytest.approx(direct, rel=1e-8, abs=1e-6)


def test_solve_finds_what_is_there():
    generator = torch.Generator().manual_seed(0)
    u, true = torch.randn(600, 8, generator=generator), torch.randn(3, 8, generator=generator)
    solution, ridge, before, after = solve(*moments(u, u @ true.T), torch.zeros(3, 8).double())
    assert ridge == min(RIDGES)
    assert torch.allclose(solution.float(), true, atol=1e-3)
    assert before == pytest.approx(1) and after < 1e-6


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_the_ridge_is_that_with_the_least_error_on_the_batches_left_out(noise):
    generator = torch.Generator().manual_seed(1)
    u = 3 * torch.randn(90, 20, generator=generator)
    t = u @ torch.randn(20, 4, generator=generator)
    t += 3 * noise * torch.randn(90, 4, generator=generator)
    u, t = ((8 * x).round() / 8 for x in (u, t))  # sums of products are exact, in any order
    start = torch.randn(4, 20, generator=generator).double()
    inputs, targets, checked = u.double(), t.double(), slice(0, 30)  # of which `moments` checks

    def fitted(rows, candidate):
        gram = inputs[rows].T @ inputs[rows]
        ridge = candidate * gram.diagonal().mean() * torch.eye(20, dtype=torch.float64)
        right = inputs[rows].T @ targets[rows] + ridge @ start.T
        return torch.linalg.solve(gram + ridge, right).T

    def error(weight):
        wrong = targets[checked] - inputs[checked] @ weight.T
        return float(wrong.square().sum() / targets[checked].square().sum())

    errors = [error(fitted(slice(30, 90), candidate)) for candidate in RIDGES]
    best = next((i for i, e in enumerate(errors[:-1]) if errors[i + 1] >= e), len(errors) - 1)
    solution, ridge, before, after = solve(*moments(u, t), start)
    assert ridge == RIDGES[best] and before == pytest.approx(error(start), rel=1e-5)
    assert after == pytest.approx(errors[best], rel=1e-5)
    assert torch.allclose(solution, fitted(slice(0, 90), ridge), rtol=1e-4, atol=1e-5)


def test_solve_keeps_weights_where_nothing_can_be_learnt():
    generator = torch.Generator().manual_seed(0)
    u, noise = torch.randn(60, 30, generator=generator), torch.randn(60, 2, generator=generator)
    start = torch.zeros(2, 30).double()
    solution, ridge, before, after = solve(*moments(u, 0.01 * noise), start)
    # Sixty tokens of pure noise for thirty inputs: whatever is fitted is worse on the next fold.
    assert after <= before
    assert ridge is None or float(solution.norm()) < 0.01


@pytest.mark.parametrize(
    ("family", "plan"),
    [(family, PLAN) for family in ("llama", "qwen3", "granite", "phi", "gemma2", "phi3")]
    + [(family, Plan.parse("1~2 3|4", 6)) for family in ("llama", "gemma2")],
    ids=str,
)
def test_refit_brings_the_grouped_model_nearer(tiny_checkpoint, family, plan):
    model, _ = load(tiny_checkpoint(family, biases=True))
    before = weights_of(model)
    refitted = refit(model, plan, words(40, 32))
    assert refitted.kl_after < refitted.kl_before and not refitted.kept
    assert refitted.num_tokens == 36 * 32  # one window in ten is held out
    members = {f"layers.{layer}." for group in plan.groups for layer in group.layers}
    for name, weight in model.named_parameters():
        # matrices of grouped layers, and gains of norms behind them
        may_change = weight.dim() == 2 or (family == "gemma2" and ".post_" in name)
        assert (may_change and any(member in name for member in members)) or torch.equal(
            weight, before[name]
        ), name
    assert {fit.step for fit in refitted.fits} == {"qkv", "gate_up", "out"}
    assert all(fit.after <= fit.before for fit in refitted.fits)


@pytest.mark.parametrize(
    ("step", "names"),
    [
        ("qkv", {"q_proj", "k_proj", "v_proj"}),
        ("gate_up", {"gate_proj", "up_proj"}),
        ("out", {"o_proj", "down_proj"}),
    ],
)
def test_each_step_solves_for_its_own_matrices(tiny_checkpoint, monkeypatch, step, names):
    monkeypatch.setattr(least_squares, "mean_kl", lambda *_: next(falling))
    falling = iter((1.0, 0.5))  # so that what was found is kept, however little alone
    model, _ = load(tiny_checkpoint())
    before = weights_of(model)
    refitted = refit(model, PLAN, words(40, 32), steps=(step,))
    assert {fit.step for fit in refitted.fits} == {step}
    changed = {n.split(".")[-2] for n, w in model.named_parameters() if not w.equal(before[n])}
    assert changed == names


@pytest.mark.parametrize("family", ["llama", "granite", "phi", "starcoder2"])
def test_a_group_that_equals_the_original_has_nothing_to_learn(tiny_checkpoint, family):
    """A first member that adds nothing but its biases' zeros: grouped and sequential agree.

    A family's scale or a bias left out of the target would show as an error before.
    """
    model, _ = load(tiny_checkpoint(family, biases=True))
    with torch.no_grad():
        for name, weight in decoder_layers(model)[1].named_parameters():
            if any(part in name for part in ("o_proj", "dense", "down", "fc2", "c_proj")):
                weight.zero_()
    refitted = refit(model, Plan.parse("1+2", 6), words(12, 48), steps=("out",))
    assert refitted.kl_before < 1e-6
    assert refitted.fits[0].before < 1e-6


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_output_matrices_are_refitted_under_norms_too(tiny_checkpoint, family):
    model, _ = load(tiny_checkpoint(family))
    refitted = refit(model, PLAN, words(60, 48), steps=("out",))
    assert [fit.layers for fit in refitted.fits] == [(1, 2), (3, 4)] and not refitted.kept
    assert refitted.kl_after < 0.9 * refitted.kl_before


def test_a_token_with_a_huge_residual_stream_does_not_decide(tiny_checkpoint):
    """As the first of a window has in real models, where one neuron fires for it.

    Token 0 alone has a first component, which only the first neuron of layer 1 reads.
    """
    model, _ = load(tiny_checkpoint())
    tokens = np.random.default_rng(0).integers(1, 128, (60, 48))
    tokens[:, 0] = 0
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 0
        embedding[0, 0] = embedding.norm(dim=-1).mean()
        for layer in decoder_layers(model):
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        mlp = decoder_layers(model)[1].mlp
        for reader in (mlp.gate_proj, mlp.up_proj):
            reader.weight[0] = torch.eye(64)[0]
        mlp.down_proj.weight[1:, 0] = 1000 * torch.randn(63, generator=torch.manual_seed(0))
    refitted = refit(model, PLAN, tokens, steps=("out",))
    assert refitted.kl_after < 0.7 * refitted.kl_before


@pytest.mark.slow
def test_few_tokens_do_no_harm():
    """1,000 tokens of calibration: the KL on other, held-out text must not rise."""
    plan = Plan.parse("5+6 7+8", 16)
    model, tokenizer = load(model_folder(), dtype="float32")
    original, _ = load(model_folder(), dtype="float32")
    text = load_tokens(tokenizer, CALIBRATION, max_tokens=1000, seed=3)
    held_out = load_tokens(tokenizer, HELD_OUT, max_tokens=2048)
    sizes = {"window": 256, "stride": 256, "batch_size": 8}
    with grouped(model, plan):
        before = compare(model, original, held_out, **sizes)
    refit(model, plan, text.tokens.reshape(8, 125))
    with grouped(model, plan):
        after = compare(model, original, held_out, **sizes)
    assert after.kl <= before.kl


def test_weights_come_back_where_nothing_is_won(tiny_checkpoint, monkeypatch):
    model, _ = load(tiny_checkpoint())
    before = weights_of(model)
    measured = iter([1.0, 1.0])
    monkeypatch.setattr("abreast.heal.least_squares.mean_kl", lambda *_: next(measured))
    assert refit(model, PLAN, words(12, 48)).kept
    assert same(before, weights_of(model))


@pytest.mark.parametrize(("windows", "held_out"), [(7, 1), (19, 1), (20, 2), (600, 51)])
def test_so_many_windows_are_held_out(tiny_checkpoint, windows, held_out, monkeypatch):
    """One in ten, at least one, and no more than 4096 tokens, here 51 windows of 80."""
    model, _ = load(tiny_checkpoint())
    monkeypatch.setattr(least_squares, "_Streams", lambda *_: None)
    monkeypatch.setattr(least_squares, "_walk", lambda *_: ())
    refitted = refit(model, PLAN, words(windows, 80), prefix=16)
    assert refitted.num_tokens == (windows - held_out) * 64


def test_an_error_leaves_the_weights_alone(tiny_checkpoint):
    model, _ = load(tiny_checkpoint())
    before = weights_of(model)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refit(model, PLAN, words(12, 48), progress=stop)
    assert same(before, weights_of(model))


def test_not_finite_activations_are_an_error(tiny_checkpoint):
    model, _ = load(tiny_checkpoint())
    with torch.no_grad():
        decoder_layers(model)[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(AbreastError, match="not finite"):
        refit(model, PLAN, words(12, 48))


@pytest.mark.parametrize(
    ("plan", "tokens", "steps", "message"),
    [
        ("1+2", words(3, 256), ("out",), "too little text"),
        ("1+2", words(20, 20), ("out",), "too little text"),
        ("1+2", words(8, 128) + 100, ("out",), "outside the model's vocabulary"),
        ("1+2", words(8, 128), ("down",), "choose some of qkv, gate_up, out"),
        ("1+2", words(8, 128), (), "choose some of qkv, gate_up, out"),
        ("", words(8, 128), ("out",), "no groups"),
    ],
)
def test_bad_input(tiny_checkpoint, plan, tokens, steps, message):
    model, _ = load(tiny_checkpoint())
    with pytest.raises(AbreastError, match=message):
        refit(model, Plan.parse(plan, 6), tokens, steps=steps)


def test_plan_of_another_model(tiny_checkpoint):
    model, _ = load(tiny_checkpoint())
    with pytest.raises(AbreastError, match="the plan is for 8 layers, the model has 6"):
        refit(model, Plan.parse("1+2", 8), words(8, 128))


def test_a_7b_model_fits_one_80_gb_device():
    needs = memory_needed(LLAMA_2_7B)
    assert needs["weights"] == pytest.approx(2 * 6.74e9, rel=0.01)
    assert needs["total"] == sum(value for name, value in needs.items() if name != "total")
    assert needs["total"] < 80e9
    # Without the widest regression there is hardly anything beside the weights.
    assert memory_needed(LLAMA_2_7B, largest_group=3)["moments"] > needs["moments"]


def test_memory_by_hand():
    """Of 4 layers of hidden size 8, FFN of 16, and 2 heads of 4 that share one of keys and values:
    8 x 8 for q and o, 4 x 8 for k and v, 16 x 8 for gate, up and down."""
    config = {**LLAMA_2_7B, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "num_hidden_layers": 4, "vocab_size": 10}
    weights = 4 * (2 * 64 + 2 * 32 + 3 * 128) + 2 * 10 * 8
    assert memory_needed(config, bytes_per_weight=4, batch_tokens=100, largest_group=3) == {
        "weights": 4 * weights,
        "moments": 2 * 8 * (72 * 72 + 72 * 8),  # 72: three members' heads and neurons
        "solve": 8 * (2 * 72 * 72 + 3 * 72 * 8),
        "activations": 4 * 100 * (2 * 72 + 8 * 8),
        "total": 4 * weights + 8 * (4 * 72 * 72 + 5 * 72 * 8) + 400 * 208,
    }
    usual = memory_needed(config, bytes_per_weight=2, batch_tokens=16_384, largest_group=2)
    assert memory_needed(config) == usual


def test_too_little_memory_on_a_device_is_said_before_anything_is_computed(monkeypatch):
    plan, device = Plan.parse("1+2 3+4+5", 32), SimpleNamespace(device="cuda:1")
    needs = memory_needed(LLAMA_2_7B, largest_group=3)
    room = needs["total"] - needs["weights"]
    free = iter([room, room - 1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 10**12))
    _check_memory(device, LLAMA_2_7B, plan)
    with pytest.raises(AbreastError, match=f"needs {room / 1e9:.0f} GB beside .* on cuda:1; use"):
        _check_memory(device, LLAMA_2_7B, plan)


def test_memory_is_what_is_really_allocated():
    """The formula's moments, counted on the tensors that a regression of that width makes."""
    config = {**LLAMA_2_7B, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config["num_key_value_heads"] = 4
    width = 2 * (64 + 96)
    sets = moments_pair(width, 64, torch.device("cpu"))
    held = sum(moments.gram.nbytes + moments.cross.nbytes for moments in sets)
    assert memory_needed(config)["moments"] == held
