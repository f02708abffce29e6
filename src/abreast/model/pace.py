"""How long windows of text take here, timed on a few: work is said before it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from abreast.checkpoint import locate, open_checkpoint
from abreast.model.devices import fitting_dtype
from abreast.model.forward import keeps
from abreast.model.grouping import device_of, load
from abreast.model.scores import token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pace:
    """Seconds of a window: in all layers once, and in making its logits and scoring them."""

    layers: float
    logits: float

    def seconds(self, windows: int, passes: float, scored: float) -> float:
        """Of so many passes through all layers, and so many programs scored, on these windows."""
        return windows * (passes * self.layers + scored * self.logits)


def pace_of(model: PreTrainedModel, window: int, rows: int = 1) -> Pace:
    """Time `rows` windows of so many random tokens, run at once and scored against themselves."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.from_numpy(np.random.default_rng(0).integers(vocabulary, size=(rows, window)))
    inputs, options = ids.to(device_of(model)), {"use_cache": False}
    with torch.no_grad():
        model(input_ids=inputs[:, :16], **options).logits.cpu()  # what only a first pass does
        begin = time.perf_counter()
        few = model(input_ids=inputs, **options, **keeps(model, 1))
        few.logits.cpu()  # waits for it
        middle = time.perf_counter()
        logits = model(input_ids=inputs, **options).logits.cpu()
    token_scores(logits[:, :-1], ids[:, 1:], logits[:, :-1])
    end = time.perf_counter()
    layers = middle - begin
    return Pace(layers / rows, max(0.0, end - middle - layers) / rows)


def pace_here(
    model: str | Path, window: int, *, revision: str | None = None, dtype: str, **loading: Any
) -> Pace | None:
    """The pace of a checkpoint, loaded for it, one window at a time.

    None where its weights are only on the Hub: nothing is downloaded for it. Raises as `load`.
    """
    folder, _, absent = locate(model, revision=revision, weights=False)
    if absent:
        return None
    fitting = fitting_dtype(open_checkpoint(folder), dtype, loading["device"])
    return pace_of(load(folder, dtype=fitting, **loading)[0], window)


def minutes_text(seconds: float) -> str:
    """About how many minutes, in words."""
    minutes = round(seconds / 60)
    return f"about {minutes} minute{'s' * (minutes > 1)}" if minutes else "less than a minute"
