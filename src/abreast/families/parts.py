"""Branches, matrices and stacks of experts that the layers of many families have alike."""

from __future__ import annotations

from typing import Any

from abreast.families.row import EXPERT_COUNTS, SHARED_COUNTS, Branches, Matrix, Stack

QK_HEADS = (("self_attn.q_norm", "Q"), ("self_attn.k_norm", "K"))
QK_BY_HEAD = "it norms q and k by head, in a group with other gains for every member"
LATENT_SIZES = (
    *(("kv_lora_rank", 512), ("qk_nope_head_dim", 128), ("qk_rope_head_dim", 64)),
    ("v_head_dim", 128),
)
SANDWICHED = Branches(
    after_attention=("post_attention_layernorm",),
    before_mlp=("pre_feedforward_layernorm",),
    after_mlp=("post_feedforward_layernorm",),
)
NORMED_AFTER = Branches(
    before_attention=(),
    after_attention=("post_attention_layernorm",),
    before_mlp=(),
    after_mlp=("post_feedforward_layernorm",),
)
ONE_NORM = Branches(before_mlp=("input_layernorm",), parallel=True)


def attention(bias: str = "", output_bias: str = "") -> tuple[Matrix, ...]:
    return (
        Matrix("self_attn.q_proj", "Q", "D", "rows", bias),
        Matrix("self_attn.k_proj", "K", "D", "rows", bias),
        Matrix("self_attn.v_proj", "K", "D", "rows", bias),
        Matrix("self_attn.o_proj", "D", "Q", "columns", output_bias),
    )


def gated_ffn(bias: str = "") -> tuple[Matrix, ...]:
    return (
        Matrix("mlp.gate_proj", "F", "D", "rows", bias),
        Matrix("mlp.up_proj", "F", "D", "rows", bias),
        Matrix("mlp.down_proj", "D", "F", "columns", bias),
    )


def plain_ffn(inner: str, outer: str, bias: str) -> tuple[Matrix, ...]:
    return (
        Matrix(f"mlp.{inner}", "F", "D", "rows", bias),
        Matrix(f"mlp.{outer}", "D", "F", "columns", bias),
    )


def shared_experts(name: str, bias: str = "") -> tuple[Matrix, ...]:
    return (
        Matrix(f"{name}.gate_proj", "S", "D", "rows", bias),
        Matrix(f"{name}.up_proj", "S", "D", "rows", bias),
        Matrix(f"{name}.down_proj", "D", "S", "columns", bias),
    )


def routing(scores: str, *methods: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("scoring_func", (scores,)), ("topk_method", methods))


def experts(router: str = "mlp.gate", width: str = "X") -> tuple[Stack, ...]:
    name = router.partition(".")[0] + ".experts"
    return (
        Stack(f"{router}.weight", ("E", "D"), gain=-1),
        Stack(f"{name}.gate_up_proj", ("E", 2 * width, "D"), gain=-1),
        Stack(f"{name}.down_proj", ("E", "D", width)),
    )


def latent(deci_lacks: str, bias: str = "") -> dict[str, Any]:
    """Attention through latent vectors, and experts beside some that every token uses."""
    return {
        "matrices": (
            Matrix("self_attn.q_proj", "N", "D", "rows"),
            Matrix("self_attn.q_a_proj", "A", "D", "rows", "attention_bias"),
            Matrix("self_attn.q_b_proj", "B", "A", "rows"),
            Matrix("self_attn.kv_a_proj_with_mqa", "R", "D", "rows", "attention_bias"),
            Matrix("self_attn.kv_b_proj", "M", "L", "rows"),
            Matrix("self_attn.o_proj", "D", "O", "columns", "attention_bias"),
            *shared_experts("mlp.shared_experts", bias),
        ),
        "flat_norms": (("self_attn.q_a_layernorm", "A"), ("self_attn.kv_a_layernorm", "L")),
        "own_attentions": True,
        **{"dense": gated_ffn(bias), "expert_keys": (*EXPERT_COUNTS, *SHARED_COUNTS)},
        "deci_lacks": deci_lacks,
    }
