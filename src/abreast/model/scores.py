"""How well next tokens are predicted: scores per token."""

from __future__ import annotations

import numpy as np
import torch

# float32 values per log-softmax chunk (128 MiB each; two models' scores hold about five of them at
# once). A vocabulary of 128k would otherwise need 0.5 GiB per 1024 positions for each of them.
CHUNK_VALUES = 2**25


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
    chunk = max(1, CHUNK_VALUES // (batch * vocabulary))
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
