"""Layers of converted models made of vLLM's own: one QKV and one gate-up matrix for a whole group.

A group that is one wide layer (lp) is a stock layer of its own width; only Qwen 3's gains, one per
head, need a norm of their own. Plain tensor parallelism over the wide layer is Layer Parallelism
(arXiv 2502.02790, section 3): at a degree of p each rank holds one member's heads.

A group whose FFNs see a band of attentions (cqil, arXiv 2404.06709, section 3.2) keeps its members
apart, so that a rank can run whole members and the group needs one all-reduce, at its end. Let P be
the members held by one rank, and S the ranks that share one member: P = p / degree and S = 1, or
P = 1 and S = degree / p. There is a second exchange only where a member is shared (S > 1) or sees
others' attention (bypass > 0).

With `abreast_unpaired: replicate` in the config whatever holds one layer only, attention or FFN, is
whole on every rank and exchanges nothing.

Shapes: N tokens, D hidden, P members here, X for whatever a matrix is wide.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    parallel_state,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.parallel_state import get_world_group, init_model_parallel_group
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from abreast.engines.members import HeadNorm, biases, output_loader, visible
from abreast.engines.vllm.experts import BiasedExperts, Experts, has_experts
from abreast.engines.vllm.packed import PackedLinear
from abreast.engines.vllm.quantized import QuantizedMembers


class Attention(LlamaAttention):
    """vLLM's attention of a layer's own width; norms of q and k where the family has them."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        bias, output_bias, _ = biases(config)
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=vllm_config.quant_config,
            bias=bias,
            bias_o_proj=output_bias,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        self.normed = config.model_type.startswith("abreast_qwen3")
        if self.normed:
            rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            for name, here, total in (
                ("q_norm", self.num_heads, self.total_num_heads),
                ("k_norm", self.num_kv_heads, self.total_num_kv_heads),
            ):
                first = rank * total // size  # ranks that share a head start at the same one
                setattr(self, name, HeadNorm(here, first, self.head_dim, config.rms_norm_eps))

    def attend(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The outputs of this rank's heads: [N, D] -> [N, heads * X]."""
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, v)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        output, _ = self.o_proj(self.attend(positions, hidden_states))
        return output


@functools.cache
def sink_attention() -> Any:
    """vLLM's attention of gpt-oss, which adds a sink per head to the softmax, at any width.

    Made when it is needed, so that where vLLM renames it other models are served.
    """
    from vllm.model_executor.layers.attention import Attention as Attend
    from vllm.model_executor.models.gpt_oss import OAIAttention

    class SinkAttention(OAIAttention):  # type: ignore[misc,unused-ignore]
        def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
            if not config.attention_bias or config.rope_parameters["rope_type"] != "yarn":
                raise ValueError("vLLM's gpt-oss has attention_bias, and rope_type yarn only")
            super().__init__(config, vllm_config.quant_config, vllm_config.cache_config, prefix)
            self.sinks.weight_loader = self._load_sinks

        def _build_attention(self, config: Any, prefix: str, **options: Any) -> nn.Module:
            slides = config.layer_types[self.layer_idx] == "sliding_attention"
            return Attend(
                self.num_local_attention_heads,
                self.head_dim,
                self.scaling,
                num_kv_heads=self.num_local_key_value_heads,
                per_layer_sliding_window=config.sliding_window if slides else None,
                prefix=f"{prefix}.attn",
                sinks=self.sinks,
                **options,
            )

        def _load_sinks(self, parameter: torch.Tensor, loaded: torch.Tensor) -> None:
            heads = len(parameter)
            first = get_tensor_model_parallel_rank() * heads
            parameter.data.copy_(loaded[first : first + heads])

        def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = super().forward(hidden_states, positions)
            return output

    return SinkAttention


