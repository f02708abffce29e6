"""From costs to plans: exact for additive costs, then refined on measured costs.

A *candidate* is a group with the cost of forming it alone. Were costs additive, the best plan of
every depth would follow from dynamic programming over disjoint groups. They are not: several groups
together cost more, or less, than their sum. So the search measures whole plans, starting from the
additive optimum, the papers' contiguous stretches, and the best plans found so far with one more
group.

Knows no torch: the caller passes the costs and a function that measures plans.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from abreast.plan import Group, Plan

Costs = Mapping[Group, float]
Groups = tuple[Group, ...]
Score = Callable[[Sequence[Plan]], Sequence[float]]
PER_GROUP = 4  # plans measured per group of a plan, at each depth
BEAM = 3
GAPS = (0, 1, 2, 4)  # layers between two groups, at least
RIDGE = 0.1
CHUNK = 4  # neighbours measured at once, at least


def additive(num_layers: int, costs: Costs, *, best: int = 1) -> dict[int, list[Plan]]:
    """The `best` plans of lowest summed cost at every depth that can be reached, cheapest first.

    Exact: dynamic programming over the layers, with the `best` cheapest ways to reach each layer
    in each number of stages. costs: candidate groups; a single layer costs nothing.
    """
    ending: dict[int, list[Group]] = {}
    for group in costs:
        ending.setdefault(group.layers[-1] + 1, []).append(group)
    reached: list[dict[int, list[tuple[float, Groups]]]] = [{0: [(0.0, ())]}]
    for layer in range(1, num_layers + 1):
        paths: dict[int, list[tuple[float, Groups]]] = {}
        for stages, shorter in reached[layer - 1].items():
            paths.setdefault(stages + 1, []).extend(shorter)
        for group in ending.get(layer, []):
            for stages, shorter in reached[group.layers[0]].items():
                longer = [(cost + costs[group], (*groups, group)) for cost, groups in shorter]
                paths.setdefault(stages + 1, []).extend(longer)
        reached.append({stages: sorted(p, key=_path_rank)[:best] for stages, p in paths.items()})
    return {
        depth: [_plan(num_layers, groups) for _, groups in paths]
        for depth, paths in sorted(reached[-1].items(), reverse=True)
    }


def refine(
    num_layers: int,
    costs: Costs,
    score: Score,
    *,
    least_depth: int,
    per_group: int = PER_GROUP,
    beam: int = BEAM,
) -> Iterator[tuple[int, dict[Plan, float]]]:
    """Measure plans of one depth after another, down to least_depth; yield (depth, their costs).

    score(plans) measures the cost of each, of at most per_group plans per group at each depth.
    First come starting points: the additive optima, contiguous stretches of equal groups, and the
    `beam` best plans of the previous depth with one more group; then `neighbours` of the `beam`
    best. The order is by cost as `predict` expects it, corrected by the measured cost of the plan
    that they come from. Deterministic: ties are broken by shorthand.
    """
    optima = additive(num_layers, costs, best=beam)
    measured: dict[Plan, float] = {}
    parents: dict[Plan, float] = {Plan(num_layers=num_layers): 0.0}
    for depth in sorted((d for d in optima if least_depth <= d < num_layers), reverse=True):
        budget = max(1, per_group * len(optima[depth][0].groups))
        at_depth: dict[Plan, float] = {}
        coupling = interactions(measured, costs)
        batch = _starts(costs, coupling, depth, optima[depth], parents)[: -(-budget // 2)]
        while batch:
            at_depth |= zip(batch, score(batch), strict=True)
            measured |= at_depth
            coupling = interactions(measured, costs)
            parents = dict(sorted(at_depth.items(), key=_rank)[:beam])
            moves = [(plan, near) for plan in parents for near in neighbours(plan, costs)]
            ranked = _ranked(moves, parents, costs, coupling)
            room = min(max(CHUNK, budget // 4), budget - len(at_depth))
            batch = [plan for plan in ranked if plan not in at_depth][: max(0, room)]
        yield depth, at_depth


def predict(plan: Plan, costs: Costs, coupling: np.ndarray) -> float:
    """Expected cost of a plan: the c_i of its groups, and the interaction of every two.

    To second order, the KL divergence of a small change d of the logits is a quadratic form in d.
    If groups i and j alone change them by d_i and d_j, both together cost
    c_i + c_j + 2 rho sqrt(c_i c_j) with a correlation rho, which is taken to depend on the number
    of layers between the two only. coupling: 2 rho for each of GAPS.
    """
    return total(plan, costs) + float(_couplings(plan, costs) @ coupling)


def interactions(measured: Mapping[Plan, float], costs: Costs) -> np.ndarray:
    """2 rho for each of GAPS, from measured plans by ridge regression on relative costs."""
    rows, excess = [], []
    for plan, cost in measured.items():
        size = total(plan, costs)
        if len(plan.groups) > 1 and size > 0:
            rows.append(_couplings(plan, costs) / size)
            excess.append(cost / size - 1)
    if not rows:
        return np.zeros(len(GAPS))
    x, y = np.array(rows), np.array(excess)
    return np.asarray(np.linalg.solve(x.T @ x + RIDGE * np.eye(len(GAPS)), x.T @ y))


def neighbours(plan: Plan, costs: Costs) -> set[Plan]:
    """Plans of the same depth that differ from `plan` by one move, with known groups only.

    The moves: put one stage, layer or group, elsewhere, the stages between shifting over; move a
    layer from one group to another stage; wire one group differently.
    """
    kinds = {_kind(group) for group in costs}
    stages = [(1, "", 0) if (g := plan.group_of(s)) is None else _kind(g) for s in plan.stages]
    changed: list[list[Kind]] = []
    indices = range(len(stages))
    for here in indices:
        rest = stages[:here] + stages[here + 1 :]
        changed += [
            [*rest[:there], stages[here], *rest[there:]] for there in indices if there != here
        ]
        same_size = [kind for kind in kinds if kind[0] == stages[here][0]]
        changed += [[*stages[:here], kind, *stages[here + 1 :]] for kind in same_size]
        for there in indices:
            if here != there and stages[here][0] > 1:
                changed += _layer_moved(stages, here, there, kinds)
    plans = {_from_stages(plan.num_layers, variant, costs) for variant in changed}
    return {near for near in plans if near is not None and near != plan}


def contiguous(num_layers: int, depth: int, costs: Costs) -> list[Plan]:
    """Every run of adjacent equal candidates that gives this depth.

    With pairs wired lp these are the plans of Layer Parallelism (arXiv 2502.02790), one per start.
    """
    plans = []
    for size, wiring, bypass in sorted({_kind(group) for group in costs}):
        count, left = divmod(num_layers - depth, size - 1)
        if left or not count:
            continue
        for start in range(num_layers - count * size + 1):
            stages: list[Kind] = [(1, "", 0)] * start + [(size, wiring, bypass)] * count
            stages += [(1, "", 0)] * (num_layers - start - count * size)
            plan = _from_stages(num_layers, stages, costs)
            if plan is not None:
                plans.append(plan)
    return plans


def total(plan: Plan, costs: Costs) -> float:
    """The summed costs of a plan's groups."""
    return sum(costs[group] for group in plan.groups)


