"""What published methods choose at a depth; knows no torch."""

from __future__ import annotations

import random

import numpy as np

from abreast.plan import Plan
from abreast.planner import Costs, additive, contiguous


def by_similarity(similarity: np.ndarray, depth: int, costs: Costs) -> Plan | None:
    """CQIL's grouping: the disjoint groups whose members' inputs are most alike.

    arXiv 2404.06709, section 3.1. similarity: [L + 1, L + 1]. Maximises the summed cosine
    similarity of adjacent members' inputs; None where the depth cannot be reached.
    """
    return _cheapest(
        {
            group: sum(1.0 - float(similarity[layer, layer + 1]) for layer in group.layers[:-1])
            for group in costs
        },
        len(similarity) - 1,
        depth,
    )


def by_angle(angular: np.ndarray, depth: int, costs: Costs) -> Plan | None:
    """The contiguous stretch over which the hidden state turns least, as equal groups.

    arXiv 2403.17887, section 4.1, chooses the layers to prune so. angular: [L + 1, L + 1].
    """

    def turn(plan: Plan) -> tuple[float, str]:
        first, last = plan.groups[0].layers[0], plan.groups[-1].layers[-1]
        return float(angular[first, last + 1]), plan.shorthand

    return min(contiguous(len(angular) - 1, depth, costs), key=turn, default=None)


def at_random(num_layers: int, depth: int, costs: Costs, seed: int) -> Plan | None:
    """A plan of this depth drawn at random; None where it cannot be reached."""
    draw = random.Random(f"{seed} {depth}")
    return _cheapest(
        {g: draw.random() for g in sorted(costs, key=lambda group: group.shorthand)},
        num_layers,
        depth,
    )


def _cheapest(costs: Costs, num_layers: int, depth: int) -> Plan | None:
    return next(iter(additive(num_layers, costs).get(depth, [])), None)
