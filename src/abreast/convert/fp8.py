"""Weights in float8 with a scale for every block of 128 x 128: `convert --quantize fp8`.

As the releases of DeepSeek-V3 (arXiv 2412.19437, section 3.3) and Qwen3-FP8 have them, with the
`quantization_config` that transformers and vLLM read. transformers takes the size of a block from
the number of scales when it computes without a GPU, and vLLM joins q, k, v and gate, up: so a
matrix is quantised only if every member's part is whole blocks, and those beside it are, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from abreast.checkpoint import NewTensor, TensorInfo
from abreast.convert.fold import TensorRule
from abreast.convert.rules import FoldError
from abreast.errors import AbreastError
from abreast.families import Family, sizes

BLOCK = 128
KIND = torch.float8_e4m3fn
_LARGEST = torch.finfo(KIND).max


def check_request(quantize: str, form: str, family: Family) -> None:
    """Raise AbreastError unless weights of this family can be written so, in this format."""
    if quantize != "fp8":
        raise AbreastError(f"--quantize {quantize} is not written here, only fp8")
    if form != "auto":
        raise AbreastError(f"--quantize fp8 needs --format auto, not {form}")
    if family.routes:
        raise AbreastError(
            f"--quantize fp8 is not for {family.model_type}: transformers builds the fp8 experts "
            "of all layers alike, and a group has more; leave --quantize out"
        )


def whole_blocks(
    family: Family,
    config: Mapping[str, Any],
    rules: Iterable[TensorRule],
    tensors: Mapping[str, TensorInfo],
) -> tuple[frozenset[str], str]:
    """The names of the tensors that are quantised, and a warning of those that are not, or "".

    Raises FoldError where there are none.
    """
    size, beside = sizes(config), dict[tuple[Any, ...], list[tuple[TensorRule, bool]]]()
    matrices = {matrix.name: matrix for matrix in family.matrices + family.dense}
    odd = ""
    for rule in rules:
        layer, _, name = rule.name.removeprefix(family.layer_prefix).partition(".")
        matrix = matrices.get(name.removesuffix(".weight"))
        if matrix is None or not name.endswith(".weight"):
            continue
        parts = *(size[part] for part in matrix.rows), size[matrix.columns]
        fits = not any(part % BLOCK for part in parts)
        shape = " x ".join(map(str, tensors[rule.members[0]].shape))
        odd = odd or ("" if fits else f"{matrix.name} of layer {layer} is {shape}")
        beside.setdefault((layer, family.is_ffn(matrix.name), matrix.join), []).append((rule, fits))
    fitting = [own for own in beside.values() if all(fits for _, fits in own)]
    names = frozenset(rule.name for own in fitting for rule, _ in own)
    count = sum(map(len, beside.values()))
    if not names:
        raise FoldError(
            f"--quantize fp8: no matrix is whole blocks of {BLOCK} x {BLOCK} with those beside it "
            f"({odd}); leave --quantize out"
        )
    if len(names) == count:
        return names, ""
    left = f"{count - len(names)} of {count} matrices stay as they are: not whole blocks of "
    return names, f"{left}{BLOCK} x {BLOCK}, or beside one that is not ({odd})"


def settings(tensors: Iterable[str], quantised: Iterable[str], head: str) -> dict[str, Any]:
    """quantization_config for a checkpoint with these tensors."""
    ends = ".weight"
    left = {name.removesuffix(ends) for name in {*tensors, head} - {*quantised} if ends in name}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(left),
    }


def stored(new: NewTensor) -> tuple[NewTensor, NewTensor]:
    """The numbers and the scales that a matrix is written as."""
    scales = tuple(-(-size // BLOCK) for size in new.shape)
    return (
        NewTensor(new.name, "F8_E4M3", new.shape),
        NewTensor(f"{new.name}_scale_inv", "F32", scales),
    )


def stream(name: str, chunks: Iterable[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, rows) of a matrix that comes in chunks of rows: its numbers, then its scales."""
    scales = []
    for rows in _blocks(chunks):
        numbers, own = quantise(rows)
        scales.append(own)
        yield name, numbers
    yield f"{name}_scale_inv", torch.cat(scales)


def _blocks(chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same rows, whole blocks of them at a time but for the last."""
    held, count = list[torch.Tensor](), 0
    for chunk in chunks:
        held.append(chunk)
        count += len(chunk)
        if count >= BLOCK:
            rows, whole = torch.cat(held), count // BLOCK * BLOCK
            yield rows[:whole]
            held, count = [rows[whole:]], count - whole
    if count:
        yield torch.cat(held)


def quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [rows, columns] in float8 and float32 scales [rows / 128, columns / 128], rounded up.

    A block's largest number becomes the largest of the format, 448; one of zeros has the scale 1.
    So a number x of a block with the scale s is off by at most |x| / 16 or s / 1024.
    """
    rows, columns = matrix.shape
    whole = pad(matrix.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = whole.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / _LARGEST
    scales = scales.where(scales > 0, 1.0)
    numbers = (blocks / scales[:, None, :, None]).to(KIND).flatten(0, 1).flatten(1)
    return numbers[:rows, :columns], scales


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """A float32 matrix as it is when it has been quantised."""
    return dequantised(*quantise(matrix))


def dequantised(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 numbers that those of float8 stand for, [rows, columns]."""
    rows, columns = numbers.shape
    wide = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return numbers.float() * wide
