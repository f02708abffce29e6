"""The KL that models are trained on, and its gradient, computed a few positions at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from abreast.model import divergence, scores


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
