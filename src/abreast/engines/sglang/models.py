"""Converted models in SGLang's own layers.

A group has one matrix of each kind for all members, as in vLLM, so that SGLang's layers split and
quantise it, but one attention for each member, under the number that the member has in the
original. A rank holds consecutive heads of the wide layer. It hands them out to the members' caches
in turn, as many to each as a single layer has here: all of its own heads where degree = 1.

Where a cqil group (arXiv 2404.06709, section 3.2) has more ranks than members, or a bypass, the
attention outputs are exchanged before the FFNs; the group's sum takes one all-reduce at the end.

Shapes: N tokens, D hidden, P members here, X for whatever a matrix is wide.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.runtime_context import get_server_args
from torch import nn

from abreast.engines.members import HeadNorm, MemberLinear, biases, output_loader, visible
from abreast.engines.sglang.plugin import plan_of
from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE, Family
from abreast.plan import Block
from abreast.targets import SGLANG, band_of, refusals


class Attentions(nn.Module):
    """The attentions of a layer: one matrix for all q, k and v, a KV cache for each member."""

    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, config: Any, block: Block, quant_config: Any, prefix: str) -> None:
        super().__init__()
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        members, head_dim = len(block.attentions), config.head_dim
        totals = members * config.num_attention_heads, members * config.num_key_value_heads
        heads, kv_heads = totals[0] // size, max(1, totals[1] // size)
        kv_heads_of_one = max(1, config.num_key_value_heads // size)
        self.parts = kv_heads // kv_heads_of_one
        self.sizes = [head_dim * count for count in (heads, kv_heads, kv_heads)]
        bias, output_bias, _ = biases(config)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            *totals,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj: Any = RowParallelLinear(
            totals[0] * head_dim,
            config.hidden_size,
            bias=output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.normed = config.model_type == "qwen3"
        counts = ("q_norm", heads, totals[0]), ("k_norm", kv_heads, totals[1])
        for name, here, total in counts if self.normed else ():
            first = rank * total // size  # ranks that share a head start at the same one
            setattr(self, name, HeadNorm(here, first, head_dim, config.rms_norm_eps))
        rope = config.rope_parameters
        self.rotary_emb = get_rope(
            head_dim,
            rotary_dim=head_dim,
            max_position=config.max_position_embeddings,
            base=rope["rope_theta"],
            rope_scaling=rope,
        )
        self.attn = nn.ModuleList(
            RadixAttention(
                heads // self.parts,
                head_dim,
                head_dim**-0.5,
                num_kv_heads=kv_heads_of_one,
                layer_id=layer,
                sliding_window_size=window_of(config, layer),
                quant_config=quant_config,
                prefix=f"{prefix}.attn.{layer}",
            )
            for layer in block.attentions
        )

    def attend(self, positions: torch.Tensor, hidden_ND: torch.Tensor, batch: Any) -> torch.Tensor:
        """The outputs of this rank's heads: [N, D] -> [N, X]."""
        qkv, _ = self.qkv_proj(hidden_ND)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary_emb(positions, q, k)
        parts = zip(*(x.chunk(self.parts, dim=-1) for x in (q, k, v)), strict=True)
        # Where ranks share the heads of a member, the caches of some members stay empty here.
        pairs = zip(self.attn, parts, strict=False)
        return torch.cat([attn(*qkv, batch) for attn, qkv in pairs], dim=-1)


