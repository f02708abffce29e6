"""A LoRA adapter of the original, folded into the matrices of its conversion.

An adapter adds s B A to a matrix (LoRA, arXiv 2106.09685, section 4.1). What read xhat * g + beta
reads xhat in the conversion, so A becomes A diag(g), and s B A beta a bias of B. Where members
stand one below the other, their A are stacked and their B lie in blocks; where they stand side by
side, it is the other way round. Either is the same sum, in every wiring.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from abreast.checkpoint import (
    ADAPTER,
    DTYPES,
    MAX_SHARD_BYTES,
    Checkpoint,
    Manifest,
    check_free,
    damaged,
    open_checkpoint,
    publish,
    read_header,
    read_json,
    read_manifest,
    read_rows,
)
from abreast.convert.fold import TensorRule, pad
from abreast.convert.rewrite import Rewrite, prepare
from abreast.errors import CheckpointError
from abreast.families import outer_tensors
from abreast.targets import format_of

WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(
    r"base_model\.model\.(.+?)\."
    r"(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|base_layer\.weight|weight|bias)"
)
# What is read here of an adapter's config, or says nothing about what the adapter computes.
_UNDERSTOOD = (
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config "
    "eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config "
    "megatron_core modules_to_save peft_type peft_version qalora_group_size r rank_pattern "
    "revision runtime_config target_modules task_type use_rslora"
)
_STARTS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # that keep the model's weights
_PAIR, _EMBEDDING_PAIR = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_embedding_A", "lora_embedding_B"),
)


@dataclass(frozen=True)
class _Low:
    """What an adapter adds to a matrix [rows, columns]: up @ down, and to its output: bias.

    down: A, [rank, columns]. up: s B, [rows, rank]. bias: [rows]. All in float32 or wider.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor


