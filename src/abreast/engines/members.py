"""Layers of converted models that vLLM and SGLang lack, in plain torch.

Shapes: N tokens, D hidden, P members here, X for whatever a matrix is wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def biases(config: Any) -> tuple[bool, bool, bool]:
    """Whether q, k and v, the attention's output, and the FFN have biases, as in transformers.

    Configs of other families may have the same keys, without meaning.
    """
    family = config.model_type.removeprefix("abreast_")

    def has(key: str, *families: str) -> bool:
        return family in families and bool(getattr(config, key, False))

    attention = has("attention_bias", "llama", "qwen3", "qwen3_moe")
    return (
        attention or family == "qwen2" or has("attention_bias", "seed_oss"),
        attention or has("attention_out_bias", "seed_oss"),
        has("mlp_bias", "llama", "seed_oss"),
    )


class HeadNorm(nn.Module):
    """RMSNorm over each head with a gain per head: [N, heads * X] -> the same.

    The checkpoint's gain is [all heads, X]; a rank keeps the rows of its heads, of each of several
    members if they run one by one.
    """

    def __init__(self, heads: int, first: int, head_dim: int, eps: float, members: int = 1) -> None:
        super().__init__()
        self.first, self.eps = first, eps
        weight: Any = nn.Parameter(torch.ones(members, heads, head_dim), requires_grad=False)
        weight.weight_loader = self.load
        self.weight = weight

    def load(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        members, heads, _ = parameter.shape
        if loaded.dim() > 1:  # a single layer has one gain for all its heads
            loaded = loaded.unflatten(0, (members, -1)).narrow(1, self.first, heads)
        parameter.data.copy_(loaded.expand(parameter.shape))

    def forward(self, x: torch.Tensor, member: int = 0) -> torch.Tensor:
        weight = self.weight[member]
        wide = x.unflatten(-1, weight.shape).float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide.to(x.dtype) * weight).flatten(-2)


class MemberLinear(nn.Module):
    """One matrix for each of several members: [P, N, in] -> [P, N, out], as one batched product.

    Never quantised. Returns a pair, as vLLM's and SGLang's linear layers do.
    """

    def __init__(self, members: int, rows: int, columns: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, rows, columns), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(members, rows), requires_grad=False) if bias else None

    def forward(self, x_PNX: torch.Tensor) -> tuple[torch.Tensor, None]:
        out_PNX = torch.bmm(x_PNX, self.weight.transpose(1, 2))
        return (out_PNX if self.bias is None else out_PNX + self.bias.unsqueeze(1)), None


def output_loader(
    first: int, here: int, hidden: int, columns: int, share: int
) -> Callable[[nn.Parameter, torch.Tensor], None]:
    """Loads members first..first + here of output matrices stored one below the other.

    Of each [hidden, X] a rank keeps so many columns, by its number among the ranks that share a
    member; one of these adds the bias.
    """

    def load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        own = loaded.narrow(0, first * hidden, here * hidden)
        if loaded.dim() > 1:
            own = own.narrow(1, share * columns, columns)
        elif share:
            own = torch.zeros_like(own)
        parameter.data.copy_(own.reshape(parameter.shape))

    return load


def visible(all_PND: torch.Tensor, bypass: int, members: Iterable[int]) -> torch.Tensor:
    """For each of some members, the sum of the attention outputs that its FFN sees: [.., N, D]."""
    return torch.stack([all_PND[max(0, j - bypass) : j + 1].sum(0) for j in members])
