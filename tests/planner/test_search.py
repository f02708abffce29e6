"""The search alone, on costs made up here: exact where it says so, better where costs interact."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abreast.plan import Group, Plan
from abreast.planner.search import (
    Candidates,
    additive,
    changes,
    contiguous,
    learn,
    predicted,
    refine,
    total,
)


def pairs(num_layers: int, cost=lambda first: 1.0, *, size: int = 2) -> dict[Group, float]:
    """All groups of one size but those with the first or last layer."""
    firsts = range(1, num_layers - size)
    return {Group(layers=tuple(range(f, f + size))): cost(f) for f in firsts}


def every_plan(num_layers: int, costs: dict[Group, float]) -> list[Plan]:
    """All plans from these groups, by trying every subset of them."""
    plans = []
    for count in range(len(costs) + 1):
        for groups in itertools.combinations(sorted(costs, key=lambda g: g.layers), count):
            layers = [layer for group in groups for layer in group.layers]
            if len(set(layers)) == len(layers) and layers == sorted(layers):
                plans.append(Plan(num_layers=num_layers, groups=groups))
    return plans


some_costs = st.integers(4, 8).flatmap(
    lambda num_layers: st.tuples(
        st.just(num_layers),
        st.dictionaries(
            st.tuples(
                st.integers(0, num_layers - 2), st.integers(2, 3), st.sampled_from(("lp", "cqil"))
            )
            .filter(lambda key: key[0] + key[1] <= num_layers)
            .map(lambda k: Group(layers=tuple(range(k[0], k[0] + k[1])), wiring=k[2])),
            st.integers(-50, 200).map(lambda cost: cost / 16),
            min_size=1,
            max_size=8,
        ),
    )
)


@given(some_costs)
def test_additive_optimum_is_the_best_of_all_plans(given_costs):
    num_layers, costs = given_costs
    best = {}
    for plan in every_plan(num_layers, costs):
        best[plan.depth] = min(best.get(plan.depth, math.inf), total(plan, costs))
    optima = additive(num_layers, costs)
    assert {depth: total(plans[0], costs) for depth, plans in optima.items()} == pytest.approx(best)
    assert all(plan.depth == depth for depth, plans in optima.items() for plan in plans)


@given(some_costs, st.integers(2, 5))
def test_the_best_few_are_the_best_few(given_costs, best):
    num_layers, costs = given_costs
    ranked: dict[int, list[float]] = {}
    for plan in every_plan(num_layers, costs):
        ranked.setdefault(plan.depth, []).append(total(plan, costs))
    for depth, plans in additive(num_layers, costs, best=best).items():
        assert [total(plan, costs) for plan in plans] == pytest.approx(sorted(ranked[depth])[:best])
        assert len(set(plans)) == len(plans)


def coupled(num_layers: int, costs: dict[Group, float], seed: int = 0) -> Candidates:
    """Candidates of which every two cost something more, or less, than their sum."""
    candidates = Candidates.of(num_layers, costs)
    n = len(candidates.groups)
    random = np.random.default_rng(seed).normal(size=(n, n)) / 4
    return dataclasses.replace(candidates, coupling=np.triu(random, 1) + np.triu(random, 1).T)


@given(some_costs, st.integers(0, 3))
def test_predicted_costs_are_sums_of_costs_and_couplings(given_costs, seed):
    num_layers, costs = given_costs
    candidates = coupled(num_layers, costs, seed)
    index_of = {group: at for at, group in enumerate(candidates.groups)}
    ranked = predicted(candidates, best=1000)
    assert sum(map(len, ranked.values())) == len(every_plan(num_layers, costs))
    for depth, plans in ranked.items():
        assert [cost for cost, _ in plans] == sorted(cost for cost, _ in plans)
        for cost, choice in plans:
            plan = candidates.plan(choice)
            couplings = (
                candidates.coupling[index_of[a], index_of[b]]
                for a, b in itertools.combinations(plan.groups, 2)
            )
            assert plan == Plan.parse(plan.shorthand, num_layers) and plan.depth == depth
            assert cost == pytest.approx(total(plan, costs) + sum(couplings))
            assert candidates.cost(choice) == pytest.approx(cost)


@given(some_costs, st.data())
def test_changes_are_plans_of_the_same_depth_and_known_groups(given_costs, data):
    num_layers, costs = given_costs
    candidates = coupled(num_layers, costs)
    plan = data.draw(st.sampled_from([p for p in every_plan(num_layers, costs) if p.groups]))
    places = tuple(candidates.groups.index(group) for group in plan.groups)
    changed = changes(candidates, places)
    assert places not in changed
    for near, cost in changed.items():
        assert candidates.plan(near).depth == plan.depth
        assert candidates.plan(near) == Plan.parse(candidates.plan(near).shorthand, num_layers)
        assert cost == pytest.approx(candidates.cost(near))


@given(some_costs, st.data())
def test_the_best_plan_with_one_group_replaced_is_among_the_changes(given_costs, data):
    num_layers, costs = given_costs
    candidates = coupled(num_layers, costs)
    plan = data.draw(st.sampled_from([p for p in every_plan(num_layers, costs) if p.groups]))
    places = tuple(candidates.groups.index(group) for group in plan.groups)
    others = [p for p in every_plan(num_layers, costs) if p.depth == plan.depth and p != plan]
    near = [p for p in others if len({*p.groups} - {*plan.groups}) == 1]
    near = [p for p in near if len({*plan.groups} - {*p.groups}) == 1]
    expected = [candidates.cost(tuple(map(candidates.groups.index, p.groups))) for p in near]
    if expected:
        assert min(changes(candidates, places).values()) <= min(expected) + 1e-9


def test_couplings_are_learnt_by_the_number_of_layers_between_two_groups():
    """Against the regression written out, pair by pair."""
    candidates = Candidates.of(20, pairs(20, lambda first: first / 4))
    rng = np.random.default_rng(0)
    choices = [(0,), (3, 5), (0, 3, 9), (1, 4, 8), (2, 6, 14), (0, 2, 4), (7, 16), (5, 8, 10, 12)]
    measured = {choice: candidates.cost(choice) * rng.uniform(0.7, 1.6) for choice in choices}

    def kind(a: int, b: int) -> int:  # pairs that begin n layers apart have n - 2 between them
        between = abs(a - b) - 2
        return next((k for k, least in ((3, 4), (2, 2), (1, 1), (0, 0)) if between >= least), -1)

    cost = {index: (index + 1) / 4 for index in range(len(candidates.groups))}
    rows, excess = [], []
    for choice in choices[1:]:
        row, alone = [0.0] * 4, sum(cost[index] for index in choice)
        for a, b in itertools.combinations(choice, 2):
            row[kind(a, b)] += math.sqrt(cost[a] * cost[b]) / alone
        rows.append(row)
        excess.append(measured[choice] / alone - 1)
    x, y = np.array(rows), np.array(excess)
    rho = np.linalg.solve(x.T @ x + 0.1 * np.eye(4), x.T @ y)
    learned = learn(candidates, measured)
    for a, b in itertools.product(cost, cost):
        expected = rho[kind(a, b)] * math.sqrt(cost[a] * cost[b]) if kind(a, b) >= 0 else 0.0
        assert learned.coupling[a, b] == pytest.approx(expected, abs=1e-12)
    assert learn(candidates, {(0,): 1.0}) is candidates  # of one group nothing can be learnt


def test_changes_of_a_full_stretch_shift_it():
    candidates = Candidates.of(8, pairs(8))
    plan = [g.shorthand for g in candidates.groups].index
    changed = changes(candidates, (plan("1+2"), plan("3+4")))
    names = {candidates.plan(choice).shorthand for choice in changed}
    assert names >= {"2+3 4+5", "1+2 4+5", "1+2 5+6"}


def test_a_stretch_for_every_start():
    stretches = contiguous(8, 6, pairs(8))
    assert [plan.shorthand for plan in stretches] == ["1+2 3+4", "2+3 4+5", "3+4 5+6"]
    assert contiguous(8, 4, pairs(8)) == []
    triples = contiguous(8, 6, pairs(8, size=3))
    assert [plan.shorthand for plan in triples] == [f"{f}+{f + 1}+{f + 2}" for f in range(1, 5)]


def everything(num_layers, costs, score, **options):
    scored = {}
    for _, plans in refine(Candidates.of(num_layers, costs), score, **options):
        scored |= plans
    return scored


def test_search_finds_what_the_sum_does_not_see():
    """Groups that touch cost extra: the additive optimum is a run of them, the best plan is not."""
    costs = pairs(16, lambda first: 1 + first / 100)

    def measured(plan: Plan) -> float:
        edges = [group.layers for group in plan.groups]
        touching = sum(b[0] - a[-1] == 1 for a, b in itertools.pairwise(edges))
        return total(plan, costs) + touching

    scored = everything(16, costs, lambda plans: [measured(p) for p in plans], least_depth=11)
    for depth in range(15, 10, -1):
        here = {plan: cost for plan, cost in scored.items() if plan.depth == depth}
        best = min(measured(p) for p in every_plan(16, costs) if p.depth == depth)
        assert min(here.values()) == pytest.approx(best, rel=0.02)
    assert measured(additive(16, costs)[11][0]) > 1.5 * min(scored.values())


def test_contiguous_stretches_are_among_the_starting_points():
    """Only whole stretches are cheap: nothing leads there step by step."""
    costs = pairs(16, lambda first: 1 + abs(first - 6) / 100)
    stretch = Plan.parse("3+4 5+6 7+8 9+10", 16)

    def measured(plan: Plan) -> float:
        return 0.5 if plan == stretch else total(plan, costs) + len(plan.shorthand) / 100

    scored = everything(16, costs, lambda plans: [measured(p) for p in plans], least_depth=12)
    assert scored[stretch] == 0.5


def test_search_keeps_to_its_budget_and_measures_nothing_twice():
    requested: list[Plan] = []

    def measured(plans):
        requested.extend(plans)
        return [float(np.random.default_rng(len(requested)).random()) for _ in plans]

    candidates = Candidates.of(16, pairs(16))
    for depth, plans in refine(candidates, measured, least_depth=10, per_group=4):
        groups = 16 - depth
        assert all(plan.depth == depth for plan in plans)
        assert len(plans) <= 4 * groups
    assert len(requested) == len(set(requested))


def test_half_of_the_budget_goes_to_starting_points():
    """Costs that just add up and rise with the layers, so that the cheapest plans are known."""
    costs = pairs(32, lambda first: 1 + first / 100)
    batches: list[list[Plan]] = []

    def measured(plans):
        batches.append(list(plans))
        return [total(plan, costs) for plan in plans]

    sizes = {1: [2, 2], 2: [4, 4], 3: [6, 4, 2], 4: [8, 4, 4], 5: [8, 4, 4], 6: [8, 4, 4]}
    for depth, _ in refine(Candidates.of(32, costs), measured, least_depth=26, per_group=4):
        count = 32 - depth
        assert [len(batch) for batch in batches] == sizes.pop(count)
        cheapest, published = (
            Plan(num_layers=32, groups=[Group(layers=(n, n + 1)) for n in range(first, end, 2)])
            for first, end in ((1, 1 + 2 * count), (28 - 2 * count, 28))  # 28: where LP's end
        )
        assert batches[0][:2] == [cheapest, published]
        batches.clear()
    assert not sizes


@pytest.mark.parametrize(("layers", "end"), [(32, 28), (28, 25), (32, 30)])
def test_stretches_that_end_where_published_ones_do_come_early(layers, end):
    """Dear as they are, if only the others that end at a published layer are dearer still."""
    ends = {32: (28, 29, 30), 28: (24, 25, 26)}[layers]
    dear = {first: 9.0 for last in ends for first in (last - 2, last - 4)}
    dear |= {end - 2: 5.0, end - 4: 5.0}
    costs = pairs(layers, lambda first: dear.get(first, 1 + first / 100))
    stretch = Plan.parse(f"{end - 4}+{end - 3} {end - 2}+{end - 1}", layers)
    batches: list[list[Plan]] = []

    def measured(plans):
        batches.append(list(plans))
        return [total(plan, costs) for plan in plans]

    for depth, _ in refine(Candidates.of(layers, costs), measured, least_depth=layers - 2):
        if depth > layers - 2:
            batches.clear()
    assert stretch in batches[0][:3]


def test_search_without_refinement_takes_the_additive_optimum():
    costs = pairs(12, lambda first: 1 / first)
    scored = everything(12, costs, lambda p: [0.0] * len(p), least_depth=8, per_group=0)
    assert list(scored) == [plans[0] for d, plans in additive(12, costs).items() if 8 <= d < 12]


def test_search_is_deterministic_and_breaks_ties_by_name():
    def run():
        return everything(14, pairs(14), lambda p: [float(len(x.groups)) for x in p], least_depth=9)

    assert list(run()) == list(run())
    assert additive(14, pairs(14))[13][0].shorthand == "1+2"


def test_two_groups_take_the_place_of_one_however_cheap_others_of_its_size_are():
    costs = pairs(12, lambda first: 1.0) | pairs(12, lambda first: 0.1, size=3)
    candidates = Candidates.of(12, costs)
    triple = candidates.groups.index(Group(layers=(5, 6, 7)))
    made = {candidates.plan(choice).shorthand for choice in changes(candidates, (triple,))}
    assert "1+2+3" in made and any(len(name.split()) == 2 for name in made)


def test_a_plan_with_a_group_that_is_no_candidate_is_none_of_theirs():
    candidates = Candidates.of(8, pairs(8))
    assert candidates.choice(Plan.parse("2+3 5+6", 8)) == (1, 4)
    assert candidates.choice(Plan.parse("2+3 5~6", 8)) is None


def test_times_that_a_faster_plan_beats_are_left_out():
    seconds = {Group(layers=(1, 2)): 1.0, Group(layers=(4, 5)): 2.0}
    costs = dict(zip(seconds, (5.0, 1.0), strict=True))
    candidates = Candidates.of(8, costs, seconds)
    scored = {}
    for depth, plans in refine(candidates, lambda plans: [total(p, costs) for p in plans]):
        scored[depth] = {plan.shorthand for plan in plans}
    # steps are thirds of what the best group saves per layer: 2 for the first, 3 for the second
    assert scored == {5: {"4+5"}, 3: {"1+2 4+5"}}


def test_a_search_by_time_finds_the_fastest_plan_within_a_loss():
    """In exchanges, two for a layer: lp saves 2 of 4, cqil 3 and ff 1; loss in the same order."""
    seconds, costs = dict[Group, float](), dict[Group, float]()
    for wiring, saved, loss in (("lp", 2.0, 2.0), ("cqil", 3.0, 3.5), ("ff", 1.0, 0.6)):
        for group in (Group(layers=(first, first + 1), wiring=wiring) for first in range(1, 5)):
            seconds[group], costs[group] = saved, loss + group.layers[0] / 100
    triple, slow = Group(layers=(2, 3, 4)), Group(layers=(3, 4, 5), wiring="ff")
    seconds |= {triple: 4.0, slow: -0.5}  # the latter takes longer than its layers
    costs |= {triple: 5.0, slow: 0.1}
    candidates = Candidates.of(7, costs, seconds)
    assert {*costs} - {*candidates.groups} == {slow}
    assert candidates.saved.tolist() == [seconds[group] for group in candidates.groups]
    scored, levels = dict[Plan, float](), list[tuple[int, float]]()
    for depth, plans in refine(candidates, lambda plans: [total(p, costs) for p in plans]):
        levels.append((depth, min(plans.values())))
        assert all(7 - total(plan, seconds) == depth for plan in plans)
        scored |= plans
    assert len(levels) > 3 and levels == sorted(levels, reverse=True)
    assert [cost for _, cost in levels] == sorted(cost for _, cost in levels)
    every = [plan for plan in every_plan(7, costs) if slow not in plan.groups]
    for limit in (0.7, 2.5, 4.0, 5.0, 8.0):
        fastest = max(total(plan, seconds) for plan in every if total(plan, costs) <= limit)
        assert fastest == max(total(plan, seconds) for plan in scored if scored[plan] <= limit)
