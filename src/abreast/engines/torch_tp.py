"""Original and converted checkpoints in the processes of torchrun, each holding a part.

A rank reads its own part of every tensor and builds the family's layers at that width; where ranks
hold parts of one sum they add it up by a plain all-reduce. `unpaired` says how layers that are in
no group are held:

- shard: every layer and every lp and ff group is split over all ranks, heads and intermediate
  values of every member alike: one all-reduce after the attentions, one after the FFNs. The members
  of a cqil group are dealt to the ranks if one number divides the other.
- replicate: single layers are whole on every rank and exchange nothing; the members of every group
  are dealt to the ranks. What runs in order (the attentions of ff) every rank computes.

Members that are dealt run as layers of their own. Their outputs take one all-reduce where FFNs see
their own attention (cqil, arXiv 2404.06709, section 3.1) or none, two where they see a sum over
members. With bypass d > 0 a rank either computes the d attentions before its own as well, or adds
an exchange of all attentions.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abreast.checkpoint import Checkpoint, TensorInfo, as_loaded, open_checkpoint, read_rows
from abreast.convert import stays_apart
from abreast.engines.ranks import (
    Dealt,
    InTurn,
    Link,
    Local,
    ParallelError,
    SplitHead,
    Summed,
    deal,
    meet,
    rank_and_world,
    together,
)
from abreast.families import CONVERTIBLE, Family, head_dim_of, layer_tensors, sizes
from abreast.model import check_device, load, loaded_dtype, named_dtype
from abreast.modeling import CountPrompt, Passes, mix
from abreast.plan import Block, Group, Plan
from abreast.targets import TORCH_TP, Unpaired, is_dealt, recorded_plan, refusals

Spans = list[tuple[int, int]]
Neighbours = Literal["auto", "repeat", "exchange"]
CHUNK = 32 << 20  # bytes of a tensor that are read at once


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@dataclass(frozen=True)
class Layout:
    """How a rank holds a checkpoint. dealt: by the number of its first local layer, every group
    whose members are dealt, with the ranks that have each member's FFN. repeat: whether they have
    the attentions that it reads as well."""

    layers: tuple[Local, ...]
    dealt: Mapping[int, tuple[Group, tuple[tuple[int, ...], ...]]]
    repeat: bool


def load_parallel(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    unpaired: Unpaired = "shard",
    neighbours: Neighbours = "auto",
    link_delay: float = 0.0,
) -> Any:
    """Load an original or converted checkpoint over all processes; returns this one's part.

    Call it in every process that torchrun started. Logits, caches and generation are those of the
    whole model, the same in every process. device: cpu (gloo) or cuda (NCCL, one GPU per process).
    unpaired: how layers in no group are held, see above. neighbours: whether a rank computes the
    attentions of other members that its FFNs read, or receives them; "auto" times both. link_delay:
    seconds that every exchange waits in addition. A single process loads the whole model. Code
    inside checkpoints never runs. Raises ParallelError for a number of processes that cannot share
    the layers and for ranks with different checkpoints, AbreastError as `load`.
    """
    rank, world = rank_and_world()
    checkpoint = open_for(model, world, unpaired)
    if world == 1:
        return load(model, dtype=dtype, device=device)[0]
    family = family_in(checkpoint.config)
    if checkpoint.config["model_type"] == family.model_type and "abreast" not in checkpoint.config:
        checkpoint = as_loaded(checkpoint, family)
    kind = named_dtype(dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    kind = loaded_dtype(checkpoint, "auto") if isinstance(kind, str) else kind
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
        check_device(device)
        torch.cuda.set_device(torch.device(device))
    meet("nccl" if device.startswith("cuda") else "gloo")
    link = Link(link_delay)
    _check_same(checkpoint, device)
    blocks = blocks_of(checkpoint.config)
    repeat = neighbours == "repeat"
    if neighbours == "auto" and any(b.group and b.group.ffn_band for b in blocks):
        repeat = _repeating_pays(family, checkpoint.config, blocks, link, kind, device)
    layout = rank_layout(family, checkpoint.config, rank, world, unpaired, repeat)
    built = _build(checkpoint, family, layout, unpaired, kind, link)
    _fill(built, checkpoint, family, blocks, layout)
    built = built.to(device).eval()
    _connect(built, checkpoint.config, family, layout, link)
    built.link = link
    return built


def family_in(config: Mapping[str, Any]) -> Family:
    """The family of an original's or a conversion's config.json. Raises ParallelError."""
    name = str(config.get("model_type")).removeprefix("abreast_")
    if name not in CONVERTIBLE:
        raise ParallelError(f"a {name} runs on 1 process only: torch_tp does not know its layers")
    return CONVERTIBLE[name]


def open_for(model: str | Path, world: int, unpaired: Unpaired = "shard") -> Checkpoint:
    """The checkpoint, if `world` processes can share its layers. Raises AbreastError."""
    checkpoint = open_checkpoint(model)
    check_degree(checkpoint.config, world, unpaired)
    return checkpoint


def check_degree(config: Mapping[str, Any], world: int, unpaired: Unpaired = "shard") -> None:
    """Raise ParallelError where `world` processes cannot share the layers of a config.json."""
    if world > 1:
        family = family_in(config)
        for reason in refusals(TORCH_TP, config, family, None, world, unpaired):
            raise ParallelError(reason)


def blocks_of(config: Mapping[str, Any]) -> tuple[Block, ...]:
    """What the layers of a checkpoint hold; an original's all stand alone. Raises AbreastError."""
    plan, count = recorded_plan(config), config["num_hidden_layers"]
    blocks = (plan or Plan(num_layers=count)).blocks
    if len(blocks) != count:
        raise ParallelError("config.json does not record its plan; convert the original again")
    return blocks


