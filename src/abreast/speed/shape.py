"""What an estimate of a model's speed takes from its config.json: sizes, and a typical plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abreast.convert import obstacle
from abreast.errors import AbreastError, first_line
from abreast.families import (
    decoder_of,
    family_of,
    is_tied,
    layer_tensors,
    num_layers_of,
    sizes,
)
from abreast.plan import Group, Plan


@dataclass(frozen=True)
class Shape:
    """The parts of a config.json that matter here, in elements. attention, ffn: parameters of one
    layer that every token reads; head: those of the output head. experts: of one layer's experts,
    of which a token reads the share `chosen`; layers without any count as if they had them.
    own_attentions: the members' attentions of a group run one by one, even on one input."""

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
    own_attentions: bool = False


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
        own_attentions=family.own_attentions,
    )


def read_config(model: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a folder or of a Hugging Face id (only that file is fetched), or the file;
    that of its decoder where it holds one beside others.

    Raises AbreastError where there is none.
    """
    from abreast.checkpoint import read_json

    path = Path(model).expanduser()
    if path.is_dir() or path.suffix == ".json":
        return decoder_of(read_json(path / "config.json" if path.is_dir() else path))
    if str(model).count("/") != 1 or not all(str(model).split("/")):
        raise AbreastError(f"no model at '{model}'; give a folder, its config.json or ORG/NAME")
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(str(model), "config.json", revision=revision)
    except Exception as error:  # of many kinds; all mean that the file is out of reach
        reason = first_line(error)
        raise AbreastError(f"no config.json of '{model}' here or on the Hub ({reason})") from None
    return decoder_of(read_json(Path(file)))


def typical_plan(config: Mapping[str, Any]) -> Plan:
    """Pairs next to the middle, as many as leave five sixths of the layers as stages.

    lp pairs; where no two neighbours can be joined so, pairs with their attentions in order (ff).
    The first and the last layer stay alone, in models of 4 layers and more.
    """
    count = num_layers_of(config)
    pairs = max(1, round(count / 6))
    first = (count - 2 * pairs) // 2
    ends = (max(1, first % 2), count - 1) if count > 3 else (0, count)
    for wiring in ("lp", "ff"):
        in_order = Group.wired((0, 1), wiring).is_in_order
        starts, start = [], ends[0] + (first - ends[0]) % 2
        while start + 1 < ends[1]:
            legal = obstacle(config, (start, start + 1), in_order=in_order) is None
            starts += [start] * legal
            start += 1 + legal
        if starts:
            break
    starts = sorted(sorted(starts, key=lambda start: abs(start + 1 - first - pairs))[:pairs])
    groups = tuple(Group.wired((start, start + 1), wiring) for start in starts)
    return Plan(num_layers=count, groups=groups)
