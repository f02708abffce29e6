"""Published quantised weights are read as the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_quantised import quantised
from safetensors.torch import load_file, save_file

from abreast.checkpoint import read_rows
from abreast.checkpoint.loaded import as_loaded
from abreast.checkpoint.tensors import open_checkpoint
from abreast.convert import convert, inspect_model, preview, verify
from abreast.errors import AbreastError
from abreast.families import family_of
from abreast.model import load

# model_type -> (method, what makes it small, plan)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt_oss": ("mxfp4", {"layer_types": ["full_attention"] * 6}, "1+2 3~4"),
    "qwen3": ("fp8", {}, "1+2 3|4"),
    # transformers takes the last, partial block of a matrix for as large as the others
    "qwen3_moe": ("fp8", {"moe_intermediate_size": 32}, "1+2 3|4"),
}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(quantised, plain) folders of the same numbers."""
    folders: dict[str, tuple[Path, Path]] = {}

    def factory(family: str) -> tuple[Path, Path]:
        if family not in folders:
            method, settings, _ = MODELS[family]
            out = tmp_path_factory.mktemp(family)
            folders[family] = quantised(tiny_checkpoint(family, **settings), method, out)
        return folders[family]

    return factory


@pytest.mark.parametrize("family", MODELS)
def test_the_conversion_is_that_of_the_same_numbers(
    made: Made, family: str, tmp_path: Path
) -> None:
    packed, plain = made(family)
    plan = MODELS[family][2]
    for name, folder in (("ours", packed), ("theirs", plain)):
        convert(folder, plan, tmp_path / name)
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    assert "quantization_config" not in json.loads((ours / "config.json").read_text())
    weights, others = (load_file(f / "model.safetensors") for f in (ours, theirs))
    assert weights.keys() == others.keys()
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert all(weights[name].equal(others[name]) for name in weights)


@pytest.mark.parametrize("family", MODELS)
def test_it_is_written_in_another_dtype_on_request(made: Made, family: str, tmp_path: Path) -> None:
    packed, plain = made(family)
    for name, folder in (("ours", packed), ("theirs", plain)):
        convert(folder, MODELS[family][2], tmp_path / name, dtype="float32")
    weights, others = (load_file(tmp_path / f / "model.safetensors") for f in ("ours", "theirs"))
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert all(weights[name].equal(others[name]) for name in others)


@pytest.mark.parametrize("family", MODELS)
def test_it_is_inspected_and_verified(made: Made, family: str, tmp_path: Path) -> None:
    packed, _ = made(family)
    method, _, plan = MODELS[family]
    facts = inspect_model(packed)
    assert facts.fusable and any(method in warning for warning in facts.warnings)
    assert any(method in warning for warning in preview(packed, plan).warnings)
    convert(packed, plan, tmp_path / "out")
    result = verify(tmp_path / "out", packed, num_tokens=24, new_tokens=4)
    assert result.ok, result.faults
    ids = torch.arange(3, 27)[None]
    with torch.inference_mode():
        ours = load(tmp_path / "out", dtype="float32")[0](ids).logits
        theirs = load(made(family)[1], dtype="float32", plan=plan)[0](ids).logits
    assert (ours - theirs).abs().max() < 0.02 * (theirs.max() - theirs.min())


@pytest.mark.parametrize("family", MODELS)
def test_rows_are_those_of_the_whole(made: Made, family: str) -> None:
    checkpoint = open_checkpoint(made(family)[0])
    tensors = as_loaded(checkpoint, family_of(checkpoint.config)).tensors
    for tensor in (t for t in tensors.values() if t.block or any(p.block for p in t.parts)):
        whole = read_rows(tensor)
        assert whole.shape == (tensor.rows, tensor.shape[-1])
        for start in range(0, tensor.rows, 29):
            stop = min(tensor.rows, start + 29)
            assert read_rows(tensor, start, stop).equal(whole[start:stop])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "awq"}, "quant_method awq"),
        ({"quant_method": "fp8"}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size [0, 128]"),
        ({**BLOCKS, "fmt": "e5m2"}, "fmt e5m2"),
        ({**BLOCKS, "scale_fmt": "ue8m0"}, "scale_fmt ue8m0"),
        (["fp8"], "quant_method None"),
    ],
    ids=str,
)
def test_other_formats_are_refused_by_name(
    made: Made, settings: Any, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in made("qwen3")[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(AbreastError, match="is quantised") as caught:
        convert(folder, "1+2", tmp_path / "out")
    method = settings["quant_method"] if isinstance(settings, dict) else None
    assert f"({method}; quantization_config: {said})" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["gone", "short", "half"])
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_scales_that_do_not_fit(made: Made, family: str, change: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in made(family)[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("_scale_inv", "_scales")))
    scale = weights.pop(name)
    if change != "gone":
        weights[name] = scale[:-1].clone() if change == "short" else scale.half()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AbreastError, match=f"has no scales '{name}'"):
        convert(folder, "1+2", tmp_path / "out")