def rank_layout(
    family: Family,
    config: Mapping[str, Any],
    rank: int,
    world: int,
    unpaired: Unpaired,
    repeat: bool,
) -> Layout:
    """What `rank` of `world` holds; how members are dealt: see `deal`."""
    blocks, costs = blocks_of(config), _costs(family, config)
    fed = {layer: index for index, block in enumerate(blocks) for layer in block.ffns}
    loads = [0] * world
    layers: list[Local] = []
    dealt: dict[int, tuple[Group, tuple[tuple[int, ...], ...]]] = {}
    for index, block in enumerate(blocks):
        group = block.group
        sequential = config.get("abreast_prefill") == "sequential"
        if group is None or not is_dealt(family, group, world, unpaired, sequential):
            parts = (world, rank) if unpaired == "shard" else (1, 0)
            layers.append(Local(index, index, None, True, True, *parts))
            continue
        first = group.layers[0]
        band = 0 if family.parallel or group.shares_ffn_input else group.ffn_band or 0
        if first in block.attentions:
            attention, ffn = (0 if group.is_in_order else costs[0]), costs[1]
            repeated = band if repeat else 0
            owners = deal(len(group.layers), loads, (attention, ffn), repeated)
            dealt[len(layers)] = group, owners
        share = len(owners[0]) if world > len(group.layers) else 1
        own = [member for member, ranks in enumerate(owners) if rank in ranks]
        lowest = max(0, own[0] - (band if repeat else 0))
        for layer in block.attentions:
            member = layer - first
            attends = group.is_in_order or lowest <= member <= own[-1]
            part = owners[own[0]].index(rank)
            layers.append(Local(index, fed[layer], layer, attends, member in own, share, part))
    return Layout(tuple(layers), dealt, repeat)


def _costs(family: Family, config: Mapping[str, Any]) -> tuple[int, int]:
    """How many weights the matrices of a layer's attention and of its FFN have."""
    own, costs = layer_tensors(family, {**dict(family.defaults), **config}), [0, 0]
    for matrix in family.matrices:
        costs[family.is_ffn(matrix.name)] += math.prod(own[f"{matrix.name}.weight"])
    return costs[0], costs[1]