def convert_adapter(
    adapter: str | Path,
    converted: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Fold peft's LoRA adapter of an original into the new folder `out`, for its conversion.

    adapter: a folder with adapter_config.json and adapter_model.safetensors; pickles are not read.
    converted: the conversion, a folder or Hugging Face id. base, revision: the original, whose
    gains the conversion has folded; None for the one that the conversion names.

    Returns plan, modules (how many), rank (the largest), dtype, bytes and warnings. Exact in every
    wiring, but for one rounding to the adapter's dtype. Raises CheckpointError, before anything is
    written, for what A and B cannot express and for files that do not belong together.
    """
    folder, target = Path(adapter), Path(out)
    if not dry_run:
        check_free(target)
    settings, parts = _settings(folder), _read(folder)
    made = open_checkpoint(converted)
    if made.wrapper is not None:
        raise CheckpointError(
            f"'{converted}' is a decoder within a {made.config['within']}, whose adapters are not "
            "converted; merge the adapter into the original and convert that"
        )
    manifest = read_manifest(made.folder)
    job = _job(made, manifest, _original(manifest, base, revision))
    low = {
        module: _low(module, kinds, settings, job)
        for module, kinds in parts.items()
        if any(kind.startswith("lora_") for kind in kinds)
    }
    folded = dict(_folded(job, low))
    embedded = {module for module, kinds in parts.items() if _EMBEDDING_PAIR[0] in kinds}
    biased = any(bool(one.bias.any()) for one in folded.values())
    divided = format_of(made.config) != "auto" or made.config.get("abreast_prefill") == "sequential"
    if biased and (embedded or divided):
        raise CheckpointError(
            "the adapter adds biases (lora_bias, or what a LayerNorm's bias becomes), which go "
            "with neither an adapted embedding, sequential prefill nor a --format"
        )
    whole = dict(_whole(parts, job))
    tensors = dict(whole)
    for module, one in folded.items():
        down, up = _EMBEDDING_PAIR if module in embedded else _PAIR
        tensors |= {f"{module}.{down}": one.down, f"{module}.{up}": one.up}
        tensors |= {f"{module}.lora_B.bias": one.bias} if biased else {}
    dtype = reduce(torch.promote_types, (t.dtype for p in parts.values() for t in p.values()))
    tensors = {f"base_model.model.{n}": t.to(dtype).contiguous() for n, t in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"tensor '{name}' would hold NaN or Inf; the adapter is damaged")
    ranks = {module: one.down.shape[0] for module, one in folded.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if not dry_run:
        with publish(target, needed_bytes=size) as staging:
            save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
            named = {name.split(".")[-2] for name in whole if "base_layer" not in name}
            config = {
                "base_model_name_or_path": str(converted),
                "inference_mode": True,
                "lora_bias": biased,
                "modules_to_save": sorted(named),
                "peft_type": "LORA",
                "task_type": settings.get("task_type"),
                **_ranks(ranks, job),
            }
            text = json.dumps(config, indent=2, sort_keys=True)
            (staging / ADAPTER).write_text(text + "\n", encoding="utf-8")
    return {
        "plan": manifest.plan.shorthand,
        "modules": len(folded),
        "rank": max(ranks.values(), default=0),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": size,
        "warnings": list(_warnings(settings, manifest)),
    }


def _settings(folder: Path) -> dict[str, Any]:
    """An adapter's config. Raises CheckpointError for one that asks for more than A and B."""
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"'{folder}' has no {WEIGHTS}; give the folder of a LoRA adapter, saved by peft as "
            "safetensors (pickles such as adapter_model.bin are not read)"
        )
    settings = read_json(folder / ADAPTER)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"'{folder}' is a {settings.get('peft_type')} adapter, not LORA")
    for key, value in settings.items():
        if key not in _UNDERSTOOD.split() and value:
            raise CheckpointError(
                f"{ADAPTER} sets {key}, which is more than LoRA's two matrices and cannot be "
                "folded; merge the adapter into the original and convert that"
            )
    if settings.get("bias", "none") != "none":
        raise CheckpointError(
            f"{ADAPTER}: the adapter replaces biases of the original (bias), of which a group may "
            "have only the sum; merge it into the original and convert that"
        )
    start = settings.get("init_lora_weights")
    if start not in _STARTS:
        raise CheckpointError(
            f"{ADAPTER}: init_lora_weights {start!r} means that the adapter was trained on other "
            "weights than the original's; save it with path_initial_model_for_weight_conversion"
        )
    return settings


