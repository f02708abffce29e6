"""Configurations and models of converted checkpoints: stock layers, each of its own width.

This file also travels inside every converted checkpoint as its remote code, so it imports torch
and transformers only. Widths live in transformers' own `per_layer_config` schema; what stock
classes lack today is to build every decoder layer from its own entry. That gap is closed here, and
nothing else: attention, FFN, norms, caches and generation are the family's own.
"""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer


def _check_widths(config: PreTrainedConfig) -> None:
    """Every layer's heads must share its KV heads evenly; hidden_size need not divide by them."""
    for index, layer in enumerate(config.per_layer_config):
        if layer.num_attention_heads % layer.num_key_value_heads:
            raise ValueError(
                f"layer {index}: {layer.num_attention_heads} attention heads cannot share "
                f"{layer.num_key_value_heads} key-value heads"
            )


@strict
class AbreastLlamaConfig(LlamaConfig):
    model_type = "abreast_llama"

    def validate_architecture(self) -> None:
        _check_widths(self)


@strict
class AbreastMistralConfig(MistralConfig):
    model_type = "abreast_mistral"

    def validate_architecture(self) -> None:
        _check_widths(self)


@strict
class AbreastQwen2Config(Qwen2Config):
    model_type = "abreast_qwen2"

    def validate_architecture(self) -> None:
        _check_widths(self)


def _without_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without layers and without widths of their own, for constructors that know none."""
    bare = copy.copy(config)
    bare.__dict__.pop("_heterogeneity_spec", None)
    bare.num_hidden_layers = 0
    return bare


class LayersOfOwnWidth(PreTrainedModel):
    """Mixed in before a stock model: builds it without layers, then gives it layers of own width.

    The models and everything in their layers are pointed at the one main config afterwards. Left
    with their per-layer copies, attention modules would miss a later change of the attention
    implementation and silently run without a causal mask. The rotary embedding keeps the bare copy:
    several kinds of RoPE scaling read the number of heads, which the main config refuses to name.
    """

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        bare = _without_layers(config)
        super().__init__(bare, *args, **kwargs)
        config._attn_implementation_internal = bare._attn_implementation_internal
        config._experts_implementation_internal = bare._experts_implementation_internal
        self.base_model.layers = nn.ModuleList(
            self.layer_class(config.per_layer_config[index], index)
            for index in range(config.num_hidden_layers)
        )
        for module in (self, self.base_model, *self.base_model.layers.modules()):
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = config
        self.post_init()


class AbreastLlamaModel(LayersOfOwnWidth, LlamaModel):
    config: AbreastLlamaConfig
    layer_class = LlamaDecoderLayer


class AbreastLlamaForCausalLM(LayersOfOwnWidth, LlamaForCausalLM):
    config: AbreastLlamaConfig
    layer_class = LlamaDecoderLayer


class AbreastMistralModel(LayersOfOwnWidth, MistralModel):
    config: AbreastMistralConfig
    layer_class = MistralDecoderLayer


class AbreastMistralForCausalLM(LayersOfOwnWidth, MistralForCausalLM):
    config: AbreastMistralConfig
    layer_class = MistralDecoderLayer


class AbreastQwen2Model(LayersOfOwnWidth, Qwen2Model):
    config: AbreastQwen2Config
    layer_class = Qwen2DecoderLayer


class AbreastQwen2ForCausalLM(LayersOfOwnWidth, Qwen2ForCausalLM):
    config: AbreastQwen2Config
    layer_class = Qwen2DecoderLayer


_CLASSES = (
    (AbreastLlamaConfig, AbreastLlamaModel, AbreastLlamaForCausalLM),
    (AbreastMistralConfig, AbreastMistralModel, AbreastMistralForCausalLM),
    (AbreastQwen2Config, AbreastQwen2Model, AbreastQwen2ForCausalLM),
)

for _config, _model, _causal in _CLASSES:
    _model.config_class = _causal.config_class = _config
    # Makes save_pretrained copy this file and write auto_map, so that a round trip keeps both.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal.register_for_auto_class("AutoModelForCausalLM")
    # As remote code, auto_map leads here; registering would push aside an installed abreast.
    if __name__ == "abreast.modeling":
        AutoConfig.register(_config.model_type, _config)
        AutoModel.register(_config, _model)
        AutoModelForCausalLM.register(_config, _causal)
