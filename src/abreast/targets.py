"""What each engine loads, what it refuses and why, and the commands that serve a checkpoint.

One row per engine; no engine is imported here, nor torch. Whoever has to know whether an engine
takes a checkpoint asks `refusals`: the engines themselves, and everything that suggests them.
Adding an engine means a row here, its module in engines/, a test and a page.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from abreast.errors import AbreastError
from abreast.plan import Block, Group, Plan

Unpaired = Literal["shard", "replicate"]  # how several processes hold layers that are in no group

SERVE_GROUPED = "serve it grouped with --hf-overrides '{\"abreast_prefill\": null}'"
REPLICATE = "torch_tp (abreast bench --backend tp --unpaired replicate)"
EXPERT_WIDTH = "moe_intermediate_size"
_SGLANGS = ("llama", "mistral", "qwen2", "qwen3")
_QUANTISED = ("compressed-tensors", "torchao", "fp8 in blocks")  # vLLM's backend has the first
NOT_IN_ORDER = "their attention and FFN read the same input, which ff would take apart"


class FamilyFacts(Protocol):
    """What engines need to know of a family; `families.Family` has it."""

    @property
    def parallel(self) -> bool: ...
    @property
    def keeps_members(self) -> bool: ...
    @property
    def member_norms(self) -> tuple[str, ...]: ...
    @property
    def flat_norms(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def transformers_only(self) -> bool: ...
    @property
    def routes(self) -> bool: ...
    @property
    def vllm_layers(self) -> bool: ...
    @property
    def deci_lacks(self) -> str | None: ...
    def blocks_of(self, plan: Plan) -> tuple[Block, ...]: ...


@dataclass(frozen=True)
class Layer:
    """Sizes of one decoder layer of a checkpoint.

    members: of a group with parts that stay with their member, 1 for a stock layer of any width.
    band: the distance d for which FFN j sees attentions j-d .. j, None if FFNs share an input.
    """

    heads: int
    kv_heads: int
    intermediate: int
    members: int = 1
    band: int | None = None


@dataclass(frozen=True)
class Model:
    """A checkpoint as engines see it: its config.json, and its family's row, None if it has none.

    plan: config is an original's, and the question is about its conversion under this plan.
    unpaired: how torch_tp and vLLM shall hold single layers, see there.
    """

    config: Mapping[str, Any]
    family: FamilyFacts | None
    plan: Plan | None = None
    unpaired: Unpaired = "shard"

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        if self.plan is None or self.family is None:
            return layers_of(self.config)
        return planned_layers(self.config, self.family, self.plan)


@dataclass(frozen=True)
class Target:
    """One engine.

    refuse(model, degree): the reasons against loading a model at a tensor parallel degree, each one
    line that says what to do. install, export, serve: shell commands with {out}, the checkpoint,
    {file}, what export writes, and {degree}; serve is empty for an engine without a server.
    formats: of `convert --format`, those that it loads.
    """

    name: str
    refuse: Callable[[Model, int], Iterator[str]]
    install: str = ""
    export: str = ""
    serve: str = ""
    split: str = ""
    file: str = ""
    formats: tuple[str, ...] = ("auto",)

    def commands(self, out: str, degree: int = 1) -> str:
        """Shell commands, one a line, that install the engine and serve the checkpoint `out`."""
        words = {"out": shlex.quote(out), "file": self.file, "degree": degree}
        serve = self.serve + (self.split if degree > 1 else "")
        lines = filter(None, (self.install, self.export, serve))
        return "\n".join(line.format(**words) for line in lines)


def format_of(config: Mapping[str, Any]) -> str:
    """The format of `convert --format` in which a config.json was written."""
    record = config.get("abreast")
    return str(record.get("format", "auto")) if isinstance(record, dict) else "auto"


def layers_of(config: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers that a config.json describes, of an original or a converted checkpoint."""
    own = config.get("per_layer_config") or {}
    try:
        entries = {int(k): v for k, v in (enumerate(own) if isinstance(own, list) else own.items())}
        own_configs = {index: {**config, **entry} for index, entry in entries.items()}
    except (AttributeError, TypeError, ValueError):
        raise AbreastError(
            "config.json: per_layer_config makes no sense; convert or download it again"
        ) from None
    count = _size(config, "num_hidden_layers")
    return tuple(_layer(own_configs.get(index, config)) for index in range(count))


