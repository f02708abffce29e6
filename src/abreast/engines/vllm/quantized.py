"""Groups whose members stand apart, with quantised weights: one of vLLM's layers for each member.

To a quantiser such a matrix is one, with the members' rows one below the other. So rows, and what
belongs to a row, are a member's own, and everything else is for all of them.

Shapes: N tokens, P members here, X for whatever a matrix is wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from abreast.convert import fp8
from abreast.engines.vllm.plugin import ServingError

# What compressed-tensors and torchao store for each row of a matrix, or once if that is so long.
_SCALES = ("weight_scale", "weight_scale_inv")
_OF_ROWS = ("weight", "weight_packed", *_SCALES, "weight_zero_point", "bias")
_DEQUANTIZED = {"weight", "weight_packed", "weight_shape", *_SCALES, "input_scale"}


class QuantizedMembers(nn.Module):
    """One matrix for each of several members: [P, N, in] -> [P, N, out].

    linears: vLLM's layers for members first.. of a group of `members`.
    """

    def __init__(self, linears: Sequence[nn.Module], first: int, members: int) -> None:
        super().__init__()
        self.linears, self.first, self.members = nn.ModuleList(linears), first, members

    def forward(self, x_PNX: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.stack(list(self.products(x_PNX))), None

    def products(self, x_PNX: torch.Tensor) -> Iterator[torch.Tensor]:
        """The members' outputs one by one, [N, out] each."""
        for layer, x_NX in zip(self.linears, x_PNX, strict=True):
            yield layer(x_NX)[0]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        for name, loaded in weights:
            # Of several matrices that are one here, which; vLLM's loader notes it on the tensor.
            shard = [loaded.shard_id] if hasattr(loaded, "shard_id") else []
            for number, layer in enumerate(self.linears):
                parameter = layer.get_parameter(name)
                load: Any = getattr(parameter, "weight_loader", default_weight_loader)
                load(parameter, self._part(name, loaded, self.first + number), *shard)
                yield f"linears.{number}.{name}"

    def _part(self, name: str, whole: torch.Tensor, member: int) -> torch.Tensor:
        if name == "weight_shape":
            return torch.stack([whole[0] // self.members, whole[1]])
        if name not in _OF_ROWS or whole.dim() == 0 or whole.shape[0] % self.members:
            return whole
        rows = whole.shape[0] // self.members
        return whole.narrow(0, member * rows, rows)


def dequantized(
    weights: Iterable[tuple[str, torch.Tensor]], modules: set[str]
) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint, those of some modules as plain weights.

    Knows compressed-tensors' weights of 8 bits and packed integers of fewer, symmetric, [rows,
    columns] with a scale for each of equal parts of a row, of a whole row or for all; float8 with a
    scale for each block of 128 x 128, as `convert` writes it; and tensors that have a `dequantize`,
    which torchao's have. Raises ServingError for others.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        module, _, kind = name.rpartition(".")
        if module in modules and type(tensor) is not torch.Tensor and hasattr(tensor, "qdata"):
            tensor = tensor.dequantize()
        if module in modules and (kind not in ("weight", "bias") or tensor.dtype.itemsize == 1):
            parts.setdefault(module, {})[kind] = tensor
        else:
            yield name, tensor
    for module, own in parts.items():
        if unknown := own.keys() - _DEQUANTIZED:
            raise ServingError(
                f"{module} is quantised with {min(unknown)}, which groups whose members stay apart "
                "cannot use here; quantise symmetrically, in the order of the columns"
            )
        if (blocks := own.get("weight_scale_inv")) is not None:
            yield f"{module}.weight", fp8.dequantised(own["weight"], blocks).to(torch.bfloat16)
            continue
        whole = own["weight"] if "weight" in own else _unpacked(own)
        scale = own["weight_scale"].float()
        scale = scale.view(-1, 1) if scale.dim() < 2 else scale
        wide = whole.float().view(scale.shape[0], scale.shape[1], -1) * scale.unsqueeze(-1)
        yield f"{module}.weight", wide.view_as(whole).to(own["weight_scale"].dtype)


def _unpacked(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Signed integers [rows, columns] from int32 that hold several each, the first one lowest."""
    packed, columns = own["weight_packed"], int(own["weight_shape"][1])
    bits = 32 * packed.shape[1] // columns
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    unsigned = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return unsigned.flatten(1)[:, :columns] - 2 ** (bits - 1)