def _repeating_pays(
    family: Family,
    config: Mapping[str, Any],
    blocks: Sequence[Block],
    link: Link,
    dtype: torch.dtype,
    device: str,
) -> bool:
    """Whether the attentions of the neighbours, of which the products with matrices are timed,
    take less time than exchanging all attentions; every rank gets the same answer."""
    furthest = max(block.group.ffn_band or 0 for block in blocks if block.group)
    own = layer_tensors(family, config)
    shapes = [own[f"{m.name}.weight"] for m in family.matrices if not family.is_ffn(m.name)]
    matrices = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    inputs = [torch.zeros(1, shape[1], dtype=dtype, device=device) for shape in shapes]

    def attention() -> None:
        for x, matrix in zip(inputs, matrices, strict=True):
            nn.functional.linear(x, matrix)

    exchanged = torch.zeros(1, config["hidden_size"], dtype=dtype, device=device)
    takes = [_seconds(attention, device) * furthest, _seconds(lambda: link.sum(exchanged), device)]
    slowest = torch.tensor(takes, device=device, dtype=torch.float32)
    with together():
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return bool(slowest[0] < slowest[1])


def _seconds(run: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def _check_same(checkpoint: Checkpoint, device: str) -> None:
    """Raise ParallelError unless all ranks hold the same config, tensors and, as far as a sample of
    every tensor shows, values."""
    digest = hashlib.sha256(repr(sorted(checkpoint.config.items())).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        for start in {0, tensor.rows // 2, max(0, tensor.rows - 1)} if tensor.rows else ():
            row = read_rows(tensor, start, start + 1)
            digest.update(row.flatten()[:512].view(torch.uint8).numpy().tobytes())
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    with together():
        dist.all_gather(every, own)
    hashes = [bytes(one.cpu().tolist()).hex()[:8] for one in every]
    other = next((rank for rank, one in enumerate(hashes) if one != hashes[0]), None)
    if other is not None:
        raise ParallelError(
            f"rank {other} has another checkpoint as '{checkpoint.source}' than rank 0 (hashes "
            f"{hashes[other]} and {hashes[0]}); copy the same one to every machine"
        )


def _build(
    checkpoint: Checkpoint,
    family: Family,
    layout: Layout,
    unpaired: Unpaired,
    dtype: torch.dtype,
    link: Link,
) -> Any:
    """The rank's model, of the right size, with arbitrary weights."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    import abreast.modeling  # noqa: F401  registers the converted architectures

    config = _local_config(checkpoint.config, family, layout, unpaired)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    for local, layer in zip(layout.layers, model.base_model.layers, strict=True):
        for name, _ in list(layer.named_children()):
            ffn = name == family.branches.mlp or family.is_ffn(name)
            if not (local.feeds if ffn else local.attends):
                setattr(layer, name, nn.Identity())
    if unpaired == "shard":
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = embedding if head.weight is embedding.weight else None
        model.set_output_embeddings(SplitHead(head, link, tied))
    return model


def _is_stock(config: Mapping[str, Any]) -> bool:
    """Whether all layers of a conversion are equally wide, so that it is a stock model."""
    return bool(config.get("abreast")) and not config.get("per_layer_config")


def _local_config(
    config: Mapping[str, Any], family: Family, layout: Layout, unpaired: Unpaired
) -> Any:
    """The config of a model with the local layers, each of its own width."""
    from transformers import AutoConfig

    blocks, stored = blocks_of(config), {**dict(family.defaults), **config}
    own = {int(key): entry for key, entry in (stored.pop("per_layer_config", None) or {}).items()}
    whole = {key: stored.get(key) or stored["num_attention_heads"] for key in family.wide}
    base, stored["head_dim"] = whole, head_dim_of(stored)
    if _is_stock(config):
        base = {key: value // len(blocks[0].ffns) for key, value in base.items()}
    share = dist.get_world_size() if unpaired == "shard" else 1
    split = _divided(family, base, share)
    entries: dict[int, dict[str, Any]] = {}
    for index, local in enumerate(layout.layers):
        entry = dict(own.get(local.attention, {}))
        if local.layer is None:
            widths = _divided(family, {k: entry.get(k, whole[k]) for k in base}, local.share)
        else:
            entry |= own.get(local.ffn, {})
            entry = {key: value for key, value in entry.items() if not key.startswith("abreast_")}
            widths = _divided(family, base, local.share)
        widths = {key: width for key, width in widths.items() if width != split[key]}
        entry = {key: value for key, value in entry.items() if key not in base} | widths
        if entry:
            entries[index] = entry
    for key in ("layer_types", "no_rope_layers"):
        if isinstance(stored.get(key), list):
            stored[key] = [stored[key][local.attention] for local in layout.layers]
    stored |= split | {"num_hidden_layers": len(layout.layers)}
    for key in ("model_type", "auto_map", "architectures", "abreast"):
        stored.pop(key, None)
    if unpaired == "replicate":
        stored.pop("abreast_prefill", None)
    if not entries and "abreast_prefill" not in stored:
        stored = {key: value for key, value in stored.items() if not key.startswith("abreast_")}
        return AutoConfig.for_model(family.model_type, **stored)
    digits = len(str(len(layout.layers) - 1))
    stored["per_layer_config"] = {str(i).zfill(digits): entry for i, entry in entries.items()}
    return AutoConfig.for_model(family.converted_type, **stored)


def _divided(family: Family, widths: Mapping[str, int], share: int) -> dict[str, int]:
    """Widths of a part; heads stay whole where a norm needs all of them in one place."""
    whole = ("num_attention_heads", "num_key_value_heads") if family.flat_norms else ()
    return {key: width if key in whole else width // share for key, width in widths.items()}


def _fill(
    model: Any, checkpoint: Checkpoint, family: Family, blocks: Sequence[Block], layout: Layout
) -> None:
    """Read the rank's part of every parameter. Raises ParallelError for tensors that do not fit."""
    prefix, size = family.layer_prefix, sizes({**dict(family.defaults), **checkpoint.config})
    if _is_stock(checkpoint.config):
        size = size | {symbol: size[symbol] // len(blocks[0].ffns) for symbol in "QKF"}
    head = family.head.removesuffix("weight")
    for name, parameter in model.named_parameters():
        local, rest, stored = None, name, name
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            local = layout.layers[int(number)]
            ffn = family.is_ffn(rest.rpartition(".")[0])
            stored = f"{prefix}{local.ffn if ffn else local.attention}.{rest}"
        tensor = checkpoint.tensors.get(stored)
        if tensor is None:
            raise ParallelError(f"'{checkpoint.source}' has no tensor '{stored}'; convert it again")
        spans: Spans = [(0, tensor.rows)]
        columns: Spans | None = None
        if local is not None:
            spans, columns = _part_of(tensor, rest, family, blocks, local, size, parameter.dim())
        elif name.startswith(head) and isinstance(model.get_output_embeddings(), SplitHead):
            spans = [model.get_output_embeddings().span]
        ends = [start + count for start, count in spans]
        count = sum(count for _, count in spans) or parameter.shape[0]
        shape = [count, sum(n for _, n in columns)] if columns else [count, *tensor.shape[1:]]
        if max(ends, default=0) > tensor.rows or math.prod(shape) != parameter.numel():
            raise ParallelError(
                f"tensor '{stored}' has shape {list(tensor.shape)}, which config.json does not "
                "describe; convert the original again"
            )
        value = _read(tensor, spans, columns) if spans else torch.zeros(count)
        parameter.data = value.to(parameter.dtype).view(parameter.shape)
        parameter.requires_grad_(False)


def _part_of(
    tensor: TensorInfo,
    name: str,
    family: Family,
    blocks: Sequence[Block],
    local: Local,
    size: Mapping[str, int],
    dimensions: int,
) -> tuple[Spans, Spans | None]:
    """(first, count) of the rows, and of the columns if not all, of a layer's tensor that a rank
    holds: of its member or of all, and there its share. No rows: all are zero."""
    module, _, kind = name.rpartition(".")
    ffn = family.is_ffn(module)
    block = blocks[local.ffn if ffn else local.attention]
    joined = block.ffns if ffn else block.attentions
    members = range(len(joined)) if local.layer is None else [joined.index(local.layer)]
    share, part = (1, 0) if family.flat_norms and not ffn else (local.share, local.part)
    matrix = next((m for m in family.matrices if m.name == module), None)
    if matrix is None:
        if len(tensor.shape) == 1:
            return [(0, tensor.rows)], None
        rows = tensor.shape[0] // len(joined)  # gains of a member, or of each of its heads
        if dimensions == 1:
            return [(members[0] * rows, 1)], None
        own = max(1, rows // share)
        return [(m * rows + part * own * (rows > 1), own) for m in members], None
    apart = stays_apart(family, matrix, block) and len(joined) > 1

    def share_of(start: int, count: int) -> tuple[int, int]:
        return start + part * (count // share), count // share

    if matrix.join == "columns":
        hidden, width = size["D"], size[matrix.columns]
        every = [(m * hidden, hidden) for m in members] if apart else [(0, hidden)]
        if kind == "bias":  # of a sum, so that one part of one member adds it
            return every if part == 0 and (apart or members[0] == 0) else [], None
        return every, [share_of(m * width, width) for m in ([0] if apart else members)]
    parts = [size[symbol] for symbol in matrix.rows]
    starts = [sum(parts[:index]) for index in range(len(parts))]
    placed, wide = list(zip(starts, parts, strict=True)), len(joined)
    if apart:
        return [share_of(m * sum(parts) + s, n) for m in members for s, n in placed], None
    return [share_of(wide * s + m * n, n) for s, n in placed for m in members], None


def _read(tensor: TensorInfo, spans: Spans, columns: Spans | None) -> Tensor:
    """These rows and columns of a tensor, of which no more than CHUNK bytes are read at once."""
    step = max(1, CHUNK // max(1, tensor.row_bytes))
    pieces = []
    for start, count in spans:
        for first in range(start, start + count, step):
            rows = read_rows(tensor, first, min(first + step, start + count))
            if columns is not None:
                rows = torch.cat([rows[:, at : at + n] for at, n in columns], 1)
            pieces.append(rows)
    return torch.cat(pieces)


def _connect(
    model: Any,
    config: Mapping[str, Any],
    family: Family,
    layout: Layout,
    link: Link,
) -> None:
    """Let the parts of the layers add up over the ranks."""
    layers = model.base_model.layers
    names = family.branches
    sharers: dict[int, Link] = {}
    for share in sorted({local.share for local in layout.layers if local.layer is not None} - {1}):
        for first in range(0, dist.get_world_size(), share):
            ranks = list(range(first, first + share))
            group = dist.new_group(ranks)  # every process takes part in making every group
            if dist.get_rank() in ranks:
                sharers[share] = link.among(group)
    for local, layer in zip(layout.layers, layers, strict=True):
        if local.share == 1:
            continue
        among = link if local.layer is None else sharers[local.share]
        for part in (layer, *getattr(layer, "narrow", ())):
            if local.attends and not family.flat_norms:
                mix(getattr(part, names.attention), Summed, link=among)
            if local.layer is None and any(True for _ in part.get_submodule(names.mlp).children()):
                mix(getattr(part, names.mlp), Summed, link=among)
    kinds = getattr(model.config, "layer_types", None) or [""] * len(layers)
    for first, (group, owners) in layout.dealt.items():
        places = range(first, first + len(group.layers))
        runner = Dealt(
            [layers[i] for i in places],
            [layout.layers[i] for i in places],
            group,
            [ranks[0] for ranks in owners],
            family,
            link,
            layout.repeat,
            [kinds.index(kinds[i]) == i for i in places],
            first,
        )
        for member, i in enumerate(places):
            layers[i].forward = InTurn(runner, member)
    if config.get("abreast_prefill") == "sequential" and layout.dealt:
        mix(model.base_model, Passes, prompts_in_order=True, cache_heads=())
        mix(model, CountPrompt)
