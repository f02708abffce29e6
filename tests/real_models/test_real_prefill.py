"""Sequential prefill on real models: the original's prompt, and one text in whatever way."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from abreast.convert.rewrite import convert
from abreast.model.grouping import grouped, load

PLANS = {"smollm2": "7|8:1 17|18:1 20|21:1 24|25:1 26|27:1", "gemma3": "6|7:1 9+10"}
TEXT = "The committee met on Monday to discuss the budget. The budget of the committee " * 2
WAYS: dict[str, dict[str, Any]] = {
    "chunks": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "static cache": {"cache_implementation": "static"},
    "without cache": {"use_cache": False},
}


def generated(model: Any, ids: torch.Tensor, **options: Any) -> list[int]:
    fixed = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **options)
    return out[0, ids.shape[1] :].tolist()


def seconds_per_token(model: Any, ids: torch.Tensor) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(ids, use_cache=True)
        times.append(time.perf_counter() - start)
    return min(times) / ids.shape[1]


@pytest.mark.parametrize("name", list(PLANS))
@torch.inference_mode()
def test_sequential_prefill(name, request, tmp_path, capsys):
    folder = request.getfixturevalue(name)
    out = tmp_path / "out"
    convert(folder, PLANS[name], out, dtype="float32", prefill="sequential")
    model, (original, tokenizer) = load(out)[0], load(folder, dtype="float32")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    want, got = original(ids).logits, model(ids).logits
    assert (got - want).abs().max() <= 1e-4 * (want.max() - want.min())
    text = generated(model, ids)
    with grouped(original, PLANS[name], prefill="sequential"):
        assert generated(original, ids) == text
    for way, options in WAYS.items():
        assert generated(model, ids, **options) == text, way
    assert generated(model, ids, assistant_model=original) == text
    sequential, alone = seconds_per_token(model, ids), seconds_per_token(original, ids)
    model.config.abreast_prefill = "grouped"
    assert generated(model, ids) != text, "the prompt is read abreast in either case"
    abreast = seconds_per_token(model, ids)
    with capsys.disabled():
        times = [f"{1000 * t:.2f}" for t in (alone, sequential, abreast)]
        print(f"\n{name}: ms per prompt token, original, sequential, abreast: {', '.join(times)}")