def _layer(config: Mapping[str, Any]) -> Layer:
    heads = _size(config, "num_attention_heads")
    return Layer(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        intermediate=_size(config, "intermediate_size"),
        members=config.get("abreast_members") or 1,
        band=config.get("abreast_bypass"),
    )


def _size(config: Mapping[str, Any], key: str) -> int:
    if not isinstance(config.get(key), int):
        raise AbreastError(f"config.json has no number for {key}; the checkpoint is incomplete")
    return int(config[key])


def planned_layers(config: Mapping[str, Any], family: FamilyFacts, plan: Plan) -> tuple[Layer, ...]:
    """The layers that a conversion of this original under a plan has."""
    single = _layer(config)
    return tuple(
        Layer(
            heads=len(block.attentions) * single.heads,
            kv_heads=len(block.attentions) * single.kv_heads,
            # experts stay as wide as they are, and become more
            intermediate=len(block.ffns[: 1 if family.routes else None]) * single.intermediate,
            members=members_of(family, block),
            band=band_of(family, block),
        )
        for block in family.blocks_of(plan)
    )


def band_of(family: FamilyFacts, block: Block) -> int | None:
    """`Group.ffn_band`, None also where FFNs read the layer's input: all wirings are one then; and
    in a layer without FFN."""
    alone = family.parallel or block.group is None or not block.ffns
    return None if alone or block.group is None else block.group.ffn_band


def members_of(family: FamilyFacts, block: Block) -> int:
    """How many members' parts a layer keeps apart, 1 if it is a stock layer of whatever width."""
    ffns = band_of(family, block) is not None or family.member_norms or family.routes
    attentions = family.keeps_members and len(block.attentions) > 1
    return len(block.ffns) if attentions or (ffns and len(block.ffns) > 1) else 1


def refusals(
    target: Target,
    config: Mapping[str, Any],
    family: FamilyFacts | None,
    plan: Plan | None = None,
    degree: int = 1,
    unpaired: Unpaired = "shard",
) -> Iterator[str]:
    """Why an engine will not load a checkpoint at a tensor parallel degree; nothing if it will.

    Arguments as for `Model`.
    """
    if plan is not None and family is not None and family.parallel:
        for group in plan.groups:
            if group.is_in_order:
                yield f"group {group.shorthand} cannot be converted: {NOT_IN_ORDER}; use lp (5+6)"
    form = format_of(config)
    if form not in target.formats:
        yield f"it loads no {form}; convert again with --format {' or '.join(target.formats)}"
        return
    if "within" in config and target is not TRANSFORMERS:
        yield (
            f"{target.name} does not load a converted decoder within a model that reads images; "
            "serve the checkpoint with transformers"
        )
    yield from target.refuse(Model(config, family, plan, unpaired), degree)


def refused_by(config: Mapping[str, Any], family: FamilyFacts | None) -> dict[str, str]:
    """By name, the servers that will not load a checkpoint, each with its first reason."""
    servers = servers_of(config)
    reasons = {server.name: next(refusals(server, config, family), None) for server in servers}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def servers_of(config: Mapping[str, Any]) -> tuple[Target, ...]:
    """The servers that a checkpoint is meant for."""
    form = format_of(config)
    if form == "mlx":
        return VLLM, MLX_MODEL, TRANSFORMERS, LLAMACPP
    return SERVERS if form == "auto" else (STOCK_VLLM, MLX, TRANSFORMERS, LLAMACPP)


