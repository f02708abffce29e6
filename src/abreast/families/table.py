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

Join = Literal["rows", "columns"]


class FamilyError(AbreastError):
    """A model that is of no known family, or whose config does not describe one."""


@dataclass(frozen=True)
class Matrix:
    """One linear map of a decoder layer, stored as `name`.weight of shape [rows, columns].

    rows: size symbols of the output's parts, "QKK" for a packed q, k, v. join: members of a group
    are stacked along output rows (they read the shared input) or along input columns (their outputs
    add up). norm: the norm whose gain folds into the columns. bias: "" for none, "always", or the
    config key that switches it on. A "rows" bias is stacked; a "columns" bias adds to the residual
    stream, so the members' biases are summed.
    """

    name: str
    rows: str
    columns: str
    join: Join
    norm: str | None = None
    bias: str = ""


@dataclass(frozen=True)
class Family:
    """How one model_type stores its decoder layers.

    norms: those whose gain folds into the matrices that read them. gain_offset: what a norm adds to
    its stored gain (Gemma stores gain - 1). norm_bias: they are LayerNorms with a bias. head_norms:
    per-head norms of q and k, with the size symbol of the heads they act on; each layer has one
    gain of head_dim for all its heads, a group one for each head. member_norms: norms after a
    branch, which stay with their member. flat_norms: likewise, over all heads of q or k at once.
    wide_norms: with a gain for every head already, and only where the config says use_qk_norm.
    parallel: the FFN reads the layer's input, which makes all wirings one. head_bias: the output
    head has one. grown_biases: config keys that give a layer the biases it lacks, for a group's to
    take up those of its norms.
    wide: config keys that grow p-fold in a group of p layers. stock: architecture of the
    unconverted checkpoint. defaults: config keys whose absence means something else than off.
    ignore: suffixes of tensors that old checkpoints carry and no engine reads. vllm_layers: vLLM
    runs it in native layers of ours, other families in its transformers backend. deci_lacks: what
    llama.cpp's architecture deci lacks to run its layers, None if nothing.
    """

    model_type: str
    stock: str
    matrices: tuple[Matrix, ...]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    gain_offset: float = 0.0
    norm_bias: bool = False
    head_norms: tuple[tuple[str, str], ...] = ()
    member_norms: tuple[str, ...] = ()
    flat_norms: tuple[tuple[str, str], ...] = ()
    wide_norms: tuple[tuple[str, str], ...] = ()
    parallel: bool = False
    head_bias: bool = False
    grown_biases: tuple[str, ...] = ()
    wide: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    defaults: tuple[tuple[str, Any], ...] = ()
    ignore: tuple[str, ...] = (".rotary_emb.inv_freq",)
    vllm_layers: bool = False
    deci_lacks: str | None = "its layers have not been compared with llama.cpp's"
    layer_prefix: str = "model.layers."
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm"

    @property
    def converted(self) -> str:
        """Architecture of a converted checkpoint with layers of different width."""
        return "Abreast" + self.stock

    @property
    def converted_type(self) -> str:
        """model_type of a converted checkpoint."""
        return f"abreast_{self.model_type}"

    @property
    def keeps_members(self) -> bool:
        """Whether a group has parts that stay with their member in every wiring."""
        return bool(self.head_norms or self.member_norms or self.flat_norms)


_BEFORE, _AFTER = "input_layernorm", "post_attention_layernorm"


def _attention(
    norm: str | None = _BEFORE, bias: str = "", output_bias: str = ""
) -> tuple[Matrix, ...]:
    return (
        Matrix("self_attn.q_proj", "Q", "D", "rows", norm, bias),
        Matrix("self_attn.k_proj", "K", "D", "rows", norm, bias),
        Matrix("self_attn.v_proj", "K", "D", "rows", norm, bias),
        Matrix("self_attn.o_proj", "D", "Q", "columns", None, output_bias),
    )


def _gated_ffn(norm: str | None = _AFTER, bias: str = "") -> tuple[Matrix, ...]:
    return (
        Matrix("mlp.gate_proj", "F", "D", "rows", norm, bias),
        Matrix("mlp.up_proj", "F", "D", "rows", norm, bias),
        Matrix("mlp.down_proj", "D", "F", "columns", None, bias),
    )


def _plain_ffn(inner: str, outer: str, bias: str) -> tuple[Matrix, ...]:
    return (
        Matrix(f"mlp.{inner}", "F", "D", "rows", _AFTER, bias),
        Matrix(f"mlp.{outer}", "D", "F", "columns", None, bias),
    )


_BIASED = _attention(bias="attention_bias", output_bias="attention_bias")
_LLAMA = _BIASED + _gated_ffn(bias="mlp_bias")
_GLM = (
    *_attention(bias="attention_bias"),
    Matrix("mlp.gate_up_proj", "FF", "D", "rows", _AFTER),
    Matrix("mlp.down_proj", "D", "F", "columns"),
)
_QK_HEADS = (("self_attn.q_norm", "Q"), ("self_attn.k_norm", "K"))
_TIED = ("tie_word_embeddings", True)
_GEMMA_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_SANDWICHED = _BIASED + _gated_ffn("pre_feedforward_layernorm")

