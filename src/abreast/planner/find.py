"""From a budget to a plan: measure, search, choose."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from abreast.checkpoint import open_checkpoint, write
from abreast.errors import AbreastError
from abreast.plan import Group, Plan
from abreast.planner.calibration import PLAN_SCREEN, Calibration, share_of
from abreast.planner.engines import ENGINES, loaded_by
from abreast.planner.expected import expect, expected_work, likely_depth
from abreast.planner.front import (
    FRONT_FILE,
    MOST_KL,
    Budget,
    Front,
    Profile,
    kind_of,
    reasons,
    unreachable,
)
from abreast.planner.measuring import (
    Progress,
    candidate_costs,
    full_forwards,
    measure,
    measured_plans,
    score,
)
from abreast.planner.objective import Cost, Objective
from abreast.planner.profiling import NoisyTiming, profile_here
from abreast.planner.search import BEAM, PER_GROUP, additive, refine


@dataclass(frozen=True)
class Planned:
    """The plan chosen within a budget.

    others: the next best plans of its depth, as many as requested. searched: the plan's cost on the
    text that it was searched on; expected: on held-out text, where it was measured there. engines,
    not_for: see `per_engine`. on_tasks: see `keep_accuracy`.
    """

    plan: Plan
    others: tuple[Plan, ...]
    expected: Cost
    searched: Cost
    front: Front
    profile: Profile | None
    engines: Mapping[str, tuple[tuple[Plan, Cost], ...]] = field(default_factory=dict)
    not_for: Mapping[str, str] = field(default_factory=dict)
    on_tasks: Cost | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values, with the best plan of each depth."""
        front, profile, timed = self.front, self.profile, self.front.profile
        return {
            "plan": self.plan.shorthand,
            "num_layers": self.plan.num_layers,
            "depth": self.plan.depth,
            "others": [plan.shorthand for plan in self.others],
            "expected": asdict(self.expected),
            "searched": asdict(self.searched),
            "optimism": front.objective.value(self.searched) - front.objective.value(self.expected),
            "predicted_speedup": profile.speedup(self.plan) if profile else None,
            "full_forwards": sum(front.full_forwards.values()),
            "full_forwards_by_depth": dict(front.full_forwards),
            "front": [
                {"plan": plan.shorthand, "depth": plan.depth, **asdict(front.judged(plan))}
                | ({"predicted_seconds": timed.latency(plan)} if timed else {})
                for plan in front.efficient()
            ],
            "reasons": reasons(self.plan, front),
            "engines": {
                name: [
                    {"plan": plan.shorthand, "depth": plan.depth, **asdict(cost)}
                    for plan, cost in plans
                ]
                for name, plans in self.engines.items()
            },
            "not_for": dict(self.not_for),
            **({} if self.on_tasks is None else {"on_tasks": asdict(self.on_tasks)}),
        }


def check_depth(calibration: Calibration, depth: int | None) -> int:
    """The least depth that the candidate groups allow.

    Raises AbreastError where they do not allow `depth`, naming the nearest. Measures nothing.
    """
    num_layers = calibration.num_layers
    free = dict.fromkeys(calibration.candidates, 0.0)
    depths = [reached for reached in additive(num_layers, free) if reached < num_layers]
    if depth is not None and depth not in depths:
        raise unreachable(depth, num_layers, depths)
    return min(depths)


