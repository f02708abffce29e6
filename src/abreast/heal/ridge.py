"""Ridge regression from second moments, the ridge chosen on text that was not fitted on."""

from __future__ import annotations

import math

import torch

from abreast.errors import AbreastError

# Multiples of the mean squared input, tried in this order until the error rises.
RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)


class Moments:
    """Sums over tokens: U'U [n, n], U'T [n, m] and |T|^2 of inputs U and targets T, in float64."""

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, targets, dtype=torch.float64, device=device)
        self.size = 0.0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        u, t = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        self.gram += u.T @ u
        self.cross += u.T @ t
        self.size += float(t.double().square().sum())

    def error(self, weight: torch.Tensor) -> float:
        """|T - U W'|^2 for W [m, n]."""
        explained = float((weight.T * self.cross).sum())
        return self.size - 2 * explained + float(((weight @ self.gram) * weight).sum())


def moments_pair(inputs: int, targets: int, device: torch.device) -> tuple[Moments, Moments]:
    """Empty sums of the batches that `solve` chooses the ridge on, and of the others."""
    return Moments(inputs, targets, device), Moments(inputs, targets, device)


def solve(
    check: Moments, fit: Moments, start: torch.Tensor
) -> tuple[torch.Tensor, float | None, float, float]:
    """min over W of |T - U W'|^2 + r |W - start|^2: W, r (None: start kept), errors before, after.

    W rests on both sums, r has the least error on `check` of those solved on `fit` alone; both
    errors are on `check`, as fractions of |T|^2. r multiplies the mean square of the inputs. `fit`
    holds both sums afterwards.
    """
    size = max(check.size, torch.finfo(torch.float64).tiny)
    if not math.isfinite(fit.size + check.size) or not bool(fit.gram.isfinite().all()):
        raise AbreastError(
            "activations are not finite (NaN or infinite); load the model in float32 or bfloat16, "
            "or check how its weights were made"
        )
    scale = float(fit.gram.diagonal().mean())
    before = best = check.error(start)
    ridge = None
    for candidate in RIDGES if scale else ():
        error = check.error(ridge_solution(fit, start, candidate * scale))
        if error >= best:
            break
        best, ridge = error, candidate
    if ridge is None:
        return start, None, before / size, before / size
    fit.gram += check.gram
    fit.cross += check.cross
    scale = float(fit.gram.diagonal().mean())
    return ridge_solution(fit, start, ridge * scale), ridge, before / size, best / size


def ridge_solution(moments: Moments, start: torch.Tensor, ridge: float) -> torch.Tensor:
    matrix = moments.gram.clone()
    matrix.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(moments.cross + ridge * start.T, factor).T
