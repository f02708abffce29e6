"""The rewrite's arithmetic: a wide layer made by the rules equals the group run member by member.

The reference below is written out in plain torch in float64, without positions: RMSNorm, grouped
query attention, SwiGLU. It shares nothing with the package but the names of the tensors.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from abreast.convert.fold import (
    TensorRule,
    fold_gain,
    fold_shift,
    join_columns,
    join_rows,
    pad,
    sum_biases,
    tensor_rules,
)
from abreast.convert.rules import FoldError, attention_kinds, check_plan, obstacle
from abreast.families.row import all_tensors, layer_tensors, outer_tensors
from abreast.families.table import CONVERTIBLE
from abreast.plan import Group, Plan

Tensors = dict[str, torch.Tensor]
EPSILON = 1e-5


def linear(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def normed(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * tensors[f"{name}.weight"]


def attention(layer: Tensors, x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Causal attention branch of one layer: [length, hidden] -> the same."""
    x = normed(layer, "input_layernorm", x)
    q, k, v = (
        linear(layer, f"self_attn.{name}_proj", x).unflatten(-1, (-1, head_dim)).transpose(0, 1)
        for name in "qkv"
    )
    share = len(q) // len(k)
    heads = []
    for index in range(len(q)):
        scores = q[index] @ k[index // share].T / math.sqrt(head_dim)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[index // share])
    return linear(layer, "self_attn.o_proj", torch.cat(heads, -1))


def ffn(layer: Tensors, y: torch.Tensor) -> torch.Tensor:
    y = normed(layer, "post_attention_layernorm", y)
    gate, up = linear(layer, "mlp.gate_proj", y), linear(layer, "mlp.up_proj", y)
    return linear(layer, "mlp.down_proj", gate * gate.sigmoid() * up)


def run(layers: list[tuple[list[Tensors], list[Tensors]]], x: torch.Tensor, head_dim: int) -> Any:
    """One after another: all attentions of a layer read its input, all FFNs the sum of them."""
    for attentions, ffns in layers:
        y = x + sum(attention(layer, x, head_dim) for layer in attentions)
        x = y + sum(ffn(layer, y) for layer in ffns)
    return x


def cook(rule: TensorRule, source: Tensors) -> torch.Tensor:
    members = [source[name] for name in rule.members]
    if rule.operation == "rows":
        gains = [source[name] for name in rule.gains]
        if gains:
            members = [fold_gain(w, g) for w, g in zip(members, gains, strict=True)]
        return join_rows(members)
    if rule.operation == "columns":
        return join_columns(members)
    if rule.operation == "sum":
        return sum_biases(members)
    if rule.operation == "fill":
        return torch.full_like(members[0], rule.fill)
    (only,) = members
    return only


def config_of(draw: st.DrawFn, families: list[str], num_layers: int) -> dict[str, Any]:
    kv_heads, family = draw(st.integers(1, 3)), draw(st.sampled_from(families))
    latent = {
        key: 2 for key, _ in CONVERTIBLE[family].defaults if CONVERTIBLE[family].own_attentions
    }
    return {
        **latent,
        "first_k_dense_replace": 0,
        "model_type": family,
        "num_hidden_layers": num_layers,
        "hidden_size": draw(st.integers(1, 12)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 6)),
        "intermediate_size": draw(st.integers(1, 10)),
        "vocab_size": draw(st.integers(1, 8)),
        "attention_bias": draw(st.booleans()),
        "attention_out_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "use_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "num_experts": draw(st.integers(1, 4)),
        "num_experts_per_tok": 1,
        "moe_intermediate_size": draw(st.integers(1, 4)),
        "n_shared_experts": 1,
    }


@st.composite
def models(draw: st.DrawFn, families: list[str], wirings: list[str]) -> tuple[dict[str, Any], Plan]:
    """A config of one of the families, and a plan for it."""
    groups, layer = [], 0
    for size in draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)):
        if size > 1:
            wiring = draw(st.sampled_from(wirings))
            bypass = draw(st.integers(0, size - 1)) if wiring == "cqil" else 0
            layers = tuple(range(layer, layer + size))
            groups.append(Group(layers=layers, wiring=wiring, bypass=bypass))
        layer += size
    return config_of(draw, families, layer), Plan(num_layers=layer, groups=tuple(groups))


def layers_of(tensors: Tensors, count: int) -> list[Tensors]:
    made: list[Tensors] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        if name.startswith("model.layers."):
            index, _, rest = name.removeprefix("model.layers.").partition(".")
            made[int(index)][rest] = tensor
    return made