def _read(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of an adapter: module -> kind -> tensor."""
    parts = dict[str, dict[str, torch.Tensor]]()
    for tensor in read_header(folder / WEIGHTS):
        match = _TENSOR.fullmatch(tensor.name)
        if match is None or tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor '{tensor.name}' ({tensor.dtype}) is none of a LoRA adapter's; "
                "merge the adapter into the original and convert that"
            )
        parts.setdefault(match[1], {})[match[2]] = read_rows(tensor)
    if not parts:
        raise CheckpointError(f"'{folder / WEIGHTS}' holds no tensors; save the adapter again")
    return parts


def _original(manifest: Manifest, base: str | Path | None, revision: str | None) -> Checkpoint:
    """The model that a conversion was made from, by name and hashes."""
    name = base if base is not None else manifest.source or ""
    try:
        source = open_checkpoint(name, revision=manifest.revision if base is None else revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"the gains of the original's norms are needed, but {error}; name it with --base"
        ) from None
    healed = manifest.healed or {}
    if healed and next(damaged(source.folder, manifest.healed_files), None) is None:
        return source
    for fault in damaged(source.folder, manifest.source_files):
        raise CheckpointError(
            f"the conversion was not made from '{name}': {fault}; name its original with --base"
        )
    if (healed.get("recipe") or {}).get("train", "lora") != "lora":
        raise CheckpointError(
            "healing has trained the norms of this conversion, too; name the healed weights "
            "(heal --keep-weights) with --base"
        )
    return source


def _job(made: Checkpoint, manifest: Manifest, source: Checkpoint) -> Rewrite:
    """The conversion as it was made. Raises CheckpointError where `made` is another one's."""
    form = format_of(made.config)
    if form == "mlx":
        raise CheckpointError(
            f"'{made.source}' is in the format mlx, whose layers are the original's; an adapter of "
            "the original fits them as it is"
        )
    if form == "openelm":
        raise CheckpointError(f"'{made.source}' is in the format openelm, which peft does not load")
    job = prepare(source, manifest.plan, True, None, "grouped", form, MAX_SHARD_BYTES)
    for name, new in job.tensors.items():
        if name not in made.tensors or made.tensors[name].shape != new.shape:
            raise CheckpointError(
                f"tensor '{name}' of '{made.source}' is not what its plan makes of the original; "
                "convert again"
            )
    return job


def _low(
    module: str, kinds: Mapping[str, torch.Tensor], settings: Mapping[str, Any], job: Rewrite
) -> _Low:
    """One module's A and B, checked, with the scaling in B (peft's LoraLayer.update_layer)."""
    wrong = f"the adapter's tensors for '{module}'"
    tensors = job.checkpoint.tensors
    head = module == job.family.head.removesuffix(".weight")
    weight = tensors.get(f"{module}.weight") or (tensors[job.family.embedding] if head else None)
    if weight is None or len(weight.shape) != 2:
        raise CheckpointError(f"{wrong} belong to no matrix of the original; is it the right one?")
    embedding = "lora_embedding_A" in kinds
    rows, columns = weight.shape[::-1] if embedding else weight.shape
    rank, alpha = (_number(settings, key, module) for key in ("r", "lora_alpha"))
    down, up = (kinds.get(name) for name in (_EMBEDDING_PAIR if embedding else _PAIR))
    if down is None or up is None or not rank >= 1:
        raise CheckpointError(f"{wrong} are incomplete; save the adapter again")
    if tuple(down.shape) != (rank, columns) or tuple(up.shape) != (rows, rank):
        raise CheckpointError(
            f"{wrong} have shapes {list(down.shape)} and {list(up.shape)}, not "
            f"[{rank:g}, {columns}] and [{rows}, {rank:g}]; they do not belong to this original"
        )
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    wide = torch.promote_types(torch.promote_types(down.dtype, up.dtype), torch.float32)
    bias = kinds.get("lora_B.bias", torch.zeros(rows))
    return _Low(down.to(wide), up.to(wide) * scale, bias.to(wide) * scale)


def _number(settings: Mapping[str, Any], key: str, module: str) -> float:
    """Rank (r) or lora_alpha of a module, as peft looks it up (get_pattern_key)."""
    patterns = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]
    try:
        for pattern, value in (settings.get(patterns) or {}).items():
            # a stranger's expression: short, and with few repetitions, none nested, it ends soon
            repeated = re.findall(r"[*+?{]", pattern)
            if len(pattern) > 200 or len(repeated) > 3 or re.search(r"\)[*+?{]", pattern):
                raise ValueError("intricate")
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(settings.get(key, 8))
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError, re.error):
        raise CheckpointError(
            f"{ADAPTER}: {key} or {patterns} makes no sense or is too intricate; write numbers and "
            "modules' names"
        ) from None


