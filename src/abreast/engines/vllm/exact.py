"""Groups of checkpoints with sequential prefill: prompts in the original order, all else abreast.

A token is its request's prompt if it lies before the length of what was sent, in whatever chunk it
comes, and after a preemption too. Both kinds may share a step. So the members' weights lie side by
side, to be taken one at a time or all at once, and every member has an attention of its own, which
in each step takes all tokens, of both kinds: the KV cache is the original's, block by block.

vLLM does not tell a model how long prompts are; `mark_prompts` adds that. plugin.py keeps what was
generated apart from prompts in the prefix cache.

Shapes: N tokens, D hidden, P members, X for whatever a matrix is wide.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from abreast.engines.members import HeadNorm, MemberLinear, biases, visible
from abreast.engines.vllm.layers import add_and_norm
from abreast.engines.vllm.plugin import is_sequential

KINDS = "abreast_kinds"  # in vLLM's forward context: rows of prompts, and the others


class ExactGroup(nn.Module):
    """A group of `members` layers, lp or cqil, of which each rank holds a share of every member.

    Its members' norms have gains of 1: their own are folded into the matrices.
    """

    def __init__(self, config: Any, members: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.members, self.bypass = members, getattr(config, "abreast_bypass", None)
        self.self_attn = _Attentions(config, members, vllm_config, f"{prefix}.self_attn")
        self.mlp = _FFNs(config, members)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, x_ND = add_and_norm(self.input_layernorm, hidden_states, residual)
        kinds = None if torch.compiler.is_compiling() else _kinds()
        if kinds is not None:
            return self.of_both_kinds(positions, normed, x_ND, *kinds)
        qkv_NPX = self.self_attn.qkv_proj.together(normed)
        heads = [self.self_attn.attend(j, positions, qkv_NPX[:, j]) for j in range(self.members)]
        return self.abreast(heads, x_ND)

    def of_both_kinds(
        self,
        positions: torch.Tensor,
        normed: torch.Tensor,
        x_ND: torch.Tensor,
        prompts: torch.Tensor,
        others: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a step with prompts, whose rows pass through one member after the other."""
        attention, heads = self.self_attn, []
        # Copies, because vLLM's norms may work in place.
        own, own_x, others_x = normed[prompts], x_ND[prompts], x_ND[others]
        qkv_NPX = attention.qkv_proj.together(normed[others])
        for j in range(self.members):
            qkv_NX = qkv_NPX.new_empty(len(normed), qkv_NPX.shape[-1])
            qkv_NX[prompts], qkv_NX[others] = attention.qkv_proj.one(j, own), qkv_NPX[:, j]
            attended = attention.attend(j, positions, qkv_NX)
            heads.append(attended[others])
            out = attention.o_proj.one(j, attended[prompts])
            own, own_x = self.post_attention_layernorm(out, own_x)
            fed = self.mlp.one(j, own)
            if j + 1 < self.members:
                own, own_x = self.input_layernorm(fed, own_x)
        outputs = torch.empty_like(x_ND), torch.empty_like(x_ND)
        outputs[0][prompts], outputs[1][prompts] = fed, own_x
        if len(others):
            outputs[0][others], outputs[1][others] = self.abreast(heads, others_x)
        return outputs

    def abreast(
        self, heads: list[torch.Tensor], x_ND: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows the members' attentions, each [N, X], where they all read the same x."""
        if self.bypass is None:
            attended = self.self_attn.o_proj.added(torch.cat(heads, -1))
            normed, x_ND = self.post_attention_layernorm(attended, x_ND)
            return self.mlp.added(self.mlp.gate_up_proj.together(normed)), x_ND
        a_PND = self.self_attn.o_proj.apart(torch.stack(heads))
        y_PND = x_ND + visible(a_PND, self.bypass, range(self.members))
        wide_PNX, _ = self.mlp.gate_up_proj(self.post_attention_layernorm(y_PND))
        return self.mlp.added(wide_PNX.transpose(0, 1).contiguous()) + a_PND.sum(0), x_ND


class _Attentions(nn.Module):
    """The members' attentions, each with a KV cache of its own."""

    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, config: Any, members: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        head_dim, hidden = config.head_dim, config.hidden_size
        counts = [config.num_attention_heads // members, config.num_key_value_heads // members]
        here = [max(1, count // size) for count in counts]
        self.sizes = [head_dim * here[kind] for kind in (0, 1, 1)]
        first = [rank * counts[kind] // size * head_dim for kind in (0, 1, 1)]
        bias, output_bias, _ = biases(config)
        shares = dict(zip("qkv", zip(first, self.sizes, strict=True), strict=True))
        self.qkv_proj = _Rows(members, hidden, shares, bias)
        self.o_proj = _Columns(members, hidden, first[0], self.sizes[0], output_bias)
        self.normed = config.model_type == "abreast_qwen3"
        for name, kind in (("q_norm", 0), ("k_norm", 1)) if self.normed else ():
            start = first[kind] // head_dim
            norm = HeadNorm(here[kind], start, head_dim, config.rms_norm_eps, members)
            setattr(self, name, norm)
        self.rotary_emb = get_rope(
            head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=getattr(config, "rope_parameters", None),
        )
        kinds = getattr(config, "layer_types", None)
        slides = kinds and kinds[extract_layer_index(prefix)] == "sliding_attention"
        self.attn = nn.ModuleList(
            Attention(
                here[0],
                head_dim,
                head_dim**-0.5,
                num_kv_heads=here[1],
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=config.sliding_window if slides else None,
                prefix=f"{prefix}.member_{member}.attn",
            )
            for member in range(members)
        )

    def attend(self, member: int, positions: torch.Tensor, qkv_NX: torch.Tensor) -> torch.Tensor:
        """One member's attention up to its output matrix: [N, X] -> [N, heads * head size]."""
        q, k, v = qkv_NX.split(self.sizes, dim=-1)
        if self.normed:
            q, k = self.q_norm(q, member), self.k_norm(k, member)
        q, k = self.rotary_emb(positions, q, k)
        return self.attn[member](q, k, v)


class _FFNs(nn.Module):
    """The members' FFNs."""

    def __init__(self, config: Any, members: int) -> None:
        super().__init__()
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        if config.hidden_act != "silu":
            raise ValueError(f"activation {config.hidden_act} is not silu, which vLLM needs here")
        here = config.intermediate_size // members // size
        shares = dict.fromkeys((0, 1), (rank * here, here))
        self.gate_up_proj = _Rows(members, config.hidden_size, shares, biases(config)[2])
        self.down_proj = _Columns(members, config.hidden_size, rank * here, here, False)
        self.act_fn = SiluAndMul()

    def one(self, member: int, x_ND: torch.Tensor) -> torch.Tensor:
        return self.down_proj.one(member, self.act_fn(self.gate_up_proj.one(member, x_ND)))

    def added(self, wide_NPX: torch.Tensor) -> torch.Tensor:
        """The sum of all outputs, [N, D], from gates and ups."""
        return self.down_proj.added(self.act_fn(wide_NPX).flatten(1))


class _Rows(MemberLinear):
    """Several matrices of each member as one. shares: by name, which rows of it this rank takes.

    The checkpoint has each matrix for itself, the members' one below the other.
    """

    def __init__(
        self, members: int, columns: int, shares: dict[Any, tuple[int, int]], bias: bool
    ) -> None:
        super().__init__(members, sum(count for _, count in shares.values()), columns, bias)
        self.members, self.shares = members, shares

    def one(self, member: int, x_ND: torch.Tensor) -> torch.Tensor:
        return linear(x_ND, self.weight[member], None if self.bias is None else self.bias[member])

    def together(self, x_ND: torch.Tensor) -> torch.Tensor:
        """All members' outputs for one input: [N, D] -> [N, P, X]."""
        bias = None if self.bias is None else self.bias.flatten()
        return linear(x_ND, self.weight.flatten(0, 1), bias).unflatten(-1, (self.members, -1))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        for name, loaded in weights:
            share = list(self.shares).index(loaded.shard_id)  # type: ignore[attr-defined]
            parts = self.get_parameter(name).data.split([n for _, n in self.shares.values()], 1)
            own = loaded.unflatten(0, (self.members, -1))
            parts[share].copy_(own.narrow(1, *list(self.shares.values())[share]))
            yield name


class _Columns(nn.Module):
    """A matrix of each member, [D, P, X], of whose columns this rank has some.

    The checkpoint has the members' matrices side by side or, in cqil groups, one below the other.
    A bias is [P, D].
    """

    def __init__(self, members: int, rows: int, first: int, columns: int, bias: bool) -> None:
        super().__init__()
        self.first, self.columns = first, columns
        self.weight = nn.Parameter(torch.empty(rows, members, columns), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(members, rows), requires_grad=False) if bias else None
        for parameter in self.parameters():
            set_weight_attrs(parameter, {"weight_loader": self.load})

    def load(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        if loaded.dim() > 1:
            rows, members, _ = parameter.shape
            below = loaded.shape[0] > rows
            loaded = loaded.unflatten(0 if below else 1, (members, -1))
            loaded = loaded.transpose(0, 1) if below else loaded
            loaded = loaded.narrow(2, self.first, self.columns)
        parameter.data.copy_(loaded.reshape(parameter.shape))

    def one(self, member: int, x_NX: torch.Tensor) -> torch.Tensor:
        out_ND = tensor_model_parallel_all_reduce(linear(x_NX, self.weight[:, member]))
        return out_ND if self.bias is None else out_ND + self.bias[member]

    def added(self, x_NX: torch.Tensor) -> torch.Tensor:
        """The sum of all outputs from the members' inputs side by side; there is no bias then."""
        return tensor_model_parallel_all_reduce(linear(x_NX, self.weight.flatten(1)))

    def apart(self, x_PNX: torch.Tensor) -> torch.Tensor:
        """All outputs: [P, N, X] -> [P, N, D]."""
        out_PND = tensor_model_parallel_all_reduce(torch.bmm(x_PNX, self.weight.permute(1, 2, 0)))
        return out_PND if self.bias is None else out_PND + self.bias.unsqueeze(1)


def _kinds() -> tuple[torch.Tensor, torch.Tensor] | None:
    return get_forward_context().additional_kwargs.get(KINDS)


def mark_prompts() -> None:
    """Let vLLM's model runner say which rows of a step are a prompt's, where there are any.

    Such steps run without compiled code and CUDA graphs, which were made without prompts.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    stock: Any = GPUModelRunner._model_forward
    if stock.__globals__ is globals():
        return

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, positions: torch.Tensor, **kwargs: Any) -> Any:
        if is_sequential(self.vllm_config) and (prompt := _rows_of_prompts(self)).any():
            rows = np.ones(positions.shape[-1], bool)  # what pads a step goes with the prompts
            rows[: len(prompt)] = prompt
            kinds = (torch.from_numpy(kind.nonzero()[0]) for kind in (rows, ~rows))
            context = get_forward_context()
            context.additional_kwargs[KINDS] = tuple(kind.to(positions.device) for kind in kinds)
            context.skip_compiled = True
            context.cudagraph_runtime_mode = CUDAGraphMode.NONE
        return stock(self, *args, positions=positions, **kwargs)

    GPUModelRunner._model_forward = forward


def _rows_of_prompts(runner: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each token of a step, whether it lies before the length of its request's prompt."""
    batch, count = runner.input_batch, runner.input_batch.num_reqs
    starts = runner.query_start_loc.np[: count + 1]
    ahead = batch.num_prompt_tokens[:count] - batch.num_computed_tokens_cpu[:count]
    prompts: Any = np.arange(starts[-1]) < np.repeat(starts[:-1] + ahead, np.diff(starts))
    return prompts
