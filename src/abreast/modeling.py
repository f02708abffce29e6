"""Configurations and models of converted checkpoints: stock layers, each of its own width.

This file also travels inside every converted checkpoint as its remote code, so it imports torch
and transformers only. Widths follow transformers' own `per_layer_config` schema; what stock classes
lack today is building every decoder layer from its own entry. That gap is closed here for every
family at once: classes `Abreast<Family>Config`, `...Model` and `...ForCausalLM` are made on first
use from the family's own. Attention, FFN, norms, caches and generation stay the family's.

Some groups are not one stock layer, because something in them stays with its member: a norm after
a branch, or FFNs that see different attention outputs. Their entry has `abreast_members` and, where
FFN j sees the attentions j - d .. j only, d as `abreast_bypass` (`Group.ffn_band`). The parts in
question are then applied to all members at once, as one batched product.

Shapes: B batch, L length, D hidden, P members, and X for any other width.
"""

import copy
import functools
import importlib
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.phi3.modeling_phi3 import Phi3Attention

# Family in class names -> module below transformers.models; both take the family's own classes.
FAMILIES = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Ministral": "ministral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "SeedOss": "seed_oss",
    "SmolLM3": "smollm3",
    "Granite": "granite",
    "Ernie4_5": "ernie4_5",
    "Arcee": "arcee",
    "Starcoder2": "starcoder2",
    "Phi3": "phi3",
    "Gemma": "gemma",
    "Gemma2": "gemma2",
    "Gemma3": "gemma3",
    "Olmo2": "olmo2",
    "Cohere2": "cohere2",
    "Cohere": "cohere",
    "Glm": "glm",
    "Glm4": "glm4",
    "Phi": "phi",
    "Nemotron": "nemotron",
    "Olmo": "olmo",
    "Olmo3": "olmo3",
    "Exaone4": "exaone4",
    "HunYuanDenseV1": "hunyuan_v1_dense",
}
# Attention classes that norm q and k after they were transposed to [B, heads, L, X].
HEADS_BEFORE_LENGTH = {"Gemma3Attention", "Exaone4Attention", "HunYuanDenseV1Attention"}
# Norms after attention, before and after the FFN, in the three orders there are.
ORDERS: tuple[tuple[Any, Any, Any], ...] = (
    ("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None),
)


class MemberLinear(nn.Module):
    """One linear map per member: [.., P, in] or [.., P * in] -> [.., P, out].

    Replaces a stock map that is wide along its output `rows` or its input `columns`. weight is
    [P * out, in], the members' matrices one below the other.
    """

    def __init__(self, stock: nn.Linear, members: int, wide: str) -> None:
        super().__init__()
        rows, columns = stock.out_features, stock.in_features
        self.members = members
        self.in_features = columns // members if wide == "columns" else columns
        self.out_features = rows // members if wide == "rows" else rows
        self.weight = nn.Parameter(torch.empty(members * self.out_features, self.in_features))
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        self.bias = None
        if stock.bias is not None:
            self.bias = nn.Parameter(torch.zeros(members * self.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lead = x.shape[:-1] if x.shape[-1] != self.in_features else x.shape[:-2]
        x_NPX = x.reshape(-1, self.members, self.in_features)
        weight = self.weight.view(self.members, self.out_features, self.in_features)
        out_NPX = torch.bmm(x_NPX.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        if self.bias is not None:
            out_NPX = out_NPX + self.bias.view(self.members, self.out_features)
        return out_NPX.reshape(*lead, self.members, self.out_features)


class JoinMembers:
    """Mixed into a linear map over the members' inputs side by side: [.., P, in] -> [.., out]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(-2))


class AddMembers:
    """Mixed into a stock norm with gains [P, D]: norms every member by itself and sums them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sum(-2)


class FlatMembers:
    """Mixed into a stock norm with gains [P, X]: norms [.., P * X] member by member."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.unflatten(-1, self.weight.shape)).flatten(-2)


class HeadsBeforeLength:
    """Mixed into a stock norm with gains [heads, X] that is given [B, heads, L, X]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class CqilForward:
    """Mixed into a family's decoder layer: FFN j sees the attentions j - bypass .. j.

    arXiv 2404.06709, section 3.2: y_j = x + sum of a_k for k = j - bypass .. j. The bypass enters
    the FFN's input only, never the residual stream a second time.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x_BLD = hidden_states
        scale = getattr(self, "residual_multiplier", 1.0)
        normed = self.input_layernorm(x_BLD) if hasattr(self, "input_layernorm") else x_BLD
        a_BLPD = self.self_attn(normed, *args, **kwargs)[0]
        if scale != 1.0:
            a_BLPD = a_BLPD * scale
        after_attention, before, after = (getattr(self, name or "", None) for name in self.norms)
        if after_attention is not None:
            a_BLPD = after_attention(a_BLPD)
        y_BLPD = x_BLD.unsqueeze(-2) + a_BLPD
        for distance in range(1, self.bypass + 1):
            y_BLPD[..., distance:, :] += a_BLPD[..., :-distance, :]
        f_BLD = self.mlp(before(y_BLPD) if before is not None else y_BLPD)
        if scale != 1.0:
            f_BLD = f_BLD * scale
        if after is not None:
            f_BLD = after(f_BLD)
        return x_BLD + a_BLPD.sum(-2) + f_BLD


class SequentialPrefill:
    """Mixed into the layer of a group: can run prompts through its members in the original order.

    With `abreast_prefill` = "sequential" in the config, anything longer than one token goes through
    the members one after another, as in the unconverted model; single tokens, that is decoding, run
    abreast. Prefill is compute-bound and gains nothing from grouping, so this buys quality for
    nothing. Members are slices of the wide weights; there is no second copy.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sequential = getattr(self.main_config, "abreast_prefill", None) == "sequential"
        if not sequential or hidden_states.shape[1] == 1:
            return super().forward(hidden_states, *args, **kwargs)
        return _one_by_one(self, hidden_states, *args, **kwargs)


class MemberCache:
    """Replaces the KV cache while one member runs: collects what the member would store."""

    def __init__(self, past: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.past = past
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.new = key, value
        if self.past is None:
            return key, value
        return torch.cat([self.past[0], key], -2), torch.cat([self.past[1], value], -2)


def _one_by_one(
    layer: Any, x: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """Run a group's members in their original order on x [B, L, D], and fill the wide KV cache."""
    (narrow,) = layer.narrow
    members, index = layer.members, layer.self_attn.layer_idx
    attention = narrow.self_attn
    attention.config._attn_implementation_internal = layer.main_config._attn_implementation_internal
    cache = kwargs.pop("past_key_values", None)
    heads = attention.config.num_key_value_heads
    past = _past(cache, index)
    if isinstance(attention_mask, torch.Tensor):
        # A static cache's mask spans its whole capacity; the members see only the filled part.
        seen = x.shape[1] + (past[0].shape[-2] if past is not None else 0)
        attention_mask = attention_mask[..., :seen]
    stored = []
    for member in range(members):
        own = slice(member * heads, (member + 1) * heads)
        collector = MemberCache((past[0][:, own], past[1][:, own]) if past is not None else None)
        weights = {n: _member_of(layer, n, p, member) for n, p in narrow.named_parameters()}
        arguments = {**kwargs, "attention_mask": attention_mask, "past_key_values": collector}
        x = torch.func.functional_call(narrow, weights, (x,), arguments)
        stored.append(collector.new)
    if cache is not None:
        keys, values = (torch.cat(parts, 1) for parts in zip(*stored, strict=True))
        cache.update(keys, values, index)
    return x


def _past(cache: Any, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    length = cache.get_seq_length(index) if cache is not None else 0
    if not length:
        return None
    entry = cache.layers[index]
    if getattr(entry, "is_sliding", False) and entry.is_compileable:
        raise ValueError("sequential prefill cannot continue from a static sliding-window cache")
    return entry.keys[:, :, :length], entry.values[:, :, :length]


def _member_of(layer: Any, name: str, like: torch.Tensor, member: int) -> torch.Tensor:
    """One member's slice of a group's parameter, in the shape of `like`."""
    holder = layer.get_submodule(name.rpartition(".")[0])
    wide, members = layer.get_parameter(name), layer.members
    if wide.shape == like.shape:
        if name.endswith(("o_proj.bias", "down_proj.bias", "c_proj.bias")):
            raise ValueError(f"{name} is the sum of its members': prefill cannot be sequential")
        return wide
    if wide.dim() > like.dim():  # gains: one row per member, or per head of a member
        return wide[member * (wide.shape[0] // members)]
    if wide.numel() != members * like.numel():
        raise ValueError("sequential prefill needs whole weights, not shards of them")
    packed = name.rpartition(".")[0].endswith(("qkv_proj", "gate_up_proj"))
    if packed and not isinstance(holder, MemberLinear):
        parts = _packed_parts(layer, name, like)
        starts = [members * sum(parts[:i]) + member * part for i, part in enumerate(parts)]
        return torch.cat([wide[a : a + part] for a, part in zip(starts, parts, strict=True)])
    side = next(d for d in range(wide.dim()) if wide.shape[d] != like.shape[d])
    return wide.narrow(side, member * like.shape[side], like.shape[side])


def _packed_parts(layer: Any, name: str, like: torch.Tensor) -> list[int]:
    if "gate_up_proj" in name:
        return [like.shape[0] // 2] * 2
    config, head = layer.narrow[0].self_attn.config, layer.self_attn.head_dim
    return [config.num_attention_heads * head, *[config.num_key_value_heads * head] * 2]


def _mix(module: Any, mixin: type) -> None:
    """Put `mixin` before the class of a module, which stays an instance of that class."""
    module.__class__ = _mixed(module.__class__, mixin)


@functools.cache
def _mixed(kind: Any, mixin: Any) -> type:
    # Under its old name, by which accelerate tells which modules must not be split over devices.
    return type(kind.__name__, (mixin, kind), {"__module__": __name__})


def _keep_members(layer: Any, config: PreTrainedConfig) -> None:
    """Replace what stays with its member in a layer built as one wide stock layer."""
    members, bypass, hidden = config.abreast_members, config.abreast_bypass, config.hidden_size
    attention, mlp = layer.self_attn, layer.mlp
    norms = next(order for order in ORDERS if order[2] is None or hasattr(layer, order[2]))
    unknown = {name for name, _ in layer.named_children() if name.endswith("norm")}
    unknown -= {"input_layernorm", *filter(None, norms)}
    if unknown:
        raise ValueError(f"no order of norms has {min(unknown)}: add the family's to ORDERS")
    sandwiched = norms[2] is not None
    for name in ("q_norm", "k_norm", "query_layernorm", "key_layernorm"):
        norm = getattr(attention, name, None)
        if norm is None or norm.weight.dim() > 1:  # Cohere has a gain for every head already
            continue
        heads = config.num_attention_heads if name[0] == "q" else config.num_key_value_heads
        if norm.weight.shape[0] == attention.head_dim:
            norm.weight = nn.Parameter(torch.ones(heads, attention.head_dim))
            if type(attention).__name__ in HEADS_BEFORE_LENGTH:
                _mix(norm, HeadsBeforeLength)
        else:
            norm.weight = nn.Parameter(norm.weight.data.view(members, -1))
            _mix(norm, FlatMembers)
    if bypass is not None or sandwiched:
        attention.o_proj = MemberLinear(attention.o_proj, members, "columns")
    out = "c_proj" if hasattr(mlp, "c_proj") else "down_proj"
    down = getattr(mlp, out)
    if sandwiched:
        setattr(mlp, out, MemberLinear(down, members, "columns"))
        for name, adds in ((norms[0], bypass is None), (norms[2], True)):
            norm = getattr(layer, name)
            norm.weight = nn.Parameter(norm.weight.data.expand(members, hidden).clone())
            if adds:
                _mix(norm, AddMembers)
    if bypass is None:
        return
    for name in ("gate_proj", "up_proj", "gate_up_proj", "c_fc"):
        if hasattr(mlp, name):
            setattr(mlp, name, MemberLinear(getattr(mlp, name), members, "rows"))
    if not sandwiched:
        _mix(down, JoinMembers)
    layer.bypass, layer.norms = bypass, norms
    _mix(layer, CqilForward)


def _remember_members(
    layer: Any, stock: Any, members: int, bare: PreTrainedConfig, config: PreTrainedConfig
) -> None:
    """Let the layer of a group run its members one by one, see SequentialPrefill."""
    with torch.device("meta"):
        narrow = stock(copy.copy(bare), layer.self_attn.layer_idx)
    # In a list, so that its parameters, which only provide shapes, are not registered.
    layer.members, layer.main_config, layer.narrow = members, config, [narrow.eval()]
    _mix(layer, SequentialPrefill)


def _check_widths(config: PreTrainedConfig) -> None:
    """Every layer's heads must share its KV heads evenly; hidden_size need not divide by them."""
    for index, layer in enumerate(config.per_layer_config):
        # None means as many as heads; some versions check before they fill it in.
        if layer.num_attention_heads % (layer.num_key_value_heads or layer.num_attention_heads):
            raise ValueError(
                f"layer {index}: {layer.num_attention_heads} attention heads cannot share "
                f"{layer.num_key_value_heads} key-value heads"
            )


def _without_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without layers or per-layer widths, for constructors that know none."""
    bare = copy.copy(config)
    bare.__dict__.pop("_heterogeneity_spec", None)
    bare.num_hidden_layers = 0
    return bare


class LayersOfOwnWidth(PreTrainedModel):
    """Mixed in before a stock model: builds it without layers, then adds layers of their own width.

    Afterwards the models and everything in their layers share the one main config. With per-layer
    copies, attention modules would miss a later change of the attention implementation and silently
    run without a causal mask. The rotary embedding keeps the bare copy: several kinds of RoPE
    scaling read the number of heads, which the main config refuses to name.
    """

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        bare = _without_layers(config)
        super().__init__(bare, *args, **kwargs)
        config._attn_implementation_internal = bare._attn_implementation_internal
        config._experts_implementation_internal = bare._experts_implementation_internal
        layers = nn.ModuleList()
        for index in range(config.num_hidden_layers):
            own = config.per_layer_config[index]
            layers.append(self.layer_class(own, index))
            if getattr(own, "abreast_members", 1) > 1:
                _keep_members(layers[-1], own)
            members = own.num_attention_heads // bare.num_attention_heads
            if members > 1:
                _remember_members(layers[-1], self.layer_class, members, bare, config)
        self.base_model.layers = layers
        for module in (self, self.base_model, *layers.modules()):
            # Phi 3 reads the number of heads while it runs, so it has to keep its layer's copy.
            if hasattr(module, "config") and not isinstance(module, Phi3Attention):
                module.config = config
        self.post_init()
        if "abreast_members" in (config.per_layer_attributes or ()):
            # The family's plan would cut through the members. Without one, every rank holds and
            # computes everything: no gain, but correct.
            self.tp_plan = None

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, Phi3Attention):
                internal = self.config._attn_implementation_internal
                module.config._attn_implementation_internal = internal


_MADE: dict[str, Any] = {}


def _make(family: str) -> None:
    """Make the three classes of one family and store them by name."""
    name = FAMILIES[family]
    stock = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    inner = "Gemma3Text" if family == "Gemma3" else family
    own: dict[str, Any] = {"__module__": __name__}
    stock_config = getattr(stock, f"{inner}Config")
    config: Any = strict(
        type(
            f"Abreast{family}Config",
            (stock_config,),
            {
                **own,
                "model_type": f"abreast_{stock_config.model_type}",
                "validate_architecture": _check_widths,
                # Phi 3's reads the number of heads, which only a copy without widths has.
                "validate_rope": lambda self: stock_config.validate_rope(_without_layers(self)),
            },
        )
    )
    own |= {"layer_class": getattr(stock, f"{family}DecoderLayer"), "config_class": config}
    own["__annotations__"] = {"config": config}
    model: Any = type(
        f"Abreast{family}Model", (LayersOfOwnWidth, getattr(stock, f"{inner}Model")), own
    )
    causal: Any = type(
        f"Abreast{family}ForCausalLM",
        (LayersOfOwnWidth, getattr(stock, f"{family}ForCausalLM")),
        own,
    )
    # Makes save_pretrained copy this file and write auto_map, so that a round trip keeps both.
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    causal.register_for_auto_class("AutoModelForCausalLM")
    _MADE.update({made.__name__: made for made in (config, model, causal)})


def __getattr__(name: str) -> Any:
    stem = name.removeprefix("Abreast")
    for ending in ("Config", "ForCausalLM", "Model"):
        family = stem.removesuffix(ending)
        if family in FAMILIES and name == f"Abreast{family}{ending}":
            if name not in _MADE:
                _make(family)
            return _MADE[name]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def register(family: str) -> None:
    """Make one family's converted checkpoints known to transformers' auto classes."""
    if f"Abreast{family}Config" in _MADE:
        return
    _make(family)
    config, model, causal = (
        _MADE[f"Abreast{family}{e}"] for e in ("Config", "Model", "ForCausalLM")
    )
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForCausalLM.register(config, causal)


# As remote code, auto_map leads here, and registering would replace an installed abreast's classes.
if __name__ == "abreast.modeling":
    for _family in FAMILIES:
        register(_family)
