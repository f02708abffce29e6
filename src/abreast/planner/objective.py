"""What a plan costs, and the number that the search makes small.

A new objective is one more `Objective`, here or in a program of your own:
`find_plan(..., objective=Objective(...))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cost:
    """Cost of running under a plan instead of the original model, in nats per token.

    kl: mean KL(original || model) of the next-token distributions. loss_increase: of the mean
    negative log-likelihood, paired. *_stderr: cluster-robust over windows. tokens: scored.
    """

    kl: float
    kl_stderr: float
    loss_increase: float
    loss_stderr: float
    tokens: int

    @property
    def ppl_increase(self) -> float:
        """Relative increase of the perplexity: 0.02 is 2 %."""
        return float(np.expm1(self.loss_increase))


@dataclass(frozen=True)
class Objective:
    """One number per plan, the less the better, from its measured cost.

    value: the number; stderr: its standard error, NaN where it is not known. name: short, for
    messages and table headers. label and unit: for the axis of a chart.
    """

    name: str
    label: str
    unit: str
    value: Callable[[Cost], float]
    stderr: Callable[[Cost], float]

    @property
    def key(self) -> str:
        """The name in lower case, as in JSON."""
        return self.name.lower()


KL = Objective(
    name="KL",
    label="KL divergence from the original",
    unit="nats per token",
    value=lambda cost: cost.kl,
    stderr=lambda cost: cost.kl_stderr,
)
