"""What published methods choose at a depth, from statistics; knows no torch."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np

from abreast.plan import Group, Plan
from abreast.planner import Costs, additive


def least_influence(influence: np.ndarray, count: int) -> tuple[int, ...]:
    """ShortGPT's layers to leave out: those whose output is most like their input.

    arXiv 2403.03853, section 3. influence: [L], 1 - mean cosine of input and output.
    """
    return tuple(sorted(np.argsort(influence, kind="stable")[:count].tolist()))


def least_turn(distance: np.ndarray, count: int, *, first: int = 0) -> tuple[int, ...]:
    """The run of layers, from `first` on, over which the hidden state turns least.

    distance: [L + 1, L + 1], of the inputs of any two layers, place L the last layer's output; with
    angles arXiv 2403.17887, section 4.1, with 1 - cosine ReplaceMe's choice (arXiv 2505.02819).
    """
    starts = range(first, len(distance) - count)
    start = min(starts, key=lambda layer: float(distance[layer, layer + count]))
    return tuple(range(start, start + count))


def by_similarity(similarity: np.ndarray, depth: int, groups: Iterable[Group]) -> Plan | None:
    """CQIL's grouping: the disjoint groups whose members' inputs are most alike.

    arXiv 2404.06709, section 3.1. similarity: [L + 1, L + 1]. Maximises the summed cosine
    similarity of adjacent members' inputs; None where the depth cannot be reached. All groups are
    wired as in that paper, cqil without a bypass.
    """
    stretches = {group.layers for group in groups}
    return _cheapest(
        {
            Group(layers=layers, wiring="cqil"): sum(
                1.0 - float(similarity[layer, layer + 1]) for layer in layers[:-1]
            )
            for layers in sorted(stretches)
        },
        len(similarity) - 1,
        depth,
    )


def at_random(num_layers: int, depth: int, groups: Iterable[Group], seed: int) -> Plan | None:
    """A plan of this depth drawn at random; None where it cannot be reached."""
    draw = random.Random(f"{seed} {depth}")
    return _cheapest(
        {g: draw.random() for g in sorted(groups, key=lambda group: group.shorthand)},
        num_layers,
        depth,
    )


def _cheapest(costs: Costs, num_layers: int, depth: int) -> Plan | None:
    return next(iter(additive(num_layers, costs).get(depth, [])), None)
