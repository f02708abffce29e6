"""How much choosing, repairing and judging rivals takes, before any of it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abreast.model import Pace, minutes_text
from abreast.plan import Group
from abreast.planner import contiguous

SCREEN = 8  # every candidate is tried on one window in so many
FINALISTS = 2  # and so many of a choice on all
REFIT_TOKENS = 8192


@dataclass(frozen=True)
class Work:
    """Full forward passes, at most, where nothing is in the journals.

    choosing: of the text to choose on, refits included; judging: of that to judge on. tried: how
    often the former is scored, judged: the latter.
    """

    choosing: float
    judging: float
    tried: float
    judged: float

    def text(self, tokens: int, judge_tokens: int) -> str:
        return (
            f"at most {self.choosing:.0f} full forward passes of {tokens:,} tokens to choose and "
            f"refit, and {self.judging:.0f} of {judge_tokens:,} tokens to judge"
        )

    def minutes(self, pace: Pace, windows: int, judge_windows: int) -> str:
        """In words; the equations that a refit solves come on top."""
        choosing = pace.seconds(windows, self.choosing, self.tried)
        return minutes_text(choosing + pace.seconds(judge_windows, self.judging, self.judged))


def work_of(
    num_layers: int,
    groups: Sequence[Group],
    depths: Sequence[int],
    methods: Sequence[str],
    *,
    refit: bool,
    tokens: int,
) -> Work:
    """What `compare` takes for these methods and depths, given what contiguous plans are made of.

    tokens: of the text to choose on.
    """
    costs = dict.fromkeys(groups, 0.0)
    layers = tried = 0.0
    if "sleb" in methods:
        for left in range(num_layers, min(depths), -1):
            # Leaving out layer i reruns what follows it.
            layers += left * left / 2 / SCREEN + FINALISTS * left
            tried += left / SCREEN + FINALISTS
    if "contiguous" in methods:
        for depth in depths:
            stretches = contiguous(num_layers, depth, costs)
            layers += sum(num_layers - p.groups[0].layers[0] for p in stretches) / SCREEN
            layers += FINALISTS * num_layers
            tried += len(stretches) / SCREEN + FINALISTS
    if "similarity" in methods:
        layers += len(depths) * FINALISTS * num_layers
        tried += len(depths) * FINALISTS
    ways = [1 + (refit and method != "random") for method in methods]
    judged = sum(ways) * sum(depths)
    fits = judged / 2 if refit else sum(depths) * ("replaceme" in methods)
    layers += fits * min(1.0, REFIT_TOKENS / tokens)
    return Work(
        choosing=layers / num_layers,
        judging=judged / num_layers,
        tried=tried,
        judged=sum(ways) * len(depths),
    )
