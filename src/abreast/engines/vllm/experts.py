"""Layers with experts in vLLM: those of all members of an lp group in one fused layer.

Their routers are one matrix with the members' rows one below the other; each member chooses among
its own experts, as `modeling_members.MemberRouter` does. vLLM splits experts over ranks by their
width. Expert parallelism, which splits them by number, has not run: on CPUs, where vLLM 0.32 leaves
the map of experts unread, both ranks ended with a segmentation fault.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear


def has_experts(config: Any, index: int) -> bool:
    """Whether a layer has experts; config: its own, where groups have as many as all members."""
    dense = getattr(config, "mlp_only_layers", None) or ()
    return bool(getattr(config, "num_local_experts", 0)) and index not in dense


class Experts(nn.Module):
    """The router and experts of a layer's members: [N, D] -> [N, D]."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        mixtral = config.model_type == "abreast_mixtral"
        self.gate = ReplicatedLinear(
            config.hidden_size, config.num_local_experts, bias=False, prefix=f"{prefix}.gate"
        )
        width = config.intermediate_size if mixtral else config.moe_intermediate_size
        normalised = mixtral or config.norm_topk_prob
        self.experts = _fused(config, vllm_config, prefix, width, normalised)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        logits, _ = self.gate(hidden_ND)
        out: torch.Tensor = self.experts(hidden_states=hidden_ND, router_logits=logits)
        return out


def _fused(
    config: Any,
    vllm_config: VllmConfig,
    prefix: str,
    width: int,
    normalised: bool,
    **options: Any,
) -> Any:
    """vLLM's layer for all experts of a group, of which every member chooses among its own."""
    # Here, so that where vLLM renames it models without experts are served.
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    members = getattr(config, "abreast_members", None) or 1
    return FusedMoEFactory(
        num_experts=config.num_local_experts,
        top_k=members * config.num_experts_per_tok,
        hidden_size=config.hidden_size,
        intermediate_size=width,
        renormalize=False,
        custom_routing_function=partial(choose, members, normalised),
        quant_config=vllm_config.quant_config,
        prefix=f"{prefix}.experts",
        **options,
    )


class BiasedExperts(nn.Module):
    """Those of gpt-oss, which have biases and a clamped activation: [N, D] -> [N, D].

    The chosen ones share a softmax of their own, which is that of all, normalised.
    """

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

        self.router = ReplicatedLinear(
            config.hidden_size, config.num_local_experts, bias=True, prefix=f"{prefix}.router"
        )
        self.experts = _fused(
            config,
            vllm_config,
            prefix,
            config.intermediate_size,
            True,
            has_bias=True,
            activation="swigluoai",
            routed_experts_cls=GptOssRoutedExperts,
        )

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        logits, _ = self.router(hidden_ND)
        out: torch.Tensor = self.experts(hidden_states=hidden_ND, router_logits=logits)
        return out

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        """Called by vLLM's loader, with names from here on; experts come all in one tensor."""
        names = {"gate_up_proj": "w13", "down_proj": "w2"}
        routed = self.experts.routed_experts
        for name, loaded in weights:
            matrix = name.removeprefix("experts.").removesuffix("_bias")
            if matrix not in names:
                self.get_parameter(name).data.copy_(loaded)
                yield name
                continue
            own = names[matrix] + ("_bias" if name.endswith("_bias") else "_weight")
            for number, expert in enumerate(loaded):
                routed.weight_loader(
                    getattr(routed, own),
                    expert,
                    weight_name=own,
                    shard_id=f"gpt_oss_{names[matrix]}",
                    expert_id=number,
                )
            yield f"experts.routed_experts.{own}"


def choose(
    members: int,
    normalised: bool,
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers of the experts that every member chooses, [N, topk] each, for all members
    together; gating_output: logits [N, members * experts]."""
    scores = gating_output.unflatten(-1, (members, -1)).softmax(-1, dtype=torch.float)
    weights, chosen = scores.topk(topk // members)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    before = torch.arange(members, device=chosen.device).unsqueeze(-1) * scores.shape[-1]
    return weights.flatten(-2), (chosen + before).flatten(-2).to(torch.int32)
