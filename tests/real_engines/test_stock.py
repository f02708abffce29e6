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


LLAMA3 = {  # of which every kind of wavelength occurs: kept, stretched and in between
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY = {"num_layers": 9, "tokenizer": True}
MIXED = "1+2 3~4 5+6+7"  # heads for 2 and 3 members' keys, and layers without FFN
# With one query head per key-value head, groups of 2 and 3 need more heads than any layer has.
SMALL = {
    "mixed": ("vllm", "deci", MIXED, {"head_dim": 32}),
    "mixed, no shared heads": ("vllm", "deci", MIXED, {"head_dim": 32, "num_key_value_heads": 4}),
    "mixed, scaled": ("vllm", "deci", MIXED, {"head_dim": 32, "rope_parameters": LLAMA3}),
    "ff, scaled": ("vllm", "deci-ff", "1~2 4~5~6", {"head_dim": 32, "rope_parameters": LLAMA3}),
    "ff, scaled, mlx": ("mlx", "deci-ff", "1~2 4~5~6", {"rope_parameters": LLAMA3}),
}


@pytest.mark.parametrize("case", SMALL)
def test_random_models(tmp_path, tiny_checkpoint, case):
    """Two wirings in one checkpoint, and a scaled RoPE, up to six times its old length."""
    engine, form, plan, settings = SMALL[case]
    source, out = tiny_checkpoint(**TINY, **settings), tmp_path / "out"
    convert(source, plan, out, form=form, dtype="float32")
    prompts = [[number % 128 for number in ids] for ids in PROMPTS]
    answers = answers_of_stock(engine, out, prompts, tokens=64)
    compare(source, prompts, answers, plan=plan)
