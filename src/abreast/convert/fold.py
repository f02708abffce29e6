"""Pure tensor arithmetic of the rewrite: fold norms into projections and join members.

With RMSNorm, N(x) = xhat * g, and W (xhat * g) = (W diag(g)) xhat: the gain folds into the columns
of every matrix that reads the norm. All members of an lp group then read one xhat, so their
matrices stack along output rows (q, k, v, gate, up) or input columns (o, down), and the group is
one stock layer with p times the heads and intermediate size and gains of 1; experts and their
routers stack, too, and every member goes on choosing among its own. Where attentions run in
order (ff), each stays a layer without FFN, and only the FFNs are joined, in the last. Exact but for
one rounding: products are formed in float32, where those of two half-precision numbers are exact,
and cast once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from abreast.convert.rules import stays_apart
from abreast.families import (
    Family,
    Matrix,
    Padding,
    Stack,
    all_tensors,
    expert_layers,
    has_bias,
    head_dim_of,
    layer_tensors,
    outer_tensors,
    sizes,
)
from abreast.plan import Block, Plan

Operation = Literal["copy", "rows", "columns", "sum", "shift", "heads", "fill"]


@dataclass(frozen=True)
class TensorRule:
    """How one output tensor is made, by one operation.

    copy: the one member unchanged. rows: members, each with its columns scaled by its gain, stacked
    along dimension 0; with parts, all members' first parts, then all second ones. columns: members
    stacked along dimension 1. sum: members added. shift: biases, each with W beta added for the
    beta of a LayerNorm that folds away, stacked. heads: 1-D gains, each repeated `heads` times,
    one row each. fill: a constant, after the members were folded elsewhere.
    members: names of the source tensors that this rule consumes. gains, shifts, weights: others
    that it reads, one per member, consumed by rules of their own. gain_offset: added to gains.
    like: for a bias that has no source, the matrix it belongs to; the members' are then 0.
    padding: zeros that a format puts between, after all else. axis: the one along which members
    are stacked, all before it being 1. transposed: gains scale the next to last axis, not the last.
    """

    name: str
    operation: Operation
    members: tuple[str, ...]
    gains: tuple[str, ...] = ()
    gain_offset: float = 0.0
    shifts: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    parts: tuple[int, ...] = ()
    heads: int = 1
    fill: float = 1.0
    like: str = ""
    padding: Padding | None = None
    axis: int = 0
    transposed: bool = False

    def shape(self, member: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output, given that of every member, or of the tensor it is `like`."""
        shape = list(self._folded(member))
        if self.padding is not None:
            axis, block, to = self.padding
            shape[axis] = shape[axis] // block * to
        return tuple(shape)

    def _folded(self, member: tuple[int, ...]) -> tuple[int, ...]:
        if self.like:
            return (max(1, len(self.weights)) * member[0],)
        count = len(self.members)
        if self.operation in ("rows", "shift"):
            axis = self.axis
            return (*member[:axis], count * member[axis], *member[axis + 1 :])
        if self.operation == "columns":
            return (member[0], count * member[1])
        if self.operation == "heads":
            return (count * self.heads, *member)
        return member


def fold_gain(
    weight: torch.Tensor, gain: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """W diag(g), each product rounded once: weight [rows, columns], gain [columns].

    Products are formed in float32 or wider, and cast to `dtype` at the end if one is given.
    """
    if weight.dtype == gain.dtype == dtype:
        # PyTorch multiplies half-precision numbers in float32 and rounds the product once, which
        # is the same result at a third of the memory traffic.
        return weight * gain
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * gain.to(wide)).to(dtype or wide)


