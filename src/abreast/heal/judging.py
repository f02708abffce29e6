"""What healing won: on held-out text of the kind that was healed on, and on another kind."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from abreast.data import CALIBRATION, HELD_OUT, PROSE, DataError, TokenStream, load_tokens
from abreast.evaluate import ratio_of_means
from abreast.model import predictions_of, scores_under
from abreast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Judged:
    """Before and after healing, on one text: KL(original || grouped), and how far the loss is above
    the original's, both in nats per token with their standard errors, clustered by window.

    text: its source. known: whether other parts of this text were healed on.
    """

    text: str
    known: bool
    tokens: int
    kl_before: float
    kl_before_stderr: float
    kl_after: float
    kl_after_stderr: float
    loss_before: float
    loss_before_stderr: float
    loss_after: float
    loss_after_stderr: float


def other_kind(stream: TokenStream, tokenizer: Any, max_tokens: int) -> TokenStream | None:
    """A kind of text that the stream does not hold, begun alike; None where none is here.

    Python's reference is prose, its library is code.
    """
    sources = stream.source.split(",")
    for kind, same in ((PROSE, ()), (HELD_OUT, (CALIBRATION,))):
        if tokenizer is not None and not {kind, *same} & {*sources}:
            with suppress(DataError):
                other = load_tokens(tokenizer, kind, max_tokens=max_tokens)
                return replace(other, prefix=stream.prefix)
    return None


class Judge:
    """What the original predicts, as it is when this is made, on texts to judge healing on.

    windows: token ids [windows, window] by source, the text healed on first, each with so many
    tokens of a prefix.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        windows: Mapping[str, np.ndarray],
        prefix: int,
        batch_size: int,
    ) -> None:
        self.model, self.plan = model, plan
        self.references = {
            name: predictions_of(model, torch.from_numpy(ids), batch_size, prefix)
            for name, ids in windows.items()
        }

    def scores(self) -> dict[str, np.ndarray]:
        """`scores_under` of the model as it is, by text."""
        return {
            name: scores_under(self.model, self.plan, reference)
            for name, reference in self.references.items()
        }

    def judged(
        self, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
    ) -> tuple[Judged, ...]:
        rows = []
        for number, (name, reference) in enumerate(self.references.items()):
            counts = np.full(len(reference.ids), len(reference.positions))
            figures = [
                figure
                for sums in (lambda s: s[:, 2], lambda s: s[:, 0] - s[:, 1])
                for scores in (before, after)
                for figure in ratio_of_means(sums(scores[name]), counts)
            ]
            rows.append(Judged(name, number == 0, int(counts.sum()), *figures))
        return tuple(rows)
