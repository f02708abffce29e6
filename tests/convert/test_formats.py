"""Formats for other engines: what is written, proved, read back, and refused before weights are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abreast.convert import convert, preview, verify
from abreast.errors import AbreastError
from abreast.model import grouped, load
from abreast.targets import MLX_MODEL, refusals, servers_of

# deci's query heads for groups of 2 and 3 are the least that all can share: 6 times those of one.
PLANS = {"deci": "1+2 3~4", "deci-ff": "1~2 3~4", "openelm": "1+2 3+4", "mlx": "1|2:1 3~4"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def checked(form: str, source: Path, out: Path, plan: str = "", **options: Any) -> Any:
    convert(source, plan or PLANS[form], out, form=form, **options)
    result = verify(out, source, num_tokens=48, new_tokens=8)
    assert result.ok, result.faults
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("form", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_format_is_proved(tiny_checkpoint, tmp_path, form, dtype):
    checked(form, tiny_checkpoint(dtype=dtype, tied=form != "deci"), tmp_path / "out")
    code = {"openelm": set(), "mlx": {"mlx_model.py"}}.get(form, {"configuration_decilm.py"})
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == code


@pytest.mark.parametrize("form", PLANS)
def test_it_computes_what_the_groups_do(tiny_checkpoint, tmp_path, form):
    source = tiny_checkpoint("mistral", sliding_window=None, head_dim=24)
    convert(source, PLANS[form], tmp_path / "out", form=form)
    ids = torch.arange(20)[None]
    model, _ = load(source)
    with torch.inference_mode(), grouped(model, PLANS[form]):
        expected = model(ids).logits
    with torch.inference_mode():
        made = load(tmp_path / "out")[0](ids).logits
    assert (made - expected).abs().max() < 1e-4


def test_groups_of_two_and_three_share_their_heads(tiny_checkpoint, tmp_path):
    """With one query head per key-value head, 2 and 3 need a multiple of both."""
    source = tiny_checkpoint(num_layers=7, num_key_value_heads=4)
    config = checked("deci", source, tmp_path / "out", "1+2 3+4+5")
    assert config["num_attention_heads"] == 24
    groups = [block["attention"]["n_heads_in_group"] for block in config["block_configs"]]
    assert groups == [6, 3, 2, 6]


def test_widths_survive_rounding_to_256(tiny_checkpoint, tmp_path):
    config = checked("deci-ff", tiny_checkpoint(), tmp_path / "out", "1~2~3")
    hidden = config["hidden_size"]
    widths = [block["ffn"]["ffn_mult"] for block in config["block_configs"]]
    assert [mult and -(-int(2 * mult * hidden / 3) // 256) * 256 for mult in widths] == [
        256, None, None, 512, 256, 256
    ]  # fmt: skip
    down = load_file(tmp_path / "out/model.safetensors")["model.layers.3.mlp.down_proj.weight"]
    assert down.shape == (hidden, 512)
    assert not down[:, 3 * 96 :].any()
    assert down[:, : 3 * 96].all()


def test_a_zero_that_is_none_is_a_fault(tiny_checkpoint, tmp_path):
    source, out = tiny_checkpoint(), tmp_path / "out"
    convert(source, "1+2", out, form="deci")
    weights = load_file(out / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][-1, 0] = 1e-6
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((out / "abreast.json").read_text())
    from abreast.checkpoint import hash_entry

    manifest["files"]["model.safetensors"] = hash_entry(out / "model.safetensors")
    (out / "abreast.json").write_text(json.dumps(manifest))
    (fault,) = verify(out, source, num_tokens=48, new_tokens=8).faults
    assert "model.layers.0.self_attn.q_proj" in fault


def test_a_dry_run_says_what_it_costs(run, tiny_checkpoint):
    source = tiny_checkpoint()
    costs = {form: preview(source, plan, form=form).format_bytes for form, plan in PLANS.items()}
    # 5 of 6 FFNs (96) grow to 256, one of 192 does; openelm has true widths
    assert costs["openelm"] == costs["mlx"] == 0 < costs["deci-ff"] < costs["deci"]
    said = run("convert", source, "--plan", "1+2", "-o", "out", "--dry-run", "--format", "deci")
    assert "zeros for it" in "".join(map(str, said))


@pytest.mark.parametrize(
    ("form", "plan", "family", "settings", "reason"),
    [
        ("deci", "1+2 3|4", "llama", {}, r"group 3\|4 cannot be written as deci.*3\+4 or 3~4"),
        ("deci-ff", "1+2", "llama", {}, r"group 1\+2 cannot .* no lp groups; make it 1~2"),
        ("openelm", "1~2", "llama", {}, r"group 1~2 cannot .* no ff groups; make it 1\+2"),
        ("openelm", "1+2", "llama", {"rope_parameters": LLAMA3}, r"RoPE is scaled \(llama3\)"),
        ("deci", "1+2", "llama", {"attention_bias": True}, "self_attn.q_proj has a bias"),
        ("deci", "1+2", "llama", {"hidden_act": "gelu"}, "gated by gelu"),
        ("deci", "1+2", "qwen2", {}, "has a bias"),
        ("openelm", "1+2", "qwen3", {}, "norms q and k by head"),
        ("deci", "1+2", "mistral", {"sliding_window": 16}, "slides"),
        ("deci", "1+2", "granite", {}, "otherwise than Llama's"),
        ("mlx", "1+2", "olmo2", {}, "runs llama, mistral, qwen2, qwen3, gemma3_text;"),
        ("mlx", "1+2", "llama", {"hidden_act": "gelu"}, "gated by gelu, there by silu"),
        ("mlx", "1+2", "gemma3_text", {"hidden_activation": "swish"}, "there by gelu_pytorch_tanh"),
        ("mlx", "1+2", "gemma3_text", {"final_logit_softcapping": 30.0}, "caps scores"),
        ("mlx", "1+2", "gemma3_text", {"use_bidirectional_attention": True}, "looks ahead"),
        ("mlx", "1+2", "llama", {"rope_parameters": {**LLAMA3, "rope_type": "yarn"}}, r"\(yarn\)"),
        ("gguf", "1+2", "llama", {}, "is not one of auto, deci, deci-ff, openelm"),
    ],
)
def test_what_a_format_cannot_express(
    tiny_checkpoint, tmp_path, form, plan, family, settings, reason
):
    with pytest.raises(AbreastError, match=reason) as caught:
        preview(tiny_checkpoint(family, **settings), plan, form=form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["deci", "mlx"])
def test_another_name_of_silu_is_no_obstacle(tiny_checkpoint, tmp_path, form):
    convert(tiny_checkpoint(hidden_act="swish"), "1+2", tmp_path / "out", form=form)


def test_sequential_prefill_needs_our_classes(tiny_checkpoint):
    with pytest.raises(AbreastError, match="--format auto"):
        preview(tiny_checkpoint(), "1+2", form="openelm", prefill="sequential")


@pytest.mark.parametrize("form", PLANS)
def test_which_engine_loads_it(tiny_checkpoint, tmp_path, form):
    convert(tiny_checkpoint(), PLANS[form], tmp_path / "out", form=form)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    loads = {target.name: not any(refusals(target, config, None)) for target in servers_of(config)}
    assert loads == {
        "vLLM": form.startswith("deci"),
        "mlx-lm": form != "deci",
        "transformers": False,
        "llama.cpp": False,
    }


def test_llama3_rope_in_deci(tiny_checkpoint, tmp_path):
    config = checked("deci", tiny_checkpoint(rope_parameters=LLAMA3), tmp_path / "out")
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"]["rope_type"] == "llama3"
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)  # as vLLM does
    assert read.max_position_embeddings == 512
    assert read.rope_parameters["factor"] == 4.0
    assert read.block_configs[0].attention.n_heads_in_group == 2 * 2
    assert json.loads(read.to_json_string())["block_configs"] == config["block_configs"]


def test_mlx_keeps_the_originals_tensors(tiny_checkpoint, tmp_path):
    """And its order: sequential prefill, and groups of layers with different masks."""
    source, out = tiny_checkpoint("gemma3_text", head_dim=16, sliding_window=8), tmp_path / "out"
    convert(source, "1+2+3+4+5", out, form="mlx", prefill="sequential", force=True)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    result = verify(out, source, num_tokens=48, new_tokens=8)
    assert result.ok, result.faults
    assert result.prefill < 1e-6


def test_which_ranks_share_the_heads(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint(), "1+2", tmp_path / "out", form="mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    reasons = {n: next(refusals(MLX_MODEL, config, None, degree=n), "") for n in (1, 2, 4)}
    assert reasons[1] == reasons[2] == ""
    assert "4 ranks cannot share 2 KV heads" in reasons[4]
    assert "ABREAST_UNPAIRED=replicate" in reasons[4]


@pytest.mark.parametrize("key", ["block_configs", "hidden_size", "num_attention_heads"])
def test_a_config_that_makes_no_sense(tiny_checkpoint, tmp_path, key):
    out = tmp_path / "out"
    convert(tiny_checkpoint(), "1+2", out, form="deci")
    config = json.loads((out / "config.json").read_text())
    config[key] = "?"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(AbreastError, match="makes no sense"):
        load(out)
