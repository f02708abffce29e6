"""What may be grouped: kinds of attention, obstacles to a fusion, and the check of a whole plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from abreast.checkpoint import cannot_unpack
from abreast.errors import AbreastError
from abreast.families import (
    CHOSEN_COUNTS,
    CONVERTIBLE,
    EXPERT_COUNTS,
    EXPERT_PLACES,
    FAMILIES,
    FORMATS,
    Branches,
    Family,
    FamilyError,
    Matrix,
    expert_layers,
    family_of,
    has_bias,
    layer_configs,
    num_layers_of,
    positive,
    rope_of,
)
from abreast.plan import Block, Group, Plan
from abreast.targets import NOT_IN_ORDER, band_of


class FoldError(AbreastError):
    """Layers that cannot become one stock layer, or tensors that do not add up."""


def unreadable(config: Mapping[str, Any]) -> str | None:
    """Why the weights of a checkpoint with this config.json cannot be folded, None if they can."""
    own = config.get("per_layer_config")
    index, changed = next(iter(own.items())) if isinstance(own, dict) and own else ("", ())
    keys = ", ".join(changed) if isinstance(changed, dict) else "damaged"
    reasons = {
        "abreast": "is converted already; give the original that it was made from",
        "per_layer_config": "has layers of different shape already (per_layer_config of layer "
        f"{index}: {keys}), which cannot be joined; give a model whose layers are all alike",
    }
    settings = config.get("quantization_config")
    if settings and (reason := cannot_unpack(settings)):
        return reason
    if not has_stock_code(config):
        reasons["auto_map"] = (
            "brings its own code (auto_map in config.json), which is not run here; only stock "
            "architectures can be converted"
        )
    return next((reason for key, reason in reasons.items() if config.get(key)), None)


def has_stock_code(config: Mapping[str, Any]) -> bool:
    """Whether what auto_map names is what transformers has under the same names by now."""
    family, names = FAMILIES.get(str(config.get("model_type"))), config.get("auto_map")
    if family is None or not isinstance(names, dict):
        return not names
    end = f"_{family.code or family.model_type}.{family.class_name}"
    stock = {"AutoConfig": f"configuration{end}Config", "AutoTokenizer": None}
    stock |= {
        "AutoModel": f"modeling{end}Model",
        "AutoModelForCausalLM": f"modeling{end}ForCausalLM",
    }
    return all(key in stock and stock[key] in (name, None) for key, name in names.items())


def attention_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Kind of attention of every layer, for example "full_attention": unlike kinds never fuse.

    Follows the config classes in transformers: an explicit layer_types list, else the family's
    pattern of sliding and full attention, else max_window_layers (Qwen), else one kind throughout.
    Layers without RoPE (SmolLM 3) are a kind of their own.
    """
    count = num_layers_of(config)
    kinds = _explicit_kinds(config, count) or _default_kinds(config, count)
    rotated = rope_layers(config)
    if rotated is None:
        return kinds
    return tuple(k if r else f"{k} without RoPE" for k, r in zip(kinds, rotated, strict=True))