Kind = tuple[int, str, int]  # size, wiring, bypass; of a single layer (1, "", 0)


def _starts(
    costs: Costs,
    coupling: np.ndarray,
    depth: int,
    optima: Sequence[Plan],
    parents: Mapping[Plan, float],
) -> list[Plan]:
    """Starting points at a depth: the first optimum, then the kinds in turn."""
    stretches = contiguous(optima[0].num_layers, depth, costs)
    stretches.sort(key=lambda plan: (predict(plan, costs, coupling), plan.shorthand))
    longer = _ranked(
        [
            (plan, more)
            for plan in parents
            for group in costs
            if (more := _with_group(plan, group)) is not None and more.depth == depth
        ],
        parents,
        costs,
        coupling,
    )
    kinds = [list(optima), longer, stretches]
    turns = [kind[at] for at in range(max(map(len, kinds))) for kind in kinds if at < len(kind)]
    return list(dict.fromkeys(turns))


def _ranked(
    moves: Iterable[tuple[Plan, Plan]],
    measured: Mapping[Plan, float],
    costs: Costs,
    coupling: np.ndarray,
) -> list[Plan]:
    """The new plans of (plan, new plan), by expected cost."""
    excess = {plan: cost - predict(plan, costs, coupling) for plan, cost in measured.items()}
    expected: dict[Plan, float] = {}
    for plan, new in moves:
        cost = excess[plan] + predict(new, costs, coupling)
        expected[new] = min(cost, expected.get(new, cost))
    return [plan for plan, _ in sorted(expected.items(), key=_rank)]


def _couplings(plan: Plan, costs: Costs) -> np.ndarray:
    """Summed sqrt(c_i c_j) over the pairs of groups at each of GAPS."""
    sums = np.zeros(len(GAPS))
    for first, second in itertools.combinations(plan.groups, 2):
        gap = second.layers[0] - first.layers[-1] - 1
        index = max(i for i, least in enumerate(GAPS) if gap >= least)
        sums[index] += math.sqrt(max(0.0, costs[first]) * max(0.0, costs[second]))
    return sums


def _layer_moved(
    stages: list[Kind], here: int, there: int, kinds: Iterable[Kind]
) -> Iterator[list[Kind]]:
    for less in kinds if stages[here][0] > 2 else [(1, "", 0)]:
        for more in kinds:
            if less[0] == stages[here][0] - 1 and more[0] == stages[there][0] + 1:
                changed = list(stages)
                changed[here], changed[there] = less, more
                yield changed


def _from_stages(num_layers: int, stages: Sequence[Kind], costs: Costs) -> Plan | None:
    """The plan of these stages in order, or None if one of its groups is no candidate."""
    groups, first = [], 0
    for size, wiring, bypass in stages:
        if size > 1:
            layers = tuple(range(first, first + size))
            group = Group.model_construct(layers=layers, wiring=wiring, bypass=bypass)
            if group not in costs:
                return None
            groups.append(group)
        first += size
    return _plan(num_layers, groups)


def _with_group(plan: Plan, group: Group) -> Plan | None:
    taken = {layer for other in plan.groups for layer in other.layers}
    if taken & set(group.layers):
        return None
    groups = sorted((*plan.groups, group), key=lambda other: other.layers)
    return _plan(plan.num_layers, groups)


def _plan(num_layers: int, groups: Iterable[Group]) -> Plan:
    return Plan.model_construct(num_layers=num_layers, groups=tuple(groups))


def _kind(group: Group) -> Kind:
    return len(group.layers), group.wiring, group.bypass


def _rank(item: tuple[Plan, float]) -> tuple[float, str]:
    return item[1], item[0].shorthand


def _path_rank(path: tuple[float, Groups]) -> tuple[float, tuple[str, ...]]:
    return path[0], tuple(group.shorthand for group in path[1])
