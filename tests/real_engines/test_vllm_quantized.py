"""Quantised conversions in vLLM, groups whose members stay apart included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import compare
from safetensors.torch import load_file, save_file
from test_vllm_features import generate

import abreast.modeling  # noqa: F401  teaches transformers the layers of different width
from abreast.convert.rewrite import convert
from abreast.demo import model_folder
from abreast.model.grouping import load

PLAN = "2+3 8|9 10|11:1"
NEEDS_AVX512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="vLLM has no 4-bit kernel for CPUs without AVX-512",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(model_folder(), PLAN, out, dtype="float32")
    return out


def quantized(folder: Path, out: Path, bits: int, group: int | None) -> Path:
    """Round every nn.Linear of a converted checkpoint, as compressed-tensors stores it.

    Returns a folder with the rounded weights as plain ones, to compare with. A matrix whose members
    stay apart is one nn.Linear to a quantiser.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    weights = load_file(folder / "model.safetensors")
    packed, rounded = {}, {}
    most = 2 ** (bits - 1) - 1
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module not in linear:
            packed[name] = rounded[name] = weight
            continue
        grouped = weight.view(weight.shape[0], -1, group or weight.shape[1])
        scale = grouped.abs().amax(-1, keepdim=True) / most
        whole = (grouped / scale).round().clamp(-most - 1, most)
        rounded[name] = (whole * scale).view_as(weight)
        whole = whole.view_as(weight).to(torch.int8)
        packed[f"{module}.weight_scale"] = scale.squeeze(-1)
        if bits == 8:
            packed[name] = whole
        else:
            packed[f"{module}.weight_packed"] = pack_to_int32(whole, bits)
            packed[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    plain = out.with_name(f"{out.name}-plain")
    for target, tensors in ((out, packed), (plain, rounded)):
        shutil.copytree(folder, target)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    shape = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**scheme, **shape},
                "input_activations": {**activations, "strategy": "token"} if bits == 8 else None,
            }
        },
    }
    (out / "config.json").write_text(json.dumps(config))
    return plain


def with_plain(llm: Any, **arguments: Any) -> dict[str, Any]:
    """Answers, and which linear layers of the decoder have plain weights."""

    def plain_modules(model: Any) -> list[str]:
        from abreast.engines.members import MemberLinear

        plain = []
        for name, module in model.model.layers.named_modules():
            method = type(getattr(module, "quant_method", None)).__name__
            is_torchs = isinstance(module, torch.nn.Linear) and type(module) is torch.nn.Linear
            if method == "UnquantizedLinearMethod" or isinstance(module, MemberLinear) or is_torchs:
                plain.append(name)
        return plain

    (plain,) = llm.apply_model(plain_modules)
    return {"answers": generate(llm, **arguments), "plain": plain}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize(
    ("bits", "group", "tolerance"),
    [
        pytest.param(8, None, 0.5, id="W8A8"),
        pytest.param(4, 32, 0.3, id="W4A16", marks=NEEDS_AVX512),
    ],
)
def test_compressed_tensors(in_engine, folder, tmp_path, bits, group, tolerance, tensor_parallel):
    """Against transformers with the same rounded weights: what differs is the arithmetic.

    All of it runs in bfloat16, and W8A8 rounds activations as well. Scales or shards in the wrong
    place change log probabilities by several units.
    """
    plain = quantized(folder, tmp_path / "small", bits, group)
    prompts = [load(folder)[1]("import os\nimport sys\n\ndef main(")["input_ids"]]
    arguments = {"prompts": prompts, "new_tokens": 8}
    done = in_engine(tmp_path / "small", with_plain, tensor_parallel, arguments, dtype="bfloat16")
    compare(plain, prompts, done["answers"], tolerance=tolerance)
    assert done["plain"] == []


SIZES = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 256}  # as vLLM's kernels want
PROMPTS = [list(range(3, 20)), [5, 99, 7]]


@pytest.mark.parametrize(
    ("plan", "tensor_parallel", "unquantized"),
    [
        ("1|2", 4, ["1.self_attn.o_proj"]),  # whose rows and columns are both shared out
        ("1|2|3|4:1", 2, []),
    ],
    ids=["two ranks per member", "two members per rank"],
)
def test_members_and_ranks_need_not_be_equal(
    in_engine, converted, tiny_checkpoint, tmp_path, plan, tensor_parallel, unquantized
):
    folder = converted(tiny_checkpoint(**SIZES), plan)
    plain = quantized(folder, tmp_path / "small", 8, None)
    arguments = {"prompts": PROMPTS, "new_tokens": 8}
    options = {"dtype": "bfloat16", "skip_tokenizer_init": True}
    done = in_engine(tmp_path / "small", with_plain, tensor_parallel, arguments, **options)
    compare(plain, PROMPTS, done["answers"], tolerance=0.5)
    assert done["plain"] == unquantized


