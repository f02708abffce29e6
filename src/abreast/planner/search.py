"""From costs to plans: predicted from what groups do alone, then refined on measured plans.

A *candidate* is a group with the cost of forming it alone, and a *coupling* with every other: what
both together are expected to cost more, or less, than their sum. The best plans of every depth
under that prediction follow from dynamic programming over the layers. What they really cost is
measured; so are the papers' contiguous stretches, and what single changes make of the best so far.

Knows no torch: the caller passes the costs and a function that measures plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, zip_longest

import numpy as np

from abreast.plan import Group, Plan

Costs = Mapping[Group, float]
Choice = tuple[int, ...]  # a plan as places in `Candidates.groups`, ascending
Ranked = list[tuple[float, Choice]]
Score = Callable[[Sequence[Plan]], Sequence[float]]
PER_GROUP = 4  # plans measured per group of a plan, at each depth
COUNTED = 4  # groups of a plan that count for that
BEAM = 3
FIRSTS = 3  # ways to begin replacing groups by two others
REACH = 3  # groups at most so many apart are replaced together
GAPS = (0, 1, 2, 4)  # layers between two groups, at least
RIDGE = 0.1
# Where the published stretches end, as shares of the depth: 28 of 32 layers (arXiv 2502.02790,
# Llama 2 7B), 25 of 28 (Llama 3.2 3B) and 30 of 32 (arXiv 2404.06709).
PUBLISHED_ENDS = (28 / 32, 25 / 28, 30 / 32)


@dataclass(frozen=True, eq=False)
class Candidates:
    """The groups that plans of a model are made of, in order of their layers.

    costs: [n], of each alone. coupling: [n, n], symmetric with a diagonal of zeros: what each two
    together cost beyond their sum. saved: [n], whole numbers above 0: by how many stages forming
    each makes a model shallower, or by how many equal steps of time faster. A plan's depth is the
    number of layers less what its groups save.
    """

    num_layers: int
    groups: tuple[Group, ...]
    costs: np.ndarray
    coupling: np.ndarray
    saved: np.ndarray
    timed: bool = False

    @classmethod
    def of(
        cls, num_layers: int, costs: Costs, seconds: Mapping[Group, float] | None = None
    ) -> Candidates:
        """Candidates of these costs whose costs just add up.

        seconds: how much faster each makes a forward pass; those that do not are left out, and the
        others save thirds of what the best of them saves for each stage.
        """
        gains = seconds or {group: float(len(group.layers) - 1) for group in costs}
        step = max((gains[group] / (len(group.layers) - 1) for group in costs), default=1.0)
        step = step / 3 if seconds else 1.0
        groups = tuple(
            sorted(
                (group for group in costs if gains[group] > 0),
                key=lambda group: (group.layers, group.shorthand),
            )
        )
        alone = np.array([costs[group] for group in groups], dtype=np.float64)
        saved = np.array([max(1, round(gains[group] / step)) for group in groups], dtype=int)
        apart = np.zeros((len(groups), len(groups)))
        return cls(num_layers, groups, alone, apart, saved, seconds is not None)

    @cached_property
    def spans(self) -> np.ndarray:
        """[n, 2]: the first layer of each group and the one after its last."""
        return np.array([(g.layers[0], g.layers[-1] + 1) for g in self.groups]).reshape(-1, 2)

    @cached_property
    def _places(self) -> dict[Group, int]:
        return {group: index for index, group in enumerate(self.groups)}

    @cached_property
    def apart(self) -> np.ndarray:
        """[n, n]: which two groups have no layer in common."""
        first, end = self.spans.T
        return np.asarray((end[:, None] <= first) | (end <= first[:, None]))

    @cached_property
    def gaps(self) -> np.ndarray:
        """[n, n]: which of GAPS lies between two groups; -1 where they have a layer in common."""
        first, end = self.spans.T
        between = np.maximum(first - end[:, None], first[:, None] - end)
        return np.where(self.apart, np.searchsorted(GAPS, between, side="right") - 1, -1)

    def cost(self, choice: Choice) -> float:
        """What the groups together are expected to cost."""
        chosen = list(choice)
        return float(self.costs[chosen].sum() + self.coupling[chosen][:, chosen].sum() / 2)

    def plan(self, choice: Choice) -> Plan:
        groups = tuple(self.groups[index] for index in choice)
        return Plan.model_construct(num_layers=self.num_layers, groups=groups)

    def choice(self, plan: Plan) -> Choice | None:
        """The places of a plan's groups, or None where one is no candidate."""
        places = [self._places.get(group, -1) for group in plan.groups]
        return None if -1 in places else tuple(places)

    def depth(self, choice: Choice) -> int:
        return self.num_layers - int(self.saved[list(choice)].sum())

    def free(self, choice: Choice) -> np.ndarray:
        """[n]: which candidates have no layer in common with those chosen."""
        return np.asarray(self.apart[list(choice)].all(0))

    def added(self, choice: Choice) -> np.ndarray:
        """[n]: what each candidate is expected to cost beside those chosen."""
        return np.asarray(self.costs + self.coupling[list(choice)].sum(0))


