"""One frozen row per model_type: the submodules of a decoder layer that a grouped run calls.

There are more rows here than in families.py: a family whose members cannot be joined into one wide
layer can still run grouped in memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Branches:
    """Names of a decoder layer's submodules in transformers: what a grouped run calls.

    The attention branch is after_attention(attention(before_attention(x))), the FFN branch
    after_mlp(mlp(before_mlp(y))); each `before` and `after` is a chain of submodules, maybe empty.
    parallel: the FFN reads the layer's input instead of the attention's result: True, False, or
    the attribute of the layer that says which. scale: attribute that multiplies both branches.
    """

    attention: str = "self_attn"
    before_attention: tuple[str, ...] = ("input_layernorm",)
    after_attention: tuple[str, ...] = ()
    mlp: str = "mlp"
    before_mlp: tuple[str, ...] = ("post_attention_layernorm",)
    after_mlp: tuple[str, ...] = ()
    parallel: bool | str = False
    scale: str | None = None


_PLAIN = Branches()
_SANDWICH = Branches(
    after_attention=("post_attention_layernorm",),
    before_mlp=("pre_feedforward_layernorm",),
    after_mlp=("post_feedforward_layernorm",),
)
_POST = Branches(
    before_attention=(),
    after_attention=("post_attention_layernorm",),
    before_mlp=(),
    after_mlp=("post_feedforward_layernorm",),
)
_COHERE = Branches(before_mlp=("input_layernorm",), parallel=True)

BRANCHES: dict[str, Branches] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3"),
            *("qwen3_moe", "smollm3", "starcoder2", "seed_oss", "olmo", "arcee", "ernie4_5"),
        ),
        _PLAIN,
    ),
    **dict.fromkeys(("gemma", "glm", "hunyuan_v1_dense", "nemotron"), _PLAIN),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _SANDWICH),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _POST),
    **dict.fromkeys(("cohere", "cohere2"), _COHERE),
    "glm4": Branches(
        after_attention=("post_self_attn_layernorm",), after_mlp=("post_mlp_layernorm",)
    ),
    "phi": Branches(
        after_attention=("resid_dropout",),
        before_mlp=("input_layernorm",),
        after_mlp=("resid_dropout",),
        parallel=True,
    ),
    "phi3": Branches(after_attention=("resid_attn_dropout",), after_mlp=("resid_mlp_dropout",)),
    "granite": Branches(scale="residual_multiplier"),
    "gpt_neox": Branches(
        attention="attention",
        after_attention=("post_attention_dropout",),
        after_mlp=("post_mlp_dropout",),
        parallel="use_parallel_residual",
    ),
    "stablelm": Branches(after_mlp=("dropout",), parallel="use_parallel_residual"),
}