# What deci lacks.
_LAYER_NORM = "its norms subtract the mean and add a bias"
_PARALLEL = "its attention and FFN read the same norm"
_SANDWICH = "it norms the output of its attention and FFN"
_QK_BY_HEAD = "it norms q and k by head, in a group with other gains for every member"
_ROTATION = "it rotates q and k in another order"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            _LLAMA,
            vllm_layers=True,
            deci_lacks=None,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _attention() + _gated_ffn(),
            vllm_layers=True,
            deci_lacks=None,
        ),
        Family("ministral", "MinistralForCausalLM", _attention() + _gated_ffn()),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _attention(bias="always") + _gated_ffn(),
            vllm_layers=True,
            deci_lacks=None,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _BIASED + _gated_ffn(),
            head_norms=_QK_HEADS,
            defaults=(("head_dim", 128),),
            vllm_layers=True,
            deci_lacks=_QK_BY_HEAD,
        ),
        Family(
            "seed_oss",
            "SeedOssForCausalLM",
            _attention(bias="attention_bias", output_bias="attention_out_bias")
            + _gated_ffn(bias="mlp_bias"),
            defaults=(("attention_bias", True), ("head_dim", 128)),
            deci_lacks=None,
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            _LLAMA,
            defaults=(_TIED,),
            deci_lacks="some of its layers do not rotate q and k",
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            _LLAMA,
            deci_lacks=None,
        ),
        Family(
            "ernie4_5",
            "Ernie4_5ForCausalLM",
            _attention(bias="use_bias", output_bias="use_bias") + _gated_ffn(bias="use_bias"),
            defaults=(_TIED, ("head_dim", 128)),
            deci_lacks=_ROTATION,
        ),
        Family(
            "arcee",
            "ArceeForCausalLM",
            _BIASED + _plain_ffn("up_proj", "down_proj", "mlp_bias"),
            deci_lacks="its FFN has no gate",
        ),
        Family(
            "nemotron",
            "NemotronForCausalLM",
            _BIASED + _plain_ffn("up_proj", "down_proj", "mlp_bias"),
            gain_offset=1.0,
            norm_bias=True,
            grown_biases=("attention_bias", "mlp_bias"),
            deci_lacks=_LAYER_NORM,
        ),
        Family(
            "starcoder2",
            "Starcoder2ForCausalLM",
            _attention(bias="use_bias", output_bias="use_bias")
            + _plain_ffn("c_fc", "c_proj", "use_bias"),
            norm_bias=True,
            defaults=(_TIED, ("use_bias", True)),
            deci_lacks=_LAYER_NORM,
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            (
                Matrix("self_attn.qkv_proj", "QKK", "D", "rows", _BEFORE),
                Matrix("self_attn.o_proj", "D", "Q", "columns"),
                Matrix("mlp.gate_up_proj", "FF", "D", "rows", _AFTER),
                Matrix("mlp.down_proj", "D", "F", "columns"),
            ),
            deci_lacks=None,
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            _BIASED + _gated_ffn(),
            gain_offset=1.0,
            defaults=(_TIED, ("head_dim", 256)),
            deci_lacks="its FFN is gated by GELU",
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            _SANDWICHED,
            norms=("input_layernorm", "pre_feedforward_layernorm"),
            gain_offset=1.0,
            member_norms=_GEMMA_NORMS,
            defaults=(_TIED, ("head_dim", 256)),
            deci_lacks=_SANDWICH,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _SANDWICHED,
            norms=("input_layernorm", "pre_feedforward_layernorm"),
            gain_offset=1.0,
            head_norms=_QK_HEADS,
            member_norms=_GEMMA_NORMS,
            defaults=(_TIED, ("head_dim", 256)),
            deci_lacks=_SANDWICH,
        ),
        *(
            Family(
                model_type,
                f"{model_type.capitalize()}ForCausalLM",
                _attention(None, "attention_bias", "attention_bias") + _gated_ffn(None),
                norms=(),
                member_norms=_GEMMA_NORMS,
                flat_norms=_QK_HEADS,
                deci_lacks=_SANDWICH,
            )
            for model_type in ("olmo2", "olmo3")
        ),
        Family(
            "cohere2",
            "Cohere2ForCausalLM",
            _BIASED + _gated_ffn(_BEFORE),
            norms=("input_layernorm",),
            parallel=True,
            defaults=(_TIED,),
            deci_lacks=_PARALLEL,
        ),
        Family(
            "cohere",
            "CohereForCausalLM",
            _BIASED + _gated_ffn(_BEFORE),
            norms=("input_layernorm",),
            wide_norms=_QK_HEADS,
            parallel=True,
            defaults=(_TIED,),
            deci_lacks=_PARALLEL,
        ),
        Family(
            "glm",
            "GlmForCausalLM",
            _GLM,
            defaults=(("attention_bias", True), ("head_dim", 128)),
            deci_lacks=_ROTATION,
        ),
        Family(
            "glm4",
            "Glm4ForCausalLM",
            _GLM,
            member_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
            defaults=(("attention_bias", True), ("head_dim", 128)),
            deci_lacks=_SANDWICH,
        ),
        Family(
            "phi",
            "PhiForCausalLM",
            (
                *_attention(bias="always")[:3],
                Matrix("self_attn.dense", "D", "Q", "columns", None, "always"),
                Matrix("mlp.fc1", "F", "D", "rows", _BEFORE, "always"),
                Matrix("mlp.fc2", "D", "F", "columns", None, "always"),
            ),
            norms=("input_layernorm",),
            norm_bias=True,
            parallel=True,
            head_bias=True,
            final_norm="model.final_layernorm",
            deci_lacks=_PARALLEL,
        ),
        Family(
            "olmo",
            "OlmoForCausalLM",
            _attention(None, "attention_bias", "attention_bias") + _gated_ffn(None),
            norms=(),
            final_norm="",
            deci_lacks=_LAYER_NORM,
        ),
        Family(
            "exaone4",
            "Exaone4ForCausalLM",
            _attention(None) + _gated_ffn(None),
            norms=(),
            head_norms=_QK_HEADS,
            member_norms=_GEMMA_NORMS,
            deci_lacks=_SANDWICH,
        ),
        Family(
            "hunyuan_v1_dense",
            "HunYuanDenseV1ForCausalLM",
            _BIASED + _gated_ffn(),
            head_norms=(("self_attn.query_layernorm", "Q"), ("self_attn.key_layernorm", "K")),
            deci_lacks=_QK_BY_HEAD,
        ),
    )
}


