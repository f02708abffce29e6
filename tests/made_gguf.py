"""GGUF files of small random checkpoints, as llama.cpp's converter writes them.

Its names of tensors, q and k of Llama in its order of rotation, gains of Gemma and Nemotron plus
one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoConfig

from abreast.checkpoint import open_checkpoint, read_rows
from abreast.engines.llamacpp.deci import llama3_factors

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA = {"tied": True, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # architecture, family, settings
    "llama": ("llama", "llama", {}),
    "llama-tied": ("llama", "llama", {"tied": True, "head_dim": 32}),
    "llama-biases": ("llama", "llama", {"biases": True}),
    "llama3": ("llama", "llama", {"rope_parameters": LLAMA3, "head_dim": 64}),
    "llama-yarn": ("llama", "llama", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32}),
    "phi3": ("phi3", "phi3", {}),
    "phi3-partial": ("phi3", "phi3", {"partial_rotary_factor": 0.75}),
    "starcoder2": ("starcoder2", "starcoder2", {}),
    "nemotron": ("nemotron", "nemotron", {}),
    "gemma2": ("gemma2", "gemma2", {**GEMMA, "final_logit_softcapping": 20.0}),
    "gemma3": ("gemma3", "gemma3_text", {**GEMMA, "rope_parameters": GEMMA3_ROPE}),
}
ROWS = 128


def alphabet() -> list[str]:
    """Tokens of a byte-level vocabulary: the letters, one merge, special ones, then unused."""
    letters = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]
    added = ["<s>", "</s>", "<end>"]
    tokens = [*letters, "ab", *added]
    return tokens + [f"[PAD{index}]" for index in range(len(tokens), ROWS)]


def pieces(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Change for `write_file`: SentencePiece in place of the byte-level vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(80))]
    tokens += ["\u2581", "a", "b", "c", "ab", "bc", "\u2581a", "  "]
    types = [2, 3, 3, *[6] * 80, *[1] * 7, 4]
    scores = [0.0] * 84 + [-9.0, -8.0, -7.0, -2.0, -1.0, -3.0, 0.0]
    facts.update({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    facts.update({"tokenizer.ggml.scores": scores, "tokenizer.ggml.model": "llama"})
    facts.update({"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2})
    facts.update({"tokenizer.ggml.unknown_token_id": 0})
    facts.pop("tokenizer.ggml.add_bos_token")


def write_file(
    path: Path,
    architecture: str,
    checkpoint: Path,
    change: Any = None,
    kinds: dict[str, str] | None = None,
) -> Path:
    """A checkpoint as a GGUF file. change(facts, tensors) may alter both before they are written.

    kinds: part of a tensor's name -> type to quantise it to.
    """
    source = open_checkpoint(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // heads
    epsilon = next(n for n in ("rms_norm_eps", "norm_epsilon", "norm_eps") if hasattr(config, n))
    norm = "layer_norm_rms" if epsilon == "rms_norm_eps" else "layer_norm"
    rope = dict(config.rope_parameters)
    rope = rope.get("full_attention", rope)
    facts: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        f"attention.{norm}_epsilon": getattr(config, epsilon),
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        facts |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        facts["rope.scaling.original_context_length"] = original
    if architecture.startswith("gemma"):
        facts["attention.sliding_window"] = config.sliding_window
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            facts |= {key: value} if (value := getattr(config, key)) else {}
    facts = {f"{architecture}.{key}": value for key, value in facts.items()}
    facts |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": alphabet(),
        "tokenizer.ggml.token_type": [1] * 97 + [3] * 3 + [5] * (ROWS - 100),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 97,
        "tokenizer.ggml.eos_token_id": 98,
        "tokenizer.ggml.eot_token_id": 99,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, info in source.tensors.items():
        stem, _, ending = name.rpartition(".")
        values = read_rows(info).float().numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if architecture in ("nemotron", "gemma2", "gemma3") and name.endswith("norm.weight"):
            values = values + 1
        tensors[f"{names.get_name(stem)}.{ending}"] = values
    if rope["rope_type"] == "llama3":
        divisors = llama3_factors(rope["rope_theta"], head_dim, rope, 8192)
        tensors["rope_freqs.weight"] = np.array(divisors, np.float32)
    if change is not None:
        change(facts, tensors)
    writer = gguf.GGUFWriter(path, facts.pop("general.architecture", architecture))
    for key, value in facts.items():
        kind = gguf.GGUFValueType.get_type(value)
        kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
        writer.add_key_value(key, value, kind)
    for name, values in tensors.items():
        kind = next((k for part, k in (kinds or {}).items() if part in name), None)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
