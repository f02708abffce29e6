"""How well next tokens are predicted: scores per token, and the mean of sums over windows."""

from __future__ import annotations

import math

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
    found = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        wanted = targets[:, part, None].to(device)
        logp = [each[:, part].to(device).float().log_softmax(-1) for each in both]
        columns = [-each.gather(-1, wanted).squeeze(-1) for each in logp]
        if len(logp) == 2:
            ours, theirs = logp
            probability = theirs.exp()
            # Tokens that the reference rules out (logit -inf) add nothing, but 0 * inf is NaN.
            terms = torch.where(probability > 0, probability * (theirs - ours), 0.0)
            agreement = ours.argmax(-1) == theirs.argmax(-1)
            columns += [terms.sum(-1), agreement.float()]
        found.append(torch.stack(columns, dim=-1).cpu())
    return np.asarray(torch.cat(found, dim=1).double().numpy())


def ratio_of_means(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean per token and its cluster-robust standard error, from sums and counts per cluster.

    With S_c the sum and n_c the tokens of cluster c of C, the mean is R = sum S_c / sum n_c and

        se(R)^2 = C / (C - 1) * sum (S_c - R n_c)^2 / (sum n_c)^2,

    the linearised variance of the ratio estimator (W. G. Cochran, Sampling Techniques, 3rd ed.,
    1977, chapter 6), which for clusters of one token is the ordinary standard error; for language
    model evaluations see E. Miller, Adding Error Bars to Evals, arXiv 2411.00640. It assumes
    clusters independent of each other, so where long documents span many windows it is still
    somewhat too small. sums, counts: shape [num_clusters]. The error of one cluster is NaN.
    """
    total = float(counts.sum())
    mean = float(sums.sum()) / total
    clusters = len(counts)
    if clusters < 2:
        return mean, math.nan
    squares = float(np.square(sums - mean * counts).sum())
    return mean, math.sqrt(clusters / (clusters - 1) * squares) / total
