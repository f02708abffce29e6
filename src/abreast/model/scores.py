"""How well a model predicts next tokens, and how far its distributions are from another's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from abreast.model.grouping import device_of, grouped
from abreast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# float32 values per log-softmax chunk; two models' scores hold about five of them at once. A
# vocabulary of 128k would otherwise need 0.5 GiB per 1024 positions for each of them, and on a CPU
# what its caches hold takes a third of the time of larger chunks.
CHUNK_VALUES = {"cpu": 2**22, "other": 2**25}


def token_scores(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
) -> np.ndarray:
    """Scores of every token, float64: nll; with a reference also its nll, KL, top-1 agreement.

    logits, reference: [batch, length, vocab]; log-probabilities will do, being their own
    log-softmax. targets: token ids [batch, length]. The result has shape [batch, length, 1] or
    [batch, length, 4]; KL is KL(reference || logits) in nats, agreement 1 or 0.
    """
    device = logits.device
    both = [logits] if reference is None else [logits, reference]
    batch, length, vocabulary = logits.shape
    values = CHUNK_VALUES["cpu" if device.type == "cpu" else "other"]
    chunk = max(1, values // (batch * vocabulary))
    scores = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        labels = targets[:, part, None].to(device)
        logp = [model[:, part].to(device).float().log_softmax(-1) for model in both]
        columns = [-log_probs.gather(-1, labels).squeeze(-1) for log_probs in logp]
        if len(logp) == 2:
            ours, theirs = logp
            probability = theirs.exp()
            # Tokens that the reference rules out (logit -inf) add nothing, but 0 * inf is NaN.
            terms = torch.where(probability > 0, probability * (theirs - ours), 0.0)
            agreement = ours.argmax(-1) == theirs.argmax(-1)
            columns += [terms.sum(-1), agreement.float()]
        scores.append(torch.stack(columns, dim=-1).cpu())
    return np.asarray(torch.cat(scores, dim=1).double().numpy())


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
def logits_of(
    model: PreTrainedModel, ids: torch.Tensor, batch_size: int, prefix: int = 0
) -> list[torch.Tensor]:
    """Logits [at most batch_size, window, vocab] of windows ids [windows, window], on the CPU.

    prefix: tokens at the beginning of every window; there are no logits before its last one's.
    """
    return [
        model(input_ids=batch.to(device_of(model)), use_cache=False)
        .logits[:, max(0, prefix - 1) :]
        .cpu()
        for batch in ids.split(batch_size)
    ]


def scores_under(
    model: PreTrainedModel,
    plan: Plan,
    ids: torch.Tensor,
    reference: Sequence[torch.Tensor],
    prefix: int = 0,
) -> np.ndarray:
    """`token_scores` of the model under a plan, summed over each window: float64 [windows, 4].

    ids: [windows, window]; every window is scored from its token `prefix` on, without a prefix from
    the second. reference: what `logits_of` gives for them.
    """
    sums = []
    with grouped(model, plan):
        for batch, theirs in zip(ids.split([*map(len, reference)]), reference, strict=True):
            (ours,) = logits_of(model, batch, len(batch), prefix)
            targets = batch[:, max(1, prefix) :].cpu()
            sums.append(token_scores(ours[:, :-1], targets, theirs[:, :-1]).sum(1))
    return np.concatenate(sums)


def mean_kl(
    model: PreTrainedModel,
    plan: Plan,
    ids: torch.Tensor,
    reference: Sequence[torch.Tensor],
    prefix: int = 0,
) -> float:
    """Mean KL(reference || model under plan) in nats per token; arguments as `scores_under`."""
    kl = scores_under(model, plan, ids, reference, prefix)[:, 2]
    return float(kl.mean()) / (ids.shape[1] - max(1, prefix))
