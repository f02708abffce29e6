"""What a checkpoint is, and which of its layers may be grouped: read from headers, no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from abreast.checkpoint import MANIFEST, as_loaded, cannot_unpack, open_checkpoint, read_manifest
from abreast.convert.rules import obstacle, unreadable
from abreast.families import (
    FAMILIES,
    FamilyError,
    as_ours,
    decoder_of,
    family_of,
    head_dim_of,
    is_tied,
    num_layers_of,
    positive,
    sizes,
)
from abreast.targets import refused_by


@dataclass(frozen=True)
class Inspection:
    """One checkpoint, as transformers loads it. parameters and nbytes count stored weights.

    fusable: groups can be written to a checkpoint. unfoldable: why not, where they can only run
    grouped in memory. stretches: maximal runs of like layers, first to last, within which every
    consecutive group can be formed. refused: adjacent pairs that cannot, with the reason. edges:
    layers that need --force.
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
    unfoldable: str
    stretches: tuple[tuple[int, int], ...]
    refused: tuple[tuple[int, int, str], ...]
    edges: tuple[int, ...]
    plan: str | None
    original_layers: int | None
    refused_by: dict[str, str]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Known:
    """A well-known checkpoint. hub: its name there. source: where config, the keys of its
    config.json that matter, was read. reason: why it cannot be converted, None if it can.
    """

    name: str
    hub: str
    source: str
    config: dict[str, Any]
    reason: str | None

    @property
    def decoder(self) -> dict[str, Any]:
        return decoder_of(self.config)


def known_models() -> tuple[Known, ...]:
    """The checkpoints of known.yaml, judged as `convert` judges their configs."""
    rows = yaml.safe_load(files("abreast.convert").joinpath("known.yaml").read_text("utf-8"))
    return tuple(Known(**row, reason=why_not(row["config"])) for row in rows)


def why_not(config: Mapping[str, Any]) -> str | None:
    """Why no two layers of a model with this config.json can be joined, None if some can."""
    try:
        config = decoder_of(config)
        family_of(config)
        sizes(config)
        starts = range(num_layers_of(config) - 1)
        pairs = [(start, start + 1) for start in starts]
        reasons = [obstacle(config, pair, in_order=ff) for ff in (True, False) for pair in pairs]
    except FamilyError as error:
        return str(error)
    return unreadable(config) or (None if None in reasons else reasons[-1])


def inspect_model(model: str | Path, *, revision: str | None = None) -> Inspection:
    """Read a checkpoint's config and headers. Raises AbreastError for one that is broken."""
    checkpoint = open_checkpoint(model, revision=revision, weights=False)
    config, _ = as_ours(checkpoint.config)
    model_type = str(config.get("model_type"))
    converted = (checkpoint.folder / MANIFEST).is_file()
    plan = read_manifest(checkpoint.folder).plan if converted else None
    row = FAMILIES.get(model_type.removeprefix("abreast_"))
    family, unfoldable = row if row and row.matrices else None, ""
    if plan is None:
        try:
            family = family_of(config)
        except FamilyError as error:
            if model_type not in FAMILIES:
                raise
            family, unfoldable = None, str(error)
    settings = config.get("quantization_config")
    if plan is None and family and not (settings and cannot_unpack(settings)):
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
    tensors = (*checkpoint.tensors.values(), *checkpoint.others.values())
    return Inspection(
        source=str(model),
        model_type=str((checkpoint.wrapper or checkpoint.config).get("model_type")),
        architecture=str(names[0]) if isinstance(names, list) and names else "unknown",
        num_layers=count,
        hidden_size=positive(config, "hidden_size"),
        num_attention_heads=heads,
        num_key_value_heads=positive(config, "num_key_value_heads", heads),
        head_dim=positive(config, "v_head_dim", head_dim_of(config)),
        intermediate_size=positive(config, "intermediate_size"),
        vocab_size=positive(config, "vocab_size"),
        tied=is_tied(config),
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors})),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        nbytes=checkpoint.nbytes,
        shards=checkpoint.shards,
        fusable=plan is None and family is not None,
        runs_grouped=plan is None and model_type in FAMILIES,
        unfoldable=unfoldable,
        stretches=_stretches(count, {first for first, *_ in refused}) if plan is None else (),
        refused=tuple(refused),
        edges=(0, count - 1),
        plan=plan.shorthand if plan else None,
        original_layers=plan.num_layers if plan else None,
        refused_by=refused_by(checkpoint.config, family) if plan or family else {},
        warnings=checkpoint.warnings,
    )


def _stretches(count: int, ends: Set[int]) -> tuple[tuple[int, int], ...]:
    """The runs of at least two layers between layers that do not go with the next one."""
    bounds = [-1, *sorted(ends), count - 1]
    runs = ((before + 1, end) for before, end in pairwise(bounds))
    return tuple((first, last) for first, last in runs if first < last)