def _mlx(model: Model, degree: int) -> Iterator[str]:
    config = model.config
    heads, size, hidden = map(config.get, ("num_attention_heads", "head_dim", "hidden_size"))
    if format_of(config) == "deci-ff" and size and heads and heads * size != hidden:
        yield (
            f"its {heads} heads of {size} do not add up to the hidden size {hidden}, as mlx-lm "
            "expects in deci-ff; convert an lp plan with --format openelm"
        )


def _mlx_model(model: Model, degree: int) -> Iterator[str]:
    """Of the format mlx, under ABREAST_UNPAIRED=shard: replicate needs no even division."""
    single = _layer(model.config)
    for name, count in (
        ("attention heads", single.heads),
        ("KV heads", single.kv_heads),
        ("FFN columns", single.intermediate),
    ):
        if count % degree:
            yield (
                f"{degree} ranks cannot share {count} {name} evenly; use a number of ranks that "
                "divides them, or ABREAST_UNPAIRED=replicate"
            )


def _is_sequential(model: Model) -> bool:
    return model.config.get("abreast_prefill") == "sequential"


def _one_process(model: Model, degree: int) -> Iterator[str]:
    if degree > 1:
        yield "it runs in one process; use vLLM, or abreast.engines.torch_tp under torchrun"


def _layers(model: Model, engine: str) -> Iterator[str]:
    if model.family is not None and model.family.transformers_only:
        yield f"{engine} has no converted layers of its family; run them with transformers"
    if model.family is None or not model.family.routes:
        pass
    elif engine != "vLLM":
        yield f"{engine} runs no groups of layers with experts; serve them with transformers"
    elif not model.family.vllm_layers:
        yield (
            "its experts have no vLLM layers here; vLLM's transformers backend gives groups no "
            "more experts than single layers, so serve the checkpoint with transformers"
        )
    elif any(layer.band is not None for layer in model.layers):
        yield (
            f"{engine} runs no cqil groups of layers with experts; convert with an lp plan (5+6 "
            "instead of 5|6), or serve it with transformers"
        )


def _is_native(model: Model) -> bool:
    """Whether it is one of llama, mistral, ministral, qwen2, qwen3 and seed_oss."""
    return model.family is not None and model.family.vllm_layers and not model.family.routes


def _vllm(model: Model, degree: int) -> Iterator[str]:
    yield from _layers(model, "vLLM")
    sequential = _is_sequential(model)
    only = "runs in vLLM for llama, mistral, ministral, qwen2, qwen3 and seed_oss only"
    if sequential and not _is_native(model):
        yield f"sequential prefill {only}; {SERVE_GROUPED}"
    if sequential and any(layer.intermediate == 0 for layer in model.layers):
        yield f"sequential prefill of ff groups does not run in vLLM; {SERVE_GROUPED}"
    if model.unpaired == "replicate" and not _is_native(model):
        yield f"abreast_unpaired: replicate {only}; leave it out, or use {REPLICATE}"
    if not (model.family and model.family.routes):
        yield from _quantised(model, "vLLM", *_QUANTISED[: 3 if _is_native(model) else 1])
    yield from _degree(model, degree, '--hf-overrides \'{"abreast_unpaired": "replicate"}\'')


def _sglang(model: Model, degree: int) -> Iterator[str]:
    if str(model.config.get("model_type")).removeprefix("abreast_") not in _SGLANGS:
        yield "SGLang runs llama, mistral, qwen2 and qwen3 only; serve it with vLLM or transformers"
    if _is_sequential(model):
        yield (
            "the checkpoint runs prompts in the original order, which is not there for SGLang; "
            "convert again without --prefill sequential, or serve it with vLLM"
        )
    yield from _quantised(model, "SGLang")
    yield from _degree(model, degree)


def _quantised(model: Model, engine: str, *methods: str) -> Iterator[str]:
    settings = model.config.get("quantization_config") or {}
    method = settings.get("quant_method", "")
    method += " in blocks" if settings.get("weight_block_size") else ""
    if method and method not in methods and any(layer.members > 1 for layer in model.layers):
        use = " or ".join((*methods, "an lp plan"))
        yield f"{engine} runs no members that stay apart with {method} weights; use {use}"


