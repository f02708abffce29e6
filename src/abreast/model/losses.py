"""How far one model's next-token distributions are from another's: to train on, and to judge by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


def batches_of(tokens: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Windows [at most size, window] of tokens [windows, window], in order."""
    yield from tokens.split(size)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """Logits [at most batch_size, window, vocab] of windows ids [windows, window], on the CPU."""
    return [
        model(input_ids=batch.to(model.device), use_cache=False).logits.cpu()
        for batch in batches_of(ids, batch_size)
    ]


@torch.no_grad()
def kl_under(
    model: PreTrainedModel, plan: Plan, ids: torch.Tensor, wanted: Sequence[torch.Tensor]
) -> float:
    """Mean KL(wanted || model run under plan) in nats, on the windows that `logits_of` was for."""
    pairs, done = [], 0
    with grouped(model, plan):
        for logits in wanted:
            batch = ids[done : done + len(logits)]
            got = model(input_ids=batch.to(model.device), use_cache=False).logits.cpu()
            pairs.append((float(divergence(got, logits)), batch.numel()))
            done += len(logits)
    return weighted_mean(pairs)
