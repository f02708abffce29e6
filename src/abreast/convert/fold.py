"""Pure tensor arithmetic of the rewrite: fold norms into projections, join members, recipes.

With RMSNorm, N(x) = xhat * g, and W (xhat * g) = (W diag(g)) xhat: the gain folds into the columns
of every matrix that reads the norm. All members of an lp group then read one xhat, so their
matrices stack along output rows (q, k, v, gate, up) or input columns (o, down), and the group is
one stock layer with p times the heads and intermediate size and gains of 1. Exact but for one
rounding: products are formed in float32, where those of two half-precision numbers are exact, and
cast once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from abreast.errors import AbreastError
from abreast.families import (
    FAMILIES,
    Family,
    FamilyError,
    Matrix,
    all_tensors,
    family_of,
    has_bias,
    head_dim_of,
    layer_tensors,
    num_layers_of,
    outer_tensors,
    positive,
    sizes,
)
from abreast.plan import Group, Plan

How = Literal["copy", "rows", "columns", "sum", "shift", "heads", "fill"]

# save_pretrained writes the file back under the name of its module: keep the two the same.
REMOTE_CODE = "modeling.py"


class FoldError(AbreastError):
    """Layers that cannot become one stock layer, or tensors that do not add up."""


@dataclass(frozen=True)
class Recipe:
    """How one output tensor is made.

    copy: the one member unchanged. rows: members, each with its columns scaled by its gain, stacked
    along dimension 0; with parts, all members' first parts, then all second ones. columns: members
    stacked along dimension 1. sum: members added. shift: biases, each with W beta added for the
    beta of a LayerNorm that folds away, stacked. heads: 1-D gains, each repeated `heads` times,
    one row each. fill: a constant, after the members were folded elsewhere.
    members: names of the source tensors that this recipe consumes. gains, shifts, weights: others
    that it reads, one per member, consumed by recipes of their own. gain_offset: added to gains.
    like: for a bias that has no source, the matrix it belongs to; the members' are then 0.
    """

    name: str
    how: How
    members: tuple[str, ...]
    gains: tuple[str, ...] = ()
    gain_offset: float = 0.0
    shifts: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    parts: tuple[int, ...] = ()
    heads: int = 1
    fill: float = 1.0
    like: str = ""

    def shape(self, member: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output, given that of every member, or of the tensor it is `like`."""
        if self.like:
            return (max(1, len(self.weights)) * member[0],)
        count = len(self.members)
        if self.how in ("rows", "shift"):
            return (count * member[0], *member[1:])
        if self.how == "columns":
            return (member[0], count * member[1])
        if self.how == "heads":
            return (count * self.heads, *member)
        return member


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


def fold_shift(weight: torch.Tensor, beta: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """b + W beta in float64: what a LayerNorm's bias becomes in a matrix that reads the norm.

    weight [rows, columns], beta [columns], bias [rows] -> [rows].
    """
    return bias.double() + weight.double() @ beta.double()


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


def attention_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Kind of attention of every layer, for example "full_attention": unlike kinds never fuse.

    Follows the config classes in transformers: an explicit layer_types list, else a repeating
    pattern of sliding and full attention (Gemma, Cohere), else max_window_layers (Qwen), else one
    kind throughout. Layers without RoPE (SmolLM 3) are a kind of their own.
    """
    count = num_layers_of(config)
    kinds = _explicit_kinds(config, count) or _default_kinds(config, count)
    rotated = rope_layers(config)
    if rotated is None:
        return kinds
    return tuple(k if r else f"{k} without RoPE" for k, r in zip(kinds, rotated, strict=True))


def rope_layers(config: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Which layers rotate q and k, for families in which not all do, else None."""
    if config.get("model_type") != "smollm3":
        return None
    count = num_layers_of(config)
    flags = config.get("no_rope_layers")
    if flags is None:
        interval = positive(config, "no_rope_layer_interval", 4)
        flags = [int((layer + 1) % interval != 0) for layer in range(count)]
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
    pattern = _PATTERNS.get(str(config.get("model_type")))
    if pattern is not None:
        period = positive(config, "sliding_window_pattern", pattern)
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


# How many layers until the next one with full attention, where config.json does not list the kinds.
_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "olmo3": 4, "exaone4": 4}


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
            if matrix.norm and not has_bias(matrix, config):
                return f"{matrix.name} has no bias to take up that of its norm"
    return None


def splits_members(family: Family, group: Group | None) -> bool:
    """Whether a stage keeps something apart for each member instead of being one stock layer."""
    if group is None:
        return False
    return family.keeps_members or not (group.is_wide_layer or family.parallel)


