"""The tensors of a conversion, made once more from those of its original, to be compared.

From the mathematics alone and in numpy: nothing here is shared with fold.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abreast.checkpoint import DTYPES, Checkpoint, TensorInfo, read_json
from abreast.convert import fp8
from abreast.convert.numbers import in_blocks, read, row_spans, wrong
from abreast.families import (
    FORMATS,
    Family,
    Stack,
    as_ours,
    decoder_name,
    head_dim_of,
    layer_configs,
    name_in,
    sizes,
    wrapped_name,
)
from abreast.plan import Block, Plan
from abreast.targets import format_of


def main_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a conversion stores its weights."""
    name = str(read_json(folder / "config.json").get("dtype", "float32"))
    dtype = getattr(torch, name, torch.float32)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


@dataclass(frozen=True)
class Fold:
    """What one tensor of a conversion must be. rows: its numbers, some rows at a time, before they
    are rounded to its dtype, and by how much each may be off, None where that is nothing.
    dtype: safetensors' name, unless the conversion casts.
    """

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[], Iterator[tuple[np.ndarray, np.ndarray | None]]]


@dataclass(frozen=True)
class Refold:
    """The tensors of a conversion, made once more from those of its original.

    With an RMSNorm N(x) = xhat * g, W N(x) = (W diag(g)) xhat, and with a LayerNorm also + W beta.
    Members that read one xhat have their rows one below the other, member after member; those
    whose outputs add up side by side, or, where something comes before the sum, below each other.
    """

    made: Checkpoint
    source: Checkpoint
    family: Family
    plan: Plan

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The layers that the conversion's tensors belong to."""
        form = format_of(self.made.config)
        joins = form not in FORMATS or FORMATS[form].joins
        return self.family.blocks_of(self.plan if joins else self.plan.ungrouped)

    def misfits(self) -> Iterator[str]:
        """Tensors that are missing, left over, misshapen or of another dtype."""
        expected, made = dict(self._written()), self.made.tensors
        for name in sorted(expected.keys() - made.keys()):
            yield f"tensor '{name}' is missing"
        for name in sorted(made.keys() - expected.keys()):
            yield f"tensor '{name}' is none of the original's"
        main = main_dtype(self.made.folder)
        for name in sorted(expected.keys() & made.keys()):
            tensor, fold = made[name], expected[name]
            if tensor.shape != fold.shape:
                yield f"tensor '{name}' has shape {list(tensor.shape)}, not {list(fold.shape)}"
            elif not tensor.block and DTYPES.get(tensor.dtype) not in (main, DTYPES[fold.dtype]):
                yield f"tensor '{name}' has dtype {tensor.dtype}, not {fold.dtype}"

    def faults(self) -> Iterator[str]:
        """Tensors that hold other numbers than the original's fold to."""
        for name, fold in self._written():
            start, count, first = 0, 0, None
            tensor, chunks = self.made.tensors[name], fold.rows()
            for values, slack in in_blocks(chunks, tensor.block[0]) if tensor.block else chunks:
                differ = wrong(tensor, start, values, slack)
                if differ.any():
                    count += int(differ.sum())
                    first = start + int(np.argwhere(differ)[0][0]) if first is None else first
                start += len(values)
            if count:
                yield (
                    f"tensor '{name}': {count} of {math.prod(fold.shape)} numbers are not what the "
                    f"original's fold to, the first in row {first}"
                )

    def round_as_folded(self, model: Any) -> None:
        """Round the original's weights, loaded in float32, as the conversion does.

        W becomes round(W diag(g)) diag(1 / g), b + W beta and sums of biases are rounded as a
        whole, and so is every other number where the conversion casts.
        """
        family, prefix, blocks = self.family, self.family.layer_prefix, self.blocks
        stored = main_dtype(self.made.folder)
        form = format_of(self.made.config)
        made = {
            name: fp8.KIND if tensor.block else DTYPES.get(tensor.dtype, stored)
            for name, _ in self._folds()
            for tensor in (self.made.tensors[name_in(form, name)],)
        }
        dtypes = {name: dtype for name, dtype in made.items() if not name.startswith(prefix)}
        at = wrapped_name if self.source.wrapper else str
        for name in made.keys() - dtypes.keys():
            number, _, short = name.removeprefix(prefix).partition(".")
            if number.isdecimal() and int(number) < len(blocks):
                for layer in self._members(blocks[int(number)], short):
                    dtypes[f"{prefix}{layer}.{short}"] = made[name]
        folded = set()
        for index, block in enumerate(blocks):
            for stack, layer in itertools.product(family.stacks, block.ffns):
                name = f"{prefix}{layer}.{stack.name}"
                if stack.gain is None or len(block.ffns) < 2 or name not in dtypes:
                    continue
                tensor = model.get_parameter(at(name))
                before = model.get_submodule(at(f"{prefix}{layer}.{family.branches.before_mlp[0]}"))
                _round_stack(tensor, before, family, stack.gain, dtypes[name])
                folded |= {id(tensor), *map(id, before.parameters())}
            for matrix in family.matrices + family.dense:
                layers = self._members(block, f"{matrix.name}.weight")
                written = self.made.tensors.keys() & {f"{prefix}{index}.{matrix.name}.weight"}
                if len(layers) < 2 or (family.routes and not written):
                    continue
                members = [model.get_submodule(at(f"{prefix}{layer}")) for layer in layers]
                name = f"{prefix}{layers[0]}.{matrix.name}"
                dtype, norm = dtypes.get(f"{name}.weight", stored), family.norm_of(matrix)
                of_bias = dtypes.get(f"{name}.bias", stored)
                maps = [member.get_submodule(matrix.name) for member in members]
                if norm is not None:
                    for member, linear in zip(members, maps, strict=True):
                        norms = member.get_submodule(norm)
                        _round_product(linear, norms, family, dtype, of_bias)
                        folded |= {id(p) for m in (linear, norms) for p in m.parameters()}
                elif matrix.join == "columns" and maps[0].bias is not None:
                    bias = self.made.tensors.get(f"{prefix}{index}.{matrix.name}.bias")
                    if bias is None or bias.shape == maps[0].bias.shape:
                        total = torch.stack([linear.bias for linear in maps]).sum(0)
                        for linear in maps:
                            linear.bias.zero_()
                        maps[0].bias.copy_(total.to(of_bias))
        for name, parameter in model.named_parameters():
            if id(parameter) not in folded:
                own = decoder_name(name) if self.source.wrapper else None
                parameter.copy_(_as_stored(parameter, dtypes.get(own or name, stored)))

    def _written(self) -> Iterator[tuple[str, Fold]]:
        """The folds by the names, and in the shapes, that the conversion's format gives them."""
        form, parts = format_of(self.made.config), dict[str, list[tuple[int, Fold]]]()
        order = [matrix.name for matrix in self.family.matrices]
        for name, fold in self._folds():
            module = (
                name.removeprefix(self.family.layer_prefix).partition(".")[2].rpartition(".")[0]
            )
            position = order.index(module) if module in order else 0
            parts.setdefault(name_in(form, name), []).append(
                (position, self._filled(form, name, fold))
            )
        for name, placed in parts.items():
            fold, *below = (fold for _, fold in sorted(placed, key=lambda part: part[0]))
            yield name, _below(fold, below) if below else fold

    def _filled(self, form: str, name: str, fold: Fold) -> Fold:
        """A fold with the zeros of deci: query heads to as many as config.json has, in every group
        that shares a key-value head, and FFNs to the width that it has.
        """
        number, _, short = name.removeprefix(self.family.layer_prefix).partition(".")
        module, _, kind = short.rpartition(".")
        if not form.startswith("deci") or kind != "weight" or not number.isdecimal():
            return fold
        own = layer_configs(as_ours(self.made.config)[0])[int(number)]
        axis = int(module.endswith(("o_proj", "down_proj")))
        if module.endswith(("q_proj", "o_proj")):
            blocks, to = own["num_key_value_heads"], own["num_attention_heads"] * head_dim_of(own)
        elif self.family.is_ffn(module) and len(fold.shape) == 2:
            blocks, to = 1, own["intermediate_size"]
        else:
            return fold
        return _filled_up(fold, axis, blocks, to)

    def _folds(self) -> Iterator[tuple[str, Fold]]:
        prefix = self.family.layer_prefix
        outer, layers = dict[str, Fold](), dict[int, dict[str, TensorInfo]]()
        for name, tensor in self.source.tensors.items():
            if name.startswith(prefix):
                layer, _, short = name.removeprefix(prefix).partition(".")
                layers.setdefault(int(layer), {})[short] = tensor
            else:
                outer[name] = _stacked([tensor])
        yield from outer.items()
        for index, block in enumerate(self.blocks):
            for name in layers[block.attentions[0]]:
                members = [layers[layer] for layer in self._members(block, name)]
                if len(members) == 1:
                    yield f"{prefix}{index}.{name}", _stacked([members[0][name]])
                elif members:
                    yield from self._joined(name, members, block, f"{prefix}{index}.")

    def _members(self, block: Block, tensor: str) -> tuple[int, ...]:
        """The layers whose tensors of this name a block joins."""
        ffn = self.family.is_ffn(tensor.rpartition(".")[0])
        return block.ffns if ffn else block.attentions

    def _joined(
        self, name: str, members: list[dict[str, TensorInfo]], block: Block, prefix: str
    ) -> Iterator[tuple[str, Fold]]:
        """What several members' tensors of this name become; a matrix brings its bias along."""
        family, size = self.family, sizes(self.source.config)
        tensors = [member[name] for member in members]
        module, _, kind = name.rpartition(".")
        maps = family.matrices + family.dense
        matrix = next((matrix for matrix in maps if matrix.name == module), None)
        stack = next((stack for stack in family.stacks if stack.name == name), None)
        if stack is not None:
            before = f"{family.branches.before_mlp[0]}.weight"
            gains = [_gain(member[before], family.gain_offset) for member in members]
            yield prefix + name, _counted(tensors, stack, gains)
            return
        name = prefix + name
        if module in family.norms:
            neutral = 1.0 - family.gain_offset if kind == "weight" else 0.0
            yield name, _constant(tensors[0].shape, tensors[0].dtype, neutral)
        elif matrix is None:
            heads = {norm: size[symbol] for norm, symbol in family.head_norms}
            repeats = heads[module] // tensors[0].shape[0] if module in heads else 1
            by_head = len(tensors[0].shape) > 1
            yield name, _stacked(tensors) if by_head else _gains(tensors, repeats)
        if matrix is None or kind == "bias":
            return
        bias = f"{module}.bias"
        biases = [member[bias] for member in members if bias in member]
        rows, columns = tensors[0].shape
        norm = family.norm_of(matrix)
        if norm is None:
            made = self.made.tensors.get(name)
            apart = made is not None and made.shape == (len(members) * rows, columns)
            yield name, (_stacked if apart else _side_by_side)(tensors)
            if biases:
                yield prefix + bias, (_stacked if apart else _summed)(biases)
            elif matrix.bias in family.grown_biases:
                shape = (len(members) * rows if apart else rows,)
                yield prefix + bias, _constant(shape, tensors[0].dtype, 0.0)
            return
        wiring = block.group.ffn_sees if block.group is not None else ()
        apart = family.is_ffn(module) and not family.parallel and len(set(wiring)) > 1
        parts = [rows] if apart else [size[part] for part in matrix.rows]
        ends = list(itertools.accumulate(parts))
        spans = [(end - part, end) for part, end in zip(parts, ends, strict=True)]
        gains = [_gain(member[f"{norm}.weight"], family.gain_offset) for member in members]
        yield name, _stacked(tensors, gains, spans)
        if family.norm_bias:
            shifts = [member[f"{norm}.bias"] for member in members]
            yield prefix + bias, _shifted(tensors, shifts, biases)
        elif biases:
            yield prefix + bias, _stacked(biases, spans=spans)


