"""Checkpoints that are no dense Llama, each in three shards: fp8 in blocks with experts, mxfp4,
attention through latent vectors, and a decoder within a model that reads images."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

FAMILIES = ("fp8", "mxfp4", "latent", "wrapper")
SIZES = {
    **{"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "head_dim": 8},
}
FULL = {"layer_types": ["full_attention"] * 6}
WRAPPER = {
    "text_config": {**SIZES, **FULL},
    "vision_config": {
        **{"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    },
    **{"mm_tokens_per_image": 4, "image_token_index": 5},
}


def families(folder: Path) -> None:
    """Write FOLDER/fp8, mxfp4, latent and wrapper, with the tokenizer of FOLDER/model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    sys.path.append(str(Path(__file__).parents[1]))
    from made_experts import EXPERTS, ROUTED
    from made_quantised import quantised

    def routed(family: str, **more: Any) -> Any:
        settings = {**SIZES, **EXPERTS, **ROUTED[family], **more}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        made = {
            "fp8": routed("qwen3_moe", moe_intermediate_size=32),
            "mxfp4": routed("gpt_oss", moe_intermediate_size=32, intermediate_size=32, **FULL),
            "latent": routed("deepseek_v3"),
            "wrapper": AutoModelForImageTextToText.from_config(
                AutoConfig.for_model("gemma3", **WRAPPER)
            ),
        }
        for name, model in made.items():
            plain = Path(directory, f"{name}-plain")
            model.save_pretrained(plain)
            if name in ("fp8", "mxfp4"):
                plain, _ = quantised(plain, name, Path(directory, name))
            shutil.copytree(plain, folder / name)
            _shard(folder / name)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(folder / "model" / file, folder / name / file)


def _shard(folder: Path, count: int = 3) -> None:
    """Divide model.safetensors into files with an index."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index: dict[str, str] = {}
    for part in range(count):
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        index |= dict.fromkeys(names[part::count], file)
        save_file(
            {name: weights[name] for name in names[part::count]}, folder / file, {"format": "pt"}
        )
    total = sum(tensor.nbytes for tensor in weights.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