def check_plan(
    config: Mapping[str, Any], plan: Plan, *, force: bool = False, prefill: str = "grouped"
) -> list[str]:
    """Whether every group of a plan can be fused. Returns warnings; raises FoldError.

    force: allow groups with the first or the last layer, with a warning. prefill: "sequential"
    needs the members back from the wide weights, which summed biases do not give.
    """
    warnings = []
    if prefill not in ("grouped", "sequential"):
        raise FoldError(f"prefill '{prefill}' is not one of grouped, sequential")
    family = family_of(config)
    for matrix in family.matrices if prefill == "sequential" else ():
        if family.grown_biases:
            raise FoldError(
                f"members of a {family.model_type} group have no biases of their own to run with: "
                "prefill cannot be sequential; leave it grouped"
            )
        summed = matrix.join == "columns" and has_bias(matrix, config)
        if summed and not all(_stays_apart(family, matrix, group) for group in plan.groups):
            raise FoldError(
                f"{matrix.name} has a bias, of which a group keeps only the sum: prefill cannot be "
                "sequential; leave it grouped"
            )
    if not plan.groups:
        raise FoldError("the plan has no group; name at least one, for example 5+6")
    for group in plan.groups:
        reason = obstacle(config, group.layers)
        if reason:
            raise FoldError(f"group {group.shorthand} cannot be fused: {reason}; leave it out")
    for group in plan.edge_groups():
        message = f"group {group.shorthand} holds the first or the last layer"
        if not force:
            raise FoldError(f"{message}, which ruins quality; leave it out or insist with --force")
        warnings.append(f"{message}: expect a large loss of quality")
    return warnings


def recipes(family: Family, config: Mapping[str, Any], plan: Plan) -> list[Recipe]:
    """Every tensor of the converted checkpoint, in order: embedding, layers, final norm, head.

    Every source tensor is a member of exactly one recipe. Raises RuntimeError if not, which is a
    fault of the family's row, not of the user.
    """
    outer = list(outer_tensors(family, config))
    made = [Recipe(family.embedding, "copy", (family.embedding,))]
    for index, stage in enumerate(plan.stages):
        made += _stage_recipes(family, config, index, stage, plan.group_of(stage))
    made += [Recipe(name, "copy", (name,)) for name in outer if name != family.embedding]
    consumed = sorted(name for recipe in made for name in recipe.members)
    if consumed != sorted(all_tensors(family, config)):
        raise RuntimeError(f"the recipes for {family.model_type} do not use every tensor once")
    return made


def _stage_recipes(
    family: Family,
    config: Mapping[str, Any],
    index: int,
    stage: Sequence[int],
    group: Group | None,
) -> list[Recipe]:
    def source(tensor: str) -> tuple[str, ...]:
        return tuple(f"{family.layer_prefix}{layer}.{tensor}" for layer in stage)

    def target(tensor: str) -> str:
        return f"{family.layer_prefix}{index}.{tensor}"

    tensors = layer_tensors(family, config)
    if group is None:
        return [Recipe(target(tensor), "copy", source(tensor)) for tensor in tensors]
    size = sizes(config)
    made: list[Recipe] = []
    for norm in family.norms:
        tensor = f"{norm}.weight"
        fill = 1.0 - family.gain_offset
        made.append(Recipe(target(tensor), "fill", source(tensor), fill=fill))
        if family.norm_bias:
            tensor = f"{norm}.bias"
            made.append(Recipe(target(tensor), "fill", source(tensor), fill=0.0))
    for norm, symbol in family.head_norms:
        tensor = f"{norm}.weight"
        heads = size[symbol] // head_dim_of(config)
        made.append(Recipe(target(tensor), "heads", source(tensor), heads=heads))
    for norm, _ in family.wide_norms:
        if f"{norm}.weight" in tensors:
            made.append(Recipe(target(f"{norm}.weight"), "rows", source(f"{norm}.weight")))
    for norm in (*family.member_norms, *(name for name, _ in family.flat_norms)):
        made.append(Recipe(target(f"{norm}.weight"), "heads", source(f"{norm}.weight")))
    for matrix in family.matrices:
        tensor = f"{matrix.name}.weight"
        apart = _stays_apart(family, matrix, group)
        how: How = "rows" if apart else matrix.join
        packed = matrix.join == "rows" and not apart and len(matrix.rows) > 1
        made.append(
            Recipe(
                target(tensor),
                how,
                source(tensor),
                gains=source(f"{matrix.norm}.weight") if matrix.norm else (),
                gain_offset=family.gain_offset,
                parts=tuple(size[part] for part in matrix.rows) if packed else (),
            )
        )
        like = source(tensor)[0]
        tensor = f"{matrix.name}.bias"
        if not has_bias(matrix, config):
            if family.grown_biases and matrix.norm:
                shifts, weights = source(f"{matrix.norm}.bias"), source(f"{matrix.name}.weight")
                made.append(
                    Recipe(target(tensor), "shift", (), shifts=shifts, weights=weights, like=like)
                )
            elif family.grown_biases:
                weights = source(f"{matrix.name}.weight") if apart else ()
                made.append(
                    Recipe(target(tensor), "fill", (), weights=weights, fill=0.0, like=like)
                )
            continue
        if matrix.norm and family.norm_bias:
            shifts, weights = source(f"{matrix.norm}.bias"), source(f"{matrix.name}.weight")
            made.append(
                Recipe(target(tensor), "shift", source(tensor), shifts=shifts, weights=weights)
            )
        else:
            made.append(
                Recipe(target(tensor), "sum" if how == "columns" else "rows", source(tensor))
            )
    return made


