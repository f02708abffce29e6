"""An adapter that is converted adds to a conversion what it adds to the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abreast.checkpoint import open_checkpoint, read_manifest
from abreast.convert import convert, convert_adapter, hash_inputs
from abreast.convert.adapter import _joined, _Low
from abreast.convert.fold import TensorRule
from abreast.errors import CheckpointError
from abreast.model import load

peft = pytest.importorskip("peft")

EXACT = 1e-4  # largest difference of logits, as a fraction of their range
Q = "model.layers.1.self_attn.q_proj"
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
FULL = {"layer_types": ["full_attention"] * 6}
ALL = "1+2 3+4"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", ALL, {}),
    "llama, three members": ("llama", "1+2+3", {"biases": True}),
    "llama, every wiring": ("llama", "0+1 2|3:1 4~5", {}),
    "qwen2, biases": ("qwen2", ALL, {}),
    "qwen3, norms of q and k": ("qwen3", ALL, {}),
    "gemma3, norms around": ("gemma3_text", "1+2 3|4:1", FULL),
    "phi3, packed": ("phi3", ALL, {}),
    "phi3, packed and apart": ("phi3", "1|2 3~4", {}),
    "olmo2, norms after": ("olmo2", "1+2 3|4", {}),
    "cohere, one norm": ("cohere", ALL, {}),
    "starcoder2, norms with biases": ("starcoder2", ALL, {}),
    "nemotron, biases that only groups have": ("nemotron", ALL, {}),
}
FAST = ("llama, every wiring", "gemma3, norms around", "nemotron, biases that only groups have")
Adapter = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Adapter:
    """A random adapter of a checkpoint, as peft saves it."""

    def make(original: Path, targets: Any = "all-linear", **settings: Any) -> Path:
        out = tmp_path_factory.mktemp("adapter") / "adapter"
        model = AutoModelForCausalLM.from_pretrained(original)
        config = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapted = peft.get_peft_model(
                model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **config)
            )
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "modules_to_save" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(out, save_embedding_layers=False)
        return out

    return make


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = load(folder, dtype="float32")[0]
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / (want.max() - want.min()))


def agree(original: Path, plan: str, adapter: Path, tmp_path: Path, **options: Any) -> Path:
    """The converted adapter against merging first and converting then; returns its folder."""
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    convert(original, plan, tmp_path / "grouped", force=True, **options)
    convert_adapter(adapter, tmp_path / "grouped", out)
    model = AutoModelForCausalLM.from_pretrained(original)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged)
    convert(merged, plan, tmp_path / "wanted", force=True, **options)
    want = logits(tmp_path / "wanted")
    assert difference(logits(tmp_path / "grouped", out), want) <= EXACT
    assert difference(logits(tmp_path / "grouped"), want) > 100 * EXACT
    return out


@pytest.mark.parametrize(
    "case", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_all_linear(tiny_checkpoint, trained, tmp_path, case):
    family, plan, settings = CASES[case]
    original = tiny_checkpoint(family, **settings)
    agree(original, plan, trained(original), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_attention_only(tiny_checkpoint, trained, tmp_path, case):
    family, plan, settings = CASES[case]
    original = tiny_checkpoint(family, **settings)
    adapter = trained(original, r".*self_attn\.(qkv|q|k|v|o)_proj")
    agree(original, plan, adapter, tmp_path)


def test_unlike_members(tiny_checkpoint, trained, tmp_path):
    """Ranks, scalings and adapted modules that differ from layer to layer."""
    original = tiny_checkpoint(tied=False)
    adapter = trained(
        original,
        ["q_proj", "o_proj", "layers.1.mlp.up_proj", "layers.2.mlp.down_proj", "lm_head"],
        rank_pattern={"layers.1.self_attn.q_proj": 7, r"layers\.[34]\..*o_proj": 2},
        alpha_pattern={"layers.2.self_attn.q_proj": 11},
        layers_to_transform=None,
    )
    out = agree(original, ALL, adapter, tmp_path)
    settings = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    ranks = {n.split(".", 2)[2][:-14]: len(t) for n, t in tensors.items() if "lora_A" in n}
    assert ranks["model.layers.1.self_attn.q_proj"] == 7 + 3 == settings["r"]
    assert ranks["model.layers.2.self_attn.o_proj"] == 2 + 2
    assert ranks["model.layers.1.mlp.up_proj"] == 3
    assert "model.layers.3.mlp.up_proj" not in ranks
    assert settings["rank_pattern"] == {n: r for n, r in ranks.items() if r != settings["r"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"targets": ["q_proj", "embed_tokens"]},
        {"targets": ["gate_proj", "q_proj"], "layers_to_transform": [1, 2, 3]},
        {"lora_bias": True, "checkpoint": {"biases": True}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings(tiny_checkpoint, trained, tmp_path, settings):
    original = tiny_checkpoint(**settings.pop("checkpoint", {}))
    agree(original, ALL, trained(original, **settings), tmp_path)


def test_sequential_prefill_and_cache(tiny_checkpoint, trained, tmp_path):
    """A prompt in order, with the adapter, is the original's with it."""
    original = tiny_checkpoint()
    adapter = trained(original)
    out = agree(original, "1|2:1 3+4", adapter, tmp_path, prefill="sequential")
    want = logits(original, adapter)
    assert difference(logits(tmp_path / "grouped", out), want) <= EXACT