def _whole(
    parts: Mapping[str, Mapping[str, torch.Tensor]], job: Rewrite
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that replace the original's: those of embedding, final norm and head."""
    outer = outer_tensors(job.family, job.checkpoint.config)
    outer.setdefault(job.family.head, outer[job.family.embedding])
    for module, kinds in parts.items():
        for kind, tensor in kinds.items():
            if kind.startswith("lora_"):
                continue
            name = f"{module}.{kind.removeprefix('base_layer.')}"
            if name not in outer:
                raise CheckpointError(
                    f"the adapter replaces '{name}' (modules_to_save){_group(module, job)}; only "
                    "embedding, final norm and head may be; merge it into the original first"
                )
            if tensor.shape != outer[name]:
                raise CheckpointError(
                    f"the adapter's '{name}' has shape {list(tensor.shape)}, the original's "
                    f"{list(outer[name])}; a vocabulary cannot grow with an adapter"
                )
            yield f"{module}.{kind}", tensor


def _group(module: str, job: Rewrite) -> str:
    """Where a module's layer is part of a group: in which."""
    number = module.removeprefix(job.family.layer_prefix).partition(".")[0]
    groups = (group for group in job.plan.groups if number in map(str, group.layers))
    return next((f", of which group {group.shorthand} has folded a part" for group in groups), "")


def _folded(job: Rewrite, low: Mapping[str, _Low]) -> Iterator[tuple[str, _Low]]:
    """What the conversion's modules get."""
    rules = {rule.name: rule for rule in job.rules}
    for name, rule in rules.items():
        members = [low.get(member.removesuffix(".weight")) for member in rule.members]
        if any(members):
            module = name.removesuffix(".weight")
            yield module, _joined(job, rule, rules.get(f"{module}.bias"), members)
    head = job.family.head.removesuffix(".weight")
    if head in low and job.family.head not in rules:  # tied
        yield head, low[head]


def _joined(
    job: Rewrite, rule: TensorRule, bias: TensorRule | None, members: list[_Low | None]
) -> _Low:
    """The changes of all members as one of the matrix that a rule makes of theirs."""
    tensors, every = job.checkpoint.tensors, list[_Low]()
    for index, (name, low) in enumerate(zip(rule.members, members, strict=True)):
        if low is None:
            rows, columns = tensors[name].shape
            low = _Low(torch.zeros(0, columns), torch.zeros(rows, 0), torch.zeros(rows))
        down, added = low.down, low.bias
        if bias is not None and bias.shifts:
            added = added + low.up @ (down @ read_rows(tensors[bias.shifts[index]]).to(down.dtype))
        if rule.gains:
            down = down * (read_rows(tensors[rule.gains[index]]).to(down.dtype) + rule.gain_offset)
        every.append(_Low(down, low.up, added))
    downs, ups, biases = ([getattr(low, name) for low in every] for name in ("down", "up", "bias"))
    if rule.operation == "columns":
        down, up, added = torch.block_diag(*downs), torch.cat(ups, 1), torch.stack(biases).sum(0)
    else:
        numbers = torch.arange(sum(map(len, biases))).view(len(every), -1)
        split = numbers.split(rule.parts or numbers.shape[1], 1)
        order = torch.cat([part.flatten() for part in split])
        down, up, added = torch.cat(downs), torch.block_diag(*ups)[order], torch.cat(biases)[order]
    if rule.padding is not None and rule.padding.axis == 0:
        up = torch.cat(list(pad([up], rule.padding)))
    elif rule.padding is not None:
        down = torch.cat(list(pad([down], rule.padding)))
    return _Low(down, up, added)


def _ranks(ranks: Mapping[str, int], job: Rewrite) -> dict[str, Any]:
    """What peft's config says of the modules: short names, unless some so called have no adapter.

    alpha is the rank everywhere, since B has the scaling.
    """
    names = [n.removesuffix(".weight") for n, new in job.tensors.items() if len(new.shape) == 2]
    short = sorted({module.rpartition(".")[2] for module in ranks})
    meant = {name for name in names if name.rpartition(".")[2] in short}
    most = max(ranks.values(), default=8)
    other = {module: rank for module, rank in ranks.items() if rank != most}
    return {
        "target_modules": short if meant <= ranks.keys() else sorted(ranks),
        "r": most,
        "rank_pattern": other,
        "lora_alpha": most,
        "alpha_pattern": other,
    }


def _warnings(settings: Mapping[str, Any], manifest: Manifest) -> Iterator[str]:
    trained, source = settings.get("base_model_name_or_path"), manifest.source
    if trained and source and Path(str(trained)).name.lower() != Path(source).name.lower():
        yield (
            f"the adapter was trained on '{trained}', the conversion was made from '{source}'; "
            "their shapes agree, but if they are not the same model, the adapter will not do well"
        )