@NEEDS_AVX512
@pytest.mark.parametrize(
    ("family", "more", "plan"),
    [
        # whose own scale of scores, 1, would make much of bfloat16's rounding
        ("granite", {"attention_multiplier": 32**-0.5}, "1|2 3+4"),
        ("olmo2", {}, "1+2 3|4:1"),
    ],
    ids=["granite", "olmo2"],
)
def test_members_in_the_transformers_backend(
    in_engine, converted, tiny_checkpoint, tmp_path, family, more, plan
):
    """It has plain matrices for them, and vLLM's for all else. (On CPUs, vLLM's for 8 bits take no
    such inputs as the backend's.)"""
    folder = converted(tiny_checkpoint(family, **SIZES, **more), plan)
    plain = quantized(folder, tmp_path / "small", 4, 32)
    arguments = {"prompts": PROMPTS, "new_tokens": 8}
    options = {"dtype": "bfloat16", "skip_tokenizer_init": True}
    done = in_engine(tmp_path / "small", with_plain, arguments=arguments, **options)
    compare(plain, PROMPTS, done["answers"], tolerance=0.3)
    assert done["plain"] and all(name.startswith(("1.", "2.")) for name in done["plain"])


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="on a CPU, vLLM needs AMX for fp8 in blocks"
)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_fp8_in_blocks(in_engine, tiny_checkpoint, tmp_path, tensor_parallel):
    """As `convert` writes it, against transformers, which reads it as bfloat16 numbers."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    source = tiny_checkpoint(**sizes, num_key_value_heads=4, dtype="bfloat16")
    convert(source, "1|2:1 3+4", tmp_path / "small", quantize="fp8")
    arguments = {"prompts": PROMPTS, "new_tokens": 8}
    options = {"dtype": "bfloat16", "skip_tokenizer_init": True}
    done = in_engine(tmp_path / "small", with_plain, tensor_parallel, arguments, **options)
    compare(tmp_path / "small", PROMPTS, done["answers"], tolerance=0.3)
    assert done["plain"] == []


def test_other_methods_are_refused_for_members_apart(in_engine, folder):
    reason = "no members that stay apart with fp8 weights; use compressed-tensors or torchao"
    with pytest.raises(RuntimeError, match=reason):
        in_engine(folder, generate, quantization="fp8")


def test_plain_weights_of_modules_are_made(folder):
    from abreast.engines.vllm.plugin import ServingError
    from abreast.engines.vllm.quantized import dequantized

    whole = torch.tensor([[1.0, -2.0], [4.0, 0.5]])
    scale = {"all": torch.tensor([0.5]), "rows": torch.tensor([[0.5], [2.0]])}
    for kind, by in scale.items():
        for dtype in (torch.int8, torch.float8_e4m3fn):
            stored = {"a.weight": (whole / by).to(dtype), "a.weight_scale": by, "b.weight": whole}
            made = dict(dequantized(stored.items(), {"a"}))
            rounded = (whole / by).to(dtype).float() * by
            assert made.keys() == {"a.weight", "b.weight"}, kind
            torch.testing.assert_close(made["a.weight"], rounded)
    stored["a.weight_zero_point"] = torch.zeros(2, 1)
    with pytest.raises(ServingError, match="a is quantised with weight_zero_point"):
        dict(dequantized(stored.items(), {"a"}))


TORCHAO = """
import sys
import torch
import abreast.modeling
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.bfloat16, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
)
model.save_pretrained(sys.argv[2])
"""


def quantized_by_torchao(llm: Any, **arguments: Any) -> Any:
    assert llm.llm_engine.vllm_config.model_config.quantization == "torchao"
    return with_plain(llm, **arguments)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_torchao(in_engine, folder, tmp_path, run_apart, tensor_parallel):
    """8-bit weights, a scale per row, against the unrounded model: they cost little."""
    done = run_apart(TORCHAO, str(folder), str(tmp_path / "small"))
    assert done.returncode == 0, done.stderr[-3000:]
    prompts = [load(folder)[1]("import os\nimport sys\n\ndef main(")["input_ids"]]
    arguments = {"prompts": prompts, "new_tokens": 8}
    options = {"dtype": "bfloat16", "skip_tokenizer_init": True}
    small = tmp_path / "small"
    answers = in_engine(small, quantized_by_torchao, tensor_parallel, arguments, **options)
    compare(folder, prompts, answers["answers"], tolerance=0.3)
    assert answers["plain"] == []
