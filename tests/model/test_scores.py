"""How far predictions are apart: with its gradient, and on windows kept for judging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from abreast.model import (
    divergence,
    grouped,
    load,
    mean_kl,
    predictions_of,
    scores,
    scores_under,
    token_scores,
)
from abreast.plan import Plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_in_parts_is_autograd_s(monkeypatch, dtype, temperature):
    monkeypatch.setattr(scores, "CHUNK_VALUES", {"cpu": 3 * 40, "other": 3 * 40})
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 7, 40, generator=generator).to(dtype) for _ in range(2))
    before = student.clone()
    ours = student.requires_grad_()
    (2 * divergence(ours, teacher, temperature)).backward()
    loss = float(divergence(before, teacher, temperature))

    expected = before.requires_grad_()
    q, p = ((x.float() / temperature).log_softmax(-1) for x in (expected, teacher))
    kl = functional.kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean", log_target=True)
    (2 * kl * temperature**2).backward()
    assert loss == pytest.approx(float(kl * temperature**2), rel=1e-5)
    assert ours.grad is not None and ours.grad.dtype == dtype
    assert torch.equal(student.detach(), before.detach())  # no logits were written over
    close = 1e-6 if dtype == torch.float32 else 2e-3
    assert torch.allclose(ours.grad.float(), expected.grad.float(), atol=close)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("kept", [2**28, 2000])
@pytest.mark.parametrize("selects", [True, False], ids=["logits_to_keep", "all logits"])
def test_windows_are_judged_at_evenly_spaced_tokens(
    tiny_checkpoint, monkeypatch, prefix, kept, selects
):
    model, _ = load(tiny_checkpoint(vocab_size=61))
    plan, ids = Plan.parse("1+2", model.config.num_hidden_layers), torch.arange(60).reshape(5, 12)
    monkeypatch.setattr(scores, "KEPT_VALUES", kept)
    if not selects:
        monkeypatch.setattr(scores, "keeps", lambda *_: {})
    reference = predictions_of(model, ids, 2, prefix)
    first = max(0, prefix - 1)
    every = 1 if kept == 2**28 else -(-5 * (11 - first) * 61 // kept)
    assert reference.positions.tolist() == list(range(first, 11, every))
    with torch.no_grad():
        theirs = model(ids).logits
        with grouped(model, plan):
            ours = model(ids).logits
    whole = token_scores(ours[:, :-1], ids[:, 1:], theirs[:, :-1])
    expected = whole[:, first::every]
    assert scores_under(model, plan, reference) == pytest.approx(expected.sum(1), abs=1e-4)
    assert mean_kl(model, plan, reference) == pytest.approx(expected[..., 2].mean(), rel=1e-4)
    assert np.ptp(scores_under(model, plan, reference)[:, 2]) > 0