def window_of(config: Any, layer: int) -> int:
    """How far back a layer of the original sees, as SGLang counts it: without the token itself."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    slides = kinds[layer] == "sliding_attention" if kinds else config.model_type == "mistral"
    return window - 1 if window and slides else -1


class FFN(nn.Module):
    """The FFNs of `members` layers that read one input, as one."""

    def __init__(self, config: Any, members: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        wide, bias = members * config.intermediate_size, biases(config)[2]
        self.gate_up_proj: Any = MergedColumnParallelLinear(
            config.hidden_size,
            [wide] * 2,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj: Any = RowParallelLinear(
            wide,
            config.hidden_size,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x_ND)
        out, _ = self.down_proj(self.act_fn(gate_up))
        return out


class Layer(nn.Module):
    """A single layer, an lp group, or what an ff group is made of: attentions alone, and a last
    one with the FFNs of all."""

    def __init__(self, config: Any, block: Block, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.self_attn = Attentions(config, block, quant_config, f"{prefix}.self_attn")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: Any = None
        if block.ffns:
            self.mlp = FFN(config, len(block.ffns), quant_config, f"{prefix}.mlp")
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, batch: Any, residual: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = add_and_norm(self.input_layernorm, hidden, residual)
        attended, _ = self.self_attn.o_proj(self.self_attn.attend(positions, normed, batch))
        if self.mlp is None:
            return attended, residual
        normed, residual = self.post_attention_layernorm(attended, residual)
        return self.mlp(normed), residual


def add_and_norm(norm: Any, hidden: Any, residual: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return (norm(hidden), hidden) if residual is None else norm(hidden, residual)


class CqilLayer(Layer):
    """A cqil group: y_j = x + sum of a_k for k = j - bypass .. j, and one all-reduce at the end.

    A rank holds whole members, or a share of one. It adds up what it holds of the a_k and f_j.
    """

    def __init__(
        self, config: Any, block: Block, quant_config: Any, prefix: str, bypass: int
    ) -> None:
        super().__init__(config, block, quant_config, prefix)
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.members, self.bypass, self.size = len(block.ffns), bypass, size
        self.here = max(1, self.members // size)
        self.first, share = rank * self.members // size, rank % max(1, size // self.members)
        hidden, attention = config.hidden_size, self.self_attn
        columns = attention.sizes[0] // self.here
        _, output_bias, bias = biases(config)
        attention.o_proj = MemberLinear(self.here, hidden, columns, output_bias)
        half = self.members * config.intermediate_size // size // self.here
        self.mlp.gate_up_proj = MemberLinear(self.here, 2 * half, hidden, bias)
        self.mlp.down_proj.reduce_results = False
        self.mlp.down_proj.skip_bias_add = True
        load_outputs = output_loader(self.first, self.here, hidden, columns, share)

        def load_gate_up(parameter: nn.Parameter, loaded: torch.Tensor, shard: int) -> None:
            own = loaded.narrow(0, rank * self.here * half, self.here * half)
            own = own.reshape(self.here, half, *own.shape[1:])
            parameter.data.narrow(1, shard * half, half).copy_(own)

        pairs = (attention.o_proj, load_outputs), (self.mlp.gate_up_proj, load_gate_up)
        for linear, load in pairs:
            for parameter in linear.parameters():
                parameter.weight_loader = load

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, batch: Any, residual: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, x_ND = add_and_norm(self.input_layernorm, hidden, residual)
        attended = self.self_attn.attend(positions, normed, batch)
        part_PND, _ = self.self_attn.o_proj(attended.unflatten(-1, (self.here, -1)).transpose(0, 1))
        y_PND = x_ND + self.visible(part_PND)
        normed_PND = self.post_attention_layernorm(y_PND.flatten(0, 1)).view_as(y_PND)
        wide_PNX, _ = self.mlp.gate_up_proj(normed_PND)
        gated = self.mlp.act_fn(wide_PNX.flatten(0, 1)).unflatten(0, wide_PNX.shape[:2])
        fed_ND, bias = self.mlp.down_proj(gated.transpose(0, 1).flatten(1))
        fed_ND = fed_ND + part_PND.sum(0)
        if bias is not None and get_tensor_model_parallel_rank() == 0:
            fed_ND = fed_ND + bias
        return tensor_model_parallel_all_reduce(fed_ND), x_ND

    def visible(self, part_PND: torch.Tensor) -> torch.Tensor:
        """For each member here, the sum of the attention outputs that its FFN sees: [P, N, D]."""
        members = range(self.first, self.first + self.here)
        if self.size <= self.members and (self.size == 1 or not self.bypass):
            return visible(part_PND, self.bypass, members) if self.bypass else part_PND
        # One exchange completes each member's output and shows it to the others.
        all_PND = part_PND.new_zeros(self.members, *part_PND.shape[1:])
        all_PND[self.first : self.first + self.here] = part_PND
        return visible(tensor_model_parallel_all_reduce(all_PND), self.bypass, members)


class Model(nn.Module):
    """The model without its head."""

    def __init__(self, config: Any, family: Family, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        layers: list[nn.Module] = []
        for index, block in enumerate(plan_of(config.abreast).blocks):
            band, name = band_of(family, block), f"{prefix}.layers.{index}"
            arguments = config, block, quant_config, name
            layers.append(Layer(*arguments) if band is None else CqilLayer(*arguments, band))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any, embeds: Any
    ) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids) if embeds is None else embeds
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, batch, residual)
        normed, _ = self.norm(hidden, residual)
        return normed


# By the end of a matrix's name in the checkpoint: the matrix that holds it here, and where.
_PACKED: dict[str, tuple[str, Any]] = {
    **{f"{name}_proj": ("qkv_proj", name) for name in "qkv"},
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class _ForCausalLM(nn.Module):
    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        family = CONVERTIBLE[config.model_type]
        _check(config, family)
        self.config, self.quant_config = config, quant_config
        start = f"{prefix}." if prefix else ""
        self.model = Model(config, family, quant_config, f"{start}model")
        self.lm_head = self.model.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=f"{start}lm_head",
            )
        self.logits_processor = LogitsProcessor(config)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: Any = None,
    ) -> Any:
        hidden_ND = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_ND, self.lm_head, forward_batch)

    def get_attention_sliding_window_size(self) -> int | None:
        layers = range(self.config.num_hidden_layers)
        window = max(window_of(self.config, layer) for layer in layers)
        return window if window >= 0 else None

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        missing = set(parameters) if self.quant_config is None else set()
        for name, loaded in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            module, _, kind = name.rpartition(".")
            parent, _, last = module.rpartition(".")
            packed, *shard = _PACKED.get(last, (last,))
            own = f"{parent}.{packed}.{kind}" if parent else name
            if own not in parameters:
                raise AbreastError(f"tensor {name} is none of this model's; convert it again")
            missing.discard(own)
            load = getattr(parameters[own], "weight_loader", _copy)
            load(parameters[own], loaded, *shard)
        if missing:
            raise AbreastError(f"tensor {min(missing)} is not in the checkpoint; convert it again")


def _copy(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
    parameter.data.copy_(loaded)


def _check(config: Any, family: Family) -> None:
    """Raise AbreastError for what SGLang was told to do, and these models cannot."""
    plan, degree = plan_of(config.abreast), get_tensor_model_parallel_world_size()
    for reason in refusals(SGLANG, config.to_dict(), family, plan, degree):
        raise AbreastError(reason)
    arguments = get_server_args()
    for used, option in (
        (get_pp_group().world_size > 1, "--pp-size"),
        (is_dp_attention_enabled(), "--enable-dp-attention"),
        (arguments.enable_lora or arguments.lora_paths, "--enable-lora"),
        (arguments.speculative_algorithm, "--speculative-algorithm"),
    ):
        if used:
            raise AbreastError(f"SGLang runs no conversions with {option}; start it without")


class AbreastLlamaForCausalLM(_ForCausalLM):
    """Llama with layers of their own width."""


class AbreastMistralForCausalLM(_ForCausalLM):
    """Mistral with layers of their own width."""


class AbreastQwen2ForCausalLM(_ForCausalLM):
    """Qwen 2 with layers of their own width."""


class AbreastQwen3ForCausalLM(_ForCausalLM):
    """Qwen 3 with layers of their own width, and a gain of q and k for every head."""


EntryClass = [
    AbreastLlamaForCausalLM,
    AbreastMistralForCausalLM,
    AbreastQwen2ForCausalLM,
    AbreastQwen3ForCausalLM,
]