def rope_layers(config: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Which layers rotate q and k, for families in which not all do, else None."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or family.rope_period is None:
        return None
    count = num_layers_of(config)
    flags = config.get("no_rope_layers")
    if flags is None:
        period = positive(config, "no_rope_layer_interval", family.rope_period)
        flags = [int((layer + 1) % period != 0) for layer in range(count)]
    if not isinstance(flags, list) or len(flags) != count:
        raise FamilyError(f"config.json: no_rope_layers must have one entry per layer ({count})")
    return tuple(bool(flag) for flag in flags)


def _explicit_kinds(config: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != count:
        raise FamilyError(f"config.json: layer_types must list the kind of all {count} layers")
    return tuple(str(kind) for kind in kinds)


def _default_kinds(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None and family.window_period is not None:
        period = positive(config, "sliding_window_pattern", family.window_period)
        return tuple(
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
            for layer in range(count)
        )
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        first = config.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise FamilyError(
                f"config.json: max_window_layers must be a whole number, not {first!r}"
            )
        full = min(first, count)
        return ("full_attention",) * full + ("sliding_attention",) * (count - full)
    return ("full_attention",) * count


def obstacle(
    config: Mapping[str, Any],
    layers: Sequence[int],
    *,
    in_order: bool = False,
    in_memory: bool = False,
) -> str | None:
    """Why these layers cannot be written as one group, or None if they can.

    in_order: their attentions run in order (ff) and so keep a layer each. in_memory: the group is
    run only, so every member has its own kind of attention.
    """
    kinds = attention_kinds(config)
    mixed = {kinds[layer] for layer in layers}
    if len(mixed) > 1 and not in_order and not in_memory:
        return f"they mix {' and '.join(sorted(mixed))}"
    if layers[0] < (config.get("deepstack_layers") or 0):
        return f"features of images are added after layer {layers[0]} (deepstack_visual_indexes)"
    if config.get("qk_layernorm"):
        return "their q and k are normed with biases of their own (qk_layernorm)"
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return None
    for key, value in family.only:
        if config.get(key, value) != value:
            return f"they norm what they add to ({key} {config[key]})"
    if in_order and family.parallel and family.converts(config):
        return NOT_IN_ORDER
    for differ in (_unknown_routing, _unlike_experts) if family.routes else ():
        if reason := differ(family, config, layers):
            return reason
    for matrix in family.matrices if family.norm_bias and not family.grown_biases else ():
        joined = family.norm_of(matrix) and (family.is_ffn(matrix.name) or not in_order)
        if joined and not has_bias(matrix, config):
            return f"{matrix.name} has no bias to take up that of its norm"
    return None


def _unknown_routing(
    family: Family, config: Mapping[str, Any], layers: Sequence[int]
) -> str | None:
    """The key that asks for another choice of experts than a group's router can make."""
    own = layer_configs(config)
    for layer, (key, known) in product(layers, family.routing):
        if (value := own[layer].get(key, known[0])) not in known:
            whose = "their routers have" if key in config else f"the router of layer {layer} has"
            return f"{whose} {key} {value!r}, known is {' or '.join(known)}"
    return None


def _unlike_experts(family: Family, config: Mapping[str, Any], layers: Sequence[int]) -> str | None:
    """How the experts of these layers differ, with the keys that say so."""
    routed, own = expert_layers(family, config), layer_configs(config)
    first = layers[0]
    for layer in layers[1:]:
        if routed[layer] != routed[first]:
            with_experts, without = (first, layer) if routed[first] else (layer, first)
            keys = ", ".join(key for key in EXPERT_PLACES if config.get(key) not in (None, []))
            return f"layer {with_experts} has experts, layer {without} has none ({keys})"
        for key in (*EXPERT_COUNTS, *CHOSEN_COUNTS):
            if (theirs := own[layer].get(key)) != own[first].get(key):
                return f"layer {layer} has {key} {theirs}, layer {first} {own[first].get(key)}"
    return None


def stays_apart(family: Family, matrix: Matrix, block: Block) -> bool:
    """Whether members of a matrix are stored one below the other and applied one by one.

    Outputs must stay apart where a norm of the member's own follows, and those of the attention
    also where FFNs see different ones; FFN inputs must where they differ.
    """
    ffn, differ = family.is_ffn(matrix.name), band_of(family, block) is not None
    if matrix.join == "columns":
        return bool(family.member_norms) or (differ and not ffn)
    return differ and ffn


def check_plan(
    config: Mapping[str, Any],
    plan: Plan,
    *,
    force: bool = False,
    prefill: str = "grouped",
    joins: bool = True,
) -> list[str]:
    """Check that every group of a plan can be written. Returns warnings; raises FoldError.

    force: allow groups with the first or the last layer, with a warning. prefill: "sequential"
    needs the members back from the wide weights, which summed biases do not give. joins: groups
    become one layer each, which has one mask; else members keep a layer, and a mask, of their own.
    """
    if prefill not in ("grouped", "sequential"):
        raise FoldError(f"prefill '{prefill}' is not one of grouped, sequential")
    if prefill == "sequential" and joins:
        _check_members_come_back(config, plan)
    if not plan.groups:
        raise FoldError("the plan has no group; name at least one, for example 5+6")
    for group in plan.groups:
        reason = obstacle(config, group.layers, in_order=group.is_in_order or not joins)
        if reason:
            message = f"group {group.shorthand} cannot be fused: {reason}; leave it out"
            in_order = Group.wired(group.layers, "ff").shorthand
            if obstacle(config, group.layers, in_order=True) is None:
                message += f", or keep its attentions in order ({in_order})"
            raise FoldError(message)
    warnings = []
    for group in plan.edge_groups():
        message = f"group {group.shorthand} holds the first or the last layer"
        if not force:
            raise FoldError(f"{message}, which ruins quality; leave it out or insist with --force")
        warnings.append(f"{message}: expect a large loss of quality")
    return warnings


def check_format(
    form: str, config: Mapping[str, Any], family: Family, plan: Plan, *, wrapped: bool = False
) -> None:
    """Raise FoldError for what a format cannot express: a family's layers, or a group."""
    if form == "auto":
        return
    if form not in FORMATS:
        raise FoldError(f"format '{form}' is not one of auto, {', '.join(FORMATS)}")
    if wrapped:
        raise FoldError(f"a model with a vision encoder has no place in {form}; use --format auto")
    wirings = FORMATS[form].wirings
    for group in plan.groups:
        if group.wiring not in wirings:
            others = " or ".join(Group.wired(group.layers, name).shorthand for name in wirings)
            raise FoldError(
                f"group {group.shorthand} cannot be written as {form}, which has no {group.wiring} "
                f"groups; make it {others}, or use --format auto"
            )
    for lack in (_lacks_of_mlx if form == "mlx" else _lacks)(form, config, family):
        raise FoldError(
            f"a {family.model_type} cannot be written as {form}: {lack}; use --format auto"
        )


def _lacks(form: str, config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """What the layers of a model need that those of a format, which are Llama's, do not have."""
    names = [matrix.name for matrix in CONVERTIBLE["llama"].matrices]
    if family.deci_lacks:
        yield family.deci_lacks
    if family.branches != Branches() or [matrix.name for matrix in family.matrices] != names:
        yield "its layers are built otherwise than Llama's"
    if biased := [matrix.name for matrix in family.matrices if has_bias(matrix, config)]:
        yield f"{biased[0]} has a bias"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"its FFN is gated by {config['hidden_act']}, there by silu"
    window = family.slides and config.get("sliding_window")
    if window or set(attention_kinds(config)) != {"full_attention"}:
        yield "its attention slides"
    rope = rope_of(config)
    factor = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if rope["rope_type"] not in FORMATS[form].ropes:
        yield f"its RoPE is scaled ({rope['rope_type']})"
    elif factor != 1:
        yield f"it rotates only {factor} of q and k"


def _lacks_of_mlx(form: str, config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """What the layers of a model need that the model file for mlx-lm does not have."""
    if family.model_type not in FORMATS[form].families:
        yield f"its model file runs {', '.join(FORMATS[form].families)}"
    gemma = family.model_type == "gemma3_text"
    key, act = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    if config.get(key, act) not in (act, "swish" if act == "silu" else act):
        yield f"its FFN is gated by {config[key]}, there by {act}"
    if bool(gemma and config.get("use_bidirectional_attention")):
        yield "its attention looks ahead (use_bidirectional_attention)"
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if gemma and config.get(key):
            yield f"it caps scores ({key})"
    ropes = config.get("rope_parameters") or {}
    nested = [rope for rope in ropes.values() if isinstance(rope, dict)]
    for rope in [rope_of({"rope_parameters": own}) for own in nested] or [rope_of(config)]:
        if rope["rope_type"] not in FORMATS[form].ropes:
            yield f"its RoPE is scaled ({rope['rope_type']})"
        if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
            yield "it rotates only a part of q and k"


def _check_members_come_back(config: Mapping[str, Any], plan: Plan) -> None:
    family = family_of(config)
    if family.grown_biases:
        raise FoldError(
            f"members of a {family.model_type} group have no biases of their own to run with: "
            "prefill cannot be sequential; leave it grouped"
        )
    for matrix, block in product(family.matrices + family.dense, family.blocks_of(plan)):
        joined = block.ffns if family.is_ffn(matrix.name) else block.attentions
        summed = matrix.join == "columns" and has_bias(matrix, config) and len(joined) > 1
        if summed and not stays_apart(family, matrix, block):
            raise FoldError(
                f"{matrix.name} has a bias, of which a group keeps only the sum: prefill cannot be "
                "sequential; leave it grouped"
            )
