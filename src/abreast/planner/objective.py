"""What a plan costs, and the number that the search makes small.

A new objective is one more `Objective`, here or in a program of your own:
`find_plan(..., objective=Objective(...))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from abreast.runs import option


@dataclass(frozen=True)
class Cost:
    """Cost of running under a plan instead of the original model, in nats per token.

    kl: mean KL(original || model) of the next-token distributions. loss_increase: of the mean
    negative log-likelihood, paired. *_stderr: cluster-robust over windows. tokens: scored.
    margin_loss: of tasks, how much the mean margin of the right choice falls, in nats per item, and
    its standard error over items; None where no task is scored. accuracy_kept: share of the
    original's accuracy above chance; None as well where it has none.
    """

    kl: float
    kl_stderr: float
    loss_increase: float
    loss_stderr: float
    tokens: int
    margin_loss: float | None = None
    margin_stderr: float | None = None
    accuracy_kept: float | None = None
    kept_stderr: float | None = None

    @property
    def ppl_increase(self) -> float:
        """Relative increase of the perplexity: 0.02 is 2 %."""
        return float(np.expm1(self.loss_increase))


OF_TASKS = ("margin_loss", "margin_stderr", "accuracy_kept", "kept_stderr")  # fields of a cost


@dataclass(frozen=True)
class Scoring:
    """What plans are scored on.

    score: `kl`, predictions on text; `answers`, those on the original's own greedy answers to chat
    prompts; `tasks`, the margin of the right choice: log p(right) less log of the mean p(wrong).
    prefill: of answers, whether prompts run under the plan or in the original order, see `apply`.
    texts: mean over all texts (tasks where these are scored), or the one that a plan costs most on.
    """

    score: Literal["kl", "answers", "tasks"] = option(
        "kl",
        "Score plans by KL on text, KL on the original's own answers to chat prompts "
        "(those of --chat, or neutral ones), or the margin of tasks' right choices. "
        "--windows then counts prompts or items.",
    )
    prefill: Literal["grouped", "sequential"] = option(
        "grouped", "With --score answers: how prompts run, as in convert."
    )
    texts: Literal["mean", "worst"] = option(
        "mean", "With several texts, --data A,B: their mean, or the worst of them."
    )
    score_tasks: tuple[str, ...] = option(
        ("offline",), "With --score tasks: tasks with choices, named as in eval."
    )

    @property
    def objective(self) -> Objective:
        """What the search makes small."""
        objective = OBJECTIVES[self.score]
        if self.texts == "mean":
            return objective
        worst = f"{objective.label}, worst text"
        return replace(objective, name=f"worst {objective.name}", label=worst)


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


def _number(value: float | None) -> float:
    return math.nan if value is None else value


OBJECTIVES = {
    "kl": KL,
    "answers": replace(KL, name="answer KL", label="KL divergence on the original's own answers"),
    "tasks": Objective(
        name="margin lost",
        label="margin of the right choice lost",
        unit="nats per item",
        value=lambda cost: _number(cost.margin_loss),
        stderr=lambda cost: _number(cost.margin_stderr),
    ),
}
