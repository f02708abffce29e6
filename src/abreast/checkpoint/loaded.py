"""A checkpoint as transformers loads it: the tensors that config.json describes, by their names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from abreast.checkpoint.files import INDEX, cannot_unpack
from abreast.checkpoint.tensors import (
    ADAPTER,
    DTYPES,
    MERGE,
    Checkpoint,
    TensorInfo,
    read_rows,
)
from abreast.errors import CheckpointError
from abreast.families import Family, all_tensors, is_tied, num_layers_of

COMPARE_BYTES = 2 << 20
GROUP = 32  # numbers that share a scale in mxfp4


def unpacked(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors, quantised ones with their scales as one of bfloat16 numbers."""
    settings, left = checkpoint.config.get("quantization_config"), dict(checkpoint.tensors)
    if not settings:
        return left
    if reason := cannot_unpack(settings):
        raise CheckpointError(f"'{checkpoint.source}' {reason}")
    block = (
        (1, GROUP) if settings["quant_method"] == "mxfp4" else tuple(settings["weight_block_size"])
    )
    for stored, numbers in checkpoint.tensors.items():
        shape = numbers.shape
        if block[0] == 1 and stored.endswith("_blocks") and len(shape) == 4:
            name, scales = stored.removesuffix("_blocks"), stored.replace("_blocks", "_scales")
            expected, kind = shape[:3], ("U8", "U8")
            shape = (shape[0], shape[2] * GROUP, shape[1])
        elif block[0] != 1 and numbers.dtype == "F8_E4M3" and len(shape) == 2:
            name, scales = stored, f"{stored}_scale_inv"
            expected = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
            kind = ("F8_E4M3", "F32")
        else:
            continue
        scale = left.pop(scales, None)
        if scale is None or (scale.shape, numbers.dtype, scale.dtype) != (expected, *kind):
            raise CheckpointError(
                f"tensor '{stored}' of '{checkpoint.source}' has no scales '{scales}' "
                f"{list(expected)} in {kind[1]}; download the checkpoint again"
            )
        del left[stored]
        size = 2 * math.prod(shape)
        left[name] = TensorInfo(
            name, numbers.file, "BF16", shape, -1, size, (numbers, scale), block
        )
    return left


def check_has_layers(checkpoint: Checkpoint, num_layers: int) -> None:
    """Refuse more layers than there are tensors, before anybody makes as many."""
    count = len(checkpoint.tensors) + len(checkpoint.others)  # a wrapper's may have any names
    if num_layers > count:
        raise CheckpointError(
            f"config.json says {num_layers} layers, '{checkpoint.source}' holds only {count} "
            "tensors; weights and config do not belong together"
        )


