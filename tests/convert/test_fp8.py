"""`convert --quantize fp8`: matrices of layers in float8, a scale for every block of 128 x 128."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_quantised import quantised
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FineGrainedFP8Config,
)

import abreast.modeling  # noqa: F401  # makes converted models known to transformers
from abreast.checkpoint import damaged, open_checkpoint, read_manifest, read_rows, unpacked
from abreast.convert import convert, fp8, inspect_model, preview, stream, verify
from abreast.errors import AbreastError
from abreast.model import load
from abreast.report.card import card
from abreast.report.records import read_conversion

Weights = dict[str, torch.Tensor]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_layers": 5}
# family -> settings besides WIDE, plan
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"biases": True}, "1+2 3|4"),
    "qwen3": ({"tied": True}, "1+2 3~4"),
    "phi3": ({}, "1+2+3"),
    "starcoder2": ({}, "1+2 3|4"),
    "olmo2": ({"num_key_value_heads": 4}, "1+2 3|4"),
    "cohere": ({}, "1+2"),
}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def original(tiny_checkpoint: Callable[..., Path]) -> Made:
    def factory(family: str) -> Path:
        settings = {**WIDE, **MODELS[family][0]}
        if family == "phi3":  # whose heads are parts of the hidden size
            settings["num_attention_heads"] = settings["num_key_value_heads"] = 2
        return tiny_checkpoint(family, dtype="bfloat16", **settings)

    return factory


@pytest.fixture(scope="module")
def converted(original: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    made: dict[str, Path] = {}

    def factory(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "out"
            convert(original(family), MODELS[family][1], made[family], force=True, quantize="fp8")
        return made[family]

    return factory


def stored(folder: Path) -> Weights:
    """The tensors of every shard, by name."""
    weights: Weights = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return weights


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


sides = st.integers(1, 300)


@given(sides, sides, st.integers(0, 99), st.floats(-30, 30))
def test_every_number_comes_back_within_the_bound(
    rows: int, columns: int, seed: int, power: float
) -> None:
    """|x| / 16 (3 bits of mantissa) or a 1024th of the scale (the smallest step, halved)."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * 2.0**power
    matrix[:, ::7] *= 1e-4
    numbers, scales = fp8.quantise(matrix)
    assert numbers.shape == matrix.shape and numbers.dtype == torch.float8_e4m3fn
    assert scales.shape == (-(-rows // 128), -(-columns // 128))
    wide = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    back = fp8.rounded(matrix)
    assert back.equal(numbers.float() * wide)
    bound = torch.maximum(matrix.abs() / 16, wide / 1024) * (1 + 1e-6)
    assert ((back - matrix).abs() <= bound).all()
    largest = matrix.abs() == 448 * wide
    assert back[largest].equal(matrix[largest])


@given(sides, sides, st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_chunks_change_nothing(rows: int, columns: int, sizes: list[int]) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    chunks = matrix.split([*sizes, rows][: len(sizes)] if sum(sizes) == rows else sizes[0])
    pieces = list(fp8.stream("w", chunks))
    numbers, scales = fp8.quantise(matrix)
    assert {name for name, _ in pieces[:-1]} == {"w"} and pieces[-1][0] == "w_scale_inv"
    assert torch.cat([piece for _, piece in pieces[:-1]]).float().equal(numbers.float())
    assert pieces[-1][1].equal(scales)


def test_zeros_stay_zeros() -> None:
    numbers, scales = fp8.quantise(torch.zeros(3, 200))
    assert scales.eq(1).all() and numbers.float().eq(0).all()
    tiny = torch.full((2, 2), 1e-45)
    assert fp8.rounded(tiny).isfinite().all()


@pytest.mark.parametrize("family", MODELS)
def test_matrices_are_the_plain_conversions_rounded(
    original: Made, converted: Made, family: str, tmp_path: Path
) -> None:
    convert(original(family), MODELS[family][1], tmp_path / "plain", force=True, dtype="float32")
    plain, made = stored(tmp_path / "plain"), stored(converted(family))
    named = set(config_of(converted(family))["quantization_config"]["modules_to_not_convert"])
    scales = {name.removesuffix("_scale_inv") for name in made if name.endswith("_scale_inv")}
    assert {name for name in made if made[name].dtype == torch.float8_e4m3fn} == scales
    assert made.keys() == plain.keys() | {f"{name}_scale_inv" for name in scales}
    for name, tensor in plain.items():
        if name in scales:
            numbers, own = fp8.quantise(tensor)
            assert made[name].float().equal(numbers.float())
            assert made[f"{name}_scale_inv"].equal(own)
            assert "_proj" in name or ".dense" in name or ".fc" in name or ".c_" in name
        else:
            assert made[name].equal(tensor.to(torch.bfloat16))
    left = {n.removesuffix(".weight") for n in plain.keys() - scales if n.endswith(".weight")}
    assert named == left | {"lm_head"}
    assert not any(n.endswith("_proj") for n in named)


@pytest.mark.parametrize("family", MODELS)
def test_transformers_loads_it_and_says_nearly_the_same(
    original: Made, converted: Made, family: str, tmp_path: Path
) -> None:
    """Against the plain conversion with the same numbers, and with those before quantisation."""
    plan, out = MODELS[family][1], converted(family)
    convert(original(family), plan, tmp_path / "plain", force=True)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
        ).float()  # the rest comes in bfloat16 all the same
        logits = theirs(ids).logits
        assert load(out, dtype="float32")[0](ids).logits.equal(logits)
        plain = load(tmp_path / "plain", dtype="float32")[0]
        before = plain(ids).logits
        for name, tensor in unpacked(open_checkpoint(out)).items():
            if tensor.block:
                parameter = plain.get_parameter(name)
                numbers, scales = (read_rows(part) for part in tensor.parts)
                wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
                parameter.copy_(numbers.float() * wide)
        same = plain(ids).logits
    assert (logits - same).abs().max() < 1e-4 * (same.max() - same.min())
    # Numbers are off by a 16th at most, 0.03 on average: so is a product, and 5 layers of them.
    assert (logits - before).std() < 0.15 * before.std()
    assert (logits - before).std() > 0
    if not torch.cuda.is_available():  # as anybody loads it
        half = AutoModelForCausalLM.from_pretrained(out)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        with torch.inference_mode():
            assert (half(ids).logits.float() - logits).std() < 0.05 * logits.std()


@pytest.mark.parametrize("family", MODELS)
def test_it_is_verified(original: Made, converted: Made, family: str) -> None:
    result = verify(converted(family), original(family), num_tokens=24, new_tokens=4)
    assert result.ok, result.faults
    assert result.tensors == len(unpacked(open_checkpoint(converted(family))))


@pytest.mark.parametrize("part", ["numbers", "scales"])
def test_one_wrong_number_is_found(
    original: Made, converted: Made, part: str, tmp_path: Path
) -> None:
    from abreast.checkpoint.loaded import as_loaded
    from abreast.convert.refold import Refold
    from abreast.families import family_of
    from abreast.plan import Plan

    source = open_checkpoint(original("llama"))
    family = family_of(source.config)
    out = tmp_path / "out"
    out.mkdir()
    for path in converted("llama").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    made = open_checkpoint(out)
    whole = unpacked(made)
    refold = Refold(
        type(made)(**{**vars(made), "tensors": whole}),
        as_loaded(source, family),
        family,
        Plan.parse(MODELS["llama"][1], 5),
    )
    assert list(refold.misfits()) == list(refold.faults()) == []
    name = "model.layers.1.mlp.down_proj.weight"
    info = whole[name].parts[part == "scales"]
    with info.file.open("r+b") as file:
        file.seek(info.offset + info.nbytes - 1)
        last = file.read(1)[0]
        file.seek(info.offset + info.nbytes - 1)
        file.write(bytes([last ^ 1]))
    faults = list(refold.faults())
    assert len(faults) == 1 and f"'{name}'" in faults[0]
    assert next(damaged(out, read_manifest(out).files), None) is not None


def test_the_dry_run_says_the_bytes(original: Made, converted: Made) -> None:
    planned = preview(original("llama"), MODELS["llama"][1], force=True, quantize="fp8")
    weights = stored(converted("llama")).values()
    assert planned.bytes_written == sum(tensor.nbytes for tensor in weights)
    plain = preview(original("llama"), MODELS["llama"][1], force=True)
    assert planned.bytes_written < 0.65 * plain.bytes_written
    assert planned.dtype == "bfloat16" and planned.format_bytes == 0


def test_shards_hold_numbers_and_scales(original: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"quantize": "fp8", "max_shard_bytes": 100_000}
    convert(original("llama"), "1+2", tmp_path / "out", **options)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and all(path.stat().st_size <= 100_000 for path in shards[1:-1])
    convert(original("llama"), "1+2", tmp_path / "one", quantize="fp8")
    many, one = stored(tmp_path / "out"), stored(tmp_path / "one")
    assert many.keys() == one.keys()
    assert all(many[name].float().equal(one[name].float()) for name in one)


def test_fp8_in_fp8_out(original: Made, tmp_path: Path) -> None:
    """Published weights in float8 are quantised again, and that is verified."""
    packed, _ = quantised(original("llama"), "fp8", tmp_path / "made")
    convert(packed, "1+2 3|4", tmp_path / "out", force=True, quantize="fp8")
    assert verify(tmp_path / "out", packed, num_tokens=24, new_tokens=4).ok
    assert config_of(tmp_path / "out")["quantization_config"]["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("options", [{"prefill": "sequential"}, {"dtype": "float16"}], ids=str)
def test_with_other_options(original: Made, options: dict[str, Any], tmp_path: Path) -> None:
    plan = MODELS["qwen3"][1]
    convert(original("qwen3"), plan, tmp_path / "out", quantize="fp8", force=True, **options)
    result = verify(tmp_path / "out", original("qwen3"), num_tokens=24, new_tokens=4)
    assert result.ok, result.faults
    assert ("prefill" in options) == (result.prefill is not None)


def test_a_stock_model_where_all_layers_come_out_alike(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    source = tiny_checkpoint(
        "llama", **{**WIDE, "head_dim": 32, "num_layers": 4}, num_key_value_heads=4
    )
    convert(source, "0+1 2+3", tmp_path / "out", force=True, quantize="fp8")
    assert config_of(tmp_path / "out")["architectures"] == ["LlamaForCausalLM"]
    result = verify(tmp_path / "out", source, num_tokens=24, new_tokens=4)
    assert result.ok, result.faults


def test_the_decoder_within_a_wrapper(tmp_path: Path) -> None:
    """Its matrices are quantised, nothing of the vision encoder, and all that is left is named."""
    text = {
        **{"model_type": "llama", "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256},
        **{"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2},
    }
    vision = {
        **{"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 256},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", "1+2", tmp_path / "out", quantize="fp8")
    made, own = stored(tmp_path / "out"), config_of(tmp_path / "out")
    packed = {name for name, tensor in made.items() if tensor.dtype == torch.float8_e4m3fn}
    assert len(packed) == 3 * 7 and all("language_model" in name for name in packed)
    left = own["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in left and any("vision_tower" in name for name in left)
    result = verify(tmp_path / "out", tmp_path / "model", num_tokens=24, new_tokens=4)
    assert result.ok, result.faults
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        assert loaded(torch.arange(3, 27)[None]).logits.isfinite().all()


def test_it_has_a_card(converted: Made) -> None:
    text = card(read_conversion(converted("llama")))
    assert "lp-wiring" in text and "model.safetensors" in text


def test_it_is_inspected_and_refused_where_it_cannot_run(converted: Made, run: Any) -> None:
    facts = inspect_model(converted("llama"))
    assert facts.plan == "1+2 3|4" and "F8_E4M3" in facts.dtypes
    assert "quantised already" in facts.refused_by["llama.cpp"]
    status, out, _ = run("inspect", converted("llama"))
    assert status == 0 and "F8_E4M3" in out


def test_matrices_of_no_whole_blocks_stay(tiny_checkpoint: Any, tmp_path: Path) -> None:
    """k and v of 64 rows: with them q, which engines join to them; o and the FFN are quantised."""
    small = tiny_checkpoint(
        "llama", **{**WIDE, "head_dim": 32}, num_attention_heads=4, num_key_value_heads=2
    )
    planned = preview(small, "1+2", quantize="fp8")
    said = "12 of 28 matrices stay as they are: not whole blocks of 128 x 128, or beside one that "
    assert f"{said}is not (self_attn.k_proj of layer 0 is 64 x 128)" in planned.warnings
    convert(small, "1+2", tmp_path / "out", quantize="fp8")
    left = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    projections = {name.rpartition(".")[2] for name in left if name.endswith("_proj")}
    assert projections == {"q_proj", "k_proj", "v_proj"}
    assert verify(tmp_path / "out", small, num_tokens=24, new_tokens=4).ok


@pytest.mark.parametrize(
    ("family", "settings", "quantize", "options", "said"),
    [
        ("llama", {}, "int4", (), "--quantize int4 is not written here, only fp8"),
        ("llama", {}, "mxfp4", (), "--quantize mxfp4 is not written here, only fp8"),
        ("llama", WIDE, "fp8", ("--format", "deci"), "--quantize fp8 needs --format auto"),
        ("mixtral", WIDE, "fp8", (), "--quantize fp8 is not for mixtral"),
        ("llama", {}, "fp8", (), "no matrix is whole blocks of 128 x 128"),
    ],
)
def test_what_cannot_be_written_is_refused_before_weights_are_read(
    tiny_checkpoint: Any,
    family: str,
    settings: dict[str, Any],
    quantize: str,
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "read_rows", None)
    folder = tiny_checkpoint(family, **settings)
    arguments = ("--plan", "1+2", "-o", tmp_path / "out", "--quantize", quantize, *options)
    status, _, err = run("convert", folder, *arguments)
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(AbreastError, match="--quantize"):
        preview(folder, "1+2", quantize=quantize, form=options[1] if options else "auto")


def test_memory_grows_by_rows_of_blocks_only(original: Made) -> None:
    plain, made = (
        preview(original("llama"), "1+2", quantize=kind).peak_memory for kind in (None, "fp8")
    )
    columns = 2 * WIDE["intermediate_size"]
    assert made - plain == 6 * 4 * 128 * columns and math.isfinite(made)
