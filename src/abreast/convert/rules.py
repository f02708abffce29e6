"""What may be grouped: kinds of attention, obstacles to a fusion, and the check of a whole plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abreast.errors import AbreastError
from abreast.families import (
    FAMILIES,
    Family,
    FamilyError,
    Matrix,
    family_of,
    has_bias,
    num_layers_of,
    positive,
)
from abreast.plan import Group, Plan


class FoldError(AbreastError):
    """Layers that cannot become one stock layer, or tensors that do not add up."""


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


def obstacle(config: Mapping[str, Any], layers: Sequence[int]) -> str | None:
    """Why these layers cannot become one layer, or None if they can."""
    kinds = attention_kinds(config)
    mixed = {kinds[layer] for layer in layers}
    if len(mixed) > 1:
        return f"they mix {' and '.join(sorted(mixed))}"
    if config.get("qk_layernorm"):
        return "their q and k are normed with biases of their own (qk_layernorm)"
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None and family.norm_bias and not family.grown_biases:
        for matrix in family.matrices:
            if family.norm_of(matrix) and not has_bias(matrix, config):
                return f"{matrix.name} has no bias to take up that of its norm"
    return None


def ffn_inputs_differ(family: Family, group: Group) -> bool:
    """Whether the members' FFNs read different inputs, which one wide layer cannot give them."""
    return not (family.parallel or group.shares_ffn_input)


def keeps_members(family: Family, group: Group) -> bool:
    """Whether a group keeps something apart for each member instead of being one stock layer."""
    return family.keeps_members or not (family.parallel or group.is_wide_layer)


def stays_apart(family: Family, matrix: Matrix, group: Group) -> bool:
    """Whether members of a matrix are stored one below the other and applied one by one.

    Outputs must stay apart where a norm of the member's own follows, and those of the attention
    also where FFNs see different ones; FFN inputs must where they differ.
    """
    ffn = matrix.name.startswith(f"{family.branches.mlp}.")
    differ = ffn_inputs_differ(family, group)
    if matrix.join == "columns":
        return bool(family.member_norms) or (differ and not ffn)
    return differ and ffn


def check_plan(
    config: Mapping[str, Any], plan: Plan, *, force: bool = False, prefill: str = "grouped"
) -> list[str]:
    """Check that every group of a plan can be fused. Returns warnings; raises FoldError.

    force: allow groups with the first or the last layer, with a warning. prefill: "sequential"
    needs the members back from the wide weights, which summed biases do not give.
    """
    if prefill not in ("grouped", "sequential"):
        raise FoldError(f"prefill '{prefill}' is not one of grouped, sequential")
    if prefill == "sequential":
        _check_members_come_back(config, plan)
    if not plan.groups:
        raise FoldError("the plan has no group; name at least one, for example 5+6")
    for group in plan.groups:
        reason = obstacle(config, group.layers)
        if reason:
            raise FoldError(f"group {group.shorthand} cannot be fused: {reason}; leave it out")
        if any(map(any, group.attention_sees)):
            raise FoldError(
                f"group {group.shorthand}: no layer of a checkpoint runs attentions one after "
                "another; run it grouped in memory"
            )
    warnings = []
    for group in plan.edge_groups():
        message = f"group {group.shorthand} holds the first or the last layer"
        if not force:
            raise FoldError(f"{message}, which ruins quality; leave it out or insist with --force")
        warnings.append(f"{message}: expect a large loss of quality")
    return warnings


def _check_members_come_back(config: Mapping[str, Any], plan: Plan) -> None:
    family = family_of(config)
    if family.grown_biases:
        raise FoldError(
            f"members of a {family.model_type} group have no biases of their own to run with: "
            "prefill cannot be sequential; leave it grouped"
        )
    for matrix in family.matrices:
        summed = matrix.join == "columns" and has_bias(matrix, config)
        if summed and not all(stays_apart(family, matrix, group) for group in plan.groups):
            raise FoldError(
                f"{matrix.name} has a bias, of which a group keeps only the sum: prefill cannot be "
                "sequential; leave it grouped"
            )
