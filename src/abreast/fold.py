"""Pure tensor arithmetic of the rewrite: fold norms into projections, join members, recipes.

With RMSNorm, N(x) = xhat * g, and W (xhat * g) = (W diag(g)) xhat: the gain folds into the columns
of every matrix that reads the norm. All members of an lp group then read one xhat, so their
matrices stack along output rows (q, k, v, gate, up) or input columns (o, down), and the group is
one stock layer with p times the heads and intermediate size and gains of 1. Exact but for one
rounding: products are formed in float32, where those of two half-precision numbers are exact, and
cast once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from abreast.errors import AbreastError
from abreast.families import Family, all_tensors, attention_kinds, has_bias, is_tied
from abreast.plan import Plan

How = Literal["copy", "rows", "columns", "sum", "ones"]


class FoldError(AbreastError):
    """Layers that cannot become one stock layer, or tensors that do not add up."""


@dataclass(frozen=True)
class Recipe:
    """How one output tensor is made.

    copy: the one member unchanged. rows: members, each with its columns scaled by its gain, stacked
    along dimension 0 (gains empty: stacked as they are). columns: members stacked along
    dimension 1. sum: members added. ones: a gain of 1, after the members were folded elsewhere.
    members: names of the source tensors that this recipe consumes. gains: names of the norm gains,
    one per member, read here and consumed by their own "ones" recipe.
    """

    name: str
    how: How
    members: tuple[str, ...]
    gains: tuple[str, ...] = ()


def fold_gain(
    weight: torch.Tensor, gain: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """W diag(g), each product rounded once: weight [rows, columns], gain [columns].

    Products are formed in float32 or wider, and cast to `dtype` at the end if one is given.
    """
    if weight.dtype == gain.dtype == dtype:
        # PyTorch multiplies half-precision numbers in float32 and rounds the product once, which
        # is the same result at a third of the memory traffic.
        return weight * gain
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * gain.to(wide)).to(dtype or wide)


def join_rows(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack members that read the same input: [r_k, ...] -> [sum r_k, ...]."""
    return torch.cat(list(weights), dim=0)


def join_columns(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack members whose outputs add up: [rows, c_k] -> [rows, sum c_k]."""
    return torch.cat(list(weights), dim=1)


def sum_biases(biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add biases that all enter the residual stream, in float32 or wider: [rows] -> [rows]."""
    wide = torch.promote_types(biases[0].dtype, torch.float32)
    return torch.stack([bias.to(wide) for bias in biases]).sum(0)


def obstacle(config: Mapping[str, Any], layers: Sequence[int]) -> str | None:
    """Why these layers cannot become one stock layer, or None if they can."""
    kinds = attention_kinds(config)
    mixed = {kinds[layer] for layer in layers}
    if len(mixed) > 1:
        return f"they mix {' and '.join(sorted(mixed))}"
    return None


def check_plan(config: Mapping[str, Any], plan: Plan, *, force: bool = False) -> list[str]:
    """Whether every group of a plan can be fused. Returns warnings; raises FoldError.

    force: allow groups with the first or the last layer, with a warning.
    """
    warnings = []
    if not plan.groups:
        raise FoldError("the plan has no group; name at least one, for example 5+6")
    for group in plan.groups:
        reason = obstacle(config, group.layers)
        if reason:
            raise FoldError(f"group {group.shorthand} cannot be fused: {reason}; leave it out")
        if group.wiring != "lp":
            raise FoldError(
                f"group {group.shorthand}: only lp groups can be written to a checkpoint so far; "
                f"write {'+'.join(map(str, group.layers))}, or run it with abreast.grouped"
            )
    for group in plan.edge_groups():
        message = f"group {group.shorthand} holds the first or the last layer"
        if not force:
            raise FoldError(f"{message}, which ruins quality; leave it out or insist with --force")
        warnings.append(f"{message}: expect a large loss of quality")
    return warnings


def recipes(family: Family, config: Mapping[str, Any], plan: Plan) -> list[Recipe]:
    """Every tensor of the converted checkpoint, in order: embedding, layers, final norm, head.

    Every source tensor is a member of exactly one recipe; anything else is our own fault and
    raises AssertionError-like RuntimeError.
    """
    made = [Recipe(family.embedding, "copy", (family.embedding,))]
    for index, stage in enumerate(plan.stages):
        made += _stage_recipes(family, config, index, stage)
    made.append(Recipe(family.final_norm, "copy", (family.final_norm,)))
    if not is_tied(config):
        made.append(Recipe(family.head, "copy", (family.head,)))
    consumed = sorted(name for recipe in made for name in recipe.members)
    if consumed != sorted(all_tensors(family, config)):
        raise RuntimeError(f"the recipes for {family.model_type} do not use every tensor once")
    return made


def _stage_recipes(
    family: Family, config: Mapping[str, Any], index: int, stage: Sequence[int]
) -> list[Recipe]:
    def source(tensor: str) -> tuple[str, ...]:
        return tuple(f"{family.layer_prefix}{layer}.{tensor}" for layer in stage)

    def target(tensor: str) -> str:
        return f"{family.layer_prefix}{index}.{tensor}"

    alone = len(stage) == 1
    made: list[Recipe] = []
    for norm in family.norms:
        tensor = f"{norm}.weight"
        made.append(Recipe(target(tensor), "copy" if alone else "ones", source(tensor)))
    for matrix in family.matrices:
        tensor = f"{matrix.name}.weight"
        gains = source(f"{matrix.norm}.weight") if matrix.norm and not alone else ()
        made.append(Recipe(target(tensor), "copy" if alone else matrix.join, source(tensor), gains))
        if has_bias(matrix, config):
            tensor = f"{matrix.name}.bias"
            how: How = "rows" if matrix.join == "rows" else "sum"
            made.append(Recipe(target(tensor), "copy" if alone else how, source(tensor)))
    return made