# Experts, partly rotated heads or branches with learned parts that are no matrices: not one layer.
GROUPED_ONLY = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_neox", "stablelm", "gemma3")


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
    if model_type in GROUPED_ONLY:
        raise FamilyError(
            f"a {model_type} cannot be written as wide layers, only run grouped in memory "
            "(abreast.grouped, or eval with --plan)"
        )
    raise FamilyError(
        f"model_type '{model_type}' is not supported; supported are {', '.join(FAMILIES)}"
    )


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the family's defaults for keys that it leaves out."""
    return {**dict(family_of(config).defaults), **config}


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The value of every size symbol for a config.json. Raises FamilyError when a key is off."""
    hidden = positive(config, "hidden_size")
    heads = positive(config, "num_attention_heads")
    kv_heads = positive(config, "num_key_value_heads", heads)
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
        "F": positive(config, "intermediate_size"),
        "V": positive(config, "vocab_size"),
    }


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Size of one attention head: explicit, or hidden_size over the number of heads."""
    derived = positive(config, "hidden_size") // positive(config, "num_attention_heads")
    return positive(config, "head_dim", derived)


def num_layers_of(config: Mapping[str, Any]) -> int:
    return positive(config, "num_hidden_layers")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding."""
    return bool(config.get("tie_word_embeddings", False))


def has_bias(matrix: Matrix, config: Mapping[str, Any]) -> bool:
    return matrix.bias == "always" or bool(matrix.bias and config.get(matrix.bias, False))


def layer_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of one layer, named without the layer's prefix."""
    size = sizes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in family.norms:
        for kind in ("weight", "bias") if family.norm_bias else ("weight",):
            shapes[f"{norm}.{kind}"] = (size["D"],)
    for norm, _ in family.head_norms:
        shapes[f"{norm}.weight"] = (head_dim_of(config),)
    for norm in family.member_norms:
        shapes[f"{norm}.weight"] = (size["D"],)
    for norm, heads in family.flat_norms:
        shapes[f"{norm}.weight"] = (size[heads],)
    for norm, heads in family.wide_norms if config.get("use_qk_norm") else ():
        head_dim = head_dim_of(config)
        shapes[f"{norm}.weight"] = (size[heads] // head_dim, head_dim)
    for matrix in family.matrices:
        rows = sum(size[part] for part in matrix.rows)
        shapes[f"{matrix.name}.weight"] = (rows, size[matrix.columns])
        if has_bias(matrix, config):
            shapes[f"{matrix.name}.bias"] = (rows,)
    return shapes


def outer_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor outside the layers."""
    size = sizes(config)
    shapes: dict[str, tuple[int, ...]] = {family.embedding: (size["V"], size["D"])}
    kinds = ("weight", "bias") if family.norm_bias else ("weight",)
    for kind in kinds if family.final_norm else ():
        shapes[f"{family.final_norm}.{kind}"] = (size["D"],)
    if not is_tied(config):
        shapes[family.head] = (size["V"], size["D"])
    if family.head_bias:
        shapes[family.head.replace("weight", "bias")] = (size["V"],)
    return shapes


def all_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a checkpoint of this config must hold: no more, no fewer."""
    shapes = outer_tensors(family, config)
    layer = layer_tensors(family, config)
    for index in range(num_layers_of(config)):
        shapes.update({f"{family.layer_prefix}{index}.{n}": shape for n, shape in layer.items()})
    return shapes


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number from a config. Raises FamilyError when it is none."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise FamilyError(f"config.json has no {key}; the checkpoint is incomplete")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FamilyError(f"config.json: {key} must be a positive whole number, not {value!r}")
    return value
