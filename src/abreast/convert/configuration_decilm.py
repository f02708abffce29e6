"""Configuration of DeciLMForCausalLM: `block_configs` say what attention and FFN each layer has.

vLLM reads their entries as attributes. This file travels inside checkpoints of the formats deci
and deci-ff, so it imports transformers only.
"""

from typing import Any

from transformers import PretrainedConfig


class Block(dict):  # type: ignore[type-arg]  # a dict, so that the config can still be written
    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        # transformers reads it while it checks a scaled RoPE, before it keeps other keys
        self.max_position_embeddings = kwargs.pop("max_position_embeddings", 2048)
        super().__init__(**kwargs)
        self.block_configs = [
            Block({part: Block(entry) for part, entry in block.items()}) for block in block_configs
        ]
