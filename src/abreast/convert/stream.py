"""The numbers of a conversion, some rows of a tensor at a time, by the rules of fold.py."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from abreast.checkpoint import DTYPES, Checkpoint, NewTensor, TensorInfo, read_rows
from abreast.convert import fp8
from abreast.convert.fold import (
    TensorRule,
    fold_gain,
    fold_shift,
    join_columns,
    join_rows,
    pad,
    sum_biases,
)
from abreast.errors import CheckpointError

CHUNK_BYTES = 2 << 20  # fits the cache; 16 MB was slower and took 5 times the memory
_BITS = {  # integer type of the same size, mask without the sign, pattern of infinity
    torch.float64: (torch.int64, np.int64(0x7FFF_FFFF_FFFF_FFFF), 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, np.int32(0x7FFF_FFFF), 0x7F80_0000),
    torch.bfloat16: (torch.int16, np.int16(0x7FFF), 0x7F80),
    torch.float16: (torch.int16, np.int16(0x7FFF), 0x7C00),
}


def stream(
    rules: Iterable[TensorRule],
    checkpoint: Checkpoint,
    tensors: Mapping[str, NewTensor],
    quantised: Collection[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, rows) of what the rules make of a checkpoint's tensors, in the dtypes of `tensors`.

    quantised: of these the numbers follow in float8, and then their scales. Raises CheckpointError
    for numbers that are not finite, or do not fit the dtype.
    """
    for rule in rules:
        chunks = _finite(rule, checkpoint, tensors[rule.name])
        if rule.name in quantised:
            yield from fp8.stream(rule.name, chunks)
        else:
            yield from ((rule.name, chunk) for chunk in chunks)


def _finite(rule: TensorRule, checkpoint: Checkpoint, new: NewTensor) -> Iterator[torch.Tensor]:
    gains = [_gain(checkpoint.tensors[name], rule) for name in rule.gains]
    chunks = _chunks(rule, checkpoint, gains, new)
    for chunk in pad(chunks, rule.padding) if rule.padding else chunks:
        cast = chunk.to(DTYPES[new.dtype])
        if not _is_finite(cast):
            _refuse_not_finite(rule, checkpoint, cast.dtype)
        yield cast


def _gain(tensor: TensorInfo, rule: TensorRule) -> torch.Tensor:
    gain = read_rows(tensor)
    if not rule.gain_offset:
        return gain
    return gain.to(torch.promote_types(gain.dtype, torch.float32)) + rule.gain_offset


def _chunks(
    rule: TensorRule, checkpoint: Checkpoint, gains: list[torch.Tensor], new: NewTensor
) -> Iterator[torch.Tensor]:
    dtype = DTYPES[new.dtype]
    sources = [checkpoint.tensors[name] for name in rule.members]
    if rule.operation in ("copy", "rows"):
        for index, start, stop in _row_spans(rule, sources):
            rows = read_rows(sources[index], start, stop)
            if rule.transposed:
                places = torch.arange(start, stop) % len(gains[index])
                yield fold_gain(rows, gains[index][places, None], dtype)
                continue
            yield fold_gain(rows, gains[index], dtype) if gains else rows
    elif rule.operation == "columns":
        for start, stop in _spans(sources[0].shape[0], sum(s.row_bytes for s in sources)):
            yield join_columns([read_rows(source, start, stop) for source in sources])
    elif rule.operation == "sum":
        yield sum_biases([read_rows(source) for source in sources])
    elif rule.operation == "shift":
        for index, (shift, weight) in enumerate(zip(rule.shifts, rule.weights, strict=True)):
            matrix, beta = checkpoint.tensors[weight], read_rows(checkpoint.tensors[shift])
            bias = read_rows(sources[index]) if sources else torch.zeros(matrix.shape[0])
            for start, stop in _spans(matrix.shape[0], matrix.row_bytes):
                yield fold_shift(read_rows(matrix, start, stop), beta, bias[start:stop])
    elif rule.operation == "heads":
        yield join_rows([read_rows(source).expand(rule.heads, -1) for source in sources])
    else:
        yield torch.full(new.shape, rule.fill)


def _row_spans(rule: TensorRule, sources: list[TensorInfo]) -> Iterator[tuple[int, int, int]]:
    """(member, start, stop) of every chunk of stacked rows, part by part if there are parts."""
    first = 0
    for part in rule.parts or (sources[0].rows,):
        for index, source in enumerate(sources):
            for start, stop in _spans(part, source.row_bytes):
                yield index, first + start, first + stop
        first += part


def _spans(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _is_finite(tensor: torch.Tensor) -> bool:
    # NaN and Inf are the bit patterns whose exponent is all ones, the largest there are but for the
    # sign. Looking for them as integers is 10 times faster than torch.isfinite.
    signed, magnitude, infinite = _BITS[tensor.dtype]
    bits: np.ndarray[Any, Any] = tensor.view(signed).numpy()
    return bits.size == 0 or int((bits & magnitude).max()) < infinite


def _refuse_not_finite(rule: TensorRule, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    for name in rule.gains + rule.shifts + rule.weights + rule.members:
        source = checkpoint.tensors[name]
        for start, stop in _spans(source.rows, source.row_bytes):
            if not read_rows(source, start, stop).isfinite().all():
                raise CheckpointError(
                    f"tensor '{source.name}' holds NaN or Inf; the checkpoint is damaged"
                )
    name = str(dtype).removeprefix("torch.")
    raise CheckpointError(
        f"tensor '{rule.name}' exceeds the range of {name}; convert with --dtype bfloat16"
    )
