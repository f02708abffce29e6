"""How members with inputs of their own are multiplied in vLLM: the same, in whichever form."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agreement import compare
from safetensors.torch import load_file

from abreast.engines.members import MemberLinear

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROMPTS = [list(range(3, 20)), [5, 99, 7]]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [64, 4096], ids=["small", "large"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_form_is_the_batched_product(dtype, rows, bias):
    """Tolerance: the last bits of float32; of the others as many as sums of 128 products lose."""
    from abreast.engines.vllm.packed import SMALL, PackedLinear

    plain, layer = MemberLinear(3, rows, 128, bias), PackedLinear(3, rows, 128, bias)
    generator = torch.Generator().manual_seed(0)
    for mine, theirs in zip(plain.parameters(), layer.parameters(), strict=True):
        mine.data.normal_(std=0.1, generator=generator)
        mine.data = mine.data.to(getattr(torch, dtype))
        theirs.data = mine.data.clone()
    large = layer.weight.nbytes > SMALL
    assert large == (rows > 64)
    layer.pack()
    packed = large or dtype == "bfloat16"
    assert len(layer.packed) == 3 * packed
    benchmark = runpy.run_path(str(BENCHMARKS / "vllm_decode.py"))
    form = "packed" if packed else "batched"
    assert benchmark["forms"](torch.nn.Sequential(layer)) == {form: 1}
    copies = [layer.weight, *(one.weight for one in layer.packed)]
    # oneDNN keeps its own copy; where it has no product of float16, vLLM keeps the only one
    takes = dtype != "float16" or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert not (packed and takes and sum(copy.numel() for copy in copies))
    assert sum(copy.numel() for copy in copies) in (0, plain.weight.numel())
    for count in (1, 9):
        x = torch.randn(count, 3, 128, generator=generator).to(plain.weight.dtype).transpose(0, 1)
        torch.testing.assert_close(
            layer(x)[0],
            plain(x)[0],
            atol={"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype],
            rtol={"float32": 1e-5, "bfloat16": 1.6e-2, "float16": 2e-3}[dtype],
        )


def products(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Answers; products that one step takes; what the group's gate and up make of unit vectors."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    def ask(prompts: list[list[int]], count: int) -> Any:
        sampling = SamplingParams(temperature=0, max_tokens=count, logprobs=5, ignore_eos=True)
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        return [answer.outputs[0] for answer in llm.generate(requests, sampling, use_tqdm=False)]

    answers = [
        {
            "ids": list(answer.token_ids),
            "logprobs": [{t: e.logprob for t, e in s.items()} for s in answer.logprobs],
        }
        for answer in ask(prompts, 8)
    ]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        ask(prompts[:1], 1)
    counts = {event.key: event.count for event in profiled.key_averages()}

    def inspected(model: Any) -> tuple[Any, int]:
        linear = model.model.layers[1].mlp.gate_up_proj
        outputs = linear(torch.eye(64).expand(2, -1, -1))[0]
        return outputs.transpose(1, 2).numpy(), linear.weight.numel()

    ((weights, members),) = llm.apply_model(inspected)
    return {
        "answers": answers,
        "bmm": counts.get("aten::bmm", 0),
        "weights": weights,
        "kept": members,
    }


def test_large_matrices_of_a_group_are_packed(in_engine, converted, tiny_checkpoint):
    source = tiny_checkpoint(head_dim=32, num_layers=4, intermediate_size=2048, biases=True)
    folder = converted(source, "1|2")
    arguments = {"prompts": PROMPTS}
    done = in_engine(folder, products, arguments=arguments, skip_tokenizer_init=True)
    compare(folder, PROMPTS, done["answers"])
    assert done["bmm"] == 1  # the outputs of both attentions, which are small
    assert done["kept"] == 0
    tensors = load_file(folder / "model.safetensors")
    gate, up = (tensors[f"model.layers.1.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    biases = [tensors[f"model.layers.1.mlp.{n}_proj.bias"] for n in ("gate", "up")]
    stored = torch.cat([part.unflatten(0, (2, -1)) for part in (gate, up)], 1)
    bias = torch.cat([part.unflatten(0, (2, -1)) for part in biases], 1)
    expected = (stored + bias.unsqueeze(-1)).numpy()
    np.testing.assert_allclose(done["weights"], expected, atol=1e-6)  # a sum of two


def test_float8_of_members_that_stand_apart_becomes_numbers_again():
    """Their matrices are none of vLLM's, so they are read as bfloat16; all others stay float8."""
    from abreast.convert import fp8
    from abreast.engines.vllm.quantized import dequantized

    matrix = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    numbers, scales = fp8.quantise(matrix)
    stored = [
        (f"{name}.{kind}", tensor)
        for name in ("a.o_proj", "b.o_proj")
        for kind, tensor in (("weight", numbers), ("weight_scale_inv", scales))
    ]
    got = dict(dequantized(stored, {"a.o_proj"}))
    assert got.keys() == {"a.o_proj.weight", "b.o_proj.weight", "b.o_proj.weight_scale_inv"}
    assert got["a.o_proj.weight"].equal(fp8.rounded(matrix).to(torch.bfloat16))
    assert got["b.o_proj.weight"] is numbers