class Layer(nn.Module):
    """A single layer or an lp group: two all-reduces, whatever its width.

    Also what an ff group is made of: attentions alone, and a last one with the FFNs of all.
    """

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        base: Any = vllm_config.model_config.hf_config
        replicate, single = replicates(base), base.to_dict()
        sinks = config.model_type == "abreast_gpt_oss"
        with whole(replicate and config.num_attention_heads == single["num_attention_heads"]):
            kind = sink_attention() if sinks else Attention
            self.self_attn = kind(config, vllm_config, f"{prefix}.self_attn")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: Any = None
        if config.intermediate_size == 0:
            return
        if has_experts(config, extract_layer_index(prefix)):
            kind = BiasedExperts if sinks else Experts
            self.mlp = kind(config, vllm_config, f"{prefix}.mlp")
        else:
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=biases(config)[2],
                prefix=f"{prefix}.mlp",
                disable_tp=replicate and config.intermediate_size == single["intermediate_size"],
            )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = add_and_norm(self.input_layernorm, hidden_states, residual)
        attended = self.self_attn(positions, normed)
        if self.mlp is None:
            return attended, residual
        normed, residual = self.post_attention_layernorm(attended, residual)
        return self.mlp(normed), residual


def replicates(config: Any) -> bool:
    """Whether single layers are whole on every rank."""
    return getattr(config, "abreast_unpaired", "shard") == "replicate"


@contextmanager
def whole(alone: bool) -> Iterator[None]:
    """Lets layers that are built meanwhile take this rank for the only one."""
    group = parallel_state._TP
    if alone:
        parallel_state._TP = every_rank_alone()
    try:
        yield
    finally:
        parallel_state._TP = group


@functools.cache
def every_rank_alone() -> Any:
    """The communicator of this rank alone. All ranks must call it together."""
    world, own = get_world_group(), get_tp_group()
    backend = torch.distributed.get_backend(own.device_group)
    ranks = [[rank] for rank in range(world.world_size)]
    return init_model_parallel_group(ranks, world.local_rank, backend, group_name="alone")


