"""vLLM's transformers backend for the families without native layers.

The backend exchanges a model's matrices and norms for vLLM's own, by what their classes look like.
It cannot see that some of ours take inputs member by member. Those it must leave as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from vllm.model_executor.models.transformers import TransformersForCausalLM

from abreast.modeling import MemberLinear


class AbreastForCausalLM(TransformersForCausalLM):
    """A converted model of any family, built by modeling.py and run in vLLM's attention.

    Groups with parts that stay with their member run at a tensor parallel size of 1 only, which
    engines/vllm.py checks.
    """

    def recursive_replace(self) -> None:
        hidden = []
        for index, layer in enumerate(self.model.layers):
            if getattr(self.config.per_layer_config[index], "abreast_members", 1) > 1:
                hidden += list(_of_members(layer))
        for holder, name, module in hidden:
            setattr(holder, name, _stand_in(module))
        super().recursive_replace()
        for holder, name, module in hidden:
            setattr(holder, name, module)


def _of_members(layer: Any) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """What works member by member in a layer of modeling.py: its FFN, norms with several gains, and
    the attention's output."""
    yield layer, "mlp", layer.mlp
    for holder in (layer, layer.self_attn):
        for name, module in holder.named_children():
            weight = getattr(module, "weight", None)
            many = "norm" in name and weight is not None and weight.dim() > 1
            if many or isinstance(module, MemberLinear):
                yield holder, name, module


def _stand_in(module: nn.Module) -> nn.Module:
    """Something to be exchanged in its place; the backend wants a matrix after the attention."""
    if not isinstance(module, MemberLinear):
        return nn.Identity()
    columns = module.members * module.in_features
    return nn.Linear(columns, module.out_features, bias=False, device="meta")