def _degree(model: Model, degree: int, replicate_by: str = "") -> Iterator[str]:
    if not (reason := undivided(model, degree)):
        return
    whole = replace(model, unpaired="replicate")
    degrees = range(1, _layer(model.config).heads + 1)
    possible = ", ".join(str(n) for n in degrees if not undivided(model, n))
    if replicate_by and not undivided(whole, degree):
        possible += f", or {degree} with {replicate_by}"
    elif not any(_torch_tp(whole, degree)):
        possible += f", or {degree} in {REPLICATE}"
    yield f"tensor parallel size {degree} does not fit this model: {reason}; possible: {possible}"


def undivided(model: Model, degree: int) -> str | None:
    """What vLLM and SGLang cannot split over `degree` ranks, None if they can split every layer.

    A cqil group of p members splits over p or a multiple of p ranks, and over a divisor of p.
    Under sequential prefill every member is split as an unconverted layer is; else vLLM's replicate
    splits groups only. Both engines check the heads of a single layer in any case.
    """
    native, single = model.family is not None and model.family.vllm_layers, _layer(model.config)
    replicate = model.unpaired == "replicate" and _is_native(model) and not _is_sequential(model)
    whole = single if replicate else Layer(0, 0, 0)
    for index, layer in enumerate((single,) if _is_sequential(model) else model.layers):
        if layer.heads % degree:
            return f"layer {index} has {layer.heads} attention heads"
        if layer.heads > whole.heads and layer.kv_heads % degree and degree % layer.kv_heads:
            return f"layer {index} has {layer.kv_heads} key-value heads"
        if layer.intermediate > whole.intermediate and layer.intermediate % degree:
            return f"layer {index} has intermediate size {layer.intermediate}"
        if model.family and model.family.routes and (model.config.get(EXPERT_WIDTH) or 0) % degree:
            return f"its experts have {EXPERT_WIDTH} {model.config[EXPERT_WIDTH]}"
        if layer.members == 1 or degree == 1:
            continue
        if not native:
            return f"layer {index} keeps members of its group apart, which this family cannot split"
        if layer.band is not None and degree % layer.members and layer.members % degree:
            return f"layer {index} is a cqil group of {layer.members} members"
    if single.heads % degree:
        return f"the original has {single.heads} attention heads"
    return None


def recorded_plan(config: Mapping[str, Any]) -> Plan | None:
    """The plan under which a config.json says it was converted, None for an original."""
    record = config.get("abreast")
    if record is None:
        return None
    try:
        return Plan.parse(record["plan"], record["num_layers"])
    except (AttributeError, KeyError, TypeError):
        raise AbreastError(
            "config.json does not say under which plan it was converted; convert the original again"
        ) from None


def is_dealt(
    family: FamilyFacts, group: Group, degree: int, unpaired: Unpaired, sequential: bool
) -> bool:
    """Whether torch_tp gives a rank whole members of a group, or parts of one, not a part of all.

    sequential: prompts run in the original order, where all ranks should have a part of all.
    """
    if unpaired == "replicate":
        return True
    members = len(group.layers)
    fits = members % degree == 0 or (degree % members == 0 and not family.member_norms)
    banded = group.ffn_band is not None and not family.parallel
    return banded and fits and not sequential


def _torch_tp(model: Model, degree: int) -> Iterator[str]:
    if degree == 1:
        return
    yield from _layers(model, "torch_tp")
    plan = model.plan or recorded_plan(model.config)
    if model.unpaired == "replicate":
        for members in sorted({len(group.layers) for group in plan.groups} if plan else ()):
            if members < degree:
                yield (
                    f"{degree} processes are more than the {members} members of a group, of which "
                    f"each needs one under --unpaired replicate; use at most {members}, or shard"
                )
        return
    single, parts = _layer(model.config), degree
    if plan is not None and model.plan is None and not model.config.get("per_layer_config"):
        parts *= len(plan.blocks[0].ffns)  # all layers are so many members
    flat = model.family is not None and bool(model.family.flat_norms)
    for key, size in (
        ("num_key_value_heads", 0 if flat else single.kv_heads),
        ("num_attention_heads", 0 if flat else single.heads),
        ("intermediate_size", single.intermediate),
    ):
        if size % parts:
            yield (
                f"{degree} processes cannot share {size} ({key}) evenly; use a divisor of it, or "
                "--unpaired replicate"
            )


