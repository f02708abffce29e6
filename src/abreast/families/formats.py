"""Formats in which engines' own classes load layers of different width, without a plugin.

deci is DeciLMForCausalLM (model_type nemotron-nas). All its layers have one number of query heads:
those of a narrow layer are filled up with zeros, in every group of heads that share a key-value
head. FFN widths are multiples of 256, filled up with zeros, too. Either branch may be left out,
which is how ff groups are written; if there are no others (deci-ff), no query heads are needed.
openelm is OpenELMForCausalLM: any heads and FFN in every layer, q, k, v and gate, up in one matrix
each. mlx has the original's layers and tensors, and a model file that runs them by the plan.

The others are written from the configuration and the tensors of a conversion for our own classes,
and read back as one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from abreast.errors import CheckpointError
from abreast.families.row import Family, has_bias, head_dim_of, is_tied
from abreast.plan import Plan
from abreast.targets import Layer, format_of, layers_of

DECI_CODE = "configuration_decilm.py"
MLX_CODE = "mlx_model.py"
_MLX_TYPE = "abreast_mlx_"


@dataclass(frozen=True)
class Format:
    """What a format can express: wirings of groups and kinds of RoPE.

    families: those that it has, where it takes more than llama's layers. joins: whether a group is
    written as one layer; else the plan is only recorded.
    """

    wirings: tuple[str, ...]
    ropes: tuple[str, ...] = ("default", "linear", "llama3")
    families: tuple[str, ...] = ()
    joins: bool = True


FORMATS = {
    "deci": Format(("lp", "ff")),
    "deci-ff": Format(("ff",)),
    "openelm": Format(("lp",), ("default",)),
    "mlx": Format(
        ("lp", "cqil", "ff"),
        families=("llama", "mistral", "qwen2", "qwen3", "gemma3_text"),
        joins=False,
    ),
}

# The beginnings and middles of tensors' names: ours, openelm's.
_OPENELM = (
    ("model.embed_tokens.", "transformer.token_embeddings."),
    ("model.layers.", "transformer.layers."),
    ("model.norm.", "transformer.norm."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".self_attn.q_proj.", ".attn.qkv_proj."),
    (".self_attn.k_proj.", ".attn.qkv_proj."),
    (".self_attn.v_proj.", ".attn.qkv_proj."),
    (".self_attn.o_proj.", ".attn.out_proj."),
    (".mlp.gate_proj.", ".ffn.proj_1."),
    (".mlp.up_proj.", ".ffn.proj_1."),
    (".mlp.down_proj.", ".ffn.proj_2."),
)
# Phi 3 packs the same matrices, in the same order.
_PACKED = {"self_attn.qkv_proj": "attn.qkv_proj", "mlp.gate_up_proj": "ffn.proj_1"}


class Padding(NamedTuple):
    """Every `block` rows (axis 0) or columns (1) of a matrix become `to`, by zeros at the end."""

    axis: int
    block: int
    to: int


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and what else a config says of RoPE, old key names or new."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.pop("type", "default")
    return {"rope_theta": config.get("rope_theta", 10_000.0), "rope_type": kind, **rope}


def name_in(form: str, name: str) -> str:
    """What a tensor of ours is called in a format; several of ours may be parts of one there."""
    for ours, theirs in _OPENELM if form == "openelm" else ():
        if name.startswith(ours) or (ours[0] == "." and ours in name):
            name = name.replace(ours, theirs, 1)
    return name


def padding_in(form: str, config: Mapping[str, Any], name: str) -> Padding | None:
    """How a format pads a tensor of ours. config: of the conversion for our own classes."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(q|o|gate|up|down)_proj\.weight", name)
    if form == "openelm" or match is None:
        return None
    layers = layers_of(config)
    layer, matrix = layers[int(match[1])], match[2]
    block, to = layer.intermediate, _multiple(layer.intermediate)
    if matrix in "qo":
        head = head_dim_of(config)
        block = layer.heads // layer.kv_heads * head
        to = _query_heads(layers) // layer.kv_heads * head
    return Padding(int(matrix in ("o", "down")), block, to) if to > block else None


