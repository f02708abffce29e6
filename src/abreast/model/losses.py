"""How far one model's next-token distributions are from another's, for training and judging."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from abreast.model.grouping import grouped
from abreast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Mean KL(teacher || student) in nats per position, both softened by the temperature.

    student, teacher: logits of shape [..., vocab]. Multiplied by temperature squared, so that the
    gradient keeps its size (Hinton et al., arXiv 1503.02531, section 2). float32 inside.
    """
    ours = (student.float() / temperature).log_softmax(-1).flatten(0, -2)
    theirs = (teacher.float() / temperature).log_softmax(-1).flatten(0, -2)
    loss = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return loss * temperature**2


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats: logits [batch, length, vocab], ids [batch, length]."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def weighted_mean(values: Iterable[tuple[float, int]]) -> float:
    """The mean of (value, weight) pairs."""
    pairs = list(values)
    return sum(v * w for v, w in pairs) / sum(w for _, w in pairs)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """Logits [at most batch_size, window, vocab] of windows ids [windows, window], on the CPU."""
    return [
        model(input_ids=batch.to(model.device), use_cache=False).logits.cpu()
        for batch in ids.split(batch_size)
    ]


@torch.no_grad()
def kl_under(
    model: PreTrainedModel, plan: Plan, ids: torch.Tensor, reference: Sequence[torch.Tensor]
) -> float:
    """Mean KL(reference || model run under plan) in nats; reference: as `logits_of` made of ids."""
    pairs = []
    with grouped(model, plan):
        batches = ids.split([len(logits) for logits in reference])
        for batch, logits in zip(batches, reference, strict=True):
            ours = model(input_ids=batch.to(model.device), use_cache=False).logits.cpu()
            pairs.append((float(divergence(ours, logits)), batch.numel()))
    return weighted_mean(pairs)
