"""What the harnesses start from: a tiny checkpoint with a tokenizer, a text, and GGUF files."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from forked import run

from abreast.data import HELD_OUT, documents

FEW = ["--data", "text.txt", "--window", "32", "--windows", "8"]
SEARCH = [*FEW, "--max-group", "2", "--per-group", "1", "--no-plots", "--hardware", "A100"]
PLAN = ["plan", "model", *SEARCH, "--depth", "4", "-o", "run"]
MADE = (["convert", "model", "--plan", "1+2 3|4", "-o", "converted"], PLAN)


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


def make(folder: Path) -> None:
    """Write FOLDER/converted and FOLDER/run with the command itself."""
    for command in MADE:
        ended = run(command, folder, limited=False)
        if ended.status:
            raise SystemExit(f"{command} fails: {ended.err}")
    (folder / "tmp").rmdir()  # of the runs, who leave it empty


def adapter(folder: Path) -> None:
    """Write FOLDER/adapter, a random LoRA adapter of the model as peft saves it."""
    import torch
    from safetensors.torch import save_file

    out = folder / "adapter"
    out.mkdir()
    names = [f"base_model.model.model.layers.{i}.mlp.up_proj.lora_" for i in range(6)]
    shapes = {"A": (2, 32), "B": (48, 2)}
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{name}{side}.weight": torch.randn(shape, generator=generator)
        for name in names
        for side, shape in shapes.items()
    }
    save_file(weights, out / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
    settings |= {"target_modules": ["up_proj"], "base_model_name_or_path": "model"}
    (out / "adapter_config.json").write_text(json.dumps(settings))


def ending(folder: Path) -> None:
    """Write FOLDER/ending: the model with a token that ends texts, which tasks need."""
    shutil.copytree(folder / "model", folder / "ending")
    about = folder / "ending/tokenizer_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "eos_token": "~"}))


def gguf_files(folder: Path) -> None:
    """Write bytes.gguf and pieces.gguf: two random Llama layers, and each kind of tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.append(str(Path(__file__).parents[1]))
    from made_gguf import ROWS, pieces, write_file

    settings: dict[str, Any] = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 32}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with tempfile.TemporaryDirectory() as source, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(source)
        kinds = {"ffn_down": "Q8_0", "attn_output": "F16", "output": "Q4_0"}
        write_file(folder / "bytes.gguf", "llama", Path(source))
        write_file(folder / "pieces.gguf", "llama", Path(source), pieces, kinds)