def format_config(form: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in a format, from that of the conversion for our own classes."""
    layers, rope, hidden = layers_of(config), rope_of(config), config["hidden_size"]
    dropped = ("auto_map", "per_layer_config", "layer_types", "sliding_window", "max_window_layers")
    new = {k: v for k, v in config.items() if k not in (*dropped, "use_sliding_window")}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    new.update(  # as transformers 4 and mlx-lm read them, too
        abreast={**config["abreast"], "format": form},
        torch_dtype=config["dtype"],
        rope_parameters=rope,
        rope_theta=rope["rope_theta"],
    )
    new.pop("rope_scaling", None)
    if scaling["rope_type"] != "default":
        new["rope_scaling"] = scaling
    if form == "openelm":
        return new | {
            "model_type": "openelm",
            "architectures": ["OpenELMForCausalLM"],
            "num_transformer_layers": len(layers),
            "model_dim": hidden,
            "num_query_heads": [layer.heads for layer in layers],
            "num_kv_heads": [layer.kv_heads for layer in layers],
            "ffn_multipliers": [layer.intermediate / hidden for layer in layers],
            "ffn_dim_divisor": 1,
            "ffn_with_glu": True,
            "normalize_qk_projections": False,
            "share_input_output_layers": bool(config.get("tie_word_embeddings")),
            "rope_freq_constant": rope["rope_theta"],
        }
    heads = _query_heads(layers)
    return new | {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{DECI_CODE.removesuffix('.py')}.DeciLMConfig"},
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "block_configs": [_block(layer, heads, hidden) for layer in layers],
    }


def mlx_config(
    config: Mapping[str, Any], family: Family, plan: Plan, kinds: Sequence[str], dtype: str
) -> dict[str, Any]:
    """config.json in the format mlx: the original's, and what its model file reads.

    kinds: of attention, of every layer. dtype: of the weights.
    """
    head = head_dim_of(config)
    gemma = family.model_type == "gemma3_text"
    slides = family.slides and config.get("sliding_window")
    kinds = ["sliding_attention"] * len(kinds) if slides else list(kinds)
    ropes = config.get("rope_parameters") or {}
    if not any(isinstance(value, dict) for value in ropes.values()):  # one for all, or old keys
        full = rope_of({"rope_theta": 1e6, **config} if gemma else config)
        local = {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", 1e4)}
        ropes = {"full_attention": full, "sliding_attention": local if gemma else full}
    scalar = config.get("query_pre_attn_scalar", 256) if gemma else head
    groups = [
        {"layers": list(g.layers), "bypass": g.ffn_band, "in_order": g.is_in_order}
        for g in plan.groups
    ]
    return dict(config) | {
        "model_type": _MLX_TYPE + family.model_type,
        "model_file": MLX_CODE,
        "dtype": dtype,
        "torch_dtype": dtype,  # as mlx-lm reads it
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": head,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": is_tied(config),
        "abreast": {
            "num_layers": plan.num_layers,
            "plan": plan.shorthand,
            "format": "mlx",
            "groups": groups,
            "kinds": kinds,
            "rope": ropes,
            "biases": [matrix.name for matrix in family.matrices if has_bias(matrix, config)],
            "head_norms": bool(family.head_norms),
            "post_norms": bool(family.member_norms),
            "gain_offset": family.gain_offset,
            "activation": "gelu" if gemma else "silu",
            "attention_scale": scalar**-0.5,
            "embedding_scale": config["hidden_size"] ** 0.5 if gemma else 1.0,
        },
    }


def _block(layer: Layer, heads: int, hidden: int) -> dict[str, Any]:
    width = _multiple(layer.intermediate)
    attention = {
        "n_heads_in_group": heads // layer.kv_heads,
        "no_op": False,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    ffn = {
        # int(2 * ffn_mult * hidden / 3) is width or one less, which is rounded up to width
        "ffn_mult": round(1.5 * width / hidden, 6) if width else None,
        "no_op": not width,
        "replace_with_linear": False,
        "sparsify": None,
    }
    return {"attention": attention, "ffn": ffn}


def _query_heads(layers: tuple[Layer, ...]) -> int:
    """The least number of query heads with which every layer's own keep their key-value heads."""
    shared = math.lcm(*(layer.kv_heads for layer in layers))
    return -(-max(layer.heads for layer in layers) // shared) * shared


def _multiple(width: int) -> int:
    return -(-width // 256) * 256


def as_ours(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json for our own classes of a checkpoint in a format, and which names it has there.

    The names are patterns with their replacements. Another config comes back as it is. Raises
    CheckpointError for one that makes no sense.
    """
    form = format_of(config)
    if form == "auto":
        return dict(config), {}
    if form == "mlx":
        model_type = str(config.get("model_type")).removeprefix(_MLX_TYPE)
        own = {key: value for key, value in config.items() if key not in ("abreast", "model_file")}
        return own | {"model_type": model_type}, {}
    try:
        hidden = config["hidden_size"]
        if form == "openelm":
            widths = [round(times * hidden) for times in config["ffn_multipliers"]]
            heads, kv_heads = config["num_query_heads"], config["num_kv_heads"]
        else:
            blocks = config["block_configs"]
            widths = [
                0
                if block["ffn"]["no_op"]
                else _multiple(int(2 * block["ffn"]["ffn_mult"] * hidden / 3))
                for block in blocks
            ]
            heads = [config["num_attention_heads"]] * len(blocks)
            shared = [block["attention"]["n_heads_in_group"] for block in blocks]
            kv_heads = [all_heads // n for all_heads, n in zip(heads, shared, strict=True)]
        entries = [
            {"num_attention_heads": q, "num_key_value_heads": kv, "intermediate_size": width}
            for q, kv, width in zip(heads, kv_heads, widths, strict=True)
        ]
        base = next(entry for entry in entries if entry["intermediate_size"])
    except (ArithmeticError, AttributeError, KeyError, StopIteration, TypeError, ValueError):
        raise CheckpointError(
            f"config.json makes no sense as {form}; convert or download it again"
        ) from None
    family = ("phi3", "Phi3") if form == "openelm" else ("llama", "Llama")
    dropped = ("auto_map", "block_configs", "rope_scaling", "rope_theta")
    ours = {key: value for key, value in config.items() if key not in dropped}
    ours |= {**base, "rope_parameters": rope_of(config)}
    ours |= {
        "model_type": f"abreast_{family[0]}",
        "architectures": [f"Abreast{family[1]}ForCausalLM"],
        "pad_token_id": config.get("pad_token_id"),
        "per_layer_config": {
            str(index).zfill(len(str(len(entries) - 1))): own
            for index, entry in enumerate(entries)
            if (own := {key: value for key, value in entry.items() if value != base[key]})
        },
    }
    names = {}
    if form == "openelm":
        renamed = {theirs: mine for mine, theirs in _OPENELM}
        renamed |= {f".{theirs}.": f".{mine}." for mine, theirs in _PACKED.items()}
        names = {
            ("" if theirs[0] == "." else "^") + re.escape(theirs): mine
            for theirs, mine in renamed.items()
        }
    return ours, names
