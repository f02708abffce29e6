"""Conversion of whole checkpoints: what is written, what is copied, what the manifest says."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tokenizers import save
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from abreast.checkpoint import open_checkpoint
from abreast.convert import stream
from abreast.convert.config import REMOTE_CODE
from abreast.convert.rewrite import convert, preview
from abreast.convert.rules import FoldError
from abreast.evaluate import Tasks, evaluate_tasks
from abreast.heal import heal
from abreast.model import load
from abreast.plan import Plan, PlanError
from abreast.speed import Case, Contender, Job, run

TinyCheckpoint = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
PLAN = "1+2 3+4"
FAMILIES = ["llama", "mistral", "qwen2"]


def tensors_of(folder: Path) -> Tensors:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def copied(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint to be changed; keys of config.json replaced, removed where None."""
    shutil.copytree(source, target)
    new = {**config_of(source), **config}
    new = {key: value for key, value in new.items() if value is not None or key not in config}
    (target / "config.json").write_text(json.dumps(new))
    return target


def with_tensors(folder: Path, extra: Tensors) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bytes_twice(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(family, sharded=True)
    for name in ("a", "b"):
        convert(source, PLAN, tmp_path / name, max_shard_bytes=100_000)
    one, two = files(tmp_path / "a"), files(tmp_path / "b")
    manifests = [json.loads(made.pop("abreast.json")) for made in (one, two)]
    assert one == two
    assert manifests[0].pop("created") and manifests[1].pop("created")
    assert manifests[0] == manifests[1]
    assert sum(name.endswith(".safetensors") for name in one) > 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_single_layers_pass_through_unchanged(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str, dtype: str
) -> None:
    source = tiny_checkpoint(family, dtype=dtype)
    convert(source, PLAN, tmp_path / "out")
    old, new = tensors_of(source), tensors_of(tmp_path / "out")
    stages = {0: (0,), 1: (1, 2), 2: (3, 4), 3: (5,)}
    outer = [name for name in old if not name.startswith("model.layers.")]
    assert same({name: old[name] for name in outer}, {name: new.get(name) for name in outer})
    assert {tensor.dtype for tensor in new.values()} == {getattr(torch, dtype)}
    inside = {name.split(".", 3)[3] for name in old if name.startswith("model.layers.")}
    for index, stage in stages.items():
        for tensor in inside:
            made = new.pop(f"model.layers.{index}.{tensor}")
            members = [old[f"model.layers.{layer}.{tensor}"] for layer in stage]
            if len(stage) == 1:
                assert torch.equal(made, members[0])
            elif "layernorm" in tensor:
                assert torch.equal(made, torch.ones_like(members[0]))
            else:
                assert made.numel() == sum(member.numel() for member in members)
    assert sorted(new) == sorted(outer)


def test_folded_layer_by_hand(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", biases=True)
    convert(source, "2+3+4", tmp_path / "out")
    old, new = tensors_of(source), tensors_of(tmp_path / "out")

    def member(tensor: str) -> list[torch.Tensor]:
        return [old[f"model.layers.{layer}.{tensor}"] for layer in (2, 3, 4)]

    gains = member("post_attention_layernorm.weight")
    gate = [w * g for w, g in zip(member("mlp.gate_proj.weight"), gains, strict=True)]
    assert torch.equal(new["model.layers.2.mlp.gate_proj.weight"], torch.cat(gate))
    gains = member("input_layernorm.weight")
    keys = [w * g for w, g in zip(member("self_attn.k_proj.weight"), gains, strict=True)]
    assert torch.equal(new["model.layers.2.self_attn.k_proj.weight"], torch.cat(keys))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        side = torch.cat(member(f"{name}.weight"), dim=1)
        assert torch.equal(new[f"model.layers.2.{name}.weight"], side)
        total = sum(member(f"{name}.bias"))
        assert torch.allclose(new[f"model.layers.2.{name}.bias"], total, atol=1e-6)
    stacked = torch.cat(member("self_attn.q_proj.bias"))
    assert torch.equal(new["model.layers.2.self_attn.q_proj.bias"], stacked)
    widths = {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 288}
    assert config_of(tmp_path / "out")["per_layer_config"] == {"2": widths}


def group_of(
    checkpoint: Path, out: Path, plan: str = "2+3"
) -> tuple[Callable[[str], list[torch.Tensor]], Callable[[str], torch.Tensor]]:
    """Convert a plan of one group, layers 2 and 3: (a tensor's members, the one it became)."""
    convert(checkpoint, plan, out)
    old, new = tensors_of(checkpoint), tensors_of(out)
    return (
        lambda tensor: [old[f"model.layers.{layer}.{tensor}"] for layer in (2, 3)],
        lambda tensor: new[f"model.layers.2.{tensor}"],
    )


def test_packed_projections_by_hand(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    members, made = group_of(tiny_checkpoint("phi3"), tmp_path / "out")
    for tensor, norm, parts in (
        ("self_attn.qkv_proj.weight", "input_layernorm.weight", [64, 32, 32]),
        ("mlp.gate_up_proj.weight", "post_attention_layernorm.weight", [96, 96]),
    ):
        folded = [w * g for w, g in zip(members(tensor), members(norm), strict=True)]
        split = zip(*(weight.split(parts) for weight in folded), strict=True)
        assert torch.equal(made(tensor), torch.cat([torch.cat(part) for part in split]))


def test_gains_stored_less_one_by_hand(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    members, made = group_of(tiny_checkpoint("gemma", head_dim=16), tmp_path / "out")
    names = ("mlp.up_proj.weight", "post_attention_layernorm.weight")
    pairs = zip(*map(members, names), strict=True)
    expected = torch.cat([weight * (1 + gain) for weight, gain in pairs])
    assert torch.allclose(made("mlp.up_proj.weight"), expected, rtol=1e-6, atol=0)
    assert made("post_attention_layernorm.weight").eq(0).all()


def test_layer_norm_biases_by_hand(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    members, made = group_of(tiny_checkpoint("starcoder2", biases=True), tmp_path / "out")
    names = ("mlp.c_fc.weight", "mlp.c_fc.bias", "post_attention_layernorm.bias")
    expected = [w @ beta + bias for w, bias, beta in zip(*map(members, names), strict=True)]
    assert torch.allclose(made("mlp.c_fc.bias"), torch.cat(expected), rtol=0, atol=1e-5)
    assert made("post_attention_layernorm.bias").eq(0).all()
    assert made("post_attention_layernorm.weight").eq(1).all()


def test_head_norms_by_hand(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    members, made = group_of(tiny_checkpoint("qwen3", head_dim=16), tmp_path / "out")
    for norm, heads in (("self_attn.q_norm.weight", 4), ("self_attn.k_norm.weight", 2)):
        first, second = members(norm)
        assert torch.equal(made(norm), torch.stack([first] * heads + [second] * heads))


@pytest.mark.parametrize("bypass", [0, 1])
def test_members_that_stay_apart_by_hand(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, bypass: int
) -> None:
    members, made = group_of(tiny_checkpoint(), tmp_path / "out", f"2|3:{bypass}")
    for name, side in (("self_attn.o_proj", 0), ("mlp.down_proj", 1)):
        assert torch.equal(made(f"{name}.weight"), torch.cat(members(f"{name}.weight"), side))
    config = config_of(tmp_path / "out")
    assert config["per_layer_config"]["2"]["abreast_members"] == 2
    assert config["per_layer_config"]["2"]["abreast_bypass"] == bypass
    assert (config["abreast_members"], config["abreast_bypass"]) == (1, None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sharding_changes_no_tensor(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str, tied: bool
) -> None:
    whole, split = (tiny_checkpoint(family, tied=tied, sharded=s) for s in (False, True))
    assert len(list(split.glob("*.safetensors"))) > 1
    convert(whole, PLAN, tmp_path / "whole")
    convert(split, PLAN, tmp_path / "split", max_shard_bytes=60_000)
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    made = tensors_of(tmp_path / "whole")
    assert same(made, tensors_of(tmp_path / "split"))
    assert ("lm_head.weight" in made) == (not tied)
    assert config_of(tmp_path / "whole")["tie_word_embeddings"] == tied


def test_tied_checkpoint_that_stores_its_head(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = copied(tiny_checkpoint(tied=True), tmp_path / "source")
    convert(source, PLAN, tmp_path / "plain")
    with_tensors(source, {"lm_head.weight": tensors_of(source)["model.embed_tokens.weight"]})
    manifest = convert(source, PLAN, tmp_path / "out")
    assert manifest["source"]["dropped_tensors"] == ["lm_head.weight"]
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain"))


def test_rotary_buffers_of_old_checkpoints_are_dropped(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = copied(tiny_checkpoint(), tmp_path / "source")
    manifest = convert(source, PLAN, tmp_path / "plain")
    assert manifest["source"]["dropped_tensors"] == []
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(6)]
    with_tensors(source, {name: torch.full((8,), torch.nan) for name in names})
    manifest = convert(source, PLAN, tmp_path / "out")
    assert manifest["source"]["dropped_tensors"] == names
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain"))


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_cast(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, stored: str, target: str) -> None:
    source = tiny_checkpoint(dtype=stored)
    convert(source, PLAN, tmp_path / "out", dtype=target)
    old, new = tensors_of(source), tensors_of(tmp_path / "out")
    kind = getattr(torch, target)
    assert {tensor.dtype for tensor in new.values()} == {kind}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(new[name], old[name].to(kind))
    weight, gain = (
        torch.cat([old[f"model.layers.{layer}.{tensor}"] for layer in (1, 2)])
        for tensor in ("self_attn.q_proj.weight", "input_layernorm.weight")
    )
    exact = weight.double() * gain.double().view(2, 64).repeat_interleave(64, 0)
    assert torch.equal(new["model.layers.1.self_attn.q_proj.weight"], exact.float().to(kind))
    assert config_of(tmp_path / "out")["dtype"] == target


def test_manifest(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = copied(tiny_checkpoint(sharded=True), tmp_path / "source")
    save("gpt-2", source)
    returned = convert(source, PLAN, tmp_path / "out", max_shard_bytes=100_000)
    written = files(tmp_path / "out")
    manifest = json.loads(written.pop("abreast.json"))
    assert manifest == returned
    assert manifest["files"] == {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in written.items()
    }
    inputs = files(source)
    for name, entry in manifest["source"]["files"].items():
        content = inputs[name]
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    read = {name for name in inputs if not name.endswith(".index.json")}
    assert set(manifest["source"]["files"]) == read
    assert manifest["source"]["name"] == str(source)
    assert manifest["source"]["revision"] is None
    record = {"source": str(source), "revision": None, "sha256": open_checkpoint(source).sha256}
    assert Plan.model_validate(manifest["plan"]) == Plan.parse(PLAN, 6, **record)
    assert (manifest["shorthand"], manifest["num_layers"], manifest["depth"]) == (PLAN, 6, 4)
    assert manifest["architecture"] == "AbreastLlamaForCausalLM"
    assert manifest["warnings"] == []


def test_only_what_belongs_to_the_model_travels(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = copied(tiny_checkpoint(), tmp_path / "source")
    travels = {
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
        *("additional_chat_templates/rag.jinja", "chat_templates/tools.jinja"),
        *("preprocessor_config.json", "processor_config.json", "added_tokens.json"),
        *("LICENSE", "LICENSE.txt", "Notice.txt", "USE_POLICY.md", "tokenizer.model.v3"),
    }
    leftovers = {
        *("modeling_tiny.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "hf_token.txt"),
        *("tf_model.h5", "model.gguf", "other.safetensors", "adapter_model.safetensors"),
        *("flax_model.msgpack", "original/params.json", "plan.yaml", "training.log"),
        *("trainer_state.json", "training_args.bin", "optimizer.pt", "rng_state.pth", "token"),
        *("events.out.tfevents.1.host", "quantize_config.json", "backup.tar.gz", "notes.txt"),
        *("checkpoint-10/trainer_state.json", "license_key.txt", "vocab.json.bak", "wandb.json"),
    }
    silent = {"README.md", ".gitattributes", "abreast.json", "model.safetensors.index.json"}
    for name in travels | leftovers | silent:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}" if name.endswith(".json") else f"this is {name}")
    save("gpt-2", source)
    convert(source, PLAN, tmp_path / "out")
    written = files(tmp_path / "out")
    for name in travels - {"tokenizer.json", "tokenizer_config.json"}:
        assert written[name] == (source / name).read_bytes()
    ours = {"config.json", "model.safetensors", "abreast.json", *REMOTE_CODE}
    assert set(written) == travels | ours | {"generation_config.json"}
    assert not written["abreast.json"].startswith(b"this is")
    (warning,) = preview(source, PLAN).warnings
    named = warning.split(": ")[1].split(", ")
    assert named[0] == "adapter_model.safetensors" and "backup.tar.gz" in named
    assert named[-1].endswith(f"and {len(leftovers) - 9} more")
    (source / "hf_token.txt").rename(source / "a_token.txt")
    assert preview(source, PLAN).warnings[0].split(": ")[1].startswith("a_token.txt, adapter_model")
    assert "a_token" not in (tmp_path / "out" / "abreast.json").read_text()


@pytest.mark.parametrize("plan", [PLAN, "0|1 2|3 4|5"])
def test_continuous_batching_is_refused(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, plan: str
) -> None:
    convert(tiny_checkpoint(), plan, tmp_path / "out", force=True)
    model, _ = load(tmp_path / "out")
    with pytest.raises(ValueError, match=r"layers of different width cannot .*; use generate$"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)  # type: ignore[operator]


def test_uniform_plan_gives_a_stock_model(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from abreast.model.grouping import grouped

    source, out = tiny_checkpoint(), tmp_path / "out"
    plan = Plan.parse("0+1 2+3 4+5", 6)
    manifest = convert(source, plan, out, force=True)
    assert len(manifest["warnings"]) == 2
    config = config_of(out)
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert not {"per_layer_config", "auto_map"} & set(config)
    assert not list(out.glob("*.py"))
    model, report = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert type(model) is LlamaForCausalLM and len(model.model.layers) == 3
    assert model.config.num_attention_heads == 8 and model.config.head_dim == 16
    original = LlamaForCausalLM.from_pretrained(source)
    ids = torch.arange(40).view(1, -1)
    with torch.inference_mode(), grouped(original, plan):
        expected = original(ids).logits
        assert torch.allclose(model(ids).logits, expected, atol=1e-4 * float(expected.abs().max()))


def test_uniform_plan_whose_heads_do_not_divide_the_hidden_size(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    convert(tiny_checkpoint(), "0+1+2 3+4+5", tmp_path / "out", force=True)
    config = config_of(tmp_path / "out")
    assert config["model_type"] == "abreast_llama"
    assert config["num_attention_heads"] == 4
    assert sorted(config["per_layer_config"]) == ["0", "1"]
    assert (tmp_path / "out" / "modeling.py").is_file()


@pytest.mark.parametrize("explicit", [True, False])
def test_sliding_layers_keep_their_kind(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, explicit: bool
) -> None:
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    source = tiny_checkpoint(
        "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3
    )
    assert config_of(source)["layer_types"] == kinds
    if not explicit:
        source = copied(source, tmp_path / "source", layer_types=None)
    with pytest.raises(FoldError, match="full_attention and sliding_attention"):
        convert(source, "2+3", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(source, PLAN, tmp_path / "out")
    assert config_of(tmp_path / "out")["layer_types"] == [
        *("full_attention", "full_attention", "sliding_attention", "sliding_attention")
    ]


@pytest.mark.parametrize(
    ("family", "plan", "chunk"),
    [
        ("llama", "1|2|3:1", 1),
        ("phi3", "1+2+3", 1),
        ("phi3", "1|2|3:1", 1000),
        ("starcoder2", "1+2+3", 1000),
        ("starcoder2", "1|2|3:1", 1000),
        ("qwen3", "1+2+3", 1000),
        ("olmo2", "1|2|3:1", 1000),
    ],
)
def test_small_chunks_change_nothing_and_bound_every_read(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    family: str,
    plan: str,
) -> None:
    source = tiny_checkpoint(family, head_dim=16, biases=True, sharded=True)
    convert(source, plan, tmp_path / "large")
    largest = 0
    read_rows = stream.read_rows

    def recording(tensor: Any, start: int = 0, stop: int | None = None) -> torch.Tensor:
        nonlocal largest
        rows = read_rows(tensor, start, stop)
        if len(tensor.shape) > 1:
            largest = max(largest, rows.nbytes)
            assert rows.nbytes < tensor.nbytes / 8
        return rows

    monkeypatch.setattr(stream, "read_rows", recording)
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
    manifest = convert(source, plan, tmp_path / "small")
    assert 0 < largest <= max(chunk, 96 * 4)  # one row is the least that can be read
    small, large = files(tmp_path / "small"), files(tmp_path / "large")
    del small["abreast.json"], large["abreast.json"]
    if family == "starcoder2":  # W beta is a sum, whose last bit may depend on the shape of W
        small_tensors, large_tensors = (
            tensors_of(tmp_path / "small"),
            tensors_of(tmp_path / "large"),
        )
        for name, tensor in small_tensors.items():
            assert torch.allclose(tensor, large_tensors[name], rtol=1e-6, atol=1e-6)
    else:
        assert small == large
    assert manifest["files"]["model.safetensors"]["bytes"] == len(small["model.safetensors"])


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"max_shard_bytes": 50_000}])
def test_preview_tells_the_truth(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    source = copied(tiny_checkpoint("qwen2", sharded=True), tmp_path / "source")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    before = files(source)
    previewed = preview(source, PLAN, **options)
    assert files(source) == before and list(work.iterdir()) == []
    manifest = convert(source, PLAN, work / "out", **options)

    def weight_bytes(folder: Path) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(folder).values())

    assert previewed.bytes_read == weight_bytes(source)
    assert previewed.bytes_written == weight_bytes(work / "out")
    written = sorted(path.name for path in (work / "out").glob("*.safetensors"))
    assert sorted(previewed.shards) == written
    assert previewed.architecture == manifest["architecture"] == "AbreastQwen2ForCausalLM"
    assert previewed.dtype == config_of(work / "out")["dtype"]
    assert (previewed.num_layers, previewed.depth, previewed.plan) == (6, 4, PLAN)
    assert previewed.stages == ((0,), (1, 2), (3, 4), (5,))
    assert json.loads(json.dumps(previewed.to_dict()))["bytes_read"] == previewed.bytes_read


def test_progress_counts_every_byte(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = tiny_checkpoint()
    convert(source, PLAN, tmp_path / "out", progress=lambda *step: seen.append(step))
    total = preview(source, PLAN).bytes_written
    assert seen[-1] == (total, total)
    assert {step[1] for step in seen} == {total}
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)


def test_mixed_dtypes_are_kept_with_a_warning(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = copied(tiny_checkpoint(dtype="bfloat16"), tmp_path / "source")
    name = "model.layers.1.mlp.up_proj.weight"
    with_tensors(source, {name: tensors_of(source)[name].float()})
    manifest = convert(source, PLAN, tmp_path / "out")
    assert "BF16, F32" in manifest["warnings"][0]
    made = tensors_of(tmp_path / "out")
    wide = {name for name, tensor in made.items() if tensor.dtype == torch.float32}
    assert wide == {name}  # stage 1, where a member is wide
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_only_nan_and_infinity_count_as_damage(dtype: str) -> None:
    kind = getattr(torch, dtype)
    limits = torch.finfo(kind)
    fine = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.smallest_normal, 1], dtype=kind)
    subnormal = torch.tensor([1], dtype=torch.int16).view(torch.uint8)
    fine = torch.cat([fine, subnormal.repeat(kind.itemsize // 2).view(kind)])
    assert fine.isfinite().all()
    assert stream._is_finite(fine)
    assert stream._is_finite(fine[:0])
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        for index in range(len(fine)):
            damaged = fine.clone()
            damaged[index] = value
            assert not stream._is_finite(damaged)


def test_thread_count_is_put_back(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise RuntimeError("stop")

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        convert(tiny_checkpoint(), PLAN, tmp_path / "out")
        assert torch.get_num_threads() == 4
        with pytest.raises(RuntimeError, match="stop"):
            convert(tiny_checkpoint(), PLAN, tmp_path / "failed", progress=fail)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    Plan.parse(PLAN, 6).save(path)
    return path


def test_every_way_to_give_a_plan(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, plan_file: Path
) -> None:
    for index, plan in enumerate([PLAN, Plan.parse(PLAN, 6), str(plan_file)]):
        convert(tiny_checkpoint(), plan, tmp_path / str(index))
    made = [files(tmp_path / str(index))["model.safetensors"] for index in range(3)]
    assert made[0] == made[1] == made[2]


def test_config_is_carried_over(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    source = copied(
        tiny_checkpoint("mistral"),
        tmp_path / "source",
        rope_parameters=rope,
        head_dim=None,
        dtype=None,
        torch_dtype="float32",
        made_up_key=[1, 2],
    )
    convert(source, PLAN, tmp_path / "out")
    old, new = config_of(source), config_of(tmp_path / "out")
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert changed == {
        *("abreast", "architectures", "auto_map", "dtype", "head_dim", "model_type"),
        *("num_hidden_layers", "per_layer_config", "torch_dtype"),
    }
    assert (new["num_hidden_layers"], new["head_dim"], new["dtype"]) == (4, 16, "float32")
    assert new["abreast"] == {"num_layers": 6, "plan": PLAN}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_plan_made_for_another_model_meets_none(tiny_checkpoint, tmp_path):
    """Its hash is in the plan file; the groups by themselves go with any model."""
    model, other, file = tiny_checkpoint(), tiny_checkpoint(seed=1), str(tmp_path / "plan.yaml")
    manifest = convert(model, PLAN, tmp_path / "out")
    plan = Plan.model_validate(manifest["plan"])
    assert plan.source == str(model) and plan.sha256 == open_checkpoint(model).sha256
    plan.save(file)
    case = Case("prefill", 1, 4, 0)
    bench = lambda folder: run(  # noqa: E731
        Job((Contender("original", str(folder)), Contender("new", str(folder), file)), (case,))
    )
    none = Tasks({}, {}, {}, None, 0)
    for meet in (
        lambda folder: convert(folder, file, tmp_path / "new"),
        lambda folder: heal(folder, file, tmp_path / "new", method="refit"),
        lambda folder: load(folder, plan=file),
        lambda folder: evaluate_tasks(folder, none, plan=file),
        bench,
    ):
        with pytest.raises(PlanError, match=rf"another model \({model}\) .*: --plan '1\+2 3\+4'$"):
            meet(other)
    assert not (tmp_path / "new").exists()
    load(model, plan=file)
    again = convert(other, plan.shorthand, tmp_path / "new")
    assert again["plan"]["sha256"] == open_checkpoint(other).sha256 != plan.sha256
