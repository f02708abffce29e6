"""What a row of the table says about a family, and what follows from it for one config.json.

A row is data, not a class tree. It says all that the package knows about a family: the submodules
that a grouped run calls, the names of a layer's matrices, along which side the members of a group
join, the norms, the config keys that give sizes and kinds of attention, and what engines lack to
run it. Rows without matrices run grouped in memory only; a model_type without a row is refused.

Sizes are written in the symbols of the config: D hidden_size, H num_attention_heads, Q
H * head_dim, K num_key_value_heads * head_dim, W q, k and v of one head after another, F
intermediate_size, V vocab_size; with experts, E how many there are, C how many of them a token
chooses, X the width of one, S that of those which every token uses. Attention through latent
vectors (MLA, arXiv 2405.04434, section 2.1): A and L are the lengths of those of queries and of
keys and values, R that of L with a rotated key, B and M the heads' together made from A and from L,
O what they give; N is B where there is no A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from abreast.errors import AbreastError
from abreast.plan import Block, Plan

Join = Literal["rows", "columns"]


# Config keys for how many experts there are, and how many of those that every token uses.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SHARED_COUNTS = ("n_shared_experts", "moe_num_shared_experts")
CHOSEN_COUNTS = ("num_experts_per_tok", "moe_k")
# Those that say which layers have experts.
EXPERT_PLACES = (
    *("mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "mlp_layer_types"),
    *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
)


class FamilyError(AbreastError):
    """A model that is of no known family, or whose config does not describe one."""


@dataclass(frozen=True)
class Matrix:
    """One linear map of a decoder layer, stored as `name`.weight of shape [rows, columns].

    rows: size symbols of the output's parts, "QKK" for a packed q, k, v. join: members of a group
    are stacked along output rows (they read the shared input) or along input columns (their outputs
    add up). bias: "" for none, "always", or the config key that switches it on. A "rows" bias is
    stacked; a "columns" bias adds to the residual stream, so the members' biases are summed.
    """

    name: str
    rows: str
    columns: str
    join: Join
    bias: str = ""


@dataclass(frozen=True)
class Stack:
    """A tensor that counts experts, heads or members along one axis: a group has those of all.

    name: the whole name within the layer. shape: the size symbols of every axis, or "1". axis: the
    one along which members follow each other; all axes before it are 1. gain: the axis that the
    gain of the norm before the FFN scales, counted from the end, None if the tensor reads no norm.
    """

    name: str
    shape: tuple[str, ...]
    axis: int = 0
    gain: int | None = None


@dataclass(frozen=True)
class Branches:
    """Names of a decoder layer's submodules in transformers: what a grouped run calls.

    The attention branch is after_attention(attention(before_attention(x))), the FFN branch
    after_mlp(mlp(before_mlp(y))); each `before` and `after` is a chain of submodules, maybe empty.
    parallel: the FFN reads the layer's input instead of the attention's result: True, False, or
    the attribute of the layer that says which, dots allowed. scale: attribute of the layer, and key
    of the config, that multiplies both branches.

    mixers, ffns: where these are given instead, the submodules that mix tokens and those of the
    FFN, of which a layer has some. A branch is then what the layer adds to its input while the
    submodules of the other give zeros. tuples: the layer returns a tuple.
    """

    attention: str = "self_attn"
    before_attention: tuple[str, ...] = ("input_layernorm",)
    after_attention: tuple[str, ...] = ()
    mlp: str = "mlp"
    before_mlp: tuple[str, ...] = ("post_attention_layernorm",)
    after_mlp: tuple[str, ...] = ()
    parallel: bool | str = False
    scale: str | None = None
    mixers: tuple[str, ...] = ()
    ffns: tuple[str, ...] = ()
    tuples: bool = False


@dataclass(frozen=True)
class Family:
    """How one model_type runs and stores its decoder layers.

    class_name: what the names of its classes in transformers begin with. matrices: all linear maps
    of a layer, empty for families that only run grouped in memory.

    stacks: tensors of a layer with experts that are no matrices. dense: the FFN's matrices in
    layers without, if the family mixes both; the attention is that of `matrices`. expert_keys:
    config keys that grow p-fold where p layers with experts are joined. renames: patterns of names
    in checkpoints, and what the model's own are. routing: config keys that say how routers score
    and choose, with the values of each that a group's router computes; the first is the default.

    gain_offset: what a norm adds to its stored gain (Gemma stores gain - 1). norm_gains: the norms
    before a branch have gains, which fold into the matrices that read them. norm_bias: they are
    LayerNorms with a bias. head_norms: per-head norms of q and k, with the size symbol of the heads
    they act on; each layer has one gain of head_dim for all its heads, a group one for each head.
    flat_norms: likewise, over all heads of q or k at once, which stay with their member.
    wide_norms: with a gain for every head already, and only where the config says use_qk_norm.
    head_bias: like a matrix's bias, that of the output head. grown_biases: config keys that give a
    layer the biases it lacks, for a group's to take up those of its norms.

    wide: config keys that grow p-fold in a group of p layers. defaults: config keys whose absence
    means something else than off. ignore: suffixes of tensors that old checkpoints carry and no
    engine reads.

    window_period: the last of every so many layers has full attention, the others slide, unless
    config.json lists the kinds. rope_period: the last of every so many layers does not rotate q and
    k, unless no_rope_layers says otherwise. slides: all layers slide as soon as config has a
    sliding_window.

    alone: there are checkpoints of it by itself, not only within a wrapper.

    own_attentions: those of a group stay whole, each in a layer of its own with its own cache, and
    only FFNs are joined, whatever the wiring. derived_head_size: its stock attention takes the size
    of a head from hidden_size, which a wider one needs told. one_input: where `branches.parallel`
    is an attribute, whether models are converted that have it or those that have it not.

    vllm_layers: vLLM runs it in native layers of ours, other families in its transformers backend.
    deci_lacks: what llama.cpp's architecture deci lacks to run its layers, None if nothing.
    """

    model_type: str
    class_name: str
    matrices: tuple[Matrix, ...] = ()
    branches: Branches = Branches()
    stacks: tuple[Stack, ...] = ()
    dense: tuple[Matrix, ...] = ()
    expert_keys: tuple[str, ...] = ()
    routing: tuple[tuple[str, tuple[str, ...]], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    gain_offset: float = 0.0
    norm_gains: bool = True
    norm_bias: bool = False
    head_norms: tuple[tuple[str, str], ...] = ()
    flat_norms: tuple[tuple[str, str], ...] = ()
    wide_norms: tuple[tuple[str, str], ...] = ()
    head_bias: str = ""
    grown_biases: tuple[str, ...] = ()
    wide: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    defaults: tuple[tuple[str, Any], ...] = ()
    ignore: tuple[str, ...] = (".rotary_emb.inv_freq",)
    window_period: int | None = None
    rope_period: int | None = None
    slides: bool = False
    alone: bool = True
    vllm_layers: bool = False
    deci_lacks: str | None = "its layers have not been compared with llama.cpp's"
    unfoldable: str = ""
    own_attentions: bool = False
    derived_head_size: bool = False
    one_input: bool = False
    code: str = ""
    names: tuple[tuple[str, str], ...] = ()
    only: tuple[tuple[str, Any], ...] = ()
    layer_prefix: str = "model.layers."
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm"

    @property
    def stock(self) -> str:
        """Architecture of the unconverted checkpoint."""
        return f"{self.class_name}ForCausalLM"

    @property
    def converted(self) -> str:
        """Architecture of a converted checkpoint with layers of different width."""
        return "Abreast" + self.stock

    @property
    def converted_type(self) -> str:
        """model_type of a converted checkpoint."""
        return f"abreast_{self.model_type}"

    @property
    def parallel(self) -> bool:
        """Whether the FFN reads the layer's input, which makes all wirings one: always, or in all
        models that can be converted."""
        return self.branches.parallel is True or self.one_input

    def reads_one_input(self, config: Mapping[str, Any]) -> bool:
        """Whether the FFN of a model with this config.json reads the layer's input."""
        key = self.branches.parallel
        known = {**dict(self.defaults), **config}
        return key if isinstance(key, bool) else known.get(key) is True

    def converts(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with this config.json is of the kind that can be converted."""
        depends = isinstance(self.branches.parallel, str)
        return bool(self.matrices) and (
            not depends or self.reads_one_input(config) == self.one_input
        )

    @property
    def why_in_memory(self) -> str:
        """Why models of the family, or of the kind that is not converted, only run grouped."""
        reads = "the attention's result" if self.one_input else "what its attention reads"
        return self.unfoldable or f"its FFN reads {reads} ({self.branches.parallel})"

    @property
    def transformers_only(self) -> bool:
        """Whether only transformers runs conversions of checkpoints that hold just this model."""
        return self.derived_head_size and self.alone

    @property
    def routes(self) -> bool:
        """Whether layers have experts, of which a router chooses some for every token."""
        return bool(self.expert_keys)

    @property
    def norms(self) -> tuple[str, ...]:
        """Norms whose gain folds into the matrices that read them."""
        if not self.norm_gains or self.branches.mixers:
            return ()
        return tuple(dict.fromkeys(self.branches.before_attention + self.branches.before_mlp))

    def norm_of(self, matrix: Matrix) -> str | None:
        """The one of `norms` that a matrix reads, None for what reads no such norm."""
        own = matrix.name.startswith(f"{self.branches.attention}.")
        before = self.branches.before_attention if own else self.branches.before_mlp
        return before[0] if before and self.norm_gains and matrix.join == "rows" else None

    def is_ffn(self, module: str) -> bool:
        """Whether a submodule of a layer belongs to its FFN branch, not to its attention's."""
        own, shared = self.branches, self.branches.before_attention
        beside = module in own.before_mlp + own.after_mlp and module not in shared
        return module.startswith(f"{own.mlp}.") or beside

    @property
    def member_norms(self) -> tuple[str, ...]:
        """Norms after a branch, which stay with their member."""
        after = self.branches.after_attention + self.branches.after_mlp
        return tuple(name for name in after if name.endswith("norm"))

    def blocks_of(self, plan: Plan) -> tuple[Block, ...]:
        """What the layers of a conversion under a plan hold."""
        return plan.blocks_with(own_attentions=self.own_attentions)

    def beside(self, block: Block) -> int:
        """How many layers' attentions read the same input, where `block` is the last of them and
        has all their FFNs, else 1."""
        in_order = block.group is None or block.group.is_in_order
        return max(1, len(block.ffns)) if self.own_attentions and not in_order else 1

    @property
    def keeps_members(self) -> bool:
        """Whether a group has parts that stay with their member in every wiring."""
        return bool(self.head_norms or self.member_norms or self.flat_norms)


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The value of every size symbol for a config.json. Raises FamilyError when a key is off."""
    hidden = positive(config, "hidden_size")
    heads = positive(config, "num_attention_heads")
    kv_heads = positive(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise FamilyError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads"
        )
    latent = config.get("kv_lora_rank") is not None
    if config.get("head_dim") is None and hidden % heads and not latent:
        raise FamilyError(f"config.json: {heads} heads do not divide hidden_size {hidden}")
    head_dim = head_dim_of(config)
    size = {
        "D": hidden,
        "Q": heads * head_dim,
        "K": kv_heads * head_dim,
        "W": 3 * heads * head_dim,
        "F": positive(config, "intermediate_size"),
        "V": positive(config, "vocab_size"),
    }
    if latent:
        length, value = positive(config, "kv_lora_rank"), positive(config, "v_head_dim")
        plain, rotated = positive(config, "qk_nope_head_dim"), positive(config, "qk_rope_head_dim")
        queries = positive(config, "q_lora_rank") if config.get("q_lora_rank") else 0
        made = heads * (plain + rotated)
        size |= {"A": queries, "B": made if queries else 0, "N": 0 if queries else made}
        size |= {"L": length, "R": length + rotated, "M": heads * (plain + value)}
        # Of keys and values the latent ones are cached, half of which count as keys.
        size |= {"O": heads * value, "Q": made, "K": (length + rotated) // 2}
    count = next((key for key in EXPERT_COUNTS if config.get(key)), None)
    if count is None:
        return size
    width = positive(config, "moe_intermediate_size", size["F"])
    own = next((key for key in SHARED_COUNTS if config.get(key)), None)
    shared = width * positive(config, own) if own else 0
    if config.get("shared_expert_intermediate_size") is not None:
        shared = positive(config, "shared_expert_intermediate_size")
    experts = positive(config, count)
    key = next((key for key in CHOSEN_COUNTS if key in config), CHOSEN_COUNTS[0])
    chosen = positive(config, key)
    if chosen > experts:
        raise FamilyError(f"config.json: {key} is {chosen}, but there are {experts} experts")
    return {**size, "H": heads, "E": experts, "C": chosen, "X": width, "S": shared}


def expert_layers(family: Family, config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which layers have experts. Raises FamilyError for keys that make no sense."""
    layers = range(num_layers_of(config))
    if not family.routes or not family.dense:
        return tuple(family.routes for _ in layers)
    if isinstance(kinds := config.get("mlp_layer_types"), list) and len(kinds) == len(layers):
        return tuple(kind == "sparse" for kind in kinds)
    dense = config.get("mlp_only_layers") or []
    first = config.get("first_k_dense_replace", config.get("moe_layer_start_index")) or 0
    last = config.get("moe_layer_end_index")
    last = len(layers) - 1 if last in (None, -1) else last
    if not (isinstance(dense, list) and isinstance(first, int) and isinstance(last, int)):
        raise FamilyError(
            f"config.json: {', '.join(key for key in EXPERT_PLACES if key in config)} do not say "
            "which layers have experts"
        )
    step = positive(config, "decoder_sparse_step", positive(config, "moe_layer_interval", 1))
    return tuple(
        layer not in dense and (layer + 1) % step == 0 and first <= layer <= last
        for layer in layers
    )


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Size of one attention head: explicit, or hidden_size over the number of heads; of MLA's what
    is rotated of it, which is what their config classes call so."""
    if config.get("kv_lora_rank") is not None:
        return positive(config, "qk_rope_head_dim")
    derived = positive(config, "hidden_size") // positive(config, "num_attention_heads")
    return positive(config, "head_dim", derived)


def num_layers_of(config: Mapping[str, Any]) -> int:
    return positive(config, "num_hidden_layers")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding."""
    return bool(config.get("tie_word_embeddings", False))


def has_bias(matrix: Matrix, config: Mapping[str, Any]) -> bool:
    return matrix.bias == "always" or bool(matrix.bias and config.get(matrix.bias, False))


def layer_tensors(
    family: Family, config: Mapping[str, Any], *, experts: bool | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of one layer, named without the layer's prefix.

    experts: whether it is one with experts, None for whatever most layers of the family are.
    """
    experts = family.routes if experts is None else experts
    size = sizes(config)
    if family.own_attentions and "L" not in size:
        raise FamilyError("config.json has no kv_lora_rank; the checkpoint is incomplete")
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in family.norms:
        for kind in ("weight", "bias") if family.norm_bias else ("weight",):
            shapes[f"{norm}.{kind}"] = (size["D"],)
    for norm, _ in family.head_norms if config.get("use_qk_norm", True) else ():
        shapes[f"{norm}.weight"] = (head_dim_of(config),)
    for norm in family.member_norms:
        shapes[f"{norm}.weight"] = (size["D"],)
    for norm, length in family.flat_norms:
        if size[length]:
            shapes[f"{norm}.weight"] = (size[length],)
    for norm, heads in family.wide_norms if config.get("use_qk_norm") else ():
        head_dim = head_dim_of(config)
        shapes[f"{norm}.weight"] = (size[heads] // head_dim, head_dim)
    if experts and "E" not in size:
        raise FamilyError(f"config.json does not say how many experts ({EXPERT_COUNTS[0]})")
    attention = tuple(m for m in family.matrices if not family.is_ffn(m.name))
    for matrix in family.matrices if experts or not family.routes else attention + family.dense:
        rows, columns = sum(size[part] for part in matrix.rows), size[matrix.columns]
        if not rows * columns:  # no expert that every token uses
            continue
        shapes[f"{matrix.name}.weight"] = (rows, columns)
        if has_bias(matrix, config):
            shapes[f"{matrix.name}.bias"] = (rows,)
    for stack in family.stacks if experts else ():
        axes = (1 if axis == "1" else sum(size[part] for part in axis) for axis in stack.shape)
        shapes[stack.name] = tuple(axes)
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
    if family.head_bias == "always" or config.get(family.head_bias):
        shapes[family.head.replace("weight", "bias")] = (size["V"],)
    return shapes


def all_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a checkpoint of this config must hold: no more, no fewer.

    Of a converted one, too, unless its groups keep something apart for each member.
    """
    shapes = outer_tensors(family, config)
    kinds = expert_layers(family, config)
    for index, (own, experts) in enumerate(zip(layer_configs(config), kinds, strict=True)):
        prefix = f"{family.layer_prefix}{index}."
        tensors = layer_tensors(family, own, experts=experts)
        shapes.update({prefix + name: shape for name, shape in tensors.items()})
    return shapes


def layer_configs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The config of every layer by itself."""
    base = {k: v for k, v in config.items() if k != "per_layer_config"}
    base["head_dim"] = head_dim_of(config)
    own = config.get("per_layer_config") or {}
    entries = own.values() if isinstance(own, Mapping) else [None]
    if not all(isinstance(entry, Mapping) for entry in entries) or not all(map(str.isdecimal, own)):
        raise FamilyError("config.json: per_layer_config does not describe layers by their number")
    own = {int(key): entry for key, entry in own.items()}
    return [{**base, **own.get(index, {})} for index in range(num_layers_of(config))]


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
