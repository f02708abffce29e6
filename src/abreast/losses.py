"""How far one model's next-token distributions are from another's, as a tensor to train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.nn import functional


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
