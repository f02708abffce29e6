"""SmolLM2 in stock vLLM and stock mlx-lm, in the formats that they load, against transformers.

In float32: the same 64 greedy tokens for 8 prompts, top-5 log probabilities within 1e-3.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from abreast.convert import convert
from abreast.model import load_tokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "real_engines"))
from agreement import answers_of_mlx, answers_of_stock, compare

LP, FF = "14+15 20+21+22", "14~15 20~21~22"
CASES = [
    ("vllm", "deci", LP),
    ("vllm", "deci-ff", FF),
    ("mlx", "deci-ff", FF),
    ("mlx", "openelm", LP),
]
TEXTS = ["The capital of France is", "import os\n\ndef main():", "Once upon a time"]
MORE = [
    "<|im_start|>user\nWhat is the largest planet?<|im_end|>\n<|im_start|>assistant\n",
    "Water boils at a lower temperature on a mountain, because",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to you about",
    "The quick brown fox jumps over the lazy dog. " * 8,
]


@pytest.mark.parametrize(("engine", "form", "plan"), CASES)
def test_stock_engines_write_the_same(smollm2, tmp_path, engine, form, plan):
    convert(smollm2, plan, tmp_path / "out", form=form, dtype="float32")
    prompts = load_tokenizer(smollm2)(TEXTS + MORE)["input_ids"]
    answers = answers_of_stock(engine, tmp_path / "out", prompts, tokens=64)
    assert [len(answer["ids"]) for answer in answers] == [64] * 8
    compare(smollm2, prompts, answers, plan=plan)


@pytest.mark.parametrize(
    ("model", "plan"), [("smollm2", "14+15 20|21|22:1 24~25"), ("gemma3", "6|7:1 10+11 13~14")]
)
def test_mlx_on_two_ranks(real_models, tmp_path, model, plan):
    """Neither has heads that two ranks could share."""
    source, out = real_models / model, tmp_path / "out"
    convert(source, plan, out, form="mlx", dtype="float32")
    prompts = load_tokenizer(source)(TEXTS)["input_ids"]
    answers, sums = answers_of_mlx(out, prompts, 16, 2, "replicate")
    compare(out, [*prompts, prompts[0], prompts[-1]], answers)
    assert sums["token"] == 2 + 1 + 1