def _round_stack(
    weight: torch.Tensor, norm: Any, family: Family, axis: int, dtype: torch.dtype
) -> None:
    """Round a stack whose axis (-1 or -2) the norm's gain scales; take the gain out again."""
    gain = norm.weight + family.gain_offset
    gain = gain if axis == -1 else gain[:, None]
    weight.copy_(torch.where(gain == 0, weight, (weight * gain).to(dtype).float() / gain))


def _as_stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 numbers after they were written in a dtype, which may be that of fp8's blocks."""
    return fp8.rounded(values) if dtype == fp8.KIND else values.to(dtype).float()


def _round_product(
    linear: Any, norm: Any, family: Family, dtype: torch.dtype, of_bias: torch.dtype
) -> None:
    """Round W diag(g), and b + W beta, of a matrix that reads a norm; take the norm out again."""
    weight, gain = linear.weight, norm.weight + family.gain_offset
    rounded = torch.where(gain == 0, weight, _as_stored(weight * gain, dtype) / gain)
    if family.norm_bias:
        shift = weight.double() @ norm.bias.double()
        total = (shift if linear.bias is None else linear.bias + shift).to(of_bias)
        bias = total.double() - rounded.double() @ norm.bias.double()
        linear.bias = torch.nn.Parameter(bias.float(), requires_grad=False)
    weight.copy_(rounded)


