"""Config keys that make tiny models of the families with experts."""

from __future__ import annotations

from typing import Any

LATENT = {  # sizes of attention through latent vectors
    **{"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "v_head_dim": 16},
    **{"qk_rope_head_dim": 8, "num_key_value_heads": 4},
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "eos_token_id": None}
ROUTED: dict[str, dict[str, Any]] = {  # families with experts: what each needs to be small
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 40},
    "gpt_oss": {
        "num_local_experts": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 0},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_layer_start_index": 0},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 0},
        **{"n_group": 1, "topk_group": 1, **LATENT},
    },
    "deepseek_v2": {"n_routed_experts": 4, "n_shared_experts": 2, **LATENT},
    "glm4_moe_lite": {"n_routed_experts": 4, **LATENT},
}