def _stays_apart(family: Family, matrix: Matrix, group: Group) -> bool:
    """Whether members of a matrix are stored one below the other and applied one by one.

    Outputs must stay apart where a norm of the member's own follows, and those of the attention
    also where FFNs see different ones; FFN inputs must where they differ.
    """
    ffn = matrix.name.startswith("mlp.")
    differ = not (group.shares_ffn_input or family.parallel)
    if matrix.join == "columns":
        return bool(family.member_norms) or (differ and not ffn)
    return differ and ffn


def converted_config(
    config: Mapping[str, Any], family: Family, plan: Plan, *, dtype: str, prefill: str = "grouped"
) -> dict[str, Any]:
    """config.json of the converted checkpoint.

    Widths live in transformers' own `per_layer_config`. Where all stages come out equally wide the
    result is a stock model and needs none. `abreast` records the plan for tools that want it.
    """
    new = copy.deepcopy(dict(config))
    new.pop("torch_dtype", None)
    new.update(
        num_hidden_layers=plan.depth,
        head_dim=head_dim_of(config),
        dtype=dtype,
        abreast={"num_layers": plan.num_layers, "plan": plan.shorthand},
    )
    base = {key: config.get(key) or config["num_attention_heads"] for key in family.wide}
    new.update(base)
    new.update(_per_stage_lists(config, family, plan))
    groups = [plan.group_of(stage) for stage in plan.stages]
    widths = [len(stage) for stage in plan.stages]
    uniform = widths[0] if len(set(widths)) == 1 else None
    apart = any(splits_members(family, group) for group in groups)
    heads = config["num_attention_heads"]
    if prefill == "sequential":
        apart = True
        new["abreast_prefill"] = prefill
    if (
        uniform
        and not (apart or family.grown_biases)
        and config["hidden_size"] % (uniform * heads) == 0
    ):
        new.update({key: uniform * value for key, value in base.items()})
        new.update(model_type=family.model_type, architectures=[family.stock])
        return new
    digits = len(str(plan.depth - 1))
    layers: dict[str, dict[str, Any]] = {}
    for index, group in enumerate(groups):
        if group is not None:
            entry = {key: len(group.layers) * value for key, value in base.items()}
            entry.update(dict.fromkeys(family.grown_biases, True))
            if splits_members(family, group):
                entry["abreast_members"] = len(group.layers)
                if not (group.shares_ffn_input or family.parallel):
                    entry["abreast_bypass"] = group.ffn_band
            layers[str(index).zfill(digits)] = entry
    new["per_layer_config"] = layers
    if apart:
        # The schema wants a global value for whatever a layer may override.
        new.update(abreast_members=1, abreast_bypass=None)
    module = REMOTE_CODE.removesuffix(".py")
    name = family.converted
    new.update(
        model_type=family.converted_type,
        architectures=[name],
        auto_map={
            "AutoConfig": f"{module}.{name.replace('ForCausalLM', 'Config')}",
            "AutoModel": f"{module}.{name.replace('ForCausalLM', 'Model')}",
            "AutoModelForCausalLM": f"{module}.{name}",
        },
    )
    return new


def _per_stage_lists(config: Mapping[str, Any], family: Family, plan: Plan) -> dict[str, list[Any]]:
    """Config lists with an entry per layer, rewritten to one per stage."""
    firsts = [stage[0] for stage in plan.stages]
    lists: dict[str, list[Any]] = {}
    kinds = [kind.removesuffix(" without RoPE") for kind in attention_kinds(config)]
    if config.get("layer_types") is not None or len(set(kinds)) > 1:
        lists["layer_types"] = [kinds[layer] for layer in firsts]
    rotated = rope_layers(config)
    if rotated is not None:
        lists["no_rope_layers"] = [int(rotated[layer]) for layer in firsts]
    return lists
