"""Configurations and models of converted checkpoints: stock layers, each of its own width.

This file also travels inside every converted checkpoint as its remote code, so it imports torch,
transformers and modeling_members.py beside it only. Stock classes build all decoder layers alike;
`Abreast<Family>Config`, `...Model` and `...ForCausalLM` build each from its entry in transformers'
`per_layer_config`.

Some groups keep something apart for each member: a norm after a branch, or FFNs that see different
attentions. Their entry has `abreast_members` and, where FFN j sees attentions j - d .. j only, d as
`abreast_bypass`. A layer of intermediate_size 0 is an attention whose FFN is in a later layer; its
last one has `abreast_beside`, the number of these attentions, if they all read the same input.
Shapes: B batch, L length, D hidden, P members, and X for any other width.
"""

import copy
import importlib
import math
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from .modeling_members import (
    SCORES,
    Apart,
    InOrder,
    MemberExperts,
    MemberNorm,
    MemberRouter,
    OwnHeadSize,
    View,
    forward_of,
    mix,
    narrowed,
    side_by_side,
    through_views,
)

VERSION = [int(part) for part in transformers.__version__.split(".")[:2]]
CACHE = "cache" if VERSION >= [5, 24] else "past_key_values"
# Family in class names -> module below transformers.models; both take the family's own classes.
SAME = (
    "Llama Mistral Ministral Qwen2 Qwen3 SmolLM3 Granite Ernie4_5 Arcee Starcoder2 Phi3 Gemma "
    "Gemma2 Gemma3 Olmo Olmo2 Olmo3 Cohere Cohere2 Glm Glm4 Phi Nemotron Exaone4 Jais2 Mixtral "
    "Olmoe GraniteMoe StableLm"
)
FAMILIES = {name: name.lower() for name in SAME.split()}
FAMILIES |= {"SeedOss": "seed_oss", "HunYuanDenseV1": "hunyuan_v1_dense"}
FAMILIES |= {"Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe", "GptOss": "gpt_oss"}
FAMILIES |= {"Glm4Moe": "glm4_moe", "Ernie4_5_Moe": "ernie4_5_moe", "DeepseekV3": "deepseek_v3"}
FAMILIES |= {"DeepseekV2": "deepseek_v2", "Glm4MoeLite": "glm4_moe_lite"}
FAMILIES |= {"GPTNeoX": "gpt_neox", "Qwen2_5_VLText": "qwen2_5_vl", "Qwen3VLText": "qwen3_vl"}
TEXT_TYPES = {"Gemma3": "gemma3_text", "Qwen3VLText": "qwen3_vl_text"}
TEXT_TYPES["Qwen2_5_VLText"] = "qwen2_5_vl_text"
MODEL_TYPES = {f"abreast_{TEXT_TYPES.get(one, name)}": one for one, name in FAMILIES.items()}
# Models that hold one of these decoders beside a vision encoder: likewise.
WRAPPERS = {"Gemma3": "gemma3", "Mistral3": "mistral3", "Qwen3VL": "qwen3_vl"}
WRAPPERS |= {"Qwen2_5_VL": "qwen2_5_vl", "InternVL": "internvl", "Llava": "llava"}
WRAPPER_TYPES = {f"abreast_{name}": kind for kind, name in WRAPPERS.items()}
# What a config.json names; families called Text exist in wrappers only.
ARCHITECTURES = [f"Abreast{family}ForCausalLM" for family in FAMILIES if family[-4:] != "Text"]
ARCHITECTURES += [f"Abreast{kind}ForConditionalGeneration" for kind in WRAPPERS]
# Attentions that norm q and k after they were transposed to [B, heads, L, X].
HEADS_BEFORE_LENGTH = {"Gemma3Attention", "Exaone4Attention", "HunYuanDenseV1Attention"}
# Those that read the number of heads while they run, so that they keep their layer's own config.
READ_HEADS = {"Phi3Attention"}
# Layers whose attention divides hidden_size by its heads, by their class.
LAYERS = {"Qwen2_5_VLText": "Qwen2_5_VLDecoderLayer", "GPTNeoX": "GPTNeoXLayer"}
LAYERS["StableLm"] = "StableLmDecoderLayer"
# Norms after attention, before and after the FFN, in the three orders there are.
ORDERS: tuple[tuple[Any, Any, Any], ...] = (
    ("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None),
)


class CqilForward:
    """Mixed into a family's decoder layer: FFN j sees the attentions j - bypass .. j in its input,
    but they are not added to the residual again (arXiv 2404.06709, section 3.2)."""

    def forward(self, x_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = getattr(self, "residual_multiplier", 1.0)
        names = "input_layernorm", *self.norms
        first, after, before, last = (getattr(self, name or "", torch.positive) for name in names)
        a_BLPD = self.self_attn(first(x_BLD), *args, **kwargs)[0]
        a_BLPD = after(a_BLPD * scale if scale != 1.0 else a_BLPD)
        y_BLPD = x_BLD.unsqueeze(-2) + a_BLPD
        for distance in range(1, self.bypass + 1):
            y_BLPD[..., distance:, :] += a_BLPD[..., :-distance, :]
        f_BLD = getattr(self, _ffn(self))(before(y_BLPD))
        return x_BLD + a_BLPD.sum(-2) + last(f_BLD * scale if scale != 1.0 else f_BLD)


PROMPT: ContextVar[int | None] = ContextVar("abreast_prompt", default=None)  # ids generate got


class CountPrompt:
    """Mixed into a model that generates: says with every pass how many tokens are the prompt's."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        outside = PROMPT.set(0 if ids is None else ids.shape[1])  # embeddings come before ids
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            PROMPT.reset(outside)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        kwargs["inputs_embeds"] = inputs_embeds  # transformers looks for it in the signature
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if (prompt := PROMPT.get()) is not None:
            ids = inputs.get("input_ids")
            length = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
            ahead = prompt - (input_ids.shape[1] - length)
            inputs["prompt_tokens"] = min(max(ahead, 0), length)
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("sequential prefill cannot run in continuous batches; use generate")


class Passes:
    """Mixed into a model without head. With `prompts_in_order` prompts run in the original order
    and all else abreast: prefill is compute-bound and gains nothing from grouping. A pass's first
    `prompt_tokens` are the prompt's; without, it is one where the cache is empty. PEFT's prefix
    tuning makes caches of equal width: wider layers repeat their heads in them."""

    def forward(self, *args: Any, prompt_tokens: int | None = None, **kwargs: Any) -> Any:
        names = "input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds"
        kwargs = {CACHE if key == "past_key_values" else key: v for key, v in kwargs.items()}
        arguments: dict[str, Any] = (
            dict.fromkeys(names) | kwargs | dict(zip(names, args, strict=False))
        )
        mask, cache = arguments["attention_mask"], arguments[CACHE]
        past = [entry for entry in getattr(cache, "layers", ()) if entry.is_initialized]
        widths = {entry.keys.shape[1:2] for entry in past}
        if len(past) == len(self.cache_heads) and len(widths) == 1 < len(set(self.cache_heads)):
            for entry, heads in zip(past, self.cache_heads, strict=True):
                for name, one in (("keys", entry.keys), ("values", entry.values)):
                    setattr(entry, name, one.repeat(1, -(-heads // one.shape[1]), 1, 1)[:, :heads])
        if not self.prompts_in_order or getattr(self.config, "abreast_prefill", "") == "grouped":
            out = super().forward(**arguments)
            if scores := getattr(out, "router_logits", None):  # of a group: member after member
                rows = out.last_hidden_state.shape[:-1].numel()
                out.router_logits = tuple(part for all_ in scores for part in all_.split(rows))
            return out
        tokens = {name: arguments[name] for name in names[::2] if arguments[name] is not None}
        (_, length, *_), *_ = (value.shape for value in tokens.values())
        if prompt_tokens is None:
            prompt_tokens = 0 if cache is not None and cache.get_seq_length() else length
        if prompt_tokens == 0:
            return super().forward(**arguments)
        if arguments.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError("sequential prefill returns no attentions; leave them out")
        if prompt_tokens == length:
            return super().forward(**arguments, in_order=True)
        # Candidates behind a prompt, or a whole text without a cache.
        if not (mask is None or getattr(mask, "ndim", 0) == 2):
            raise ValueError("sequential prefill ends within this pass: give it a mask [B, L]")
        cached = {CACHE: DynamicCache(config=self.config) if cache is None else cache}
        outputs: list[Any] = []
        for begin, end in ((0, prompt_tokens), (prompt_tokens, length)):
            part = {name: whole[:, begin:end] for name, whole in tokens.items()}
            part["attention_mask"] = mask if mask is None else mask[:, : end - length or None]
            part |= cached | {"use_cache": True, "prompt_tokens": prompt_tokens - begin}
            outputs.append(self.forward(**arguments | part))
        first, last = outputs
        last.last_hidden_state = torch.cat([first.last_hidden_state, last.last_hidden_state], 1)
        if last.hidden_states:
            pairs = zip(first.hidden_states, last.hidden_states, strict=True)
            last.hidden_states = tuple(torch.cat(pair, 1) for pair in pairs)
        if cache is None and arguments.get("use_cache") is False:
            setattr(last, CACHE, None)
        return last


class NoExperts(nn.Threshold):
    """Is 0 for all there is, and no scores, in layers that expect a router's."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


def _ffn(layer: Any) -> str:
    return "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"


def _keep_members(layer: Any, config: Any, attentions: int, norms: Any, bare: Any) -> None:
    """Replace what stays with its member in a wide layer of `attentions` members' attentions."""
    members, bypass, joined = config.abreast_members, config.abreast_bypass, attentions > 1
    attention, mlp = layer.self_attn, getattr(layer, _ffn(layer))
    children = {name for name, _ in layer.named_children() if name.endswith("norm")}
    if unknown := children - {"input_layernorm", *norms}:
        raise ValueError(f"no order of norms has {min(unknown)}: add the family's to ORDERS")
    sandwiched = norms[2] is not None
    for name in ("q_norm", "k_norm", "query_layernorm", "key_layernorm") if joined else ():
        norm = getattr(attention, name, None)
        if norm is None or norm.weight.dim() > 1:  # Cohere has a gain for every head already
            continue
        heads = config.num_attention_heads if name[0] == "q" else config.num_key_value_heads
        by_head, gains = norm.weight.shape[0] == attention.head_dim, norm.weight.data
        size = heads // members * attention.head_dim  # OLMoE's are as long as all heads, or one's
        norm.weight = nn.Parameter(
            gains.repeat(heads, 1) if by_head else gains.new_ones(members, size)
        )
        if not by_head or type(attention).__name__ in HEADS_BEFORE_LENGTH:
            mix(norm, MemberNorm, lie="heads" if by_head else "flat")
    if routed := hasattr(mlp, "experts"):
        _keep_experts(mlp, members, bare if bypass is not None else None)
    out = "c_proj" if hasattr(mlp, "c_proj") else "down_proj"
    if not sandwiched and bypass is None:
        return
    stacked = [(attention, "o_proj")] * joined + [(mlp, out)] * sandwiched
    for holder, name in stacked:  # members side by side in the columns: one below the other
        wide = getattr(holder, name)
        rows, columns = members * wide.out_features, wide.in_features // members
        setattr(holder, name, nn.Linear(columns, rows, bias=wide.bias is not None))
    if joined:
        through_views(attention, {"o_proj": Apart(attention, "o_proj", members)})
    if routed:
        mix(layer, CqilForward, bypass=bypass, norms=norms)
        return
    views: dict[str, nn.Module] = {out: nn.Sequential(nn.Flatten(-2), View(mlp, out))}
    if sandwiched:
        views = {out: Apart(mlp, out, members)}
        for name in filter(None, norms[0 if joined else 2 :: 2]):
            norm = getattr(layer, name)
            norm.weight = nn.Parameter(norm.weight.data.repeat(members, 1))
            if bypass is None or name == norms[2]:
                mix(norm, MemberNorm, lie="added")
    if bypass is not None:
        for name, child in mlp.named_children():
            if isinstance(child, nn.Linear) and name != out:
                views[name] = Apart(mlp, name, members)
        mix(layer, CqilForward, bypass=bypass, norms=norms)
    through_views(mlp, views)


def _keep_experts(mlp: Any, members: int, bare: Any) -> None:
    """Let members choose among their own experts, and, with a config, from inputs of their own."""
    if hasattr(mlp, "shared_expert_gate"):
        hidden = mlp.shared_expert_gate.in_features
        mlp.shared_expert_gate = nn.Linear(hidden, members, bias=False)
    blocks: list[Any] = []
    for member in range(members) if bare is not None else ():
        with torch.device("meta"):
            block = type(mlp)(bare)
        blocks.append(narrowed(block, lambda _, own=member: (mlp, own, members), {}))
    router = mlp.gate if hasattr(mlp, "gate") else mlp.router
    if type(router).__name__ not in SCORES:
        raise ValueError(f"how a {type(router).__name__} scores experts is not known: add it")
    chosen_first = VERSION < [5, 21] and type(router).__name__ == "GraniteMoeTopKRouter"
    mix(router, MemberRouter, members=members, chosen_first=chosen_first)
    mix(mlp, MemberExperts, narrow=blocks)


def _keep_order(members: list[Any], fed: Any, norms: Any, stock: Any, bare: Any) -> None:
    """Let layers run their group's members one by one, see InOrder. members: which layer has their
    attention, at which place, of how many; fed: which has their FFNs."""
    heads = bare.num_attention_heads, bare.num_key_value_heads, bare.num_key_value_heads
    size = getattr(fed.self_attn, "head_dim", 0)  # MLA's heads are never joined
    packed = {"qkv_proj": [size * count for count in heads]}
    if not isinstance(fed, CqilForward):
        packed["gate_up_proj"] = [bare.intermediate_size] * 2
    for index, (layer, position, attentions) in enumerate(members):

        def wide_of(path: str, layer: Any = layer, own: Any = (position, attentions)) -> Any:
            if path.startswith(_ffn(fed)) or path in norms[1:]:
                return fed, index, len(members)  # noqa: B023
            return layer, *own

        with torch.device("meta"):
            narrow = narrowed(stock(bare, layer.self_attn.layer_idx), wide_of, packed)
        if position == 0:
            mix(layer, InOrder, narrow=[])  # a list, so that they are no children
        layer.narrow.append(narrow)


def _heads(config: Any) -> tuple[int, int]:
    """Heads, and key-value heads: as many where the config has none, or has not filled them in."""
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _check_widths(config: PreTrainedConfig) -> None:
    """Every layer's heads must share its KV heads evenly; hidden_size need not divide by them."""
    for index, layer in enumerate(config.per_layer_config):
        heads, shared = _heads(layer)
        if heads % shared:
            raise ValueError(f"layer {index}: {heads} heads cannot share {shared} key-value heads")


def _without_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without layers or per-layer widths, for constructors that know none."""
    bare = copy.copy(config)
    bare.__dict__.pop("_heterogeneity_spec", None)
    bare.num_hidden_layers = 0
    return bare


class LayersOfOwnWidth(PreTrainedModel):
    """Mixed in before a stock model: builds it without layers, then adds layers of their own width.
    All share the one main config: with copies, attention would miss a change of its implementation
    and lose its causal mask. The rotary embedding keeps the bare copy: RoPE may read heads."""

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        bare = _without_layers(config)
        super().__init__(bare, *args, **kwargs)
        config._attn_implementation_internal = bare._attn_implementation_internal
        config._experts_implementation_internal = bare._experts_implementation_internal
        entries = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
        have_ffn = [own.intermediate_size > 0 for own in entries]
        for own in entries:
            own.intermediate_size = own.intermediate_size or 1  # torch warns of empty matrices
        layers = nn.ModuleList(self.layer_class(own, index) for index, own in enumerate(entries))
        self.base_model.layers = layers
        for module in (self, self.base_model, *layers.modules()):
            if hasattr(module, "config") and type(module).__name__ not in READ_HEADS:
                module.config = config
        sequential = getattr(config, "abreast_prefill", None) == "sequential"
        norms = next(names for names in ORDERS if names[2] is None or hasattr(layers[0], names[2]))
        members: list[Any] = []  # whose FFNs are still to come
        for layer, own, has_ffn in zip(layers, entries, have_ffn, strict=True):
            attentions = own.num_attention_heads // bare.num_attention_heads
            members += [(layer, position, attentions) for position in range(attentions)]
            if not has_ffn:
                scored = type(layer).__name__ == "GptOssDecoderLayer"
                nothing = (NoExperts if scored else nn.Threshold)(math.inf, 0.0)  # 0 for all
                setattr(layer, _ffn(layer), nothing)
                for name in filter(None, norms[1:]):
                    setattr(layer, name, nn.Identity())
                continue
            if getattr(own, "abreast_members", 1) > 1:
                _keep_members(layer, own, attentions, norms, bare)
            if (beside := getattr(own, "abreast_beside", 1)) > 1:
                group = [layer for layer, _, _ in members[-beside:]]
                side_by_side(group, stacked=getattr(own, "abreast_bypass", None) is not None)
            if sequential and len(members) > 1:
                _keep_order(members, layer, norms, self.layer_class, bare)
            members = []
        heads = [_heads(own)[1] for own in entries]
        mix(self.base_model, Passes, cache_heads=heads, prompts_in_order=sequential)
        if sequential and self is not self.base_model:
            mix(self, CountPrompt)
        self.post_init()
        if sequential or "abreast_members" in (config.per_layer_attributes or ()):
            self.tp_plan = None  # it would cut through members; now every rank computes everything

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("layers of different width cannot run in continuous batches; use generate")

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        used = self.config._attn_implementation_internal
        for module in self.modules():
            if type(module).__name__ in READ_HEADS:
                module.config._attn_implementation_internal = used


class HoldsDecoder:
    """Mixed into a wrapper's configuration: the one of its decoder is one of ours."""

    def __post_init__(self, **kwargs: Any) -> None:
        text = self.text_config  # type: ignore[has-type]
        if isinstance(text, dict):
            self.text_config = _class(f"Abreast{MODEL_TYPES[text['model_type']]}Config")(**text)
        super().__post_init__(**kwargs)


class AroundDecoder(PreTrainedModel):
    """Mixed in before a stock wrapper: builds it around a decoder without layers, then gives it
    one of ours."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        bare, text = copy.copy(config), config.text_config
        bare.text_config = _without_layers(text)
        bare.text_config.__class__ = type(text).__bases__[0]
        super().__init__(bare, *args, **kwargs)
        for own, used in ((config, bare), (text, bare.text_config)):
            own._attn_implementation_internal = used._attn_implementation_internal
            own._experts_implementation_internal = used._experts_implementation_internal
        decoder = _class(type(text).__name__.removesuffix("Config") + "Model")
        self.base_model.language_model = decoder(text)
        self.config = self.base_model.config = config
        self.post_init()


def _make_wrapper(kind: str) -> None:
    """Make the two classes of a wrapper."""
    name = WRAPPERS[kind]
    stock = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    own: dict[str, Any] = {"__module__": __name__, "model_type": f"abreast_{name}"}
    bases = HoldsDecoder, getattr(transformers, f"{kind}Config")
    config: Any = strict(type(f"Abreast{kind}WrapperConfig", bases, own))
    head = f"{kind}ForConditionalGeneration"
    own = {"__module__": __name__, "config_class": config, "__annotations__": {"config": config}}
    whole: Any = type(f"Abreast{head}", (AroundDecoder, getattr(stock, head)), own)
    _publish({"AutoConfig": config, "AutoModelForImageTextToText": whole}, config)


def _make(family: str) -> None:
    """Make the three classes of one family, or two of one that exists in wrappers only."""
    name = FAMILIES[family]
    stock = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    inner = "Gemma3Text" if family == "Gemma3" else family
    stock_config = getattr(stock, f"{inner}Config")
    own: dict[str, Any] = {
        "__module__": __name__,
        "model_type": f"abreast_{stock_config.model_type}",
        "validate_architecture": _check_widths,
        # Phi 3's reads the number of heads, which only a copy without widths has.
        "validate_rope": lambda self: stock_config.validate_rope(_without_layers(self)),
    }
    config: Any = strict(type(f"Abreast{family}Config", (stock_config,), own))
    layer: Any = getattr(stock, LAYERS.get(family, f"{family}DecoderLayer"))
    if family in LAYERS:
        layer = type("OwnHeadSizeLayer", (OwnHeadSize, layer), {})
    own = {"layer_class": layer, "config_class": config}
    own |= {"__module__": __name__, "__annotations__": {"config": config}}
    body = getattr(stock, f"{inner}Model")
    passing = own | {"forward": forward_of(Passes, body)}
    model: Any = type(f"Abreast{family}Model", (LayersOfOwnWidth, Passes, body), passing)
    kinds = {"AutoConfig": config, "AutoModel": model}
    if f"Abreast{family}ForCausalLM" in ARCHITECTURES:
        head = getattr(stock, f"{family}ForCausalLM")
        causal: Any = type(f"Abreast{family}ForCausalLM", (LayersOfOwnWidth, head), own)
        kinds["AutoModelForCausalLM"] = causal
    _publish(kinds, config)


def _publish(kinds: dict[str, Any], config: Any) -> None:
    """Make classes known by their names, and to transformers' own of these kinds."""
    for auto, made in kinds.items():
        made.register_for_auto_class(auto)  # save_pretrained copies this file and writes auto_map
        globals()[made.__name__] = made
        # As remote code this would replace an installed abreast's classes.
        if __name__ == "abreast.modeling":
            key = config.model_type if made is config else config
            getattr(transformers, auto).register(key, made)


def _provide(name: str, make: Any = _make) -> None:
    """Make classes. Raises ValueError where this transformers lacks what they need."""
    try:
        make(name)
    except (AttributeError, ImportError) as error:
        version = transformers.__version__
        raise ValueError(f"transformers {version} has not all of {name}: {error}") from None


def _class(name: str) -> Any:
    return globals()[name] if name in globals() else __getattr__(name)


def __getattr__(name: str) -> Any:
    for makes, kinds, ends in (
        (_make, FAMILIES, ("Config", "Model", "ForCausalLM")),
        (_make_wrapper, WRAPPERS, ("WrapperConfig", "ForConditionalGeneration")),
    ):
        for kind in kinds:
            if name in (f"Abreast{kind}{end}" for end in ends):
                _provide(kind, makes)
                if name in globals():
                    return globals()[name]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


class OnDemand(dict[str, Any]):
    """transformers' configs from elsewhere; ours are made, and registered, when looked up."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in MODEL_TYPES or key in WRAPPER_TYPES

    def __missing__(self, key: str) -> Any:
        if key in WRAPPER_TYPES:
            _provide(WRAPPER_TYPES[key], _make_wrapper)
        else:
            _provide(MODEL_TYPES[key])
        return self[key]


if __name__ == "abreast.modeling":
    _configs = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    _configs._extra_content = OnDemand(_configs._extra_content)