def _stacked(
    tensors: list[TensorInfo],
    gains: list[np.ndarray] | None = None,
    spans: list[tuple[int, int]] | None = None,
) -> Fold:
    """Members one below the other, their columns times their gains; all members' rows of the first
    span come before those of the second.
    """
    shape = tensors[0].shape

    def rows() -> Iterator[tuple[np.ndarray, None]]:
        for first, last in spans or [(0, tensors[0].rows)]:
            for index, tensor in enumerate(tensors):
                for start, stop in row_spans(first, last, tensor.row_bytes):
                    values = read(tensor, start, stop)
                    yield (
                        values if gains is None else values * gains[index].astype(values.dtype),
                        None,
                    )

    return Fold((len(tensors) * shape[0], *shape[1:]), _common_dtype(tensors), rows)


def _counted(tensors: list[TensorInfo], stack: Stack, gains: list[np.ndarray]) -> Fold:
    """A stack of the experts, heads or members of several layers, one after another."""
    shape = list(tensors[0].shape)
    shape[stack.axis] *= len(tensors)

    def rows() -> Iterator[tuple[np.ndarray, None]]:
        if stack.axis:
            yield np.concatenate([read(tensor) for tensor in tensors], stack.axis), None
            return
        for tensor, gain in zip(tensors, gains, strict=True):
            for start, stop in row_spans(0, tensor.rows, tensor.row_bytes):
                values = read(tensor, start, stop)
                if stack.gain == -1:
                    values = values * gain.astype(values.dtype)
                elif stack.gain == -2:  # rows of the hidden size, those of one expert after another
                    places = np.arange(start, stop) % gain.size
                    values = values * gain.astype(values.dtype)[places, None]
                yield values, None

    return Fold(tuple(shape), _common_dtype(tensors), rows)


