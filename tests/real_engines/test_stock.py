"""Formats in engines that know nothing of abreast, against transformers running the plan grouped.

In float32: the same 64 greedy tokens, top-5 log probabilities within 1e-3.
"""

from __future__ import annotations

import pytest
from agreement import answers_of_stock, compare

from abreast.convert import convert
from abreast.demo import model_folder

LP, FF = "2+3 4+5 9+10+11", "2~3 4~5 9~10~11"
CASES = [
    ("vllm", "deci", LP),
    ("vllm", "deci-ff", FF),
    ("mlx", "deci-ff", FF),
    ("mlx", "openelm", LP),
]
PROMPTS = [  # of lengths that mlx-lm takes together, two by two
    *([3, 4, 5, 6, 7, 8], [5, 99, 7, 300, 22, 1], [5, 99, 7], [2047, 1024, 512]),
    *([*range(100, 60, -1)], [*range(900, 940)], [17], [*range(200, 329)]),
]


@pytest.mark.parametrize(("engine", "form", "plan"), CASES)
def test_same_tokens_and_logprobs(tmp_path, engine, form, plan):
    out = tmp_path / "out"
    convert(model_folder(), plan, out, form=form, dtype="float32")
    answers = answers_of_stock(engine, out, PROMPTS, tokens=64)
    compare(model_folder(), PROMPTS, answers, plan=plan)
