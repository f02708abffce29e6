"""Checkpoints on disk: find them, read their tensors piece by piece, write new ones atomically.

Tensors are read with plain file reads, never mapped: mapped pages count as resident memory, and a
reader that promises bounded memory must not depend on the kernel giving them back. Pickled weights
are never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abreast.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "abreast.json"
MAX_SHARD_BYTES = 5_000_000_000
HASH_CHUNK = 2 << 20
_MAX_HEADER = 100_000_000  # the limit of the safetensors format itself

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_ITEM_BYTES = {
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
    **{"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8},
}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_NOT_COPIED = {"config.json", MANIFEST, "README.md", "plan.yaml"}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. offset and nbytes are bytes in `file`; dtype is safetensors' name."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first dimension."""
        return math.prod(self.shape[1:]) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers and config are read, weights are not.

    tensors: name -> TensorInfo, in the order of the shards. shards: file names. source and
    revision: as asked for, for the record.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[str, ...]
    source: str
    revision: str | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def resolve(model: str | Path, *, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a model, downloading from the Hugging Face Hub if it is a hub id.

    model: a folder, or ``ORG/NAME``. Returns (folder, revision); the revision of a local folder is
    None. Only safetensors, JSON, tokenizer and text files are fetched; remote code is not.
    Raises CheckpointError when there is no such folder and the Hub has, or gives, no such model.
    """
    folder = Path(os.path.expanduser(model))
    if str(model) and os.path.isdir(folder):
        return folder, None
    if os.path.isfile(folder):
        raise CheckpointError(f"'{model}' is a file; give the folder that holds config.json")
    name = str(model)
    parts = name.split("/")
    if len(parts) > 2 or name.startswith((".", "~", "/")) or not all(parts):
        raise CheckpointError(f"no model at '{model}'; give a folder or a Hugging Face id ORG/NAME")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client raises many kinds; all mean that it is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"no folder '{model}', and the Hugging Face Hub does not give it ({reason}); "
            "check the name, the connection, or HF_TOKEN"
        ) from None
    return path, path.name


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint and check every header: names, shapes, sizes, shard list.

    Raises CheckpointError for a missing or broken config, pickle-only weights, a missing, truncated
    or overlapping shard, shard names that leave the folder, and an index that does not agree with
    the shards.
    """
    folder, found = resolve(model, revision=revision)
    config = read_json(folder / "config.json")
    shards, index = _shard_names(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for tensor in read_header(folder / shard):
            if tensor.name in tensors:
                first = tensors[tensor.name].file.name
                raise CheckpointError(f"tensor '{tensor.name}' is in both {first} and {shard}")
            if index is not None and index.get(tensor.name) != shard:
                raise CheckpointError(
                    f"{shard} holds tensor '{tensor.name}', which {INDEX} does not place there; "
                    "download the checkpoint again"
                )
            tensors[tensor.name] = tensor
    for name in index or ():
        if name not in tensors:
            raise CheckpointError(f"tensor '{name}' is in {INDEX} but in no shard; download again")
    return Checkpoint(folder, config, tensors, shards, str(model), found or revision)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError when it is absent or not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"'{path.parent}' has no {path.name}; give a model folder") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number too long
        reason = getattr(error, "strerror", None) or "not valid JSON"
        raise CheckpointError(f"'{path}' cannot be read: {reason}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"'{path}' is not a JSON object; download it again")
    return data


def _shard_names(folder: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    if (folder / SINGLE).is_file():
        return (SINGLE,), None
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"'{folder / INDEX}' has no weight_map; download it again")
        for name in weight_map.values():
            safe = isinstance(name, str) and name == os.path.basename(name) and "\\" not in name
            if not safe or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{INDEX} names shard {name!r}, which is not a plain .safetensors file name; "
                    "do not trust this checkpoint"
                )
        shards = tuple(sorted(set(weight_map.values())))
        for shard in shards:
            if not (folder / shard).is_file():
                raise CheckpointError(f"shard '{shard}' is missing from '{folder}'; download it")
        return shards, weight_map
    if any(path.suffix in _PICKLES for path in folder.iterdir()):
        raise CheckpointError(
            f"'{folder}' holds pickled weights only, which can run code when opened; "
            "save it as safetensors first (model.save_pretrained does)"
        )
    raise CheckpointError(f"'{folder}' holds no {SINGLE} and no {INDEX}; give a model folder")


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, checked against the file's size, in file order."""
    broken = f"'{path}' is not a whole safetensors file"
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{broken}: it is truncated; download it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{broken}: its header is not JSON; download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{broken}: its header is not a JSON object; download it again")
    start = 8 + length
    tensors = [_tensor(path, n, e, start) for n, e in header.items() if n != "__metadata__"]
    tensors.sort(key=lambda tensor: tensor.offset)
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(f"{broken}: tensor '{tensor.name}' overlaps or leaves a gap")
        end += tensor.nbytes
    if end > size:
        raise CheckpointError(
            f"{broken}: {size} bytes of {end}, it is truncated; download it again"
        )
    if end < size:
        raise CheckpointError(f"{broken}: {size - end} bytes follow the last tensor")
    return tensors


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
        sound = all(isinstance(n, int) and n >= 0 for n in numbers) and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"'{path}': the header entry of tensor '{name}' makes no sense")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(f"'{path}': tensor '{name}' has unknown dtype {dtype}")
    if math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise CheckpointError(f"'{path}': tensor '{name}' of shape {list(shape)} has a wrong size")
    return TensorInfo(name, path, dtype, shape, start + begin, end - begin)


