"""What is said of well-known checkpoints holds for tiny ones of exactly their structure."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from made_quantised import quantised
from safetensors.torch import load_file, save_file

from abreast.convert import convert, known_models
from abreast.families import decoder_of
from abreast.model import load
from abreast.speed import typical_plan

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {model.name: model for model in known_models()}
QUICK = ("Llama-3.2-1B", "Phi-3.5-mini", "GLM-4.5-Air")
SMALL = {
    **{"hidden_size": 64, "vocab_size": 128, "num_hidden_layers": 8, "intermediate_size": 96},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "sliding_window": 5},
    **{"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"max_position_embeddings": 512, "head_dim": 16},
}
LATENT = {  # all of whole blocks of fp8, as transformers wants them
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8},
    **{"v_head_dim": 16, "moe_intermediate_size": 32},
    "n_routed_experts": 16,  # of which n_group wants two for each
}
GEMMA3 = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"), 8)
FACTORS = {"long_factor": [1.5] * 8, "short_factor": [1.0] * 8}


VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_hidden_layers": 1},
    **{"num_heads": 2, "num_attention_heads": 2, "head_dim": 16, "image_size": 28},
    **{"out_hidden_size": 64, "num_position_embeddings": 16, "window_size": 56},
    **{"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0, 1, 2]},
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same keys with small sizes; 4 heads that share their key-value heads as there."""
    if "vision_config" in config:
        vision = config["vision_config"]
        small = {key: 4 if key == "mm_tokens_per_image" else v for key, v in config.items()}
        small |= {"vision_config": {k: VISION.get(k, v) for k, v in vision.items()}}
        if "text_config" not in config:
            own = {k: v for k, v in config.items() if k != "vision_config"}
            return {**shrunk(own), "vision_config": small["vision_config"]}
        text = {**(GEMMA3 if config["model_type"] == "gemma3" else {}), **config["text_config"]}
        return {**small, "text_config": shrunk(text)}
    small = {key: SMALL.get(key, value) for key, value in config.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    small |= {"num_attention_heads": 4, "num_key_value_heads": max(1, 4 * kv_heads // heads)}
    if (config.get("rope_scaling") or {}).get("type") == "longrope":
        small["rope_scaling"] = config["rope_scaling"] | FACTORS
    if "mrope_section" in (config.get("rope_scaling") or {}):
        small["rope_scaling"] = config["rope_scaling"] | {"mrope_section": [2, 3, 3]}
    if config["model_type"] == "qwen3_vl_text":  # whose default is for larger heads
        small["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    if "kv_lora_rank" in config:
        small |= LATENT
    if config["model_type"] in ("phi3", "glm4", "smollm3"):  # defaults beyond the small vocabulary
        small["pad_token_id"] = None
    return small


def made(folder: Path, config: dict[str, Any]) -> None:
    """A random checkpoint with this config.json, its keys as they are."""
    left_out = ("auto_map", "torch_dtype", "quantization_config")
    bare = {k: v for k, v in config.items() if k not in left_out}
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if "vision_config" in config:
        auto = transformers.AutoModelForImageTextToText
    made_of = transformers.AutoConfig.for_model(
        **bare | {"pad_token_id": None, "eos_token_id": None}
    )
    auto.from_config(made_of).save_pretrained(folder)
    if "quantization_config" in config:
        method = config["quantization_config"]["quant_method"]
        packed, _ = quantised(folder, method, folder.with_name("copies"))
        shutil.copyfile(packed / "model.safetensors", folder / "model.safetensors")
        settings = json.loads((packed / "config.json").read_text())["quantization_config"]
        config = config | {"quantization_config": config["quantization_config"] | settings}
    if layers := config.get("num_nextn_predict_layers"):  # no class of transformers' has these
        assert layers == 1
        weights = load_file(folder / "model.safetensors")
        name = f"model.layers.{config['num_hidden_layers']}.embed_tokens.weight"
        weights[name] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def test_at_least_so_many_can_be_converted() -> None:
    assert len(KNOWN) == 40
    assert sum(model.reason is None for model in KNOWN.values()) == 37
    for model in KNOWN.values():
        assert model.source and (model.reason is None or "\n" not in model.reason)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name, model in KNOWN.items()
        if model.reason is None
    ],
)
def test_a_tiny_one_of_its_structure_converts_and_loads(name: str, tmp_path: Path) -> None:
    config = shrunk(KNOWN[name].config)
    made(tmp_path / "tiny", config)
    plan = typical_plan(decoder_of(config))
    assert plan.groups
    convert(tmp_path / "tiny", plan, tmp_path / "out")
    ids = torch.arange(3, 27)[None]
    tolerance = 0.05 if "quantization_config" in config else 1e-4  # read back in bfloat16
    with torch.inference_mode():
        ours = load(tmp_path / "out", dtype="float32")[0](ids).logits
        theirs = load(tmp_path / "tiny", plan=plan, dtype="float32")[0](ids).logits
    assert (ours - theirs).abs().max() <= tolerance * (theirs.max() - theirs.min())


@pytest.mark.parametrize("name", [name for name, model in KNOWN.items() if model.reason])
def test_the_others_are_refused_with_the_same_reason(name: str, tmp_path: Path, run: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN[name].config))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    status, _, said = run("convert", tmp_path, "--plan", "1+2", "-o", tmp_path / "out")
    assert status == 2 and KNOWN[name].reason in " ".join(said.split())


def test_inspect_prints_them(run: Any) -> None:
    status, out, _ = run("inspect", "--known", "--json")
    records = {record["name"]: record for record in json.loads(out)}
    assert status == 0 and records.keys() == KNOWN.keys()
    assert records["Falcon-H1-7B"]["reason"] == KNOWN["Falcon-H1-7B"].reason
    assert records["Gemma-2-9B"]["plan"].count("~") == 7
    for arguments in ([], ["model", "--known"]):
        assert run("inspect", *arguments)[0] == 2


def test_what_no_engine_splits_is_said_with_the_reason(run: Any) -> None:
    status, out, _ = run("inspect", "--known", "--json")
    entries = {r["name"]: r["estimates"]["8xH100"] for r in json.loads(out) if not r["reason"]}
    refused = {name: entry["refused"] for name, entry in entries.items() if entry["refused"]}
    assert status == 0 and len(refused) > 10
    said = " ".join(run("inspect", "--known")[1].split())
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    for name, reason in refused.items():
        assert any(name in line for line in said.split("8xH100: ")[1:] if reason in line)
        lines = [line for line in page.splitlines() if line.startswith("- ") and name in line]
        short = reason.partition(";")[0].rpartition(": ")[2]
        assert lines and all(short in line for line in lines)
    assert "layer 0 has 28 attention heads" in refused["Qwen2.5-7B"]
    assert "its experts have no vLLM layers" in refused["OLMoE-1B-7B"]
    assert "gpt-oss-20b" not in refused


def test_the_page_is_what_table_and_list_say() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import models_page

    assert models_page.PAGE.read_text("utf-8") == models_page.page(), "run scripts/models_page.py"