def _side_by_side(tensors: list[TensorInfo]) -> Fold:
    rows, columns = tensors[0].shape

    def chunks() -> Iterator[tuple[np.ndarray, None]]:
        for start, stop in row_spans(0, rows, sum(tensor.row_bytes for tensor in tensors)):
            yield np.concatenate([read(tensor, start, stop) for tensor in tensors], 1), None

    return Fold((rows, len(tensors) * columns), _common_dtype(tensors), chunks)


def _gains(tensors: list[TensorInfo], repeats: int) -> Fold:
    """One row per member, or per head of a member."""

    def rows() -> Iterator[tuple[np.ndarray, None]]:
        yield np.repeat(np.stack([read(tensor) for tensor in tensors]), repeats, 0), None

    shape = (len(tensors) * repeats, *tensors[0].shape)
    return Fold(shape, _common_dtype(tensors), rows)


def _summed(tensors: list[TensorInfo]) -> Fold:
    """Members added in float32, in any order if there are more than two."""

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        values = np.stack([read(tensor) for tensor in tensors])
        yield values.sum(0), np.abs(values).sum(0) * ((len(tensors) - 2) * 2.0**-23)

    return Fold(tensors[0].shape, _common_dtype(tensors), rows)


def _shifted(weights: list[TensorInfo], shifts: list[TensorInfo], biases: list[TensorInfo]) -> Fold:
    """b + W beta of every member, in float64, whose own rounding is all that may differ."""
    rows, columns = weights[0].shape

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for index, (weight, shift) in enumerate(zip(weights, shifts, strict=True)):
            beta = read(shift).astype(np.float64)
            for start, stop in row_spans(0, rows, weight.row_bytes):
                matrix = read(weight, start, stop).astype(np.float64)
                bias = read(biases[index], start, stop) if biases else np.zeros(stop - start)
                size = abs(matrix) @ abs(beta) + abs(bias)
                yield bias + matrix @ beta, size * columns * 2.0**-53

    return Fold((len(weights) * rows,), _common_dtype(biases or weights[:1]), chunks)


