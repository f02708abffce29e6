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
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
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
    source_sha256,
    weight_files,
    weights_hash,
)
from abreast.errors import CheckpointError, first_line
from abreast.families import (
    decoder_name,
    decoder_of,
    num_layers_of,
    with_usual_names,
    wrapped_name,
    wrapper_of,
)
from abreast.plan import Plan

ADAPTER = "adapter_config.json"
MERGE = "merge it into its base model first (merge_and_unload and save_pretrained of peft)"
MAX_SHARD_BYTES = 5_000_000_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_STORED = DTYPES | {"F8_E4M3": torch.float8_e4m3fn}  # which has no meaning without its scales


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. offset and nbytes are bytes in `file`; dtype is safetensors' name.

    parts: equal tensors whose rows it has. [experts, rows, columns] has experts * rows of them.
    block: where there is one, the parts are numbers of few bits and their scales, of which each
    belongs to so many rows and columns, see `read_rows`; offset and nbytes are those it would have.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    parts: tuple[TensorInfo, ...] = ()
    block: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(1, self.rows)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers and config are read, weights are not.

    tensors: name -> TensorInfo, in the order of the shards. wrapper: config.json of the model that
    holds the decoder which config and tensors describe, with the others' tensors beside it, by
    transformers' names; None for a decoder by itself. shards: file names. source and
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
    wrapper: dict[str, Any] | None = None
    others: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for part in (self.tensors, self.others) for t in part.values())

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole content of the config and every shard, see `model_hash`."""
        return model_hash(self._hashed)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the whole content of every shard, see `weights_hash`."""
        return weights_hash(self._hashed)

    @cached_property
    def _hashed(self) -> dict[str, str]:
        names = ("config.json", *self.shards)
        return {name: source_sha256(self.folder / name) for name in names}


def plan_for(checkpoint: Checkpoint, plan: Plan | str) -> Plan:
    """A plan for this model, read where it is text, see `Plan.read`.

    Raises PlanError for a plan of another number of layers, or one made for another model.
    """
    num_layers = num_layers_of(checkpoint.config)
    plan = Plan.read(plan, num_layers) if isinstance(plan, str) else plan
    plan.check_layers(num_layers)
    if plan.sha256 is not None:
        plan.check_model({checkpoint.sha256, checkpoint.weights_sha256}, checkpoint.source)
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
        raise CheckpointError(f"'{model}' is an adapter without its model; {MERGE}")
    config = with_usual_names(read_json(folder / "config.json"))
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
    opened = Checkpoint(folder, config, tensors, shards, str(model), resolved or revision, absent)
    return opened if wrapper_of(config) is None else _unwrapped(opened)


def _unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The decoder within a wrapper as a checkpoint of its own, and the rest beside it."""
    inside: dict[str, TensorInfo] = {}
    others: dict[str, TensorInfo] = {}
    for stored, tensor in checkpoint.tensors.items():
        name = decoder_name(stored)
        part, name = (others, wrapped_name(stored)) if name is None else (inside, name)
        if name in part:
            raise CheckpointError(
                f"'{checkpoint.source}' holds tensor '{stored}' twice, also as "
                f"'{part[name].name}'; nobody can tell which is meant"
            )
        part[name] = tensor
    return replace(
        checkpoint,
        config=decoder_of(checkpoint.config),
        tensors=inside,
        absent=tuple(decoder_name(name) or name for name in checkpoint.absent),
        wrapper=checkpoint.config,
        others=others,
    )


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


def read_rows(tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows start..stop (exclusive) of a tensor as a fresh CPU tensor, [rows, columns] or [rows].

    Quantised ones come back in bfloat16, for every number times its scale.
    fp8 (DeepSeek-V3, arXiv 2412.19437, section 3.3): float8_e4m3fn, a float scale for every block.
    mxfp4 (OCP Microscaling Formats 1.0, section 5.3.3), as gpt-oss has its experts: see `_expert`.
    """
    stop = tensor.rows if stop is None else stop
    if tensor.block and tensor.parts[0].dtype == "U8":
        return torch.cat([_expert(tensor, e)[rows] for e, rows in _within(tensor, start, stop)])
    if tensor.block:
        numbers, scales = tensor.parts
        rows, columns = tensor.block
        first = start // rows
        factors = read_rows(scales, first, -(-stop // rows)).float()
        factors = factors.repeat_interleave(rows, 0)[start - first * rows :][: stop - start]
        values = read_rows(numbers, start, stop).float()
        factors = factors.repeat_interleave(columns, 1)[:, : values.shape[1]]
        return (values * factors).to(torch.bfloat16)
    if tensor.parts:
        size = tensor.parts[0].rows
        pieces = [
            read_rows(tensor.parts[i], max(start - i * size, 0), min(stop - i * size, size))
            for i in range(start // size, -(-stop // size))
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    values = _read_bytes(tensor, start, stop).view(_STORED[tensor.dtype])
    return values.view(stop - start, *tensor.shape[1:][-1:])


def _within(tensor: TensorInfo, start: int, stop: int) -> Iterator[tuple[int, slice]]:
    """The experts that rows start..stop of [experts, rows, columns] are of, and which of each."""
    size = tensor.shape[1]
    for expert in range(start // size, -(-stop // size)):
        yield expert, slice(max(start - expert * size, 0), min(stop - expert * size, size))


@lru_cache(maxsize=1)  # its rows are the file's columns, and a caller reads some after others
def _expert(tensor: TensorInfo, expert: int) -> torch.Tensor:
    """An expert's matrix of an mxfp4 tensor, [columns, rows] of what is stored.

    Numbers [experts, rows, groups, 16]: 2 of 4 bits a byte, the low half first, of sign, exponent
    and mantissa (E2M1). Scales [experts, rows, groups]: exponents of 2, plus 127.
    """
    numbers, scales = tensor.parts
    _, rows, groups, _ = numbers.shape
    count = rows * groups
    pairs = _read_bytes(numbers, expert * count, (expert + 1) * count).view(count, 16).int()
    size = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = size[torch.stack((pairs & 15, pairs >> 4), -1)].view(count, 32)
    start, stop = expert * rows, (expert + 1) * rows
    exponents = _read_bytes(scales, start, stop).view(count, 1).int() - 127
    return torch.ldexp(values, exponents).to(torch.bfloat16).view(rows, -1).T.contiguous()


def _read_bytes(tensor: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """The bytes of rows start..stop of a tensor that lies in one file, whatever they stand for."""
    buffer = torch.empty((stop - start) * tensor.row_bytes, dtype=torch.uint8)
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + start * tensor.row_bytes)
            count = file.readinto(memoryview(buffer.numpy()))  # type: ignore[arg-type]
    except OSError as error:
        raise CheckpointError(f"'{tensor.file}' cannot be read: {error.strerror}") from None
    if count < len(buffer):
        raise CheckpointError(f"'{tensor.file}' ended while it was read; download it again")
    return buffer


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _STORED[self.dtype].itemsize


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
