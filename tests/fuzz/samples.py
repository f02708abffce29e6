"""What the harnesses start from: a tiny checkpoint with a tokenizer, and a text."""

from __future__ import annotations

import json
from pathlib import Path

from abreast.data import HELD_OUT, documents


def checkpoint(folder: Path) -> Path:
    """Write FOLDER/model, six random Llama layers with a byte-level tokenizer, and text.txt."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    model = folder / "model"
    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(model, max_shard_size="60KB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (model / "tokenizer.json").write_text(tokenizer.to_str())
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    text = "".join(body for _, body in documents(HELD_OUT))[:20_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return model
