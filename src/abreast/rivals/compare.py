"""Published methods beside the planner, measured on the same text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from abreast.checkpoint import write
from abreast.plan import Plan
from abreast.planner import Calibration, Cost, Planned, contiguous, score
from abreast.rivals.choose import at_random, by_angle, by_similarity

Progress = Callable[[int, int], None]
Series = Mapping[str, Mapping[Plan, Cost]]


def baselines(
    planned: Planned,
    held_out: Calibration,
    out: str | Path,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Series:
    """Cost on other text of the best plan of each depth, and of what published methods choose.

    All choose among the same groups: "contiguous" is the best start of all (arXiv 2502.02790),
    judged on this very text; "similarity" CQIL's (arXiv 2404.06709), "angular" arXiv 2403.17887's.
    Also written to out/baselines.json.
    """
    front, stats = planned.front, planned.front.stats
    value = front.objective.value
    costs = {group: value(stats.groups[group]) for group in held_out.candidates}
    proposed: dict[str, list[list[Plan]]] = {}  # of each method, per depth
    for depth, best in front.best().items():
        methods: dict[str, list[Plan | None]] = {
            "planner": [best],
            "contiguous": [*contiguous(stats.num_layers, depth, costs)],
            "similarity": [by_similarity(stats.similarity, depth, costs)],
            "angular": [by_angle(stats.angular, depth, costs)],
            "random": [at_random(stats.num_layers, depth, costs, seed)],
        }
        for name, plans in methods.items():
            if reached := [plan for plan in plans if plan is not None]:
                proposed.setdefault(name, []).append(reached)
    every = {plan for depths in proposed.values() for plans in depths for plan in plans}
    ordered = sorted(every, key=str)
    measured = dict(zip(ordered, score(held_out, ordered, progress=progress), strict=True))

    def rank(plan: Plan) -> tuple[float, str]:
        return value(measured[plan]), plan.shorthand

    series = {}
    for name, depths in proposed.items():
        winners = [min(plans, key=rank) for plans in depths]
        series[name] = {plan: measured[plan] for plan in winners}
    rows = [
        {"method": name, "depth": plan.depth, "plan": plan.shorthand, **asdict(cost)}
        for name, line in series.items()
        for plan, cost in line.items()
    ]
    record = {"rests_on": held_out.identity, "plans": rows}
    write(Path(out) / "baselines.json", json.dumps(record, indent=1) + "\n")
    return series