def additive(num_layers: int, costs: Costs, *, best: int = 1) -> dict[int, list[Plan]]:
    """The `best` plans of lowest summed cost at every depth that can be reached, cheapest first.

    Exact. costs: candidate groups; a single layer costs nothing.
    """
    candidates = Candidates.of(num_layers, costs)
    return {
        depth: [candidates.plan(choice) for _, choice in ranked]
        for depth, ranked in predicted(candidates, best=best).items()
    }


def predicted(candidates: Candidates, *, best: int = 1) -> dict[int, Ranked]:
    """(expected cost, choice) of the `best` plans of every depth, deepest first, cheapest first.

    Dynamic programming over the layers, with the `best` cheapest ways to reach each layer at each
    depth: exact where costs just add up, a beam search where they do not.
    """
    ending: dict[int, list[int]] = {}
    for index, (_, end) in enumerate(candidates.spans.tolist()):
        ending.setdefault(end, []).append(index)
    costs, coupling = candidates.costs.tolist(), candidates.coupling.tolist()
    firsts, saved = candidates.spans[:, 0].tolist(), candidates.saved.tolist()
    reached: list[dict[int, Ranked]] = [{0: [(0.0, ())]}]
    for layer in range(1, candidates.num_layers + 1):
        paths: dict[int, Ranked] = {}
        for depth, shorter in reached[layer - 1].items():
            paths.setdefault(depth + 1, []).extend(shorter)
        for index in ending.get(layer, []):
            beside, adds = coupling[index], layer - firsts[index] - saved[index]
            for depth, shorter in reached[firsts[index]].items():
                paths.setdefault(depth + adds, []).extend(
                    (cost + costs[index] + sum(beside[other] for other in path), (*path, index))
                    for cost, path in shorter
                )
        reached.append({depth: sorted(ranked)[:best] for depth, ranked in paths.items()})
    return dict(sorted(reached[-1].items(), reverse=True))


