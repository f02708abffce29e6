"""The few of SGLang's layers that converted models use, in plain torch, for one request.

Ranks are threads. What SGLang's kernels overwrite is overwritten here, and its KV pool is made as
SGLang makes it: one size for all layers, from the config alone. test_sglang_source.py
compares names and signatures with the real package.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

_here = threading.local()


class _Group:
    """What ranks exchange."""

    def __init__(self, size: int) -> None:
        self.size, self.slots, self.calls = size, [None] * size, [0] * size
        self.barrier = threading.Barrier(size)

    def all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.slots[_here.rank] = x.clone()
        self.calls[_here.rank] += 1
        self.barrier.wait()
        parts = list(self.slots)
        self.barrier.wait()
        return parts


def on_ranks(size: int, work: Callable[[int], Any]) -> tuple[list[Any], list[int]]:
    """What work(rank) returns on every rank, and how often each took part in an exchange."""
    group = _Group(size)

    def run(rank: int) -> Any:
        _here.rank, _here.group = rank, group
        try:
            return work(rank)
        except BaseException:
            group.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size))), group.calls


def get_tensor_model_parallel_rank() -> int:
    return _here.rank


def get_tensor_model_parallel_world_size() -> int:
    return _here.group.size


def tensor_model_parallel_all_reduce(input_: torch.Tensor) -> torch.Tensor:
    if _here.group.size == 1:
        return input_
    return input_.copy_(sum(_here.group.all(input_)))


def _part(whole: torch.Tensor, axis: int, replicas: int = 1) -> torch.Tensor:
    return whole.chunk(_here.group.size // replicas, axis)[_here.rank // replicas]


def _parameter(module: nn.Module, name: str, shape: tuple[int, ...], load: Any) -> None:
    parameter = nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
    parameter.weight_loader = load
    setattr(module, name, parameter)


class _Columns(nn.Module):
    """A matrix of several, whose rows are divided."""

    def __init__(self, columns: int, sizes: dict[Any, tuple[int, int]], bias: bool) -> None:
        super().__init__()
        self.sizes, self.bias = sizes, None  # by shard: rows here, ranks that share them
        rows = sum(size for size, _ in sizes.values())
        _parameter(self, "weight", (rows, columns), self.load)
        if bias:
            _parameter(self, "bias", (rows,), self.load)

    def load(self, param: Any, loaded_weight: torch.Tensor, loaded_shard_id: Any) -> None:
        parts = param.data.split([size for size, _ in self.sizes.values()])
        index, (_, replicas) = list(self.sizes).index(loaded_shard_id), self.sizes[loaded_shard_id]
        parts[index].copy_(_part(loaded_weight, 0, replicas))

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return linear(input_, self.weight, self.bias), None


class QKVParallelLinear(_Columns):
    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        bias: bool = True,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        size = _here.group.size
        assert total_num_heads % size == 0
        kv_heads, replicas = max(1, total_num_kv_heads // size), size // total_num_kv_heads
        kv = kv_heads * head_size, max(1, replicas)
        sizes = {"q": (total_num_heads // size * head_size, 1), "k": kv, "v": kv}
        super().__init__(hidden_size, sizes, bias)


class MergedColumnParallelLinear(_Columns):
    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = True,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        size = _here.group.size
        super().__init__(
            input_size, {i: (rows // size, 1) for i, rows in enumerate(output_sizes)}, bias
        )


class RowParallelLinear(nn.Module):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        skip_bias_add: bool = False,
        reduce_results: bool = True,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.skip_bias_add, self.reduce_results, self.bias = skip_bias_add, reduce_results, None
        _parameter(self, "weight", (output_size, input_size // _here.group.size), self.load)
        if bias:
            _parameter(self, "bias", (output_size,), self.load)

    def load(self, param: Any, loaded_weight: torch.Tensor) -> None:
        param.data.copy_(_part(loaded_weight, 1) if loaded_weight.dim() > 1 else loaded_weight)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, Any]:
        bias = None if _here.rank or self.skip_bias_add else self.bias
        out = linear(input_, self.weight, bias)
        out = tensor_model_parallel_all_reduce(out) if self.reduce_results else out
        return out, self.bias if self.skip_bias_add else None


class RMSNorm(nn.Module):
    """With a residual, both inputs are overwritten."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), torch.nan), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        assert x.shape == residual.shape
        residual += x
        x.copy_(self(residual))
        return x, residual


class SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up


