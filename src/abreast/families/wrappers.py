"""Models that hold a text decoder beside something else, a vision encoder as a rule.

The decoder is read, and converted, as if it were alone; everything else is carried along.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abreast.families.in_memory import DELTA
from abreast.families.parts import QK_BY_HEAD, QK_HEADS, attention, gated_ffn
from abreast.families.row import Family, FamilyError

DECODERS = (  # that exist within a wrapper only
    Family(
        "qwen2_5_vl_text",
        "Qwen2_5_VLText",
        attention("always") + gated_ffn(),
        derived_head_size=True,
        alone=False,
    ),
    Family(
        "qwen3_vl_text",
        "Qwen3VLText",
        attention("attention_bias", "attention_bias") + gated_ffn(),
        head_norms=QK_HEADS,
        defaults=(("head_dim", 128),),
        deci_lacks=QK_BY_HEAD,
        alone=False,
    ),
)

# The decoder's tensors in the three layouts there are; all others belong to the rest.
_DECODER = re.compile(
    r"(?:model\.)?language_model\.(?:model\.)?((?:layers|embed_tokens|norm)\..+)"
    r"|model\.((?:layers|embed_tokens|norm)\..+)"
    r"|(?:language_model\.)?(lm_head\..+)"
)
# What config.json says of the whole, but a decoder's says of itself.
_OF_THE_WHOLE = ("architectures", "auto_map", "dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True)
class Wrapper:
    """class_name: what the names of its classes in transformers begin with. decoder: model_type of
    the decoder where config.json names none, or calls it `once`. tied: whether its head is its
    embedding where config.json does not say. unfoldable: why its decoder runs in memory only.
    """

    model_type: str
    class_name: str
    decoder: str
    tied: bool = False
    once: str = ""
    unfoldable: str = ""


WRAPPERS = {
    row.model_type: row
    for row in (
        Wrapper("gemma3", "Gemma3", "gemma3_text", tied=True),
        Wrapper("mistral3", "Mistral3", "mistral", tied=True),
        Wrapper("qwen2_5_vl", "Qwen2_5_VL", "qwen2_5_vl_text"),
        Wrapper("qwen3_vl", "Qwen3VL", "qwen3_vl_text"),
        Wrapper("internvl", "InternVL", "qwen2", tied=True),
        Wrapper("llava", "Llava", "llama"),
    )
}


# Those whose decoder runs abreast in memory only.
HOLDERS = {
    "kimi_k25": Wrapper(
        "kimi_k25",
        "Kimi_K25",
        "deepseek_v3",
        once="kimi_k2",
        unfoldable="its vision encoder is stored with q, k and v fused (wqkv), which transformers "
        "splits only when it loads a kimi_k25",
    ),
    "qwen3_5": Wrapper("qwen3_5", "Qwen3_5", "qwen3_5_text", unfoldable=DELTA),
}
# Why the layers of other well-known types cannot become one, nor run side by side as they are.
OTHERS = {
    "kimi_k2": "its layers are DeepSeek V3's, under a name that transformers does not know; say "
    "deepseek_v3 in a copy of its config.json",
    "llama4_text": "its router scales what experts read, and it norms q and k after the rotation",
}
OTHERS["llama4"] = OTHERS["llama4_text"]


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """The row of a config.json, of an original or a conversion; None for a decoder by itself."""
    model_type = str(config.get("model_type"))
    return WRAPPERS.get(model_type.removeprefix("abreast_")) or HOLDERS.get(model_type)


def decoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the decoder that a wrapper holds; that of any other model as it is.

    within: the wrapper's model_type. deepstack_layers: after how many of the first layers features
    of images are added. Raises FamilyError where a wrapper describes no decoder.
    """
    row = wrapper_of(config)
    if row is None:
        return dict(config)
    flat = {k: v for k, v in config.items() if k != "vision_config"}  # Qwen2.5-VL's first release
    inner = config.get("text_config", flat if "hidden_size" in config else None)
    vision = config.get("vision_config") or {}
    if not isinstance(inner, dict) or not isinstance(vision, dict):
        raise FamilyError(
            f"config.json: the text_config of this {row.model_type} describes no text decoder"
        )
    own = inner.get("model_type") or row.decoder
    decoder = {key: config[key] for key in _OF_THE_WHOLE if key in config} | inner
    decoder |= {key: config[key] for key in ("architectures",) if key in config}
    decoder["model_type"] = row.decoder if own in (row.model_type, row.once) else own
    tied = inner.get("tie_word_embeddings", row.tied) if row.model_type == "llava" else row.tied
    decoder["tie_word_embeddings"] = config.get("tie_word_embeddings", tied)
    decoder["within"] = row.model_type
    if indexes := vision.get("deepstack_visual_indexes"):
        decoder["deepstack_layers"] = len(indexes)
    return decoder


def wrapped_config(config: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a wrapper, here `config`, around another decoder, which names its class."""
    row = wrapper_of(config)
    assert row is not None
    apart = {*_OF_THE_WHOLE, "deepstack_layers", "within"}
    inner = {key: value for key, value in decoder.items() if key not in apart}
    # What Qwen2.5-VL's first release says of the decoder it says at the top.
    whole = {k: v for k, v in config.items() if "text_config" in config or k not in inner}
    whole = {k: v for k, v in whole.items() if k not in ("torch_dtype", "auto_map")}
    whole |= {
        "model_type": row.model_type,
        "architectures": [f"{row.class_name}ForConditionalGeneration"],
        "dtype": decoder["dtype"],
        "text_config": inner,
        "tie_word_embeddings": decoder["tie_word_embeddings"],
    }
    if "auto_map" in decoder:
        module = decoder["auto_map"]["AutoConfig"].partition(".")[0]
        name = f"Abreast{row.class_name}ForConditionalGeneration"
        whole |= {
            "model_type": f"abreast_{row.model_type}",
            "architectures": [name],
            "auto_map": {
                "AutoConfig": f"{module}.Abreast{row.class_name}WrapperConfig",
                "AutoModelForImageTextToText": f"{module}.{name}",
            },
        }
    return whole


def decoder_name(stored: str) -> str | None:
    """What a tensor of a wrapper is called in its decoder by itself, None if it is none of it."""
    match = _DECODER.fullmatch(stored)
    if match is None:
        return None
    return match[3] or f"model.{match[1] or match[2]}"


def wrapped_name(name: str) -> str:
    """What transformers calls a tensor of a decoder, or of the rest, within the wrapper."""
    if decoder_name(name) is not None:
        return re.sub(r"^model\.(?=layers|embed_tokens|norm)", "model.language_model.", name)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
