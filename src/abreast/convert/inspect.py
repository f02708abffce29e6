"""What a checkpoint is, and which of its layers may be grouped: read from headers, no weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abreast.checkpoint import MANIFEST, as_loaded, open_checkpoint, read_manifest
from abreast.convert.rules import attention_kinds, obstacle
from abreast.families import (
    CONVERTIBLE,
    FAMILIES,
    as_ours,
    family_of,
    head_dim_of,
    is_tied,
    num_layers_of,
    positive,
)
from abreast.targets import refused_by


@dataclass(frozen=True)
class Inspection:
    """One checkpoint, as transformers loads it. parameters and nbytes count stored weights.

    fusable: model_type has a row of its own, so groups can be written to a checkpoint. stretches:
    maximal runs of layers, first to last, within which every consecutive group can be fused.
    refused: adjacent pairs that cannot, with the reason. edges: layers that need --force.
    plan: that of a converted checkpoint, else None. refused_by: engines that will not load it, or
    conversions of it, and why. warnings: where config.json and tensors differ.
    """

    source: str
    model_type: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    dtypes: tuple[str, ...]
    parameters: int
    nbytes: int
    shards: tuple[str, ...]
    fusable: bool
    runs_grouped: bool
    stretches: tuple[tuple[int, int], ...]
    refused: tuple[tuple[int, int, str], ...]
    edges: tuple[int, ...]
    plan: str | None
    original_layers: int | None
    refused_by: dict[str, str]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_model(model: str | Path, *, revision: str | None = None) -> Inspection:
    """Read a checkpoint's config and headers. Raises AbreastError for one that is broken."""
    checkpoint = open_checkpoint(model, revision=revision, weights=False)
    config, _ = as_ours(checkpoint.config)
    model_type = str(config.get("model_type"))
    converted = (checkpoint.folder / MANIFEST).is_file()
    plan = read_manifest(checkpoint.folder).plan if converted else None
    if plan is None and model_type not in FAMILIES:
        family_of(config)
    family = CONVERTIBLE.get(model_type.removeprefix("abreast_"))
    if plan is None and family and not config.get("quantization_config"):
        checkpoint = as_loaded(checkpoint, family)
        config = checkpoint.config
    count = num_layers_of(config)
    refused = []
    if plan is None:
        for first in range(count - 1):
            pair = first, first + 1
            if (reason := obstacle(config, pair)) is not None:
                in_order = obstacle(config, pair, in_order=True) is None
                only = f"; only {first}~{first + 1} joins them" if in_order else ""
                refused.append((*pair, reason + only))
    names = checkpoint.config.get("architectures")
    heads = positive(config, "num_attention_heads")
    return Inspection(
        source=str(model),
        model_type=str(checkpoint.config.get("model_type")),
        architecture=str(names[0]) if isinstance(names, list) and names else "unknown",
        num_layers=count,
        hidden_size=positive(config, "hidden_size"),
        num_attention_heads=heads,
        num_key_value_heads=positive(config, "num_key_value_heads", heads),
        head_dim=head_dim_of(config),
        intermediate_size=positive(config, "intermediate_size"),
        vocab_size=positive(config, "vocab_size"),
        tied=is_tied(config),
        dtypes=tuple(sorted({tensor.dtype for tensor in checkpoint.tensors.values()})),
        parameters=sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        nbytes=checkpoint.nbytes,
        shards=checkpoint.shards,
        fusable=plan is None and model_type in CONVERTIBLE,
        runs_grouped=plan is None and model_type in FAMILIES,
        stretches=_stretches(attention_kinds(config)) if plan is None else (),
        refused=tuple(refused),
        edges=(0, count - 1),
        plan=plan.shorthand if plan else None,
        original_layers=plan.num_layers if plan else None,
        refused_by=refused_by(checkpoint.config, family) if plan or family else {},
        warnings=checkpoint.warnings,
    )


def _stretches(kinds: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    stretches, start = [], 0
    for layer in range(1, len(kinds) + 1):
        if layer == len(kinds) or kinds[layer] != kinds[start]:
            if layer - start >= 2:
                stretches.append((start, layer - 1))
            start = layer
    return tuple(stretches)