def add_and_norm(
    norm: RMSNorm, hidden: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is None:
        return norm(hidden), hidden
    return norm(hidden, residual)


class CqilLayer(nn.Module):
    """A cqil group: y_j = x + sum of a_k for k = j - bypass .. j, and one all-reduce at the end.

    Every rank adds up what it holds of the a_k and f_j; the sum over all ranks is the group's.
    """

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.members, self.bypass = config.abreast_members, config.abreast_bypass
        self.here, self.sharing = max(1, self.members // size), max(1, size // self.members)
        self.first, self.lead = rank * self.members // size, rank == 0
        self.group = member_group(self.members) if self.sharing > 1 else None
        self.self_attn = Attention(config, vllm_config, f"{prefix}.self_attn")
        self.self_attn.o_proj = self._outputs(vllm_config.quant_config, prefix)
        self.mlp = MemberMLP(config, vllm_config, self.here, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, x_ND = add_and_norm(self.input_layernorm, hidden_states, residual)
        attended = self.self_attn.attend(positions, normed)
        part_PND, _ = self.self_attn.o_proj(attended.unflatten(-1, (self.here, -1)).transpose(0, 1))
        y_PND = x_ND + self.visible(part_PND)
        fed_ND, bias = self.mlp(self.post_attention_layernorm(y_PND))
        fed_ND = fed_ND + part_PND.sum(0)
        if bias is not None and self.lead:
            fed_ND = fed_ND + bias
        return tensor_model_parallel_all_reduce(fed_ND), x_ND

    def _outputs(self, quant_config: Any, prefix: str) -> nn.Module:
        """The output matrices of the members here: [P, N, X] -> [P, N, D]; the sum over ranks is
        whole.

        In the checkpoint they lie one below the other, [p * D, X]: a rank takes the rows of its
        members and of those its share of the columns.
        """
        attention, here = self.self_attn, self.here
        hidden, bias = attention.hidden_size, attention.o_proj.bias is not None
        columns, name = attention.q_size // here, f"{prefix}.self_attn.o_proj"
        if quant_config is not None and self.sharing == 1:
            linears = [
                ReplicatedLinear(columns, hidden, bias, quant_config=quant_config, prefix=name)
                for _ in range(here)
            ]
            return QuantizedMembers(linears, self.first, self.members)
        if here > 1:
            linear: Any = PackedLinear(here, hidden, columns, bias)
        else:
            linear = ReplicatedLinear(columns, hidden, bias, prefix=name)
        share = get_tensor_model_parallel_rank() % self.sharing
        load = output_loader(self.first, here, hidden, columns, share)
        for parameter in linear.parameters():
            parameter.weight_loader = load
        return linear

    def visible(self, part_PND: torch.Tensor) -> torch.Tensor:
        """For each member here, the sum of the attention outputs that its FFN sees: [P, N, D]."""
        if self.group is not None and not self.bypass:
            # On some platforms the reduction is in place, and the part is needed again.
            return self.group.all_reduce(part_PND.clone())
        if not self.bypass:
            return part_PND
        all_PND = part_PND
        if self.group is not None:
            # One exchange does both: it completes each member's output and shows it to the others.
            slots = [torch.zeros_like(part_PND)] * self.members
            slots[self.first] = part_PND
            all_PND = tensor_model_parallel_all_reduce(torch.cat(slots))
        elif self.here < self.members:
            all_PND = tensor_model_parallel_all_gather(part_PND, 0)
        return visible(all_PND, self.bypass, range(self.first, self.first + self.here))


class MemberMLP(nn.Module):
    """The FFNs of the members here: [P, N, D] -> their sum [N, D] without the bias, and the bias.

    A rank with one member or less holds consecutive rows of gate and up, so stock layers do.
    """

    def __init__(self, config: Any, vllm_config: VllmConfig, here: int, prefix: str) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.here, bias, quant_config = here, biases(config)[2], vllm_config.quant_config
        name, members = f"{prefix}.gate_up_proj", config.abreast_members
        if config.hidden_act != "silu":
            raise ValueError(f"activation {config.hidden_act} is not silu, which vLLM needs here")
        if here == 1:
            self.gate_up_proj = MergedColumnParallelLinear(
                hidden, [wide] * 2, bias, quant_config=quant_config, prefix=name
            )
        elif quant_config is not None:
            linears = [
                MergedColumnParallelLinear(
                    hidden,
                    [wide // members] * 2,
                    bias,
                    quant_config=quant_config,
                    prefix=name,
                    disable_tp=True,
                )
                for _ in range(here)
            ]
            first = get_tensor_model_parallel_rank() * here
            self.gate_up_proj = QuantizedMembers(linears, first, members)
        else:
            self.gate_up_proj = _GateUp(here, 2 * wide // members, hidden, bias)
        self.down_proj = RowParallelLinear(
            wide,
            hidden,
            bias=bias,
            skip_bias_add=True,
            reduce_results=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, y_PND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.here == 1:
            wide_NX, _ = self.gate_up_proj(y_PND[0])
            return self.down_proj(self.act_fn(wide_NX))
        gated = [self.act_fn(wide_NX) for wide_NX in self.gate_up_proj.products(y_PND)]
        return self.down_proj(torch.cat(gated, -1))


class _GateUp(PackedLinear):
    """Gate and up of each member, one below the other; the checkpoint has all gates, then all ups.

    A rank that holds several members holds them whole.
    """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        rank = get_tensor_model_parallel_rank()
        for name, loaded in weights:
            parameter = self.get_parameter(name)
            members, half = parameter.shape[0], parameter.shape[1] // 2
            shard: Any = loaded.shard_id  # type: ignore[attr-defined]
            own = loaded.narrow(0, rank * members * half, members * half)
            own = own.reshape(members, half, *own.shape[1:])
            parameter.data.narrow(1, shard * half, half).copy_(own)
            yield name


@functools.cache
def member_group(members: int) -> Any:
    """Communicator of the ranks that share one member, where the degree is a multiple of p.

    All ranks of all tensor parallel groups must call it together.
    """
    ranks = []
    for group in get_tp_group().group_ranks:
        share = len(group) // members
        ranks += [group[start : start + share] for start in range(0, len(group), share)]
    world = get_world_group()
    # On a CPU, vLLM uses its fast shared-memory exchange for groups of this name only.
    name = "tp_members" if current_platform.is_cpu() else "members"
    backend = torch.distributed.get_backend(get_tp_group().device_group)
    return init_model_parallel_group(ranks, world.local_rank, backend, group_name=name)