def find_plan(
    calibration: Calibration,
    out: str | Path,
    budget: Budget,
    *,
    held_out: Calibration | None = None,
    profile: Profile | None = None,
    best: int = 1,
    per_group: int = PER_GROUP,
    beam: int = BEAM,
    objective: Objective | None = None,
    step: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
) -> Planned:
    """Measure what has not been measured, search as deep as the budget goes, choose, judge.

    Plans are first measured on a share of the calibration text (`PLAN_SCREEN`), and the `beam` best
    of each depth on all of it. held_out: other text, on which the best plan of each depth is then
    measured; what a plan costs there is what it is said to cost. profile: predicts times; one of
    other hardware, with a limit on quality, makes the search and its front go by predicted time
    instead of by depth. out: the run folder; front.json
    there gets every plan that this and earlier calls measured, of which one is chosen that consists
    of candidates. best: how many plans to return, the best and the next ones of its depth.
    per_group: plans measured per group at each depth; 0 measures the predicted optima only.
    objective: what candidates and plans are ranked by, None for that of the calibration. Nothing in
    the calibration's journal is measured again, so another budget takes seconds where the first
    search went deep enough. Raises AbreastError for a budget that no plan meets, with the nearest.
    """
    objective = objective or calibration.objective
    deepest = check_depth(calibration, budget.depth)
    least_depth = budget.depth or deepest
    least = budget.depth or likely_depth(calibration.num_layers)
    work = expect(
        calibration.checkpoint, calibration.settings, depth=least, per_group=per_group, beam=beam
    )
    step(expected_work(calibration, work, least=least))
    step("measure groups alone")
    stats = measure(calibration, objective=objective, depth=budget.depth, progress=progress)
    screened = partial(_screened, calibration, objective, progress)
    timed = profile if budget.depth is None and budget.speedup is None else None
    candidates = candidate_costs(calibration, objective, timed)
    if not candidates.groups:
        raise AbreastError(
            f"no group is faster than its layers ({timed and timed.about}); allow others "
            "(--wirings, --max-group), or keep the model as it is"
        )
    for depth, values in refine(
        candidates,
        screened,
        least_depth=-math.inf if timed else least_depth,
        per_group=per_group,
        beam=beam,
    ):
        best_few = sorted(values, key=lambda plan: (values[plan], plan.shorthand))[:beam]
        measured = dict(zip(best_few, score(calibration, best_few, progress=progress), strict=True))
        reached = f"{timed.speedup(best_few[0]):.2f}x" if timed else f"depth {depth}"
        step(
            f"{reached}: {objective.name} {min(map(objective.value, measured.values())):.5f}, "
            f"the best of {len(values)} plans"
        )
        if budget.exhausted(measured, profile):
            break
    full = Front(stats, measured_plans(calibration), full_forwards(calibration), objective)
    front = replace(full.among(calibration.candidates), profile=timed)
    if held_out is not None:
        step(f"measure the best plan of each {'time' if timed else 'depth'} on held-out text")
        plans = front.efficient()
        costs = score(held_out, plans, progress=progress)
        front = replace(front, held_out=dict(zip(plans, costs, strict=True)))
        full = replace(full, held_out=front.held_out)
    write(Path(out) / FRONT_FILE, json.dumps(full.to_dict(), indent=1) + "\n")
    chosen, *others = front.choose(budget, profile, best=best)
    expected, searched = front.judged(chosen), front.plans[chosen]
    return Planned(chosen, tuple(others), expected, searched, front, profile)


def keep_accuracy(
    planned: Planned,
    calibration: Calibration,
    share: float,
    *,
    step: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
) -> Planned:
    """The deepest cut of a front that keeps such a share of the accuracy above chance.

    calibration: on tasks with choices. The best plans of each depth are judged, the least cut
    first, until one does not keep it; `on_tasks` is what the chosen one costs there. Raises
    AbreastError where the original is no better than chance, and where no plan keeps it.
    """
    front, chosen = planned.front, None
    step(f"judge the best plan of each depth on {calibration.sample.num_items} questions")
    for plan in front.efficient():
        if front.judged(plan).kl > MOST_KL:
            break
        (cost,) = score(calibration, [plan], progress=progress)
        if cost.accuracy_kept is None:
            raise AbreastError(
                "the model is no better than chance on these tasks; name others with "
                "--score-tasks, or give --max-kl"
            )
        interval = f"{cost.accuracy_kept:.1%} ± {cost.kept_stderr:.1%}"
        step(f"{plan.depth} stages keep {interval} of the accuracy above chance")
        if cost.accuracy_kept < share:
            break
        chosen = plan, cost
    if chosen is None:
        raise AbreastError(
            f"no plan keeps {share:.1%} of the accuracy above chance on "
            f"{calibration.sample.num_items} questions; ask for less, or give --max-kl"
        )
    plan, cost = chosen
    expected, searched = front.judged(plan), front.plans[plan]
    return replace(
        planned, plan=plan, others=(), expected=expected, searched=searched, on_tasks=cost
    )