def test_format_with_zeros_between(tiny_checkpoint, trained, tmp_path):
    """deci fills query heads and FFNs up; the adapter must act on none of the zeros."""
    original = tiny_checkpoint()
    agree(original, "1+2 3~4", trained(original), tmp_path, form="deci")


def test_rounded_once(tiny_checkpoint, trained, tmp_path):
    original = tiny_checkpoint()
    adapter = shutil.copytree(trained(original), tmp_path / "small")
    file = adapter / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file)
    convert(original, ALL, tmp_path / "grouped")
    record = convert_adapter(adapter, tmp_path / "grouped", tmp_path / "out")
    assert record["dtype"] == "bfloat16" and record["rank"] == 6
    exact, want = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", adapter)
    )
    gain = load_file(original / "model.safetensors")["model.layers.1.input_layernorm.weight"]
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(exact[name][:3], (want[name].float() * gain).bfloat16())


@given(
    ranks=st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any),
    parts=st.sampled_from([(), (2, 4), (1, 2, 3)]),
    operation=st.sampled_from(["rows", "columns"]),
)
def test_joined_is_the_joint_sum(ranks, parts, operation):
    """Against adding up every member's product where the matrix has that member."""

    class Source:
        shape = (6, 5)

    class Job:
        class checkpoint:
            tensors = dict.fromkeys(map(str, range(4)), Source)

    names = tuple(str(index) for index in range(len(ranks)))
    members = [
        _Low(torch.randn(rank, 5), torch.randn(6, rank), torch.randn(6)) if rank else None
        for rank in ranks
    ]
    rule = TensorRule("out", operation, names, parts=parts if operation == "rows" else ())
    made = _joined(Job, rule, None, members)
    expected = [torch.zeros(6, 5) if low is None else low.up @ low.down for low in members]
    if operation == "columns":
        want = torch.cat(expected, 1)
    else:
        pieces = [low.split(rule.parts or 6) for low in expected]
        want = torch.cat([piece for part in zip(*pieces, strict=True) for piece in part])
    assert made.down.shape[0] == made.up.shape[1] == sum(ranks)
    assert torch.allclose(made.up @ made.down, want, atol=1e-5)


