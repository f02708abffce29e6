"""Small configs of the families whose layers run abreast in memory only, and random models."""

from __future__ import annotations

from typing import Any

FULL, LINEAR = "full_attention", "linear_attention"
TWO_KINDS = [LINEAR, LINEAR, FULL, LINEAR, FULL]
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MLA = {
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 12},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"n_group": 1, "topk_group": 1},
}
_DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "layer_types": TWO_KINDS},
}
_MAMBA = {
    **{"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8},
    **{"mamba_expand": 2, "mamba_d_head": "auto"},
}
_GRANITE = {
    **{**_HEADS, **_MAMBA, "layer_types": TWO_KINDS, "residual_multiplier": 0.4},
    **{"shared_intermediate_size": 24, "position_embedding_type": "rope"},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_FALCON: dict[str, Any] = {"num_attention_heads": 4, "ffn_hidden_size": 48}

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5},
    **{"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# case -> (model_type, config keys that differ from SIZES)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"num_attention_heads": 4, "n_inner": 48}),
    "opt": ("opt", {"num_attention_heads": 4, "ffn_dim": 48}),
    "falcon": ("falcon", {**_FALCON, "multi_query": True}),
    "falcon-two-norms": (
        "falcon",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon-one-after-another": (
        "falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "bloom": ("bloom", {"n_head": 4}),
    "mpt": ("mpt", {"n_heads": 4, "max_seq_len": 128}),
    "kimi_linear": (
        "kimi_linear",
        {
            **{**MLA, "q_lora_rank": None, "num_local_experts": 4, "layer_types": TWO_KINDS},
            **{"linear_head_dim": 8, "linear_num_heads": 4},
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {**_HEADS, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_5_text": (
        "qwen3_5_text",
        {
            **{**_HEADS, **_DELTA, "head_dim": 32},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
                **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
            },
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", {**_HEADS, **_DELTA}),
    "lfm2": (
        "lfm2",
        {**_HEADS, "layer_types": [kind.replace(LINEAR, "conv") for kind in TWO_KINDS]},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granitemoehybrid-dense": ("granitemoehybrid", {**_GRANITE, "num_local_experts": 0}),
    "falcon_h1": (
        "falcon_h1",
        {
            **{**_HEADS, **_MAMBA, "mamba_d_ssm": 32, "ssm_out_multiplier": 0.7},
            **{"attention_in_multiplier": 0.8, "attention_out_multiplier": 0.6},
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **{**_HEADS, "layers_block_type": [LINEAR, LINEAR, FULL, "mlp", "moe"]},
            **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
            **{"chunk_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
        },
    ),
}
# Where the FFN reads the layer's input, or there is none.
PARALLEL = {"falcon", "falcon-two-norms", "nemotron_h"}


def random_model(model_type: str, settings: dict[str, Any]) -> Any:
    """A model with norms and biases far from 1 and 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model
