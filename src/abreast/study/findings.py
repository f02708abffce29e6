"""What a study found: rows of losses, compared, written as CSV. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """What one intervention on layers start..end costs.

    depth: effective depth, the number of steps run one after another. loss: mean negative
    log-likelihood in nats per token. loss_increase: over the unmodified model. stderr: its standard
    error, paired over windows (std / sqrt(number of windows); NaN for one); for ``shuffle`` that of
    the average over the orders drawn, which leaves out what other orders would have given.
    """

    intervention: str
    start: int
    end: int
    depth: int
    loss: float
    loss_increase: float
    stderr: float
    perplexity: float


def row_of(
    case: tuple[str, int, int], depth: int, losses: Sequence[np.ndarray], original: np.ndarray
) -> Row:
    """One row from the losses per window, shape [num_windows], of its models and the original.

    case: intervention, start, end. losses: several for shuffle, whose mean is taken.
    """
    per_window = np.mean(losses, axis=0)
    increase = per_window - original
    several = len(increase) > 1
    loss = float(per_window.mean())
    return Row(
        *case,
        depth=depth,
        loss=loss,
        loss_increase=float(increase.mean()),
        stderr=float(increase.std(ddof=1)) / math.sqrt(len(increase)) if several else math.nan,
        perplexity=math.exp(loss) if loss < 709 else math.inf,  # the last one a float holds
    )


def wins(rows: Iterable[Row], first: str, second: str) -> tuple[int, int, int]:
    """At how many stretches intervention `first` loses less than, the same as, more than `second`.

    Rows of the same program are equal to the last bit, others practically never.
    """
    loss = {(row.intervention, row.start, row.end): row.loss for row in rows}
    signs = [
        (own > other) - (own < other)
        for (name, *stretch), own in loss.items()
        if name == first and (other := loss.get((second, *stretch))) is not None  # type: ignore[arg-type]
    ]
    return signs.count(-1), signs.count(0), signs.count(1)


def best_by_depth(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """For each intervention, the row of lowest loss at every effective depth it reaches."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        at = found.setdefault(row.intervention, {})
        if row.depth not in at or row.loss < at[row.depth].loss:
            at[row.depth] = row
    return found