def test_healed_conversion(tiny_checkpoint, trained, tmp_path):
    """The gains are the original's where healing left them alone, else the healed ones."""
    original = tiny_checkpoint()
    healed = shutil.copytree(original, tmp_path / "healed")
    tensors = load_file(healed / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    save_file(tensors | {name: tensors[name] + 1}, healed / "model.safetensors")
    source = {"name": str(original), "revision": None, "dropped_tensors": []}
    source["files"] = hash_inputs(open_checkpoint(original))
    outs = {train: tmp_path / train for train in ("all", "lora")}
    for train, out in outs.items():
        options = {"source": source, "recipe": {"train": train}}
        convert(healed, ALL, out, healed=options)
    adapter = trained(original, ["q_proj"])
    refused("--keep-weights", adapter, outs["all"])
    convert_adapter(adapter, outs["lora"], tmp_path / "old gains")
    convert_adapter(adapter, outs["all"], tmp_path / "new gains", base=healed)
    name = f"base_model.model.{Q}.lora_A.weight"
    old, new = (
        load_file(tmp_path / f"{which} gains" / "adapter_model.safetensors")[name][:3]
        for which in ("old", "new")
    )
    assert torch.allclose(new - old, load_file(adapter / "adapter_model.safetensors")[name])


@pytest.fixture
def pair(tiny_checkpoint, trained, tmp_path) -> tuple[Path, Path]:
    """(an adapter to be spoilt, its conversion)"""
    original = tiny_checkpoint()
    convert(original, ALL, tmp_path / "grouped")
    return shutil.copytree(trained(original), tmp_path / "adapter"), tmp_path / "grouped"


def refused(match: str, adapter: Path, converted: Path, **options: Any) -> None:
    out = adapter.parent / "out"
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_adapter(adapter, converted, out, **options)
    assert len(str(caught.value).splitlines()) == 1 and not out.exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "sets use_dora"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"of_a_later_peft": {"a": 1}}, "sets of_a_later_peft"),
        ({"peft_type": "LOHA"}, "LOHA adapter"),
        ({"bias": "all"}, "replaces biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 4}, r"not \[4, 96\]"),
        ({"lora_alpha": "much"}, "lora_alpha or alpha_pattern"),
        ({"lora_alpha": float("nan")}, "NaN"),
        ({"alpha_pattern": {"(.*)*x": 1}}, "intricate"),
        ({"alpha_pattern": {"(": 1}}, "makes no sense"),
        ({"alpha_pattern": [1]}, "makes no sense"),
    ],
    ids=str,
)
def test_configs_that_are_refused(pair, changes, match):
    file = pair[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(match, *pair)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({f"{Q}.lora_B.weight": None}, "incomplete"),
        ({f"{Q}.lora_B.weight": torch.zeros(7, 3)}, r"\[64, 3\]"),
        ({f"{Q}.lora_A.weight": torch.full((3, 64), torch.inf)}, "NaN or Inf"),
        ({f"{Q}.lora_magnitude_vector.weight": torch.ones(64)}, "replaces"),
        ({"model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(3, 64)}, "no matrix"),
        ({"model.layers.1.input_layernorm.weight": torch.ones(64)}, "group 1[+]2"),
        ({"lm_head.weight": torch.ones(130, 64)}, "vocabulary"),
        ({"whatever": torch.ones(1)}, "none of a LoRA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_are_refused(pair, changes, match):
    file = pair[0] / "adapter_model.safetensors"
    tensors = load_file(file) | {f"base_model.model.{n}": t for n, t in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    refused(match, *pair)


def test_pickles_and_wrong_folders(pair, tiny_checkpoint, tmp_path):
    adapter, converted = pair
    other = tiny_checkpoint(seed=1)
    refused("not made from", adapter, converted, base=other)
    refused("no model at", adapter, converted, base=tmp_path / "nowhere")
    refused("abreast.json", adapter, other)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused("pickles", adapter, converted)


def test_a_conversion_that_does_not_follow_from_its_plan(pair, tiny_checkpoint, tmp_path):
    adapter, converted = pair
    convert(tiny_checkpoint(), "1+2 4+5", tmp_path / "other", force=True)
    shutil.copyfile(tmp_path / "other" / "abreast.json", converted / "abreast.json")
    refused("is not what its plan makes", adapter, converted)


def test_command(pair, run, tmp_path):
    adapter, converted = pair
    status, text, _ = run(
        "convert-adapter", adapter, converted, "-o", tmp_path / "out", "--dry-run"
    )
    assert status == 0 and "rank up to 6" in text and not (tmp_path / "out").exists()
    status, text, _ = run("convert-adapter", adapter, converted, "-o", tmp_path / "out", "--json")
    assert status == 0
    record = json.loads(text)
    assert record["modules"] == 4 * 7 and record["warnings"] == []
    assert record["plan"] == read_manifest(converted).plan.shorthand
    status, _, err = run("convert-adapter", adapter, converted, "-o", tmp_path / "out")
    assert status == 2 and "exists" in err