class _Rope(nn.Module):
    def __init__(self, head_size: int, base: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.frequencies = base ** -(torch.arange(0, head_size, 2) / head_size)

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
        angles = (positions.unsqueeze(-1) * self.frequencies).unsqueeze(1)
        for x in (query, key):
            first, second = x.unflatten(-1, (-1, self.head_size)).chunk(2, dim=-1)
            cos, sin = angles.cos(), angles.sin()
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            x.copy_(turned.flatten(1))
        return query, key


def get_rope(
    head_size: int, rotary_dim: int, max_position: int, base: float, rope_scaling: Any = None
) -> nn.Module:
    assert rotary_dim == head_size and rope_scaling["rope_type"] == "default"
    return _Rope(head_size, base)


class RadixAttention(nn.Module):
    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
        sliding_window_size: int = -1,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.shape, self.scaling, self.layer_id = (num_heads, head_dim), scaling, layer_id
        self.window = sliding_window_size

    def forward(self, q: Any, k: Any, v: Any, forward_batch: Batch) -> torch.Tensor:
        pool, positions = forward_batch.pool[_here.rank][self.layer_id], forward_batch.positions
        for own, new in zip(pool, (k, v), strict=True):
            own[positions] = new.view(-1, *own.shape[1:])
        seen = torch.arange(int(positions[-1]) + 1)
        ahead = positions.unsqueeze(-1) - seen
        mask = (ahead >= 0) & ((ahead <= self.window) | (self.window < 0))
        k, v = (own[seen].transpose(0, 1) for own in pool)
        q = q.view(-1, *self.shape).transpose(0, 1)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scaling, enable_gqa=True
        )
        return out.transpose(0, 1).flatten(1)


@dataclass
class Batch:
    """Tokens at these positions of the one request. pool: by rank and layer, keys and values."""

    positions: torch.Tensor
    pool: Any


def pool_of(config: Any, size: int, tokens: int) -> Any:
    """The KV pool as SGLang makes it from a config."""
    shape = tokens, max(1, config.num_key_value_heads // size), config.head_dim
    layers = range(config.num_hidden_layers)
    return [[(torch.zeros(shape), torch.zeros(shape)) for _ in layers] for _ in range(size)]


class VocabParallelEmbedding(nn.Module):
    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, quant_config: Any = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.rows = num_embeddings // _here.group.size
        _parameter(self, "weight", (self.rows, embedding_dim), self.load)

    def load(self, param: Any, loaded_weight: torch.Tensor) -> None:
        param.data.copy_(_part(loaded_weight, 0))

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        own = input_ - _here.rank * self.rows
        here = ((own >= 0) & (own < self.rows)).unsqueeze(-1)
        out = self.weight[own.clamp(0, self.rows - 1)] * here
        return tensor_model_parallel_all_reduce(out)


class ParallelLMHead(VocabParallelEmbedding):
    pass


class LogitsProcessor(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(
        self, input_ids: Any, hidden_states: torch.Tensor, lm_head: Any, logits_metadata: Any
    ) -> Any:
        own = linear(hidden_states, lm_head.weight)
        parts = _here.group.all(own) if _here.group.size > 1 else [own]
        return SimpleNamespace(next_token_logits=torch.cat(parts, -1))


SWITCHES = {"pp": 1, "dp": False}
SERVER_ARGS = SimpleNamespace(enable_lora=None, lora_paths=None, speculative_algorithm=None)
MODULES: dict[str, dict[str, Any]] = {
    "distributed": {
        "get_pp_group": lambda: SimpleNamespace(world_size=SWITCHES["pp"]),
        "get_tensor_model_parallel_rank": get_tensor_model_parallel_rank,
        "get_tensor_model_parallel_world_size": get_tensor_model_parallel_world_size,
        "tensor_model_parallel_all_reduce": tensor_model_parallel_all_reduce,
    },
    "layers.activation": {"SiluAndMul": SiluAndMul},
    "layers.dp_attention": {"is_dp_attention_enabled": lambda: SWITCHES["dp"]},
    "layers.layernorm": {"RMSNorm": RMSNorm},
    "layers.linear": {
        "MergedColumnParallelLinear": MergedColumnParallelLinear,
        "QKVParallelLinear": QKVParallelLinear,
        "RowParallelLinear": RowParallelLinear,
    },
    "layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
    "layers.radix_attention": {"RadixAttention": RadixAttention},
    "layers.rotary_embedding": {"get_rope": get_rope},
    "layers.vocab_parallel_embedding": {
        "ParallelLMHead": ParallelLMHead,
        "VocabParallelEmbedding": VocabParallelEmbedding,
    },
    "runtime_context": {"get_server_args": lambda: SERVER_ARGS},
}


@contextmanager
def installed() -> Iterator[Any]:
    """While it lasts, `sglang` is this; gives abreast's models, built on it."""
    from importlib import import_module

    parents = ["sglang", "sglang.srt", "sglang.srt.layers"]
    for name in [*parents, *(f"sglang.srt.{name}" for name in MODULES)]:
        module = ModuleType(name)
        module.__dict__.update(MODULES.get(name.removeprefix("sglang.srt."), {}))
        sys.modules[name] = module
    ours = "abreast.engines.sglang.models"
    try:
        yield import_module(ours)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "sglang"] + [ours]:
            sys.modules.pop(name, None)