def _screened(
    calibration: Calibration,
    objective: Objective,
    progress: Progress | None,
    plans: Sequence[Plan],
) -> list[float]:
    """What plans cost on a share of the text."""
    few = calibration.batches[: share_of(calibration.batches, PLAN_SCREEN)]
    return [
        objective.value(cost) for cost in score(calibration, plans, batches=few, progress=progress)
    ]


def per_engine(
    planned: Planned,
    calibration: Calibration,
    held_out: Calibration | None = None,
    *,
    step: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
) -> Planned:
    """With the best plan of each depth that each engine loads, and with why others load none.

    Where an engine does not load the best of all: the best, on a part of the text, of those
    measured that it loads, and of the best as predicted of groups that it loads. A search for that
    engine alone (`engines` in the settings) may find a better one.
    """
    settings, front, num_layers = calibration.settings, planned.front, calibration.num_layers
    config = open_checkpoint(calibration.checkpoint, weights=False).config
    costs = candidate_costs(calibration, front.objective)
    alone = dict(zip(costs.groups, costs.costs, strict=True))
    loads, reasons = dict[str, frozenset[Group]](), dict[str, str]()
    for name in ENGINES:
        try:
            loads[name] = frozenset(
                loaded_by([name], costs.groups, config, settings.degree, settings.unpaired)
            )
        except AbreastError as error:
            reasons[name] = str(error).partition(": ")[2]
    few = share_of(calibration.batches, PLAN_SCREEN)
    measured, chosen_at = measured_plans(calibration, least=few), dict[Any, tuple[Plan, Cost]]()
    for some in dict.fromkeys(loads.values()):
        optima = additive(num_layers, {g: alone[g] for g in alone if g in some}, best=BEAM)
        depths = [d for d, best in front.best().items() if not some.issuperset(best.groups)]
        if depths:
            names = ", ".join(name for name in loads if loads[name] == some)
            passes = len(depths) * (BEAM * PLAN_SCREEN + 1)
            step(f"at most {passes:.0f} full forward passes for the plans of {names}")
        for depth, best in front.best().items():
            chosen = best
            if depth in depths:
                own = [p for p in measured if p.depth == depth and some.issuperset(p.groups)]
                plans = [*dict.fromkeys([*own, *optima.get(depth, [])])]
                if not plans:
                    continue
                values = _screened(calibration, front.objective, progress, plans)
                chosen = plans[values.index(min(values))]
            (cost,) = score(held_out or calibration, [chosen], progress=progress)
            chosen_at[some, depth] = chosen, cost
    engines = {
        name: tuple(chosen_at[some, depth] for depth in front.best() if (some, depth) in chosen_at)
        for name, some in loads.items()
    }
    return replace(planned, engines=engines, not_for=reasons)


def with_profile(
    planned: Planned,
    calibration: Calibration,
    out: str | Path,
    *,
    rounds: int,
    step: Callable[[str], None] = lambda message: None,
) -> Planned:
    """With the speed of the best plans' groups measured here, unless a speed is known.

    step is told where the timings are too noisy for one.
    """
    if planned.profile is not None:
        return planned
    plans = planned.front.best().values()
    kinds = {kind_of(group) for plan in plans for group in plan.groups}
    try:
        profile = profile_here(calibration, kinds, out, rounds=rounds, step=step)
    except NoisyTiming as error:
        step(f"no speed is predicted: {error}")
        return planned
    return replace(planned, profile=profile)