def _llamacpp(model: Model, degree: int) -> Iterator[str]:
    """Against llama.cpp's architecture `deci`; the export itself also refuses kinds of RoPE."""
    config, family = model.config, model.family
    lacks = "abreast does not know its layers" if family is None else family.deci_lacks
    if lacks is not None:
        name = str(config.get("model_type")).removeprefix("abreast_")
        yield (
            f"a {name} cannot be written for llama.cpp with layers of different width: {lacks}; "
            "serve it with vLLM or transformers"
        )
    if config.get("quantization_config"):
        yield "the checkpoint is quantised already; export the unquantised one with --quantize"
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        yield f"its FFN is gated by {act}, llama.cpp's deci only by silu; use vLLM or transformers"
    if _is_sequential(model):
        yield "llama.cpp has no prompts in original order; convert without --prefill sequential"
    if any(layer.intermediate == 0 for layer in model.layers):
        yield "ff groups do not run in llama.cpp yet; convert with an lp plan (5+6 instead of 5~6)"
    if any(layer.band is not None for layer in model.layers):
        yield "cqil groups are no layers of llama.cpp; convert with an lp plan (5+6 instead of 5|6)"


TRANSFORMERS = Target(
    name="transformers",
    refuse=_one_process,
    install='pip install abreast "transformers[serving]" accelerate',
    serve="python -m abreast.engines.transformers serve {out} --port 8000",
)
TORCH_TP = Target(name="torch_tp", refuse=_torch_tp)
VLLM = Target(
    name="vLLM",
    refuse=_vllm,
    install='pip install "abreast[vllm]"',
    serve="vllm serve {out}",
    split=" --tensor-parallel-size {degree}",
)
SGLANG = Target(  # not among SERVERS, which cards suggest, until it has run on a GPU
    name="SGLang",
    refuse=_sglang,
    install="pip install abreast sglang",
    export="export SGLANG_EXTERNAL_MODEL_PACKAGE=abreast.engines.sglang",
    serve="python -m sglang.launch_server --model-path {out}",
    split=" --tp-size {degree}",
)
LLAMACPP = Target(
    name="llama.cpp",
    refuse=_llamacpp,
    install='pip install "abreast[gguf]"',
    export="abreast export {out} --gguf {file}",
    serve="llama-server -m {file} --flash-attn on",
    file="model.gguf",
)
MLX = Target(
    name="mlx-lm",
    refuse=_mlx,
    install="pip install mlx-lm",
    serve="mlx_lm.server --model {out}",
    formats=("openelm", "deci-ff"),
)
MLX_MODEL = replace(  # the model file that comes with the checkpoint
    MLX,
    refuse=_mlx_model,
    export="mlx_lm.convert --hf-path {out} --mlx-path {file} -q --trust-remote-code  # 4 bits",
    serve="mlx_lm.server --model {out} --trust-remote-code",
    file="OUT-4BIT",
    formats=("mlx",),
)
STOCK_VLLM = replace(  # the code that reads these formats' configuration comes with them
    VLLM,
    refuse=lambda model, degree: iter(()),
    install="pip install vllm",
    serve="vllm serve {out} --trust-remote-code",
    formats=("deci", "deci-ff"),
)
STOCK_SGLANG = replace(
    SGLANG,
    refuse=STOCK_VLLM.refuse,
    install="pip install sglang",
    export="",
    serve=f"{SGLANG.serve} --trust-remote-code",
    formats=("deci-ff",),  # all layers need one number of key-value heads there
)
SERVERS = (VLLM, TRANSFORMERS, LLAMACPP)
