"""A cache that is written in place gives what transformers' own gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abreast.model import keep_rows, load, reserve

STEPS = 12
SLIDING = {"family": "mistral", "sliding_window": 4}


def logits_of_steps(model: Any, ids: torch.Tensor, room: int | None) -> list[torch.Tensor]:
    """Logits [2, vocab] of the last two rows, token by token; with `room` the first row leaves
    halfway."""
    cache, logits = None, []
    with torch.inference_mode():
        for step in range(STEPS):
            out = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            if cache is None and room is not None:
                reserve(out.past_key_values, room)
            cache = out.past_key_values
            logits.append(out.logits[-2:, -1])
            if step == STEPS // 2 and room is not None:
                assert keep_rows(cache, torch.tensor([1, 2]))
                ids = ids[1:]
    return logits


@pytest.mark.parametrize("settings", [{}, SLIDING], ids=["plain", "sliding"])
@pytest.mark.parametrize("room", [STEPS, 3], ids=["enough room", "too little"])
def test_in_place_and_copied_caches_give_the_same(tiny_checkpoint, settings, room):
    model, _ = load(tiny_checkpoint(**settings), dtype="float32")
    ids = torch.arange(3 * STEPS).reshape(3, STEPS) * 7 % 50
    pairs = zip(logits_of_steps(model, ids, room), logits_of_steps(model, ids, None), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in pairs)


def test_what_others_do_to_the_cache_is_seen(tiny_checkpoint):
    """Rows in another order, as a beam search has them."""
    model, _ = load(tiny_checkpoint(), dtype="float32")
    ids, order = torch.arange(8).reshape(2, 4), torch.tensor([1, 0])
    last = []
    for room in (8, None):
        with torch.inference_mode():
            cache = model(ids, use_cache=True).past_key_values
            if room is not None:
                reserve(cache, room)
            cache.reorder_cache(order)
            last.append(model(ids[order], past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(*last, atol=1e-5)


def test_the_cache_is_not_copied(tiny_checkpoint):
    model, _ = load(tiny_checkpoint(), dtype="float32")
    ids = torch.arange(8).reshape(2, 4)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        reserve(cache, 8)
        addresses = {layer.keys.data_ptr() for layer in cache.layers}
        model(ids, past_key_values=cache, use_cache=True)
    assert {layer.keys.data_ptr() for layer in cache.layers} == addresses


def test_rows_of_other_state_stay():
    class Recurrent:
        layers = (SimpleNamespace(conv_states=torch.zeros(2)),)

    assert not keep_rows(Recurrent(), torch.tensor([0]))
    assert not keep_rows(object(), torch.tensor([0]))
