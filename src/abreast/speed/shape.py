"""The parts of a model that an estimate of its speed counts, from config.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abreast.families import family_of, is_tied, layer_tensors, num_layers_of, sizes


@dataclass(frozen=True)
class Shape:
    """The parts of a config.json that matter here, in elements. attention, ffn: parameters of one
    layer that every token reads; head: those of the output head. experts: of one layer's experts,
    of which a token reads the share `chosen`; layers without any count as if they had them."""

    hidden: int
    queries: int
    keys: int
    attention: int
    ffn: int
    head: int
    embedding: int
    num_layers: int
    experts: int = 0
    chosen: float = 0.0


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Sizes from a config.json. Raises FamilyError for an unknown or a converted model."""
    family, size = family_of(config), sizes(config)
    attention = ffn = experts = 0
    for name, shape in layer_tensors(family, config).items():
        elements = math.prod(shape) if len(shape) > 1 and "norm" not in name else 0
        if ".experts." in name:
            experts += elements
        elif family.is_ffn(name):
            ffn += elements
        else:
            attention += elements
    vocabulary = size["V"] * size["D"]
    return Shape(
        hidden=size["D"],
        queries=size["Q"],
        keys=size["K"],
        attention=attention,
        ffn=ffn,
        head=vocabulary,
        embedding=0 if is_tied(config) else vocabulary,
        num_layers=num_layers_of(config),
        experts=experts,
        chosen=size["C"] / size["E"] if experts else 0.0,
    )
