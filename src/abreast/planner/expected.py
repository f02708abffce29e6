"""What a search takes, said before it is done: forward passes, memory and minutes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from abreast.checkpoint import open_checkpoint
from abreast.families import num_layers_of
from abreast.model import loaded_dtype, minutes_text, pace_of
from abreast.plan import Group
from abreast.planner.calibration import (
    DEPENDENCY_SHARE,
    PLAN_SCREEN,
    Calibration,
    candidates_of,
    share_of,
    window_cache,
)
from abreast.planner.measuring import full_forwards
from abreast.planner.search import BEAM, COUNTED, PER_GROUP, additive
from abreast.planner.settings import CalibrationSettings
from abreast.runs import windows_at_once


@dataclass(frozen=True)
class Expected:
    """Cost of a calibration run: full forward passes, at most, and bytes held at once.

    likely: passes where the groups chosen are like the others, instead of those that take longest;
    scored: how often the logits of the whole text are then made and scored, more often than that,
    for plans share layers. activations: hidden states and logits that are kept; a layer's working
    memory comes on top.
    """

    candidates: int
    full_forwards: float
    likely: float
    scored: float
    weights: int
    activations: int


def expect(
    model: str | Path,
    settings: CalibrationSettings,
    *,
    depth: int | None = None,
    per_group: int = PER_GROUP,
    beam: int = BEAM,
) -> Expected:
    """Cost of `measure` with these settings, from config and headers, reading no weights.

    depth: that of a search as well, down to this depth, and of judging the best plan of each.
    """
    checkpoint = open_checkpoint(model, revision=settings.revision, weights=False)
    groups = candidates_of(checkpoint.config, settings)
    num_layers, cache = num_layers_of(checkpoint.config), window_cache(checkpoint, settings)
    num_windows, at_once = settings.num_windows, windows_at_once(cache, settings.max_cache_bytes)
    size = min(num_windows, settings.batch_size, at_once)
    batches = math.ceil(num_windows / size)
    depths = list[int]()
    if depth is not None:
        free = dict.fromkeys(groups, 0.0)
        depths = [
            reached for reached in additive(num_layers, free) if depth <= reached < num_layers
        ]
    (most, _), (likely, scored) = (
        np.add(
            _alone(groups, num_layers, batches, settings, likely=likely),
            _searched(depths, num_layers, per_group, beam, likely=likely),
        ).tolist()
        for likely in (False, True)
    )
    return Expected(
        candidates=len(groups),
        full_forwards=most,
        likely=likely,
        scored=scored,
        weights=sum(math.prod(t.shape) for t in checkpoint.tensors.values())
        * loaded_dtype(checkpoint, settings.dtype).itemsize,
        activations=size * cache,
    )


def _alone(
    groups: Sequence[Group],
    num_layers: int,
    batches: int,
    settings: CalibrationSettings,
    *,
    likely: bool,
) -> tuple[float, float]:
    """Passes of the groups alone, and how often the text is scored: those that take longest are
    chosen, or such as take the mean."""
    share = share_of(range(batches), settings.screen) / batches
    wirings = len({group.kind for group in groups if len(group.layers) == 2}) or 1
    smallest = min(len(group.layers) for group in groups)

    def chosen(layers: Sequence[float], part: float) -> list[float]:
        count = math.ceil(part * len(layers))
        ranked = sorted(layers, reverse=True)
        return [sum(layers) / len(layers)] * count if likely else ranked[:count]

    screened = list[float]()
    for size in sorted({len(group.layers) for group in groups}):
        # A candidate shares the layers before it with the original.
        layers = {num_layers - group.layers[0] for group in groups if len(group.layers) == size}
        screened += chosen([*layers], 1.0 if size == smallest else settings.larger)
    measured = chosen(screened, settings.keep)
    dependency = num_layers * (num_layers - 1) / 2 / DEPENDENCY_SHARE
    layers_run = 2 * num_layers + dependency + (1 - share) * sum(measured)
    scored = 1 + share * wirings * len(screened) + (1 - share) * len(measured)
    return (layers_run + share * wirings * sum(screened)) / num_layers, scored


def _searched(
    depths: Sequence[int], num_layers: int, per_group: int, beam: int, *, likely: bool
) -> tuple[float, float]:
    """Passes of the plans of these depths, and how often the text is scored, judging included."""
    passes = scored = float(bool(depths))
    for number, depth in enumerate(depths, start=1):
        # a plan shares the layers before its first group; so many groups, spread over the model
        whole = number / (number + 1) * depth / num_layers if likely else 1.0
        plans = per_group * min(COUNTED, number) * PLAN_SCREEN + beam * (1 - PLAN_SCREEN) + 1
        passes += whole * plans
        scored += plans
    return passes, scored


def likely_depth(num_layers: int) -> int:
    """How deep a search without a depth probably goes, the depth that is too much included.

    DEFAULT_KL is reached at 28 of SmolLM2's 30 layers, see benchmarks/RESULTS.md.
    """
    return num_layers - max(2, round(num_layers / 10))


def expected_work(calibration: Calibration, expected: Expected, *, least: int | None = None) -> str:
    """What measuring, or a search down to `least` stages, takes, in words; in minutes as well where
    it begins, from a pass over a few windows."""
    down = f" down to {least} stages" if least is not None else ""
    work = (
        f"about {expected.likely:.0f} full forward passes over {calibration.tokens.size:,} tokens"
        f"{down}"
    )
    if (done := sum(full_forwards(calibration).values())) > 0:
        return f"{work}, of which earlier calls made {done:.0f}"
    count, window = calibration.tokens.shape
    pace = pace_of(calibration.model, window, min(count, calibration.size))
    return f"{work}, {minutes_text(pace.seconds(count, expected.likely, expected.scored))} here"