def as_loaded(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint as transformers loads it: config complete, tensors by the model's own names.

    Names may lack the prefix of the base model, or have it twice. Where config.json ties the head
    to the embedding, a head of the same values is dropped, one of others unties them, and one
    without an embedding is both (`tie_weights` in transformers/modeling_utils.py). Whatever else
    config.json does not describe, or the shards lack, raises CheckpointError with its name, and so
    does an adapter, which transformers would add to the weights.
    """
    source = checkpoint.source
    if (checkpoint.folder / ADAPTER).is_file():
        raise CheckpointError(
            f"'{source}' holds an adapter beside its weights ({ADAPTER}), which transformers adds "
            f"to them; {MERGE}, or move it away"
        )
    config = {**dict(family.defaults), **checkpoint.config}
    check_has_layers(checkpoint, num_layers_of(config))
    for name in checkpoint.absent:  # old versions of transformers list the heads of tied models
        if not ((is_tied(config) and name == family.head) or name.endswith(family.ignore)):
            raise CheckpointError(
                f"tensor '{name}' is in {INDEX} but in no shard of '{source}'; download it again"
            )
    known = all_tensors(family, {**config, "tie_word_embeddings": False})
    tensors = _named(checkpoint, family, known)
    ahead = tuple(f"{family.layer_prefix}{layer}." for layer in _layers_ahead(config))
    dropped = {n for n in tensors if n.endswith(family.ignore) or (ahead and n.startswith(ahead))}
    tensors = _packed(source, tensors, known)
    warnings = []
    if settings := config.pop("quantization_config", None):
        warnings.append(
            f"the weights were quantised ({settings['quant_method']}) and are bfloat16 numbers "
            "now; quantise the result again where that is wanted"
        )
    if is_tied(config) and family.head in tensors:
        warnings += _head_of(tensors, family, config, dropped)
    if any(name.startswith(ahead) for name in dropped if ahead):
        warnings.append(
            "the layers that predict further tokens (MTP) are left out, as transformers does"
        )
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    described = f"{family.model_type} of {num_layers_of(config)} layers"
    _check_tensors(source, tensors, all_tensors(family, config), described)
    for name, tensor in checkpoint.others.items():
        _check_tensor(source, tensor, name, tensor.shape)
    return replace(
        checkpoint,
        config=config,
        tensors=tensors,
        dropped=tuple(sorted(dropped)),
        warnings=tuple(warnings),
    )


def _named(checkpoint: Checkpoint, family: Family, known: Collection[str]) -> dict[str, TensorInfo]:
    """The tensors by the model's own names, which are `known`."""
    tensors: dict[str, TensorInfo] = {}
    prefix = family.layer_prefix.split(".")[0] + "."
    for stored, tensor in unpacked(checkpoint).items():
        name = stored
        for pattern, own in family.renames:
            name = re.sub(pattern, own, name)
        short = name.removeprefix(prefix)
        full = short if short in known else prefix + name if prefix + name in known else name
        if re.search(r"\.experts\.\d+\.", name):  # of one expert, see `_packed`
            full = prefix + short.removeprefix(prefix)
        if full in tensors:
            raise CheckpointError(
                f"'{checkpoint.source}' holds tensor '{full}' twice, also as "
                f"'{tensors[full].name}'; nobody can tell which is meant"
            )
        tensors[full] = tensor
    return tensors


def _head_of(
    tensors: dict[str, TensorInfo], family: Family, config: dict[str, Any], dropped: set[str]
) -> list[str]:
    """Drop, untie or take for the embedding the head of a tied model; what is to be said of it."""
    head = tensors[family.head]
    if family.embedding not in tensors:
        tensors[family.embedding] = tensors.pop(family.head)
        return []
    if not all(tensors[name].file.is_file() for name in (family.head, family.embedding)):
        dropped.add(family.head)
        return [
            f"config.json ties '{head.name}' to the embedding; whether it holds other values "
            "is seen only when it is downloaded"
        ]
    if _same_values(head, tensors[family.embedding]):
        dropped.add(family.head)
        return []
    config["tie_word_embeddings"] = False
    return [
        f"config.json ties '{head.name}' to the embedding, but it holds other values: it "
        "stays a head of its own, as in transformers"
    ]


def _layers_ahead(config: Mapping[str, Any]) -> range:
    """The layers behind the last that guess tokens further ahead, which transformers leaves out."""
    count, more = num_layers_of(config), config.get("num_nextn_predict_layers")
    return range(count, count + min(more, 8)) if isinstance(more, int) else range(0)


def _packed(
    source: str, tensors: Mapping[str, TensorInfo], known: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorInfo]:
    """Tensors of one expert joined to those of all: gate and up of one, then of the next."""
    left = dict(tensors)
    for name, shape in known.items():
        above, _, last = name.rpartition(".")
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last)
        if names is None or f"{above}.0.{names[0]}.weight" not in left:
            continue
        experts = range(min(shape[0], len(tensors)))  # config.json may say any number
        parts = []
        for part in (f"{above}.{e}.{n}.weight" for e in experts for n in names):
            _check_tensor(source, left.get(part), part, (shape[1] // len(names), shape[2]))
            parts.append(left.pop(part))
            if parts[-1].dtype != parts[0].dtype:
                raise CheckpointError(
                    f"tensor '{parts[-1].name}' has dtype {parts[-1].dtype}, other experts "
                    f"{parts[0].dtype}; give a checkpoint whose experts are all alike"
                )
        size = sum(part.nbytes for part in parts)
        left[name] = TensorInfo(name, parts[0].file, parts[0].dtype, shape, -1, size, tuple(parts))
    return left


def _check_tensors(
    source: str,
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    described: str,
) -> None:
    for name, shape in expected.items():
        _check_tensor(source, tensors.get(name), name, shape)
    unknown = [tensor.name for name, tensor in tensors.items() if name not in expected]
    if unknown:
        raise CheckpointError(
            f"tensor '{unknown[0]}' ({len(unknown)} in all) does not belong to a {described}; "
            "weights and config do not belong together"
        )


def _check_tensor(
    source: str, tensor: TensorInfo | None, name: str, shape: tuple[int, ...]
) -> None:
    if tensor is None:
        raise CheckpointError(
            f"tensor '{name}' is missing from '{source}': config.json describes it, no shard "
            "has it; download the checkpoint again, or correct config.json"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor '{tensor.name}' has shape {list(tensor.shape)}, config.json says "
            f"{list(shape)}; weights and config do not belong together"
        )
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{tensor.name}' has dtype {tensor.dtype}, which cannot be converted; "
            "give the checkpoint in float32, bfloat16 or float16"
        )


def _same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold equal numbers; those of unlike shape or dtype never do."""
    if (one.shape, one.dtype) != (other.shape, other.dtype) or one.dtype not in DTYPES:
        return False
    step = max(1, COMPARE_BYTES // max(1, one.row_bytes))
    spans = ((start, min(one.rows, start + step)) for start in range(0, one.rows, step))
    return all(read_rows(one, *span).equal(read_rows(other, *span)) for span in spans)
