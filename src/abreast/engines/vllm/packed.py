"""Matrices of members with inputs of their own, each in the form that multiplies fastest.

A GPU multiplies all members at once, whatever the layout. On a CPU torch arranges the matrices anew
for every batched product, which for a few rows takes as long as the product itself; vLLM arranges
those of its layers once. benchmarks/LOG.md has the times behind the choice.

Shapes: N tokens, P members here, X for whatever a matrix is wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from vllm.platforms import current_platform

from abreast.engines.members import MemberLinear

SMALL = 1 << 20  # bytes: what a core's cache holds, it arranges fast, but for bfloat16


class PackedLinear(MemberLinear):
    """One matrix for each of several members: [P, N, in] -> [P, N, out]."""

    def __init__(self, members: int, rows: int, columns: int, bias: bool) -> None:
        super().__init__(members, rows, columns, bias)
        self.packed = cast(Any, nn.ModuleList())

    def pack(self) -> None:
        """Choose the form, once all weights are there; those that are packed are not kept."""
        if not current_platform.is_cpu():
            return
        if self.weight.nbytes > SMALL or self.weight.dtype == torch.bfloat16:
            biases: Any = [None] * len(self.weight) if self.bias is None else self.bias
            self.packed.extend(map(_packed, self.weight, biases))
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x_PNX: torch.Tensor) -> tuple[torch.Tensor, None]:
        if self.packed:
            return torch.stack(list(self.products(x_PNX))), None
        return super().forward(x_PNX)

    def products(self, x_PNX: torch.Tensor) -> Iterator[torch.Tensor]:
        """The members' outputs one by one, [N, out] each, so that what follows may come between."""
        if not self.packed:
            yield from self(x_PNX)[0]
            return
        for one, x_NX in zip(self.packed, x_PNX, strict=True):
            yield one.cpu_linear(x_NX, one.weight, one.bias)


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """A member's matrix [out, in] as vLLM packs those of its layers, with their `cpu_linear`."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    one: Any = nn.Module()
    one.weight = nn.Parameter(weight, requires_grad=False)
    one.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    dispatch_cpu_unquantized_gemm(one, remove_weight=True)
    return one
