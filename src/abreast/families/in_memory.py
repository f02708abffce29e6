"""Families whose layers run abreast in memory only: of them no group can be written as one layer.

Each row says why. Their config.json files name some things otherwise, see `with_usual_names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abreast.families.row import EXPERT_COUNTS, Branches, Family, Matrix

_STATE = "carry a state from token to token, which no wider layer holds"
_MAMBA = f"its Mamba mixers {_STATE}"
DELTA = f"its linear attentions {_STATE}"
_NO_BIASES = "its norms have biases, which matrices without any cannot take up"
_BIASED = "all that its heads see of positions is a bias made once, for as many heads in all layers"
# Only says that some layers have an FFN of their own instead of experts.
_DENSE = (Matrix("mlp.gate_proj", "F", "D", "rows"),)
_MIXED = ("linear_attn", "self_attn")
_KINDS = (("layer_types", "layers_block_type"),)
_N_LAYER = (("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"))
_EXPERTS: dict[str, Any] = {"expert_keys": EXPERT_COUNTS, "dense": _DENSE}

IN_MEMORY = (
    Family(
        "gpt2",
        "GPT2",
        branches=Branches(attention="attn", before_attention=("ln_1",), before_mlp=("ln_2",)),
        names=(
            *_N_LAYER,
            ("hidden_size", "n_embd"),
            ("intermediate_size", "n_inner"),
            ("max_position_embeddings", "n_positions"),
        ),
        unfoldable="its matrices are stored transposed, which no rule here folds",
    ),
    Family(
        "opt",
        "OPT",
        branches=Branches(mixers=("self_attn",), ffns=("fc1", "fc2")),
        names=(("intermediate_size", "ffn_dim"),),
        only=(("do_layer_norm_before", True),),
        unfoldable="its FFN is two matrices of the layer itself, which no row describes",
    ),
    Family(
        "falcon",
        "Falcon",
        branches=Branches(
            mixers=("self_attention",),
            ffns=("mlp",),
            parallel="config.parallel_attn",
            tuples=True,
        ),
        names=(("num_key_value_heads", "num_kv_heads"), ("intermediate_size", "ffn_hidden_size")),
        unfoldable=_NO_BIASES,
    ),
    Family(
        "bloom",
        "Bloom",
        branches=Branches(mixers=("self_attention",), ffns=("mlp",), tuples=True),
        names=(*_N_LAYER, ("hidden_size", "n_embed")),
        only=(("apply_residual_connection_post_layernorm", False),),
        unfoldable=_BIASED,
    ),
    Family(
        "mpt",
        "Mpt",
        branches=Branches(mixers=("attn",), ffns=("ffn",), tuples=True),
        names=(
            ("num_hidden_layers", "n_layers"),
            ("num_attention_heads", "n_heads"),
            ("hidden_size", "d_model"),
            ("max_position_embeddings", "max_seq_len"),
        ),
        unfoldable=_BIASED,
    ),
    Family(
        "kimi_linear",
        "KimiLinear",
        branches=Branches(mixers=("self_attn",), ffns=("mlp",)),
        defaults=(("first_k_dense_replace", 1),),
        unfoldable=DELTA,
        **_EXPERTS,
    ),
    Family(
        "qwen3_next",
        "Qwen3Next",
        branches=Branches(mixers=_MIXED, ffns=("mlp",)),
        unfoldable=DELTA,
        **_EXPERTS,
    ),
    Family(
        "qwen3_5_text",
        "Qwen3_5",
        branches=Branches(mixers=_MIXED, ffns=("mlp",)),
        unfoldable=DELTA,
    ),
    Family(
        "olmo_hybrid",
        "OlmoHybrid",
        branches=Branches(mixers=_MIXED, ffns=("mlp",)),
        unfoldable=DELTA,
    ),
    Family(
        "lfm2",
        "Lfm2",
        branches=Branches(mixers=("conv", "self_attn"), ffns=("feed_forward",)),
        names=(("intermediate_size", "block_ff_dim"),),
        unfoldable=f"its short convolutions {_STATE}",
    ),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        branches=Branches(mixers=("mamba", "self_attn"), ffns=("block_sparse_moe", "shared_mlp")),
        names=_KINDS,
        unfoldable=_MAMBA,
    ),
    Family(
        "falcon_h1",
        "FalconH1",
        branches=Branches(mixers=("mamba", "self_attn"), ffns=("feed_forward",), tuples=True),
        unfoldable=_MAMBA,
    ),
    # Its layers are attention, Mamba or FFN alone; those of a group all read its input.
    Family(
        "nemotron_h",
        "NemotronH",
        branches=Branches(mixers=("mixer",), parallel=True),
        names=(*_KINDS, ("layer_types", "hybrid_override_pattern")),
        unfoldable=_MAMBA,
    ),
)
_ROWS = {row.model_type: row for row in IN_MEMORY}
_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}  # Nemotron-H's


def with_usual_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the keys that all families share, where one of these has others for them.

    layer_types says which layers are of one kind, as transformers' config classes do. What makes
    no sense stays as it is, for others to refuse.
    """
    family = _ROWS.get(str(config.get("model_type")))
    if family is None:
        return dict(config)
    usual = {**dict(family.defaults), **config}
    for ours, theirs in family.names:
        if usual.get(ours) is None and usual.get(theirs) is not None:
            usual[ours] = usual[theirs]
    hidden, kinds = usual.get("hidden_size"), usual.get("layer_types")
    if usual.get("intermediate_size") is None and isinstance(hidden, int):
        usual["intermediate_size"] = 4 * hidden
    if usual.get("multi_query") and not usual.get("new_decoder_architecture"):
        usual["num_key_value_heads"] = 1
    if isinstance(kinds, str):  # a letter for every layer
        usual["layer_types"] = [_LETTERS.get(letter, letter) for letter in kinds]
        usual.setdefault("num_hidden_layers", len(kinds))
    elif isinstance(kinds, list):
        usual.setdefault("num_hidden_layers", len(kinds))
    elif isinstance(count := usual.get("num_hidden_layers"), int) and 0 < count < 10_000:
        full = _full_attention(usual, count)
        if full is not None:
            other = "conv" if family.model_type == "lfm2" else "linear_attention"
            usual["layer_types"] = [
                "full_attention" if layer in full else other for layer in range(count)
            ]
    return usual


def _full_attention(config: Mapping[str, Any], count: int) -> set[int] | None:
    """The layers with full attention, None in families where no other kind is or all are mixed."""
    model_type, layers = config["model_type"], range(count)
    if model_type == "lfm2":
        listed = config.get("full_attn_idxs")
        return set(layers) if not isinstance(listed, list) else {i for i in layers if i in listed}
    if model_type == "kimi_linear":
        linear = config.get("linear_attn_config")
        listed = linear.get("full_attn_layers") if isinstance(linear, Mapping) else None
        if isinstance(listed, list):  # counted from 1
            return {layer for layer in layers if layer + 1 in listed}
        return {layer for layer in layers if layer and layer % 4 == 0}
    if model_type == "granitemoehybrid":
        return set()
    if model_type in ("qwen3_next", "qwen3_5_text", "olmo_hybrid"):
        period = config.get("full_attention_interval")
        period = period if isinstance(period, int) and period > 0 else 4
        full = {layer for layer in layers if (layer + 1) % period == 0}
        return full or ({count - 1} if model_type == "olmo_hybrid" else full)
    return None