def refine(
    candidates: Candidates,
    score: Score,
    *,
    least_depth: float = -math.inf,
    per_group: int = PER_GROUP,
    beam: int = BEAM,
) -> Iterator[tuple[int, dict[Plan, float]]]:
    """Measure plans of one depth after another, down to least_depth; yield (depth, their costs).

    score(plans) measures the cost of each, of at most per_group plans per group at each depth, no
    more than COUNTED groups counted. Depths in steps of time where a faster plan is expected to
    cost no more are left out.
    First come starting points: the best plans as predicted, contiguous stretches of equal groups,
    the `beam` best plans of one stage more, and as predicted of one less, with one group changed;
    then `changes` of the `beam` best. The order is by predicted cost, corrected by the measured
    cost of the plan that they come from. Deterministic: ties are broken by the layers.
    """
    optima = predicted(candidates, best=max(beam, 1))
    following = dict(zip(optima, [*optima.values()][1:], strict=False))
    depths = [d for d in optima if least_depth <= d < candidates.num_layers]
    if candidates.timed:
        cheaper: list[int] = []
        for depth in reversed(depths):
            if not cheaper or optima[depth][0][0] < optima[cheaper[0]][0][0]:
                cheaper.insert(0, depth)
        depths = cheaper
    before: dict[Choice, float] = {}
    above: dict[Choice, float] = {(): 0.0}
    learned = candidates
    for depth in depths:
        budget = max(1, per_group * min(COUNTED, len(optima[depth][0][1])))
        shallower = [choice for _, choice in following.get(depth, [])]
        starts = _starts(learned, depth, optima[depth], above, shallower)
        batch, measured = starts[: -(-budget // 2)], dict[Choice, float]()
        near: dict[Choice, dict[Choice, float]] = {}
        while batch:
            plans = [candidates.plan(choice) for choice in batch]
            measured |= zip(batch, score(plans), strict=True)
            if not near:  # once at a depth: it takes longer than it tells
                learned = learn(candidates, before | measured)
            above = dict(sorted(measured.items(), key=_rank)[:beam])
            near |= {choice: changes(learned, choice) for choice in above.keys() - near.keys()}
            ranked = _expected(learned, {choice: near[choice] for choice in above}, above)
            room = min(max(4, budget // 4), budget - len(measured))
            batch = [choice for choice in ranked if choice not in measured][: max(0, room)]
        before = measured
        yield depth, {candidates.plan(choice): cost for choice, cost in measured.items()}


def learn(candidates: Candidates, measured: Mapping[Choice, float]) -> Candidates:
    """Candidates whose couplings agree better with measured plans.

    To second order, the KL divergence of a small change d of the logits is a quadratic form in d.
    If groups i and j alone change them by d_i and d_j, both together cost
    c_i + c_j + 2 rho sqrt(c_i c_j) with a correlation rho. What the couplings leave unexplained is
    taken for a rho that depends on the number of layers between the two only, one for each of GAPS,
    by ridge regression on relative costs.
    """
    roots = np.sqrt(np.maximum(candidates.costs, 0.0))
    rows, excess = [], []
    for choice, cost in measured.items():
        expected, chosen = candidates.cost(choice), list(choice)
        if len(chosen) > 1 and expected > 0:
            pairs = np.outer(roots[chosen], roots[chosen])
            gaps = candidates.gaps[chosen][:, chosen]
            rows.append([pairs[gaps == gap].sum() / 2 / expected for gap in range(len(GAPS))])
            excess.append(cost / expected - 1)
    if not rows:
        return candidates
    x, y = np.array(rows), np.array(excess)
    rho = np.linalg.solve(x.T @ x + RIDGE * np.eye(len(GAPS)), x.T @ y)
    more = np.append(rho, 0.0)[candidates.gaps] * np.outer(roots, roots)
    return replace(candidates, coupling=candidates.coupling + more)


def changes(candidates: Candidates, choice: Choice, *, most: int = 64) -> dict[Choice, float]:
    """Plans of the same depth with one or two groups replaced, and their expected costs.

    One or two others take their place, of any size and wiring, anywhere; the `most` best.
    """
    changed: dict[Choice, float] = {}
    for removed in _removals(choice):
        rest = tuple(index for index in choice if index not in removed)
        saved = int(candidates.saved[list(removed)].sum())
        base = candidates.cost(rest)
        for added, cost in _fillings(candidates, rest, saved).items():
            new = tuple(sorted((*rest, *added)))
            changed[new] = base + cost
    changed.pop(choice, None)
    return dict(sorted(changed.items(), key=_rank)[:most])


def _removals(choice: Choice) -> Iterator[Choice]:
    yield from ((index,) for index in choice)
    for a, b in combinations(range(len(choice)), 2):
        if b - a <= REACH:
            yield choice[a], choice[b]


def _fillings(candidates: Candidates, rest: Choice, saved: int) -> dict[Choice, float]:
    """One or two groups that save `saved` stages beside the rest, with what they cost there."""
    cost, free = candidates.added(rest), candidates.free(rest)
    fillings: dict[Choice, float] = {}
    for index in _cheapest(cost, free & (candidates.saved == saved), 4 * FIRSTS):
        fillings[(index,)] = float(cost[index])
    for first in _cheapest(cost / candidates.saved, free & (candidates.saved < saved), FIRSTS):
        fits = candidates.saved == saved - candidates.saved[first]
        both = cost + candidates.coupling[first]
        for second in _cheapest(both, free & fits & candidates.free((first,)), FIRSTS):
            fillings[tuple(sorted((first, second)))] = float(cost[first] + both[second])
    return fillings


def _cheapest(cost: np.ndarray, allowed: np.ndarray, most: int) -> list[int]:
    places = np.flatnonzero(allowed)
    order: list[int] = places[np.argsort(cost[places], kind="stable")[:most]].tolist()
    return order


def contiguous(num_layers: int, depth: int, costs: Costs) -> list[Plan]:
    """Every run of adjacent equal candidates that gives this depth.

    With pairs wired lp these are the plans of Layer Parallelism (arXiv 2502.02790), one per start.
    """
    candidates = Candidates.of(num_layers, costs)
    return [candidates.plan(choice) for choice in _stretches(candidates, depth)]


def _stretches(candidates: Candidates, depth: int) -> list[Choice]:
    """The choices of `contiguous`."""
    places = {(g.layers[0], len(g.layers), g.kind): i for i, g in enumerate(candidates.groups)}
    stretches = []
    for size, kind in sorted({(size, kind) for _, size, kind in places}):
        for start in range(candidates.num_layers):
            chosen: list[int] = []
            left = candidates.num_layers - depth
            while left > 0 and (start + size * len(chosen), size, kind) in places:
                chosen.append(places[start + size * len(chosen), size, kind])
                left -= int(candidates.saved[chosen[-1]])
            if chosen and left == 0:
                stretches.append(tuple(chosen))
    return stretches


def total(plan: Plan, costs: Costs) -> float:
    """The summed costs of a plan's groups."""
    return sum(costs[group] for group in plan.groups)


def _starts(
    candidates: Candidates,
    depth: int,
    optima: Ranked,
    above: Mapping[Choice, float],
    shallower: Sequence[Choice],
) -> list[Choice]:
    """Starting points at a depth: the kinds in turn, each by expected cost.

    Of the contiguous stretches, one that ends where a published one does comes first. above: plans
    of one stage more and their measured costs; shallower: predicted plans of one stage less.
    """
    ends = {round(share * candidates.num_layers) for share in PUBLISHED_ENDS}
    stretches = sorted(
        _stretches(candidates, depth), key=lambda choice: (candidates.cost(choice), choice)
    )
    published = [c for c in stretches if candidates.spans[c[-1], 1] in ends][:1]
    costs = {**{choice: candidates.cost(choice) for choice in shallower}, **above}
    steps = {choice: dict(_one_step(candidates, choice, depth)) for choice in costs}
    near = _expected(candidates, steps, costs)
    turns = [[choice for _, choice in optima], near, published + stretches]
    in_turn = zip_longest(*turns)
    return [*dict.fromkeys(choice for turn in in_turn for choice in turn if choice is not None)]


def _one_step(candidates: Candidates, choice: Choice, depth: int) -> Iterator[tuple[Choice, float]]:
    """Plans of this depth from one of another, and their expected costs.

    They have one group more or less, or a larger or smaller one in the place of one.
    """
    gap = candidates.depth(choice) - depth
    for removed in ((), *((index,) for index in choice)):
        saved = gap + int(candidates.saved[list(removed)].sum())
        rest = tuple(index for index in choice if index not in removed)
        base, added = candidates.cost(rest), candidates.added(rest)
        if saved == 0:
            yield rest, base
        fits = candidates.free(rest) & (candidates.saved == saved)
        for index in removed:
            fits &= ~candidates.apart[index]
        for index in np.flatnonzero(fits).tolist():
            yield tuple(sorted((*rest, index))), base + float(added[index])


def _expected(
    candidates: Candidates,
    changed: Mapping[Choice, Mapping[Choice, float]],
    measured: Mapping[Choice, float],
) -> list[Choice]:
    """New plans by their expected costs, corrected by the error made for what they come from."""
    expected: dict[Choice, float] = {}
    for choice, news in changed.items():
        excess = measured[choice] - candidates.cost(choice)
        for new, cost in news.items():
            expected[new] = min(excess + cost, expected.get(new, math.inf))
    return [choice for choice, _ in sorted(expected.items(), key=_rank)]


def _rank(item: tuple[Choice, float]) -> tuple[float, Choice]:
    return item[1], item[0]