def read_rows(tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows start..stop (exclusive) of a tensor along its first dimension, as a fresh CPU tensor."""
    stop = tensor.shape[0] if stop is None else stop
    buffer = torch.empty((stop - start) * tensor.row_bytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    try:
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset + start * tensor.row_bytes)
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise CheckpointError(
                        f"'{tensor.file}' ended while it was read; download it again"
                    )
                filled += count
    except OSError as error:
        raise CheckpointError(f"'{tensor.file}' cannot be read: {error.strerror}") from None
    return buffer.view(DTYPES[tensor.dtype]).view(stop - start, *tensor.shape[1:])


def sha256_of(path: Path, *, stop: threading.Event | None = None) -> str:
    """Hash of a file. Setting `stop` from another thread ends it early with an empty string."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK):
            if stop is not None and stop.is_set():
                return ""
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


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
        path = folder / name
        header = _header(tensors)
        with path.open("wb", buffering=0) as file, _background(path, file) as put:
            put(memoryview(header))
            for tensor in tensors:
                left = tensor.nbytes
                while left:
                    got, chunk = next(chunks, ("nothing", torch.empty(0)))
                    flat = chunk.contiguous().view(-1).view(torch.uint8)
                    data = memoryview(flat.numpy())  # type: ignore[arg-type]
                    left -= len(data)
                    if got != tensor.name or left < 0:
                        raise CheckpointError(f"writing '{tensor.name}': got a piece of '{got}'")
                    put(data)
            digest = put.digest()
        size = len(header) + sum(t.nbytes for t in tensors)
        written[name] = {"sha256": digest, "bytes": size}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for ts in shards.values() for t in ts)},
            "weight_map": {t.name: name for name, ts in shards.items() for t in ts},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


class _Put:
    """Hands buffers to a thread that writes and one that hashes; at most 4 wait for either."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self._sha = hashlib.sha256()
        self._faults: list[BaseException] = []
        self._lines = [_Line(take, self._faults) for take in (self._write, self._sha.update)]

    def __call__(self, data: memoryview) -> None:
        self._check()
        for line in self._lines:
            line.queue.put(data)

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def digest(self) -> str:
        self.close()
        self._check()
        return self._sha.hexdigest()

    def close(self) -> None:
        for line in self._lines:
            line.close()

    def _check(self) -> None:
        for fault in self._faults:
            if isinstance(fault, OSError):
                raise CheckpointError(f"'{self._path}' cannot be written: {fault.strerror}")
            raise fault


class _Line:
    """A thread that takes buffers from a short queue, which bounds the memory."""

    def __init__(self, take: Callable[[memoryview], object], faults: list[BaseException]) -> None:
        self.queue: queue.Queue[memoryview | None] = queue.Queue(maxsize=4)
        self._take, self._faults = take, faults
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while (data := self.queue.get()) is not None:
            if self._faults:  # go on emptying, or the producer would wait for ever
                continue
            try:
                self._take(data)
            except BaseException as error:
                self._faults.append(error)

    def close(self) -> None:
        if self._thread.is_alive():
            self.queue.put(None)
            self._thread.join()


@contextmanager
def _background(path: Path, file: Any) -> Iterator[_Put]:
    put = _Put(path, file)
    try:
        yield put
    finally:
        put.close()


def companions(folder: Path) -> list[Path]:
    """What travels with the weights: tokenizer, chat templates, generation config, licence.

    Weights of any kind, code, plans, logs, config.json and the model card stay behind.
    """
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in _WEIGHTS | {".py", ".log"}
        and path.name not in _NOT_COPIED
        and not path.name.endswith(".index.json")
    ]
    templates = folder / "additional_chat_templates"
    return files + ([templates] if templates.is_dir() else [])
