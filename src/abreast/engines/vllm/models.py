"""Converted models in vLLM's own layers, for the families whose row says `vllm_layers`.

vLLM imports this file in its workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from abreast.engines.vllm.exact import ExactGroup, mark_prompts
from abreast.engines.vllm.layers import (
    CqilLayer,
    Layer,
    every_rank_alone,
    member_group,
    replicates,
)
from abreast.engines.vllm.packed import PackedLinear
from abreast.engines.vllm.plugin import StreamsOfOriginal, is_sequential
from abreast.engines.vllm.quantized import dequantized


def _layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    model_config: Any = vllm_config.model_config.hf_config
    config = model_config.per_layer_config[extract_layer_index(prefix)]
    members = config.num_attention_heads // model_config.to_dict()["num_attention_heads"]
    if members > 1 and is_sequential(vllm_config):
        return ExactGroup(config, members, vllm_config, prefix)
    return (CqilLayer if _has_band(config) else Layer)(config, vllm_config, prefix)


def _has_band(config: Any) -> bool:
    """Whether the layer is a group whose FFNs see a band of attentions each."""
    return getattr(config, "abreast_bypass", None) is not None


class _ForCausalLM(StreamsOfOriginal, LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config: Any = vllm_config.model_config.hf_config
        size = get_tensor_model_parallel_world_size()
        layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
        if is_sequential(vllm_config):
            mark_prompts()
            layers = []  # of which none is built as a CqilLayer
        # Communicators first: every rank has to take part, even without such a layer.
        for members in sorted({layer.abreast_members for layer in layers if _has_band(layer)}):
            if size > members:
                member_group(members)
        if size > 1 and replicates(config):
            every_rank_alone()
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_layer)
        banded = {f"model.layers.{i}": layer for i, layer in enumerate(layers) if _has_band(layer)}
        apart = [
            f"{layer}.{name}"
            for layer in banded
            for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
        ]
        self.hf_to_vllm_mapper = without_adapters(self.hf_to_vllm_mapper, apart)
        # Of these a rank has some columns of its member's rows, which no quantised layer can load.
        self.cut_both_ways = {
            f"{name}.self_attn.o_proj"
            for name, layer in banded.items()
            if size > layer.abreast_members
        }

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(dequantized(weights, self.cut_both_ways))

    def process_weights_after_loading(self) -> None:
        """Called by vLLM's loader."""
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module.pack()


def without_adapters(mapper: WeightsMapper, modules: Iterable[str]) -> WeightsMapper:
    """The mapper, with names for these modules' adapters that vLLM refuses.

    Of matrices that are none of its own it would leave the adapter out, and say nothing.
    """
    names = {f"{n}.lora_": f"{n}, whose members stand apart.lora_" for n in sorted(modules)}
    return mapper | WeightsMapper(orig_to_new_substr=names)


class AbreastLlamaForCausalLM(_ForCausalLM):
    """Llama with layers of their own width."""


class AbreastMistralForCausalLM(_ForCausalLM):
    """Mistral with layers of their own width."""


class AbreastMinistralForCausalLM(_ForCausalLM):
    """Ministral with layers of their own width."""


class AbreastSeedOssForCausalLM(_ForCausalLM):
    """Seed-OSS with layers of their own width."""


class AbreastQwen2ForCausalLM(_ForCausalLM):
    """Qwen 2 with layers of their own width."""


class AbreastQwen3ForCausalLM(_ForCausalLM):
    """Qwen 3 with layers of their own width, and a gain of q and k for every head."""


class AbreastMixtralForCausalLM(_ForCausalLM):
    """Mixtral with layers of their own width and number of experts."""


class AbreastQwen3MoeForCausalLM(_ForCausalLM):
    """Qwen 3 with experts, and layers of their own width and number of them."""


class AbreastGptOssForCausalLM(_ForCausalLM):
    """gpt-oss with layers of their own width and number of experts."""
