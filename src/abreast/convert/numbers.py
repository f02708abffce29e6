"""Tensors as numpy's numbers, and as integers of their bits, to be compared; see refold.py.

Rounding is written down here once more, as the formats define it, not as torch does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from abreast.checkpoint import TensorInfo, read_rows

CHUNK_BYTES = 2 << 20


def wrong(
    tensor: TensorInfo, start: int, values: np.ndarray, slack: np.ndarray | None
) -> np.ndarray:
    """Which of the rows from `start` on are not `values`, rounded once to the tensor's dtype."""
    if tensor.block:
        return _wrong_blocks(tensor, start, values)
    made = _raw(tensor, start, start + len(values))
    if slack is None:
        return made != rounded(values, tensor.dtype)
    low, high = (
        widened(rounded(bound, tensor.dtype), tensor.dtype)
        for bound in (values - slack, values + slack)
    )
    numbers = widened(made, tensor.dtype)
    return ~((low <= numbers) & (numbers <= high))


def in_blocks(
    chunks: Iterable[tuple[np.ndarray, np.ndarray | None]], rows: int
) -> Iterator[tuple[np.ndarray, None]]:
    """The same numbers [rows, columns], so many rows at a time."""
    held: np.ndarray | None = None
    for values, _ in chunks:
        values = values.astype(np.float32)
        held = values if held is None else np.concatenate([held, values])
        while len(held) >= rows:
            yield held[:rows], None
            held = held[rows:]
    if held is not None and len(held):
        yield held, None


def _wrong_blocks(tensor: TensorInfo, start: int, values: np.ndarray) -> np.ndarray:
    """Which numbers of a row of blocks are not what `values` become in float8 (E4M3: a sign, 4 bits
    of exponent and 3 of mantissa), or have another scale than a 448th of their block's largest.
    """
    numbers, scales = tensor.parts
    rows, columns = tensor.block
    across = np.arange(0, values.shape[1], columns)
    scale = np.maximum.reduceat(np.abs(values).max(0), across) / np.float32(448)
    scale[scale == 0] = 1
    wide = np.repeat(scale, columns)[: values.shape[1]]
    parts = values / wide
    step = np.ldexp(np.float32(1), np.maximum(np.frexp(parts)[1] - 1, -6) - 3)
    codes = _raw(numbers, start, start + len(values)).astype(np.int32)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.ldexp(np.where(exponent, 8 + mantissa, mantissa), np.maximum(exponent, 1) - 10)
    made = np.where(codes >> 7, -size, size)
    block = start // rows
    other = read(scales, block, block + 1)[0] != scale
    return (made != np.rint(parts / step) * step) | np.repeat(other, columns)[: values.shape[1]]


def row_spans(first: int, last: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    return ((start, min(last, start + step)) for start in range(first, last, step))


def read(tensor: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
    return widened(_raw(tensor, start, stop), tensor.dtype)


def _raw(tensor: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of a tensor as integers of its size."""
    rows = read_rows(tensor, start, stop)
    raw: np.ndarray = rows.view(torch.uint8).numpy().view(f"u{rows.itemsize}")
    return raw


def widened(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers, in float32 or wider, that integers stand for."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    numbers = raw.view(f"f{raw.itemsize}")
    return numbers.astype(np.float32) if dtype == "F16" else numbers


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers rounded to the nearest of a dtype, in the middle to the even one, as integers."""
    if dtype == "F64":
        return values.astype(np.float64).view(np.uint64)
    bits = values.astype(np.float32).view(np.uint32)
    if dtype == "BF16":
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return bits.view(np.float32).astype(np.float16).view(np.uint16) if dtype == "F16" else bits
