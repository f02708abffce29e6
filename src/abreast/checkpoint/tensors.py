"""Safetensors in and out: open a checkpoint, read its tensors piece by piece, write new shards.

Tensors are read with plain file reads, not with safetensors' memory maps: mapped pages count as
resident memory, and a reader that promises bounded memory must not depend on the kernel giving them
back. safetensors checks the headers, but does not tell where the data lies in the file. Shards are
laid out here because huggingface_hub moves large tensors ahead of the others and does not count the
header, while these are written in the order in which they are made. Pickled weights are never
opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from abreast.checkpoint.files import (
    INDEX,
    SINGLE,
    locate,
    model_hash,
    read_json,
    sha256_of,
    weight_files,
)
from abreast.errors import CheckpointError, first_line
from abreast.families import Family, all_tensors, is_tied, num_layers_of
from abreast.plan import Plan

ADAPTER = "adapter_config.json"
_MERGE = "merge it into its base model first (merge_and_unload and save_pretrained of peft)"
MAX_SHARD_BYTES = 5_000_000_000
COMPARE_BYTES = 2 << 20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. offset and nbytes are bytes in `file`; dtype is safetensors' name.

    parts: equal tensors whose rows it has. [experts, rows, columns] has experts * rows of them.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    parts: tuple[TensorInfo, ...] = ()

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(1, self.rows)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers and config are read, weights are not.

    tensors: name -> TensorInfo, in the order of the shards. shards: file names. source and
    revision: as the caller named them, for the record. absent: names that the index lists and no
    shard has. dropped: tensors that `as_loaded` left out. warnings: what it found, one sentence
    each.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[str, ...]
    source: str
    revision: str | None
    absent: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole content of the config and every shard, see `model_hash`."""
        names = ("config.json", *self.shards)
        return model_hash({name: sha256_of(self.folder / name) for name in names})


def plan_for(checkpoint: Checkpoint, plan: Plan | str) -> Plan:
    """A plan for this model, read where it is text, see `Plan.read`.

    Raises PlanError for a plan of another number of layers, or one made for another model.
    """
    num_layers = num_layers_of(checkpoint.config.get("text_config", checkpoint.config))
    plan = Plan.read(plan, num_layers) if isinstance(plan, str) else plan
    plan.check_layers(num_layers)
    if plan.sha256 is not None:
        plan.check_model(checkpoint.sha256, checkpoint.source)
    return plan


def open_checkpoint(
    model: str | Path, *, revision: str | None = None, weights: bool = True
) -> Checkpoint:
    """Open a checkpoint and check every header: names, shapes, sizes, shard list.

    weights: False asks the Hub for the headers of files that are not here, and downloads none; the
    tensors then cannot be read.
    Raises CheckpointError for a missing or broken config, pickle-only weights, a missing, truncated
    or overlapping shard, shard names that leave the folder, and a shard with a tensor that the
    index places elsewhere.
    """
    folder, resolved, far = locate(model, revision=revision, weights=weights)
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"'{model}' is an adapter without its model; {_MERGE}")
    config = read_json(folder / "config.json")
    shards, index = weight_files(folder, {*far})
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        away = shard in far
        header = _header_on_hub(str(model), folder, shard) if away else read_header(folder / shard)
        for tensor in header:
            if tensor.name in tensors:
                first = tensors[tensor.name].file.name
                raise CheckpointError(f"tensor '{tensor.name}' is in both {first} and {shard}")
            if index is not None and index.get(tensor.name) != shard:
                raise CheckpointError(
                    f"{shard} holds tensor '{tensor.name}', which {INDEX} does not place there; "
                    "download the checkpoint again"
                )
            tensors[tensor.name] = tensor
    absent = tuple(name for name in index or () if name not in tensors)
    return Checkpoint(folder, config, tensors, shards, str(model), resolved or revision, absent)


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, checked against the file's size, in file order."""
    try:
        with safe_open(path, "np"):  # checks the header; no tensor is touched
            pass
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"'{path}' is not a whole safetensors file ({first_line(error)}); download it again"
        ) from None
    tensors = []
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors.append(
                TensorInfo(name, path, entry["dtype"], shape, start + begin, end - begin)
            )
    return sorted(tensors, key=lambda tensor: tensor.offset)