def fold_shift(weight: torch.Tensor, beta: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """b + W beta in float64: what a LayerNorm's bias becomes in a matrix that reads the norm.

    weight [rows, columns], beta [columns], bias [rows] -> [rows].
    """
    return bias.double() + weight.double() @ beta.double()


def join_rows(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack members that read the same input: [r_k, ...] -> [sum r_k, ...]."""
    return torch.cat(list(weights), dim=0)


def join_columns(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack members whose outputs add up: [rows, c_k] -> [rows, sum c_k]."""
    return torch.cat(list(weights), dim=1)


def sum_biases(biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add biases that all enter the residual stream, in float32 or wider: [rows] -> [rows]."""
    wide = torch.promote_types(biases[0].dtype, torch.float32)
    return torch.stack([bias.to(wide) for bias in biases]).sum(0)


def pad(chunks: Iterable[torch.Tensor], padding: Padding) -> Iterator[torch.Tensor]:
    """A matrix, which comes in chunks of rows, with its padding."""
    axis, block, to = padding
    filled = 0
    for chunk in chunks:
        rows = chunk
        if axis == 1:
            yield torch.nn.functional.pad(rows.unflatten(1, (-1, block)), (0, to - block)).flatten(
                1
            )
            continue
        while len(rows):
            piece, rows = rows[: block - filled], rows[block - filled :]
            yield piece
            filled = (filled + len(piece)) % block
            if not filled:  # one row of zeros, shown many times
                yield from piece.new_zeros(1, piece.shape[1]).expand(to - block, -1).split(256)


def tensor_rules(family: Family, config: Mapping[str, Any], plan: Plan) -> list[TensorRule]:
    """Rules for every tensor of the converted checkpoint: embedding, layers, final norm, head.

    Every source tensor is a member of exactly one rule. Raises RuntimeError if not, which is a
    fault of the family's row, not of the user.
    """
    rules = [TensorRule(family.embedding, "copy", (family.embedding,))]
    for index, block in enumerate(family.blocks_of(plan)):
        rules += _Layer(family, config, block, f"{family.layer_prefix}{index}.").rules()
    outer = [name for name in outer_tensors(family, config) if name != family.embedding]
    rules += [TensorRule(name, "copy", (name,)) for name in outer]
    consumed = sorted(name for rule in rules for name in rule.members)
    if consumed != sorted(all_tensors(family, config)):
        raise RuntimeError(f"the rules for {family.model_type} do not use every tensor once")
    return rules


@dataclass(frozen=True)
class _Layer:
    """A layer of the converted checkpoint; its tensors' names begin with `prefix`."""

    family: Family
    config: Mapping[str, Any]
    block: Block
    prefix: str

    def rules(self) -> Iterator[TensorRule]:
        """A tensor of one member is copied, those of several are joined."""
        matrices = {m.name: m for m in self.family.matrices + self.family.dense}
        stacks = {stack.name: stack for stack in self.family.stacks}
        experts = expert_layers(self.family, self.config)[self.block.attentions[0]]
        for name in layer_tensors(self.family, self.config, experts=experts):
            module, _, kind = name.rpartition(".")
            sources, matrix = self._sources(name), matrices.get(module)
            if len(sources) == 1:
                yield TensorRule(self.prefix + name, "copy", sources)
            elif not sources:
                continue
            elif name in stacks:
                yield self._stack(stacks[name], sources)
            elif matrix is None:
                yield self._norm(module, kind)
            elif kind == "bias":
                yield self._bias(matrix)
            else:
                yield self._weight(matrix)
                grows = matrix.bias in self.family.grown_biases
                if grows and not has_bias(matrix, self.config):
                    yield self._grown_bias(matrix)

    def _sources(self, tensor: str) -> tuple[str, ...]:
        ffn = self.family.is_ffn(tensor.rpartition(".")[0])
        members = self.block.ffns if ffn else self.block.attentions
        return tuple(f"{self.family.layer_prefix}{layer}.{tensor}" for layer in members)

    def _norm(self, module: str, kind: str) -> TensorRule:
        family, sources = self.family, self._sources(f"{module}.{kind}")
        name = f"{self.prefix}{module}.{kind}"
        if module in family.norms:
            fill = 1.0 - family.gain_offset if kind == "weight" else 0.0
            return TensorRule(name, "fill", sources, fill=fill)
        if module in dict(family.wide_norms):
            return TensorRule(name, "rows", sources)
        symbol = dict(family.head_norms).get(module)
        heads = sizes(self.config)[symbol] // head_dim_of(self.config) if symbol else 1
        return TensorRule(name, "heads", sources, heads=heads)

    def _weight(self, matrix: Matrix) -> TensorRule:
        name, norm = f"{matrix.name}.weight", self.family.norm_of(matrix)
        apart = stays_apart(self.family, matrix, self.block)
        packed = matrix.join == "rows" and not apart and len(matrix.rows) > 1
        size = sizes(self.config)
        return TensorRule(
            self.prefix + name,
            "rows" if apart else matrix.join,
            self._sources(name),
            gains=self._sources(f"{norm}.weight") if norm else (),
            gain_offset=self.family.gain_offset,
            parts=tuple(size[part] for part in matrix.rows) if packed else (),
        )

    def _stack(self, stack: Stack, sources: tuple[str, ...]) -> TensorRule:
        norm = self.family.branches.before_mlp[0]
        return TensorRule(
            self.prefix + stack.name,
            "rows",
            sources,
            gains=self._sources(f"{norm}.weight") if stack.gain is not None else (),
            gain_offset=self.family.gain_offset,
            axis=stack.axis,
            transposed=stack.gain == -2,
        )

    def _bias(self, matrix: Matrix) -> TensorRule:
        name, norm = f"{matrix.name}.bias", self.family.norm_of(matrix)
        if norm and self.family.norm_bias:
            return self._shifted(matrix, norm, members=self._sources(name))
        summed = matrix.join == "columns" and not stays_apart(self.family, matrix, self.block)
        return TensorRule(self.prefix + name, "sum" if summed else "rows", self._sources(name))

    def _grown_bias(self, matrix: Matrix) -> TensorRule:
        """A bias that only the group has, since it has to take up that of a norm somewhere."""
        norm, weights = self.family.norm_of(matrix), self._sources(f"{matrix.name}.weight")
        if norm:
            return self._shifted(matrix, norm, like=weights[0])
        apart = stays_apart(self.family, matrix, self.block)
        return TensorRule(
            f"{self.prefix}{matrix.name}.bias",
            "fill",
            (),
            weights=weights if apart else (),
            fill=0.0,
            like=weights[0],
        )

    def _shifted(
        self, matrix: Matrix, norm: str, members: tuple[str, ...] = (), like: str = ""
    ) -> TensorRule:
        return TensorRule(
            f"{self.prefix}{matrix.name}.bias",
            "shift",
            members,
            shifts=self._sources(f"{norm}.bias"),
            weights=self._sources(f"{matrix.name}.weight"),
            like=like,
        )
