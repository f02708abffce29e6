"""One frozen row per model_type: which tensors a decoder layer has and how members join.

A row is data, not a class tree. It says everything that conversion needs: the names of a layer's
matrices, which norm each one reads (that norm's gain folds into it), along which side the members
of a group join, and which config keys give the sizes. A model_type without a row is refused.

Sizes are written in the symbols of the config: D hidden_size, Q num_attention_heads * head_dim,
K num_key_value_heads * head_dim, F intermediate_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from abreast.errors import AbreastError

Size = Literal["D", "Q", "K", "F", "V"]
Join = Literal["rows", "columns"]


class FamilyError(AbreastError):
    """A model that is of no known family, or whose config does not describe one."""


@dataclass(frozen=True)
class Matrix:
    """One linear map of a decoder layer, stored as `name`.weight of shape [rows, columns].

    join: members of a group are stacked along output rows (they read the shared input) or along
    input columns (their outputs add up). norm: the norm whose gain folds into the columns.
    bias: "" for none, "always", or the config key that switches it on. A "rows" bias is stacked; a
    "columns" bias adds to the residual stream, so the members' biases are summed.
    """

    name: str
    rows: Size
    columns: Size
    join: Join
    norm: str | None = None
    bias: str = ""


@dataclass(frozen=True)
class Family:
    """How one model_type stores its decoder layers.

    wide: config keys that grow p-fold in a group of p layers. ignore: suffixes of tensors that old
    checkpoints carry and no engine reads. stock: architecture of the unconverted checkpoint.
    """

    model_type: str
    stock: str
    matrices: tuple[Matrix, ...]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    wide: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    ignore: tuple[str, ...] = (".rotary_emb.inv_freq",)
    layer_prefix: str = "model.layers."
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"

    @property
    def converted(self) -> str:
        """Architecture of a converted checkpoint with layers of different width."""
        return "Abreast" + self.stock

    @property
    def converted_type(self) -> str:
        """model_type of a converted checkpoint."""
        return f"abreast_{self.model_type}"


def _gated(
    attention_bias: str = "", output_bias: str = "", mlp_bias: str = ""
) -> tuple[Matrix, ...]:
    """The matrices of a Llama-like layer: attention with q, k, v, o and a gated FFN."""
    before, after = "input_layernorm", "post_attention_layernorm"
    return (
        Matrix("self_attn.q_proj", "Q", "D", "rows", before, attention_bias),
        Matrix("self_attn.k_proj", "K", "D", "rows", before, attention_bias),
        Matrix("self_attn.v_proj", "K", "D", "rows", before, attention_bias),
        Matrix("self_attn.o_proj", "D", "Q", "columns", None, output_bias),
        Matrix("mlp.gate_proj", "F", "D", "rows", after, mlp_bias),
        Matrix("mlp.up_proj", "F", "D", "rows", after, mlp_bias),
        Matrix("mlp.down_proj", "D", "F", "columns", None, mlp_bias),
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            _gated("attention_bias", "attention_bias", "mlp_bias"),
        ),
        Family("mistral", "MistralForCausalLM", _gated()),
        Family("qwen2", "Qwen2ForCausalLM", _gated(attention_bias="always")),
    )
}


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
    **dict.fromkeys(("gemma", "glm"), _PLAIN),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _SANDWICH),
    **dict.fromkeys(("olmo2", "olmo3"), _POST),
    **dict.fromkeys(("cohere", "cohere2"), _COHERE),
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


def family_of(config: Mapping[str, Any]) -> Family:
    """The row for a config.json. Raises FamilyError for an unknown or a converted model."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("config.json has no model_type; give a Hugging Face checkpoint")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type.startswith("abreast_"):
        raise FamilyError(
            "this checkpoint is converted already; give the original that it was made from"
        )
    raise FamilyError(
        f"model_type '{model_type}' is not supported; supported are {', '.join(FAMILIES)}"
    )


def sizes(config: Mapping[str, Any]) -> dict[Size, int]:
    """The value of every size symbol for a config.json. Raises FamilyError when a key is off."""
    hidden = _positive(config, "hidden_size")
    heads = _positive(config, "num_attention_heads")
    kv_heads = _positive(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise FamilyError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise FamilyError(f"config.json: {heads} heads do not divide hidden_size {hidden}")
    head_dim = head_dim_of(config)
    return {
        "D": hidden,
        "Q": heads * head_dim,
        "K": kv_heads * head_dim,
        "F": _positive(config, "intermediate_size"),
        "V": _positive(config, "vocab_size"),
    }


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Size of one attention head: explicit, or hidden_size over the number of heads."""
    derived = _positive(config, "hidden_size") // _positive(config, "num_attention_heads")
    return _positive(config, "head_dim", derived)


def num_layers_of(config: Mapping[str, Any]) -> int:
    return _positive(config, "num_hidden_layers")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding. The three families' configs default to untied."""
    return bool(config.get("tie_word_embeddings", False))


def has_bias(matrix: Matrix, config: Mapping[str, Any]) -> bool:
    return matrix.bias == "always" or bool(matrix.bias and config.get(matrix.bias, False))


def layer_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of one layer, named without the layer's prefix."""
    size = sizes(config)
    shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (size["D"],) for norm in family.norms}
    for matrix in family.matrices:
        shapes[f"{matrix.name}.weight"] = (size[matrix.rows], size[matrix.columns])
        if has_bias(matrix, config):
            shapes[f"{matrix.name}.bias"] = (size[matrix.rows],)
    return shapes


def outer_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor outside the layers."""
    size = sizes(config)
    shapes: dict[str, tuple[int, ...]] = {family.embedding: (size["V"], size["D"])}
    shapes[family.final_norm] = (size["D"],)
    if not is_tied(config):
        shapes[family.head] = (size["V"], size["D"])
    return shapes


def all_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a checkpoint of this config must hold: no more, no fewer."""
    shapes = outer_tensors(family, config)
    layer = layer_tensors(family, config)
    for index in range(num_layers_of(config)):
        shapes.update({f"{family.layer_prefix}{index}.{n}": shape for n, shape in layer.items()})
    return shapes


def attention_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Kind of attention of every layer, for example "full_attention": unlike kinds never fuse.

    Follows the three families' config classes in transformers: an explicit layer_types list, else
    Qwen 2's max_window_layers, else one kind throughout.
    """
    count = num_layers_of(config)
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != count:
            raise FamilyError(f"config.json: layer_types must list the kind of all {count} layers")
        return tuple(str(kind) for kind in kinds)
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        first = config.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise FamilyError(
                f"config.json: max_window_layers must be a whole number, not {first!r}"
            )
        full = min(first, count)
        return ("full_attention",) * full + ("sliding_attention",) * (count - full)
    return ("full_attention",) * count


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise FamilyError(f"config.json has no {key}; the checkpoint is incomplete")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FamilyError(f"config.json: {key} must be a positive whole number, not {value!r}")
    return value