def _header_on_hub(name: str, folder: Path, shard: str) -> list[TensorInfo]:
    """As `read_header`, of a file that only the Hub has, by ranges; offsets are in its data."""
    from huggingface_hub import HfApi

    try:
        header = HfApi().parse_safetensors_file_metadata(name, shard, revision=folder.name)
    except Exception as error:  # of many kinds
        raise CheckpointError(
            f"the Hub does not give the header of {shard} in '{name}' ({first_line(error)})"
        ) from None
    tensors = [
        TensorInfo(n, folder / shard, t.dtype, tuple(t.shape), begin, end - begin)
        for n, t in header.tensors.items()
        for begin, end in (t.data_offsets,)
    ]
    return sorted(tensors, key=lambda tensor: tensor.offset)


def as_loaded(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint as transformers loads it: config complete, tensors by the model's own names.

    Names may lack the prefix of the base model, or have it twice. Where config.json ties the head
    to the embedding, a head of the same values is dropped, one of others unties them, and one
    without an embedding is both (`tie_weights` in transformers/modeling_utils.py). Whatever else
    config.json does not describe, or the shards lack, raises CheckpointError with its name, and so
    does an adapter, which transformers would add to the weights.
    """
    source, tensors = checkpoint.source, dict[str, TensorInfo]()
    if (checkpoint.folder / ADAPTER).is_file():
        raise CheckpointError(
            f"'{source}' holds an adapter beside its weights ({ADAPTER}), which transformers adds "
            f"to them; {_MERGE}, or move it away"
        )
    config = {**dict(family.defaults), **checkpoint.config}
    if num_layers_of(config) > len(checkpoint.tensors):  # also spares us a list of absurd length
        raise CheckpointError(
            f"config.json says {num_layers_of(config)} layers, '{source}' holds only "
            f"{len(checkpoint.tensors)} tensors; weights and config do not belong together"
        )
    for name in checkpoint.absent:  # old versions of transformers list the heads of tied models
        if not ((is_tied(config) and name == family.head) or name.endswith(family.ignore)):
            raise CheckpointError(
                f"tensor '{name}' is in {INDEX} but in no shard of '{source}'; download it again"
            )
    known = all_tensors(family, {**config, "tie_word_embeddings": False})
    prefix = family.layer_prefix.split(".")[0] + "."
    for stored, tensor in checkpoint.tensors.items():
        name = stored
        for pattern, own in family.renames:
            name = re.sub(pattern, own, name)
        short = name.removeprefix(prefix)
        full = short if short in known else prefix + name if prefix + name in known else name
        if re.search(r"\.experts\.\d+\.", name):  # of one expert, see `_packed`
            full = prefix + short.removeprefix(prefix)
        if full in tensors:
            raise CheckpointError(
                f"'{source}' holds tensor '{full}' twice, also as '{tensors[full].name}'; "
                "nobody can tell which is meant"
            )
        tensors[full] = tensor
    dropped = {name for name in tensors if name.endswith(family.ignore)}
    tensors = _packed(source, tensors, known)
    warnings = []
    if is_tied(config) and (head := tensors.get(family.head)) is not None:
        if family.embedding not in tensors:
            tensors[family.embedding] = tensors.pop(family.head)
        elif not all(tensors[n].file.is_file() for n in (family.head, family.embedding)):
            warnings.append(
                f"config.json ties '{head.name}' to the embedding; whether it holds other values "
                "is seen only when it is downloaded"
            )
            dropped.add(family.head)
        elif _same_values(head, tensors[family.embedding]):
            dropped.add(family.head)
        else:
            config["tie_word_embeddings"] = False
            warnings.append(
                f"config.json ties '{head.name}' to the embedding, but it holds other values: it "
                "stays a head of its own, as in transformers"
            )
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    described = f"{family.model_type} of {num_layers_of(config)} layers"
    _check_tensors(source, tensors, all_tensors(family, config), described)
    return replace(
        checkpoint,
        config=config,
        tensors=tensors,
        dropped=tuple(sorted(dropped)),
        warnings=tuple(warnings),
    )


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


def read_rows(tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows start..stop (exclusive) of a tensor as a fresh CPU tensor, [rows, columns] or [rows]."""
    stop = tensor.rows if stop is None else stop
    if tensor.parts:
        size = tensor.parts[0].rows
        spans = [
            (part, max(start - index * size, 0), min(stop - index * size, size))
            for index, part in enumerate(tensor.parts)
            if index * size < stop and start < (index + 1) * size
        ]
        return torch.cat([read_rows(*span) for span in spans])
    buffer = torch.empty((stop - start) * tensor.row_bytes, dtype=torch.uint8)
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + start * tensor.row_bytes)
            count = file.readinto(memoryview(buffer.numpy()))  # type: ignore[arg-type]
    except OSError as error:
        raise CheckpointError(f"'{tensor.file}' cannot be read: {error.strerror}") from None
    if count < len(buffer):
        raise CheckpointError(f"'{tensor.file}' ended while it was read; download it again")
    return buffer.view(DTYPES[tensor.dtype]).view(stop - start, *tensor.shape[1:][-1:])


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def lay_out(
    tensors: Iterable[NewTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[NewTensor]]:
    """Distribute tensors over shards of at most max_shard_bytes, in order: file name -> tensors.

    A tensor that is larger than a shard gets one to itself.
    """
    shards: list[list[NewTensor]] = [[]]
    room = max_shard_bytes - _header_room([])
    for tensor in tensors:
        need = tensor.nbytes + _header_room([tensor])
        if shards[-1] and need > room:
            shards.append([])
            room = max_shard_bytes - _header_room([])
        shards[-1].append(tensor)
        room -= need
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    total = len(shards)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def _header_room(tensors: list[NewTensor]) -> int:
    # Upper bound: offsets take at most 20 digits each.
    return 128 + sum(len(t.name) + 12 * len(t.shape) + 120 for t in tensors)


def _header(tensors: list[NewTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_shards(
    folder: Path,
    shards: dict[str, list[NewTensor]],
    chunks: Iterator[tuple[str, torch.Tensor]],
) -> dict[str, dict[str, Any]]:
    """Write the shards from a stream of (tensor name, chunk) in exactly the order laid out.

    Hashing and writing run in a thread of their own, a few chunks behind the producer. Returns
    file name -> {"sha256", "bytes"} and writes the index if there are several shards. Raises
    CheckpointError when the disk is full or a stream does not fit the layout.
    """
    written: dict[str, dict[str, Any]] = {}
    for name, tensors in shards.items():
        header = _header(tensors)
        with _HashingWriter(folder / name) as file:
            file.write(memoryview(header))
            for tensor in tensors:
                left = tensor.nbytes
                while left:
                    owner, chunk = next(chunks, ("nothing", torch.empty(0)))
                    flat = chunk.contiguous().view(-1).view(torch.uint8)
                    data = memoryview(flat.numpy())  # type: ignore[arg-type]
                    left -= len(data)
                    if owner != tensor.name or left < 0:
                        raise CheckpointError(f"writing '{tensor.name}': got a piece of '{owner}'")
                    file.write(data)
            digest = file.digest()
        size = len(header) + sum(t.nbytes for t in tensors)
        written[name] = {"sha256": digest, "bytes": size}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for ts in shards.values() for t in ts)},
            "weight_map": {t.name: name for name, ts in shards.items() for t in ts},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


class _HashingWriter:
    """Writes buffers to a file and hashes them, each in a thread of its own.

    At most 4 buffers wait for either thread, which bounds the memory.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("wb", buffering=0)
        self._sha = hashlib.sha256()
        self._threads = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> _HashingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        self._file.close()

    def write(self, data: memoryview) -> None:
        self._wait(until=6)
        tasks = (self._write, self._sha.update)
        self._waiting += [t.submit(f, data) for t, f in zip(self._threads, tasks, strict=True)]

    def digest(self) -> str:
        self._wait(until=0)
        return self._sha.hexdigest()

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def _wait(self, until: int) -> None:
        try:
            while len(self._waiting) > until:
                self._waiting.popleft().result()
        except OSError as error:
            raise CheckpointError(f"'{self._path}' cannot be written: {error.strerror}") from None
