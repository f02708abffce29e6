"""Matrices, and stacks of experts, that the layers of many families have alike."""

from __future__ import annotations

from abreast.families.row import Matrix, Stack


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
