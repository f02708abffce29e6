"""One row per model_type. A model_type without a row is refused.

A new family is a row here, its name in modeling.py's list, and a line in the parity test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abreast.families.in_memory import IN_MEMORY, with_usual_names
from abreast.families.parts import (
    LATENT_SIZES,
    NORMED_AFTER,
    ONE_NORM,
    QK_BY_HEAD,
    QK_HEADS,
    SANDWICHED,
    attention,
    experts,
    gated_ffn,
    latent,
    plain_ffn,
    routing,
    shared_experts,
)
from abreast.families.row import (
    EXPERT_COUNTS,
    SHARED_COUNTS,
    Branches,
    Family,
    FamilyError,
    Matrix,
    Stack,
)
from abreast.families.wrappers import DECODERS, HOLDERS, OTHERS, decoder_config

_BIASED = attention("attention_bias", "attention_bias")
_PACKED_FFN = (
    Matrix("mlp.gate_up_proj", "FF", "D", "rows"),
    Matrix("mlp.down_proj", "D", "F", "columns"),
)
_TIED = ("tie_word_embeddings", True)
# What config.json of the larger models leaves out.
_GEMMA3_HEADS = (("head_dim", 256), ("num_attention_heads", 8), ("num_key_value_heads", 4))
_GEMMA3_DEFAULTS = (_TIED, *_GEMMA3_HEADS, ("vocab_size", 262_208))
_GLM_DEFAULTS = (("attention_bias", True), ("head_dim", 128))

# What deci lacks.
_LAYER_NORM = "its norms subtract the mean and add a bias"
_PARALLEL = "its attention and FFN read the same norm"
_NORM_AFTER = "it norms the output of its attention and FFN"
_ROTATION = "it rotates q and k in another order"
_EXPERTS = "it has experts, which every member of a group would choose by itself"
# What published configs call the routing that modeling_members.MemberRouter computes.
_SOFTMAX = routing("softmax", "greedy")
_SIGMOID = routing("sigmoid", "noaux_tc")
_OLMO: dict[str, Any] = {"flat_norms": QK_HEADS, "deci_lacks": _NORM_AFTER}

_ROWS = (
    Family("llama", "Llama", _BIASED + gated_ffn("mlp_bias"), vllm_layers=True, deci_lacks=None),
    Family(
        "mistral",
        "Mistral",
        attention() + gated_ffn(),
        slides=True,
        vllm_layers=True,
        deci_lacks=None,
    ),
    Family("ministral", "Ministral", attention() + gated_ffn(), vllm_layers=True),
    Family("qwen2", "Qwen2", attention("always") + gated_ffn(), vllm_layers=True, deci_lacks=None),
    Family(
        "qwen3",
        "Qwen3",
        _BIASED + gated_ffn(),
        head_norms=QK_HEADS,
        defaults=(("head_dim", 128),),
        vllm_layers=True,
        deci_lacks=QK_BY_HEAD,
    ),
    Family(
        "seed_oss",
        "SeedOss",
        attention("attention_bias", "attention_out_bias") + gated_ffn("mlp_bias"),
        defaults=(("attention_bias", True), ("head_dim", 128)),
        vllm_layers=True,
        deci_lacks=None,
    ),
    Family(
        "smollm3",
        "SmolLM3",
        _BIASED + gated_ffn("mlp_bias"),
        defaults=(_TIED,),
        rope_period=4,
        deci_lacks="some of its layers do not rotate q and k",
    ),
    Family(
        "granite",
        "Granite",
        _BIASED + gated_ffn("mlp_bias"),
        Branches(scale="residual_multiplier"),
        deci_lacks=None,
    ),
    Family(
        "ernie4_5",
        "Ernie4_5",
        attention("use_bias", "use_bias") + gated_ffn("use_bias"),
        defaults=(_TIED, ("head_dim", 128)),
        deci_lacks=_ROTATION,
    ),
    Family(
        "arcee",
        "Arcee",
        _BIASED + plain_ffn("up_proj", "down_proj", "mlp_bias"),
        deci_lacks="its FFN has no gate",
    ),
    Family(
        "nemotron",
        "Nemotron",
        _BIASED + plain_ffn("up_proj", "down_proj", "mlp_bias"),
        gain_offset=1.0,
        norm_bias=True,
        grown_biases=("attention_bias", "mlp_bias"),
        deci_lacks=_LAYER_NORM,
    ),
    Family(
        "starcoder2",
        "Starcoder2",
        attention("use_bias", "use_bias") + plain_ffn("c_fc", "c_proj", "use_bias"),
        norm_bias=True,
        defaults=(_TIED, ("use_bias", True)),
        deci_lacks=_LAYER_NORM,
    ),
    Family(
        "phi3",
        "Phi3",
        (
            Matrix("self_attn.qkv_proj", "QKK", "D", "rows"),
            Matrix("self_attn.o_proj", "D", "Q", "columns"),
            *_PACKED_FFN,
        ),
        Branches(after_attention=("resid_attn_dropout",), after_mlp=("resid_mlp_dropout",)),
        slides=True,
        deci_lacks=None,
    ),
    Family(
        "gemma",
        "Gemma",
        _BIASED + gated_ffn(),
        gain_offset=1.0,
        defaults=(_TIED, ("head_dim", 256)),
        deci_lacks="its FFN is gated by GELU",
    ),
    Family(
        "gemma2",
        "Gemma2",
        _BIASED + gated_ffn(),
        SANDWICHED,
        gain_offset=1.0,
        defaults=(_TIED, ("head_dim", 256)),
        window_period=2,
        deci_lacks=_NORM_AFTER,
    ),
    Family(
        "gemma3_text",
        "Gemma3",
        _BIASED + gated_ffn(),
        SANDWICHED,
        gain_offset=1.0,
        head_norms=QK_HEADS,
        defaults=_GEMMA3_DEFAULTS,
        window_period=6,
        deci_lacks=_NORM_AFTER,
    ),
    Family("olmo2", "Olmo2", _BIASED + gated_ffn(), NORMED_AFTER, **_OLMO),
    Family("olmo3", "Olmo3", _BIASED + gated_ffn(), NORMED_AFTER, window_period=4, **_OLMO),
    Family(
        "cohere2",
        "Cohere2",
        _BIASED + gated_ffn(),
        ONE_NORM,
        defaults=(_TIED,),
        window_period=4,
        deci_lacks=_PARALLEL,
    ),
    Family(
        "cohere",
        "Cohere",
        _BIASED + gated_ffn(),
        ONE_NORM,
        wide_norms=QK_HEADS,
        defaults=(_TIED,),
        deci_lacks=_PARALLEL,
    ),
    Family(
        "glm",
        "Glm",
        attention("attention_bias") + _PACKED_FFN,
        defaults=_GLM_DEFAULTS,
        deci_lacks=_ROTATION,
    ),
    Family(
        "glm4",
        "Glm4",
        attention("attention_bias") + _PACKED_FFN,
        Branches(after_attention=("post_self_attn_layernorm",), after_mlp=("post_mlp_layernorm",)),
        defaults=_GLM_DEFAULTS,
        deci_lacks=_NORM_AFTER,
    ),
    Family(
        "phi",
        "Phi",
        (
            *attention("always")[:3],
            Matrix("self_attn.dense", "D", "Q", "columns", "always"),
            *plain_ffn("fc1", "fc2", "always"),
        ),
        Branches(
            after_attention=("resid_dropout",),
            before_mlp=("input_layernorm",),
            after_mlp=("resid_dropout",),
            parallel=True,
        ),
        norm_bias=True,
        head_bias="always",
        final_norm="model.final_layernorm",
        deci_lacks=_PARALLEL,
    ),
    Family(
        "gpt_neox",
        "GPTNeoX",
        (
            Matrix("attention.query_key_value", "W", "D", "rows", "attention_bias"),
            Matrix("attention.dense", "D", "Q", "columns", "attention_bias"),
            *plain_ffn("dense_h_to_4h", "dense_4h_to_h", "always"),
        ),
        Branches(
            attention="attention",
            after_attention=("post_attention_dropout",),
            after_mlp=("post_mlp_dropout",),
            parallel="use_parallel_residual",
        ),
        norm_bias=True,
        derived_head_size=True,
        wide=("num_attention_heads", "intermediate_size"),
        one_input=True,
        renames=((r"^embed_out\.", "lm_head."),),
        ignore=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
        defaults=(("attention_bias", True), ("use_parallel_residual", True)),
        layer_prefix="gpt_neox.layers.",
        embedding="gpt_neox.embed_in.weight",
        final_norm="gpt_neox.final_layer_norm",
        deci_lacks=_LAYER_NORM,
    ),
    Family(
        "stablelm",
        "StableLm",
        attention("use_qkv_bias") + gated_ffn("mlp_bias"),
        Branches(after_mlp=("dropout",), parallel="use_parallel_residual"),
        norm_bias=True,
        grown_biases=("use_qkv_bias", "mlp_bias"),
        derived_head_size=True,
        deci_lacks=_LAYER_NORM,
    ),
    Family(
        "olmo",
        "Olmo",
        _BIASED + gated_ffn(),
        norm_gains=False,
        final_norm="",
        deci_lacks=_LAYER_NORM,
    ),
    Family(
        "exaone4",
        "Exaone4",
        attention() + gated_ffn(),
        NORMED_AFTER,
        head_norms=QK_HEADS,
        window_period=4,
        deci_lacks=_NORM_AFTER,
    ),
    Family(
        "hunyuan_v1_dense",
        "HunYuanDenseV1",
        _BIASED + gated_ffn(),
        head_norms=(("self_attn.query_layernorm", "Q"), ("self_attn.key_layernorm", "K")),
        deci_lacks=QK_BY_HEAD,
    ),
    Family(
        "jais2",
        "Jais2",
        _BIASED + plain_ffn("up_proj", "down_proj", "mlp_bias"),
        norm_bias=True,
        grown_biases=("attention_bias", "mlp_bias"),
        defaults=(("attention_bias", True), ("mlp_bias", True)),
        deci_lacks=_LAYER_NORM,
    ),
    Family(
        "mixtral",
        "Mixtral",
        attention(),
        stacks=experts(width="F"),
        expert_keys=EXPERT_COUNTS,
        routing=_SOFTMAX,
        renames=(
            (r"\.block_sparse_moe\.", ".mlp."),
            (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
            (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
            (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
        ),
        slides=True,
        vllm_layers=True,
        deci_lacks=_EXPERTS,
    ),
    Family(
        "qwen2_moe",
        "Qwen2Moe",
        attention("qkv_bias") + shared_experts("mlp.shared_expert"),
        stacks=(
            *experts(),
            Stack("mlp.shared_expert_gate.weight", ("1", "D"), gain=-1),
        ),
        dense=gated_ffn(),
        expert_keys=(*EXPERT_COUNTS, "shared_expert_intermediate_size"),
        routing=_SOFTMAX,
        defaults=(("qkv_bias", True),),
        deci_lacks=_EXPERTS,
    ),
    Family(
        "qwen3_moe",
        "Qwen3Moe",
        _BIASED,
        stacks=experts(),
        dense=gated_ffn(),
        expert_keys=EXPERT_COUNTS,
        routing=_SOFTMAX,
        head_norms=QK_HEADS,
        vllm_layers=True,
        deci_lacks=_EXPERTS,
    ),
    Family(
        "olmoe",
        "Olmoe",
        _BIASED,
        stacks=experts(width="F"),
        expert_keys=EXPERT_COUNTS,
        routing=_SOFTMAX,
        flat_norms=QK_HEADS,
        deci_lacks=_EXPERTS,
    ),
    Family(
        "granitemoe",
        "GraniteMoe",
        _BIASED,
        Branches(mlp="block_sparse_moe", scale="residual_multiplier"),
        experts("block_sparse_moe.router", "F"),
        expert_keys=EXPERT_COUNTS,
        routing=_SOFTMAX,
        renames=(
            (r"\.input_linear\.weight$", ".experts.gate_up_proj"),
            (r"\.output_linear\.weight$", ".experts.down_proj"),
            (r"\.router\.layer\.weight$", ".router.weight"),
        ),
        deci_lacks=_EXPERTS,
    ),
    Family(
        "gpt_oss",
        "GptOss",
        _BIASED,
        stacks=(
            Stack("self_attn.sinks", ("H",)),
            Stack("mlp.router.weight", ("E", "D"), gain=-1),
            Stack("mlp.router.bias", ("E",)),
            Stack("mlp.experts.gate_up_proj", ("E", "D", "FF"), gain=-2),
            Stack("mlp.experts.gate_up_proj_bias", ("E", "FF")),
            Stack("mlp.experts.down_proj", ("E", "F", "D")),
            Stack("mlp.experts.down_proj_bias", ("E", "D")),
        ),
        expert_keys=EXPERT_COUNTS,
        routing=_SOFTMAX,
        defaults=(("attention_bias", True), ("head_dim", 64)),
        window_period=2,
        vllm_layers=True,
        deci_lacks=_EXPERTS,
    ),
    Family(
        "glm4_moe",
        "Glm4Moe",
        attention("attention_bias") + shared_experts("mlp.shared_experts"),
        stacks=(*experts(), Stack("mlp.gate.e_score_correction_bias", ("E",))),
        dense=gated_ffn(),
        expert_keys=(*EXPERT_COUNTS, *SHARED_COUNTS),
        routing=_SIGMOID,
        head_norms=QK_HEADS,
        defaults=(("first_k_dense_replace", 1), ("n_shared_experts", 1), ("use_qk_norm", False)),
        deci_lacks=_EXPERTS,
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        attention("use_bias", "use_bias") + shared_experts("mlp.shared_experts", "use_bias"),
        stacks=(
            *experts(),
            Stack("mlp.gate.moe_statics.e_score_correction_bias", ("1", "E"), axis=1),
        ),
        dense=gated_ffn("use_bias"),
        expert_keys=(*EXPERT_COUNTS, *SHARED_COUNTS),
        routing=routing("softmax", "noaux_tc"),
        renames=((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),),
        head_bias="use_bias",
        defaults=(_TIED, ("moe_layer_start_index", 1), ("moe_num_shared_experts", 2)),
        deci_lacks=_EXPERTS,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3",
        stacks=(*experts(), Stack("mlp.gate.e_score_correction_bias", ("E",))),
        defaults=(
            *(("first_k_dense_replace", 3), ("n_shared_experts", 1), ("q_lora_rank", 1536)),
            *LATENT_SIZES,
        ),
        code="deepseek",
        routing=_SIGMOID,
        **latent(_EXPERTS),
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2",
        stacks=experts(),
        defaults=(("n_shared_experts", 2), ("q_lora_rank", 1536), *LATENT_SIZES),
        code="deepseek",
        routing=routing("softmax", "greedy", "group_limited_greedy"),
        **latent(_EXPERTS, "mlp_bias"),
    ),
    Family(
        "glm4_moe_lite",
        "Glm4MoeLite",
        stacks=(*experts(), Stack("mlp.gate.e_score_correction_bias", ("E",))),
        defaults=(
            *(("first_k_dense_replace", 1), ("n_shared_experts", 1), ("q_lora_rank", 768)),
            *(("kv_lora_rank", 512), ("qk_nope_head_dim", 192), ("qk_rope_head_dim", 64)),
            ("v_head_dim", 256),
        ),
        routing=_SIGMOID,
        **latent(_EXPERTS),
    ),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in (*_ROWS, *DECODERS, *IN_MEMORY)}
CONVERTIBLE: dict[str, Family] = {
    name: row for name, row in FAMILIES.items() if row.matrices and row.alone
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of a config.json whose groups can be written as wide layers.

    Raises FamilyError for a missing or unsupported model_type, one that only runs grouped in
    memory, and a checkpoint that is converted already.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("config.json has no model_type; give a Hugging Face checkpoint")
    if (holder := config.get("within")) in HOLDERS:
        reason = HOLDERS[holder].unfoldable
        raise FamilyError(f"a {holder}'s decoder cannot be converted, only run grouped: {reason}")
    if (row := FAMILIES.get(model_type)) is not None and row.converts(config):
        return row
    if model_type.startswith("abreast_"):
        raise FamilyError(
            "this checkpoint is converted already; give the original that it was made from"
        )
    if row is not None:
        raise FamilyError(
            f"a {model_type} cannot be written as wide layers, only run grouped in memory "
            f"(abreast.grouped, or eval with --plan): {row.why_in_memory}"
        )
    if model_type in OTHERS:
        raise FamilyError(f"a {model_type} cannot be converted: {OTHERS[model_type]}")
    raise FamilyError(
        f"model_type '{model_type}' is not supported; supported are {', '.join(CONVERTIBLE)}"
    )


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the family's defaults for keys that it leaves out."""
    return {**dict(family_of(config).defaults), **config}


def decoder_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`decoder_config` with the family's defaults, where it is of a known one."""
    decoder = with_usual_names(decoder_config(config))
    row = FAMILIES.get(str(decoder.get("model_type")))
    return {**dict(row.defaults if row else ()), **decoder}
