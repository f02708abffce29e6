"""vLLM's transformers backend for the families without native layers.

The backend replaces a model's matrices and norms by vLLM's own, judging by their classes. It cannot
see that some of ours take inputs member by member; those it must leave alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from abreast.engines.vllm.models import without_adapters
from abreast.engines.vllm.plugin import StreamsOfOriginal
from abreast.engines.vllm.quantized import dequantized
from abreast.modeling_members import ThroughViews


class AbreastForCausalLM(StreamsOfOriginal, TransformersForCausalLM):
    """A converted model of any family, built by modeling.py and run with vLLM's attention.

    Groups with parts that stay with their member need a tensor parallel size of 1, which plugin.py
    checks.
    """

    def recursive_replace(self) -> None:
        protected = []
        for index, layer in enumerate(self.model.layers):
            own = self.config.per_layer_config[index]
            if getattr(own, "abreast_members", 1) > 1 and not isinstance(layer, PPMissingLayer):
                protected += list(_member_modules(layer))
        for parent, name, _ in protected:
            setattr(parent, name, _placeholder(parent, name))
        super().recursive_replace()
        for parent, name, module in protected:
            setattr(parent, name, module)
        parts = {module for _, _, part in protected for module in part.modules()}
        self.apart = {
            f"model.{name}"
            for name, module in self.model.named_modules()
            if module in parts and isinstance(module, nn.Linear)
        }
        self.hf_to_vllm_mapper = without_adapters(self.hf_to_vllm_mapper, self.apart)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(dequantized(weights, self.apart))


def _member_modules(layer: Any) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of what works member by member in a layer of modeling.py: the FFN,
    norms with a gain per member or head, and the output of the attention."""
    yield layer, "mlp", layer.mlp
    for parent in (layer, layer.self_attn):
        for name, module in parent.named_children():
            weight = getattr(module, "weight", None)
            several_gains = "norm" in name and weight is not None and weight.dim() > 1
            apart = name == "o_proj" and isinstance(parent, ThroughViews)
            if several_gains or apart:
                yield parent, name, module


def _placeholder(parent: Any, name: str) -> nn.Module:
    """What the backend may replace instead; it expects a matrix after the attention."""
    if name != "o_proj":
        return nn.Identity()
    rows, columns = parent.o_proj.weight.shape
    members = parent.viewing[0].o_proj.members
    return nn.Linear(members * columns, rows // members, bias=False, device="meta")
