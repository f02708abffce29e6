"""How well a model predicts next tokens, and how far its distributions are from another's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from abreast.model.forward import keeps
from abreast.model.grouping import device_of, grouped
from abreast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# float32 values per log-softmax chunk; two models' scores hold about five of them at once. A
# vocabulary of 128k would otherwise need 0.5 GiB per 1024 positions for each of them, and a CPU
# takes half the time for what its caches hold.
CHUNK_VALUES = {"cpu": 2**20, "other": 2**25}
KEPT_VALUES = 2**28  # of one model's predictions: 1 GiB in float32


@dataclass(frozen=True)
class Reference:
    """What models are scored against, prepared once for many.

    log_probs: [batch, length, vocab], float32. top: its most likely tokens [batch, length].
    """

    log_probs: torch.Tensor
    top: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> Reference:
        log_probs = logits.float().log_softmax(-1)
        return cls(log_probs, log_probs.argmax(-1))

    def part(self, part: tuple[slice, slice], device: torch.device) -> Reference:
        return Reference(self.log_probs[part].to(device), self.top[part].to(device))


def token_scores(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | Reference | None = None
) -> np.ndarray:
    """Scores of every token, float64: nll; with a reference also its nll, KL, top-1 agreement.

    logits, reference: [batch, length, vocab]; log-probabilities will do, being their own
    log-softmax. targets: token ids [batch, length]. The result has shape [batch, length, 1] or
    [batch, length, 4]; KL is KL(reference || logits) in nats, agreement 1 or 0.
    """
    device = logits.device
    scores = torch.empty(*targets.shape, 1 if reference is None else 4)
    for part in _chunks(logits.shape, CHUNK_VALUES["cpu" if device.type == "cpu" else "other"]):
        labels = targets[part].to(device)[..., None]
        ours = logits[part].float().log_softmax(-1)
        columns = [-ours.gather(-1, labels).squeeze(-1)]
        if reference is not None:
            theirs = (
                reference.part(part, device)
                if isinstance(reference, Reference)
                else Reference.of(reference[part].to(device))
            )
            columns += [
                -theirs.log_probs.gather(-1, labels).squeeze(-1),
                _kl(theirs.log_probs, ours),
                _agreement(ours, theirs.top),
            ]
        scores[part] = torch.stack(columns, dim=-1).cpu()
    return np.asarray(scores.double().numpy())


def _chunks(shape: torch.Size, values: int) -> Iterator[tuple[slice, slice]]:
    """Parts of [batch, length, vocab] of limited size, whole sequences where they fit."""
    batch, length, vocab = shape
    rows = max(1, values // (length * vocab))
    columns = max(1, min(length, values // (rows * vocab)))
    for row in range(0, batch, rows):
        for column in range(0, length, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _kl(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) of log-probabilities [..., vocab]."""
    probability = theirs.exp()
    terms = (theirs - ours).mul_(probability)
    kl = terms.sum(-1)
    # Tokens that the reference rules out (-inf) add nothing, but 0 * inf is NaN.
    if kl.isnan().any():
        kl = torch.where(probability > 0, terms, 0.0).sum(-1)
    return kl


def _agreement(ours: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """1.0 where `top` is what argmax gives, which on a CPU takes ten times as long as amax."""
    best = ours.amax(-1, keepdim=True)
    agree = ours.gather(-1, top[..., None]).squeeze(-1) == best.squeeze(-1)
    ties = (ours == best).sum(-1) > 1
    if ties.any():
        agree[ties] = ours[ties].argmax(-1) == top[ties]
    return agree.float()


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Mean KL(teacher || student) in nats per position, both softened by the temperature.

    student, teacher: logits of shape [..., vocab]. Multiplied by temperature squared, so that the
    gradient keeps its size (Hinton et al., arXiv 1503.02531, section 2). float32 inside.
    """
    ours, theirs = student.flatten(0, -2), teacher.flatten(0, -2)
    if not torch.compiler.is_compiling():
        mean: torch.Tensor = _Divergence.apply(ours, theirs, temperature)
        return mean
    ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (ours, theirs))
    loss = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return loss * temperature**2


class _Divergence(torch.autograd.Function):
    """`divergence` of logits [positions, vocab], and its gradient, a few positions at a time.

    So neither distribution is held whole, and memory is passed over half as often as by autograd's
    chain of functions. torch.compile fuses that chain as well.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        count, vocabulary = student.shape
        kind = "cpu" if student.device.type == "cpu" else "other"
        size = max(1, CHUNK_VALUES[kind] // vocabulary)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = student.new_zeros((), dtype=torch.float32)
        for begin in range(0, count, size):
            part = slice(begin, begin + size)
            ours, theirs = (x[part].float() / temperature for x in (student, teacher))
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
            expected = theirs.exp()
            total += (theirs.sub_(ours)).mul_(expected).sum()
            if gradient is not None:
                gradient[part] = ours.exp_().sub_(expected).mul_(temperature / count)
        ctx.save_for_backward(gradient)
        return total * (temperature**2 / count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_loss: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_loss[0], None, None


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats: logits [batch, length, vocab], ids [batch, length]."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def weighted_mean(values: Iterable[tuple[float, int]]) -> float:
    """The mean of (value, weight) pairs."""
    pairs = list(values)
    return sum(v * w for v, w in pairs) / sum(w for _, w in pairs)


@dataclass(frozen=True)
class Predictions:
    """What a model predicts on windows, to score others against: ids [windows, window].

    positions: in each window, of the tokens that it read last before it predicted. logits: of
    consecutive windows [few, positions, vocab], on the CPU.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    logits: list[torch.Tensor]


def predictions_of(
    model: PreTrainedModel, ids: torch.Tensor, batch_size: int, prefix: int = 0
) -> Predictions:
    """Predictions on windows ids [windows, window], of `batch_size` of them at once.

    prefix: tokens at the beginning of every window, which are not predicted; without one the first
    is not. With a large vocabulary only every so many tokens are, so that what is kept holds at
    most `KEPT_VALUES`.
    """
    first, last = max(0, prefix - 1), ids.shape[1] - 1
    vocabulary = model.get_input_embeddings().weight.shape[0]
    every = math.ceil(len(ids) * (last - first) * vocabulary / KEPT_VALUES)
    positions = torch.arange(first, last, min(every, last - first))
    logits = [_logits_at(model, batch, positions) for batch in ids.split(batch_size)]
    return Predictions(ids, positions, logits)


@torch.no_grad()
def _logits_at(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [batch, positions, vocab] of ids [batch, length], on the CPU."""
    device = device_of(model)
    only = keeps(model, positions.to(device))
    logits: torch.Tensor = model(input_ids=ids.to(device), use_cache=False, **only).logits
    return (logits if only else logits[:, positions]).cpu()


def scores_under(model: PreTrainedModel, plan: Plan, reference: Predictions) -> np.ndarray:
    """`token_scores` of the model under a plan, summed over each window: float64 [windows, 4]."""
    sums = []
    with grouped(model, plan):
        batches = reference.ids.split([*map(len, reference.logits)])
        for batch, theirs in zip(batches, reference.logits, strict=True):
            ours = _logits_at(model, batch, reference.positions)
            targets = batch[:, reference.positions + 1].cpu()
            sums.append(token_scores(ours, targets, theirs).sum(1))
    return np.concatenate(sums)


def mean_kl(model: PreTrainedModel, plan: Plan, reference: Predictions) -> float:
    """Mean KL(reference || model under plan) in nats per token."""
    return float(scores_under(model, plan, reference)[:, 2].mean()) / len(reference.positions)