@settings(deadline=None, max_examples=60)
@given(
    models(["llama", "mistral", "qwen2"], ["lp", "ff"]), st.integers(0, 2**32), st.integers(1, 5)
)
def test_wide_layers_equal_the_group_run_member_by_member(
    model: tuple[dict[str, Any], Plan], seed: int, length: int
) -> None:
    config, plan = model
    family = CONVERTIBLE[config["model_type"]]
    generator = torch.Generator().manual_seed(seed)
    source = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])
        for name, shape in all_tensors(family, config).items()
    }
    made = {rule.name: cook(rule, source) for rule in tensor_rules(family, config, plan)}
    assert {tensor.dtype for tensor in made.values()} == {torch.float64}

    x = torch.randn(length, config["hidden_size"], generator=generator, dtype=torch.float64)
    narrow = layers_of(source, plan.num_layers)
    wide = iter(layers_of(made, len(plan.blocks)))
    for stage in plan.stages:
        group, members = plan.group_of(stage), [narrow[member] for member in stage]
        in_order = group is not None and group.wiring == "ff"
        chain = [([member], []) for member in members[:-1]] if in_order else []
        chain.append((members[-1:] if in_order else members, members))
        want = run(chain, x, config["head_dim"])
        layers = [next(wide) for _ in chain]
        alone = [([a], [a] if fs else []) for a, (_, fs) in zip(layers, chain, strict=True)]
        got = run(alone, x, config["head_dim"])
        assert (got - want).abs().max() <= 1e-12 * max(1.0, float(want.abs().max()))
        x = want  # both go on from here: a chain of layers would amplify rounding

        for layer, (attentions, ffns) in zip(layers, chain, strict=True):
            grown = {
                **config,
                "num_attention_heads": len(attentions) * config["num_attention_heads"],
                "num_key_value_heads": len(attentions) * config["num_key_value_heads"],
                "intermediate_size": max(1, len(ffns)) * config["intermediate_size"],
            }
            shapes = {name: tuple(tensor.shape) for name, tensor in layer.items()}
            assert shapes == {
                name: shape
                for name, shape in layer_tensors(family, grown).items()
                if ffns or not name.startswith(("mlp.", "post_attention_layernorm."))
            }
    assert next(wide, None) is None


@given(models(sorted(CONVERTIBLE), ["lp", "cqil", "ff"]))
def test_rules_use_every_tensor_once(model: tuple[dict[str, Any], Plan]) -> None:
    config, plan = model
    family = CONVERTIBLE[config["model_type"]]
    assume(not (family.parallel and any(group.is_in_order for group in plan.groups)))
    made = tensor_rules(family, config, plan)
    used = [name for rule in made for name in rule.members]
    assert sorted(used) == sorted(all_tensors(family, config))
    assert len({rule.name for rule in made}) == len(made)
    expected = set(outer_tensors(family, config))
    for index, block in enumerate(family.blocks_of(plan)):
        for ffn, members in ((False, block.attentions), (True, block.ffns)):
            grown = dict.fromkeys(family.grown_biases, True) if len(members) > 1 else {}
            expected |= {
                f"{family.layer_prefix}{index}.{name}"
                for name in layer_tensors(family, {**config, **grown})
                if members and family.is_ffn(name.rpartition(".")[0]) == ffn
            }
    assert {rule.name for rule in made} == expected
    folded = {name for rule in made for name in rule.gains}
    folded |= {name for rule in made for name in rule.shifts}
    filled = {name for rule in made if rule.operation == "fill" for name in rule.members}
    assert folded - filled == set()
    # a LayerNorm's bias has nowhere to go without the bias of a matrix: `obstacle` refuses
    if all(obstacle(config, (layer,)) is None for layer in range(plan.num_layers)):
        assert filled == folded
    for rule in made:
        for read in (rule.gains, rule.shifts, rule.weights):
            assert len(read) in (0, len(rule.members) or len(rule.weights))
        assert (rule.operation == "copy") == (len(rule.members) == 1)
        assert bool(rule.members) != bool(rule.like)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_bias_of_a_layer_norm_moves_into_that_of_the_matrix(
    rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x, gain, beta = torch.randn(3, columns, generator=generator, dtype=torch.float64)
    bias = torch.randn(rows, generator=generator, dtype=torch.float64)
    expected = weight @ (x * gain + beta) + bias
    folded = fold_gain(weight, gain) @ x + fold_shift(weight, beta, bias)
    assert torch.allclose(folded, expected, rtol=0, atol=1e-12)
    half = (t.bfloat16() for t in (weight, beta, bias))
    assert fold_shift(*half).dtype == torch.float64


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["float16", "bfloat16"]))
def test_half_precision_folds_in_float32(rows: int, columns: int, dtype: str) -> None:
    generator = torch.Generator().manual_seed(rows * 64 + columns)
    weight = torch.randn(rows, columns, generator=generator).to(getattr(torch, dtype))
    gain = torch.randn(columns, generator=generator).to(getattr(torch, dtype))
    folded = fold_gain(weight, gain)
    assert folded.dtype == torch.float32
    assert torch.equal(folded.double(), weight.double() * gain.double())  # no rounding at all
    for target in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(fold_gain(weight, gain, target), folded.to(target))  # rounded once
    total = sum_biases([gain, gain, gain])
    assert total.dtype == torch.float32
    assert torch.allclose(total, 3 * gain.float(), atol=0, rtol=1e-6)


CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 6,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 8,
}
MIXED = {**CONFIG, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}


def test_layers_of_unlike_attention_do_not_fuse() -> None:
    assert attention_kinds(MIXED)[2:4] == ("full_attention", "sliding_attention")
    assert obstacle(MIXED, (1, 2)) is None
    assert "full_attention and sliding_attention" in str(obstacle(MIXED, (2, 3)))
    assert check_plan(MIXED, Plan.parse("1+2 3+4", 6)) == []
    with pytest.raises(FoldError, match=r"group 2\+3 cannot be fused"):
        check_plan(MIXED, Plan.parse("2+3", 6))


@pytest.mark.parametrize("text", ["0+1", "4+5", "0+1+2+3+4+5"])
def test_edge_groups_want_force(text: str) -> None:
    plan = Plan.parse(text, 6)
    with pytest.raises(FoldError, match="first or the last layer"):
        check_plan(CONFIG, plan)
    (warning,) = check_plan(CONFIG, plan, force=True)
    assert text in warning


def test_norm_bias_needs_a_bias_to_go_to() -> None:
    config = {**CONFIG, "model_type": "starcoder2"}
    plan = Plan.parse("1+2", 6)
    assert check_plan({**config, "use_bias": True}, plan) == []
    with pytest.raises(FoldError, match="has no bias to take up that of its norm"):
        check_plan({**config, "use_bias": False}, plan)


def test_summed_biases_rule_out_a_sequential_prefill() -> None:
    config = {**CONFIG, "model_type": "llama", "attention_bias": True}
    plan = Plan.parse("1+2", 6)
    assert check_plan(config, plan) == []
    assert check_plan({**config, "attention_bias": False}, plan, prefill="sequential") == []
    with pytest.raises(FoldError, match="o_proj has a bias"):
        check_plan(config, plan, prefill="sequential")
    with pytest.raises(FoldError, match="prefill 'other' is not one of grouped, sequential"):
        check_plan(config, plan, prefill="other")


def test_in_order_layers_may_mix_kinds_of_attention() -> None:
    assert check_plan(MIXED, Plan.parse("2~3", 6)) == []
    with pytest.raises(FoldError, match=r"leave it out, or keep its attentions in order \(2~3\)"):
        check_plan(MIXED, Plan.parse("2|3", 6))


@pytest.mark.parametrize("family", ["cohere", "cohere2", "phi"])
def test_in_order_needs_an_ffn_that_reads_the_attention(family: str) -> None:
    config = {**CONFIG, "model_type": family}
    assert check_plan(config, Plan.parse("1+2", 6)) == []
    with pytest.raises(FoldError, match="group 1~2 cannot be fused: their attention and FFN read"):
        check_plan(config, Plan.parse("1~2", 6))


def test_an_attention_by_itself_has_no_norm_to_fold() -> None:
    config = {**CONFIG, "model_type": "starcoder2", "use_bias": False}
    assert "c_fc has no bias" in str(obstacle(config, (1, 2), in_order=True))
    assert "q_proj has no bias" in str(obstacle(config, (1, 2)))


def test_biases_of_attentions_in_order_are_not_summed() -> None:
    config = {**CONFIG, "model_type": "llama", "attention_bias": True}
    assert check_plan(config, Plan.parse("1~2", 6), prefill="sequential") == []
    with pytest.raises(FoldError, match="down_proj has a bias"):
        check_plan({**config, "mlp_bias": True}, Plan.parse("1~2", 6), prefill="sequential")


def test_plan_without_groups_is_refused() -> None:
    with pytest.raises(FoldError, match="no group"):
        check_plan(CONFIG, Plan.parse("", 6))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 12])
def test_zeros_follow_every_block_however_many_rows_come_at_once(rows):
    matrix = torch.arange(1.0, 121.0).reshape(12, 10)
    below = list(pad(matrix.split(rows), (0, 4, 300)))
    zeros = torch.zeros(296, 10)
    blocks = [part for block in matrix.split(4) for part in (block, zeros)]
    assert torch.equal(torch.cat(below), torch.cat(blocks))
    assert max(map(len, below)) <= 256  # rows of zeros are not all held at once
    beside = torch.cat(list(pad(matrix.split(rows), (1, 5, 7))))
    zeros = torch.zeros(12, 2)
    assert torch.equal(beside, torch.cat([matrix[:, :5], zeros, matrix[:, 5:], zeros], dim=1))


CONFIG_OF_EXPERTS = {
    "model_type": "mixtral",
    "num_hidden_layers": 6,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_layers_whose_experts_differ_in_number_do_not_fuse():
    config = {**CONFIG_OF_EXPERTS, "per_layer_config": {"2": {"num_experts_per_tok": 1}}}
    assert obstacle(CONFIG_OF_EXPERTS, (1, 2)) is None and obstacle(config, (3, 4)) is None
    assert obstacle(config, (1, 2)) == "layer 2 has num_experts_per_tok 1, layer 1 2"
