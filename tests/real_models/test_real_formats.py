"""SmolLM2 in stock vLLM and stock mlx-lm, in the formats that they load, against transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from abreast.convert import convert
from abreast.model import load_tokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "real_engines"))
from agreement import answers_of_stock, compare

LP, FF = "14+15 20+21+22", "14~15 20~21~22"
CASES = [("vllm", "deci", LP), ("mlx", "deci-ff", FF), ("mlx", "openelm", LP)]
TEXTS = ["The capital of France is", "import os\n\ndef main():", "Once upon a time"]


@pytest.mark.parametrize(("engine", "form", "plan"), CASES)
def test_stock_engines_write_the_same(smollm2, tmp_path, engine, form, plan):
    convert(smollm2, plan, tmp_path / "out", form=form, dtype="float32")
    prompts = load_tokenizer(smollm2)(TEXTS)["input_ids"]
    answers = answers_of_stock(engine, tmp_path / "out", prompts, tokens=16)
    compare(smollm2, prompts, answers, plan=plan)