def _below(first: Fold, others: list[Fold]) -> Fold:
    """Folds one below the other."""
    folds = [first, *others]
    dtypes = {fold.dtype for fold in folds}
    return Fold(
        (sum(fold.shape[0] for fold in folds), *first.shape[1:]),
        dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32",
        lambda: itertools.chain.from_iterable(fold.rows() for fold in folds),
    )


def _filled_up(fold: Fold, axis: int, blocks: int, to: int) -> Fold:
    """A matrix whose rows (axis 0) or columns (axis 1), in so many blocks, have zeros behind each,
    so that there are `to` of them. Row r of block b goes to row b * (to / blocks) + r.
    """
    size, room = fold.shape[axis] // blocks, to // blocks
    shape = (to, fold.shape[1]) if axis == 0 else (fold.shape[0], to)
    if room <= size:
        return fold

    def rows() -> Iterator[tuple[np.ndarray, None]]:
        done = 0
        for values, _ in fold.rows():
            if axis == 1:
                wide = np.zeros((len(values), blocks, room), values.dtype)
                wide[:, :, :size] = values.reshape(len(values), blocks, size)
                yield wide.reshape(len(values), to), None
                continue
            ends = [end for end in range(size, fold.shape[0] + 1, size) if done < end]
            for piece in np.split(values, [e - done for e in ends if e < done + len(values)]):
                yield piece, None
                done += len(piece)
                if done % size == 0 and len(piece):
                    for start, stop in row_spans(0, room - size, 4 * fold.shape[1]):
                        yield np.zeros((stop - start, fold.shape[1]), np.float32), None

    return Fold(shape, fold.dtype, rows)


def _constant(shape: tuple[int, ...], dtype: str, value: float) -> Fold:
    return Fold(shape, dtype, lambda: iter([(np.full(shape, value, np.float32), None)]))


def _gain(tensor: TensorInfo, offset: float) -> np.ndarray:
    values = read(tensor)
    return values + values.dtype.type(offset)


def _common_dtype(tensors: list[TensorInfo]) -> str:
    """The narrowest dtype that holds the numbers of all."""
    names = {tensor.dtype for tensor in tensors}
    return names.pop() if len(names) == 1 else "F64" if "F64" in names else "F32"
