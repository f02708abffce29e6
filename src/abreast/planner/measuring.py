"""Measuring: the cost of plans on a calibration's text, of groups alone, how the layers depend."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from abreast.checkpoint import replacing
from abreast.errors import AbreastError
from abreast.evaluate import ratio_of_means
from abreast.model import Program, geometry, name_of, program_of, run_programs
from abreast.plan import Group, Plan, PlanError
from abreast.planner.calibration import DEPENDENCY_SHARE, Calibration, share_of
from abreast.planner.front import GEOMETRY_ARRAYS, STATS_FILE, Profile, Stats
from abreast.planner.objective import Cost, Objective
from abreast.planner.search import Candidates, additive
from abreast.runs import JOURNAL, Journal

Progress = Callable[[int, int], None]
GEOMETRY = "geometry.safetensors"


def score(
    calibration: Calibration,
    plans: Sequence[Plan],
    *,
    batches: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> list[Cost]:
    """The cost of each plan on the calibration text, or on some of its batches.

    Nothing in the journal is run again; every evaluation is on disk before the next one runs.
    progress: called with (evaluations done, in all), one being a plan on a batch. Raises
    AbreastError where a model's logits are not finite.
    """
    programs = [program_of(plan) for plan in plans]
    scores = score_programs(calibration, programs, batches=batches, progress=progress)
    return [cost for cost, *_ in scores]


def score_programs(
    calibration: Calibration,
    programs: Sequence[Program],
    *,
    batches: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> list[tuple[Cost, float, float]]:
    """As `score`; with each cost the share of next tokens that stay the same, and its error."""
    chosen = list(calibration.batches if batches is None else batches)
    lines = calibration.journal()
    todo = {
        batch: [p for p in dict.fromkeys(programs) if (name_of(p), batch) not in lines]
        for batch in chosen
    }
    total = len(chosen) * len(set(programs))
    finished = total - sum(map(len, todo.values()))
    with open(calibration.folder / JOURNAL.format(0), "a", encoding="utf-8") as journal:
        for batch, missing in todo.items():
            for line in _evaluate(calibration, batch, missing) if missing else ():
                lines[line["program"], batch] = line
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                finished += 1
                if progress is not None:
                    progress(finished, total)
    scores = []
    for program in programs:
        sums = _sums(lines, program, chosen)
        counts = calibration.sample.counts[calibration.windows_of(chosen)]
        same = ratio_of_means(sums[:, 3], counts)
        scores.append((_cost(calibration, sums, chosen), *same))
    return scores


def measured_plans(calibration: Calibration, *, least: int | None = None) -> dict[Plan, Cost]:
    """The cost of every plan in the journal, the deepest first, whatever call it was measured for.

    least: also plans that were measured on so many batches only; None: those on the whole text.
    """
    lines = calibration.journal()
    batches_of: dict[str, list[int]] = {}
    for program, batch in sorted(lines):
        batches_of.setdefault(program, []).append(batch)
    costs = {}
    for program, batches in batches_of.items():
        plan = _plan_of(program, calibration.num_layers)
        if plan is not None and len(batches) >= (least or len(calibration.batches)):
            costs[plan] = _cost(calibration, _sums(lines, program_of(plan), batches), batches)
    return dict(sorted(costs.items(), key=lambda item: (-item[0].depth, item[0].shorthand)))


def _plan_of(program: str, num_layers: int) -> Plan | None:
    """The plan of a journal's program, or None where layers are left out or changed."""
    groups = " ".join(word for word in program.split() if not word.isdigit())
    try:
        plan = Plan.parse(groups, num_layers)
    except PlanError:
        return None
    return plan if name_of(program_of(plan)) == program else None


def _evaluate(
    calibration: Calibration, batch: int, programs: Sequence[Program]
) -> Iterator[dict[str, Any]]:
    """Run programs on a batch; yield the journal's line of each."""
    original = program_of(Plan(num_layers=calibration.num_layers))
    sample, windows = calibration.sample, calibration.windows_of([batch])
    ids, layers_run = torch.from_numpy(sample.tokens[windows]), 0
    options: dict[str, Any] = {"prefix": calibration.prefix, "reference": original}
    if sample.scored is not None:
        scored = torch.from_numpy(sample.scored[windows])
        end = int(scored.any(0).nonzero().max()) + 1  # nothing behind it is scored
        ids, scored = ids[:, :end], scored[:, :end]
        options["scored"] = scored
        if sample.sequential:
            options["prompts"] = scored.cumsum(1) == 0
    for program, sums, evaluated in run_programs(calibration.model, ids, programs, **options):
        name = name_of(program)
        if not np.isfinite(sums).all():
            raise AbreastError(
                f"the model gives logits that are not finite (plan '{name}'); "
                "use --dtype bfloat16 or float32, or check its weights"
            )
        layers_run += evaluated
        if program != original:  # whose layers count as run for the program after it
            yield {"program": name, "batch": batch, "evaluated": layers_run, "sums": sums.tolist()}
            layers_run = 0


def measure(
    calibration: Calibration,
    *,
    objective: Objective | None = None,
    depth: int | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Measure candidates alone and how layers depend on each other; write stats.safetensors.

    The file also has the groups that earlier calls measured, and nothing in the journal is measured
    again. Of candidates larger than the smallest only those that promise most (`larger` in the
    settings) are measured, or all where the others do not reach `depth`; after a part of the text
    (`screen`) only the best by the objective (`keep`) are measured on the rest. All three 1:
    everything on everything. progress: as for `score`, of the current step. Raises as `score`.
    """
    objective = objective or calibration.objective
    screen, keep = calibration.settings.screen, calibration.settings.keep
    larger = calibration.settings.larger
    if not (0 < screen <= 1 and 0 < keep <= 1 and 0 <= larger <= 1):
        raise AbreastError(
            f"screen, keep and larger are shares, not {screen}, {keep} and {larger}; "
            "use 0.125, 0.1 and 0.3"
        )
    arrays = _geometry(calibration)
    num_layers, batches = calibration.num_layers, calibration.batches
    screened = batches[: share_of(batches, screen)]
    smallest = min(len(group.layers) for group in calibration.candidates)
    first = [group for group in calibration.candidates if len(group.layers) == smallest]
    costs = _costs_alone(calibration, first, screened, progress)
    more = _worth_measuring(calibration, costs, objective, depth)
    costs |= _costs_alone(calibration, more, screened, progress)
    promising = _promising(costs, keep, objective)
    _costs_alone(calibration, promising, batches, progress)
    original = Plan(num_layers=num_layers, groups=(promising[0],))
    measured = measured_plans(calibration, least=len(screened))
    original_nll = _sums(calibration.journal(), program_of(original), batches)[:, 1]
    stats = Stats(
        identity=calibration.identity,
        source=calibration.source,
        num_layers=num_layers,
        loss=float(original_nll.sum() / calibration.sample.counts.sum()),
        groups={plan.groups[0]: c for plan, c in measured.items() if len(plan.groups) == 1},
        full_forwards=sum(full_forwards(calibration).values()),
        revision=calibration.revision,
        **{name: arrays[name] for name in GEOMETRY_ARRAYS},
    )
    stats.check()
    path = calibration.folder / STATS_FILE
    if path.is_file() and (saved := Stats.load(path)).groups == stats.groups:
        return replace(saved, source=calibration.source, revision=calibration.revision)
    stats.save(path)
    return stats


def _costs_alone(
    calibration: Calibration,
    groups: Sequence[Group],
    batches: Sequence[int],
    progress: Progress | None = None,
) -> dict[Group, Cost]:
    plans = [Plan(num_layers=calibration.num_layers, groups=(group,)) for group in groups]
    costs = score(calibration, plans, batches=batches, progress=progress)
    return dict(zip(groups, costs, strict=True))


def _worth_measuring(
    calibration: Calibration, costs: dict[Group, Cost], objective: Objective, depth: int | None
) -> list[Group]:
    """The larger candidates, of each size the share whose smallest ones within cost least alone.

    All of them where the others do not reach the depth. costs: of the smallest candidates.
    """
    cheapest: dict[tuple[int, ...], float] = {}
    for group, cost in costs.items():
        value = objective.value(cost)
        cheapest[group.layers] = min(value, cheapest.get(group.layers, value))
    size = min(map(len, cheapest))

    def within(layers: tuple[int, ...]) -> float:
        return sum(
            cheapest.get(layers[at : at + size], math.inf) for at in range(len(layers) - size + 1)
        )

    stretches: dict[int, set[tuple[int, ...]]] = {}
    for group in set(calibration.candidates) - costs.keys():
        stretches.setdefault(len(group.layers), set()).add(group.layers)
    chosen: set[tuple[int, ...]] = set()
    for of_size in stretches.values():
        ranked = sorted(of_size, key=lambda layers: (within(layers), layers))
        chosen.update(ranked[: math.ceil(calibration.settings.larger * len(ranked))])
    larger = [group for group in calibration.candidates if group not in costs]
    some = [group for group in larger if group.layers in chosen]
    reached = additive(calibration.num_layers, dict.fromkeys([*costs, *some], 0.0))
    return some if depth is None or depth in reached else larger


def candidate_costs(
    calibration: Calibration, objective: Objective | None = None, profile: Profile | None = None
) -> Candidates:
    """The candidates that `measure` measured, with their costs on the text that all share.

    profile: by predicted time instead of by stages, see `Candidates.of`.
    """
    objective = objective or calibration.objective
    batches = calibration.batches
    screened = batches[: share_of(batches, calibration.settings.screen)]
    measured = calibration.journal()
    num_layers = calibration.num_layers
    groups = [
        group
        for group in calibration.candidates
        if all(
            (name_of(program_of(Plan(num_layers=num_layers, groups=(group,)))), batch) in measured
            for batch in screened
        )
    ]
    costs = _costs_alone(calibration, groups, screened)
    values = {group: objective.value(cost) for group, cost in costs.items()}
    seconds = None if profile is None else {group: profile.saves(group) for group in groups}
    return Candidates.of(num_layers, values, seconds)


def difference(calibration: Calibration, first: Plan, second: Plan) -> Cost:
    """Cost of `first` over `second`, both measured before; errors paired over windows."""
    lines = calibration.journal()
    one, two = (_sums(lines, program_of(plan), calibration.batches) for plan in (first, second))
    sums = np.stack([one[:, 0], two[:, 0], one[:, 2] - two[:, 2]], 1)
    return _cost(calibration, sums, calibration.batches)


def full_forwards(calibration: Calibration) -> dict[int, float]:
    """Cost of the run so far, in full forward passes over the calibration text, by depth.

    Candidates alone count at their depth; what `Stats` has besides them at the full depth.
    """
    path = calibration.folder / GEOMETRY
    layers = {calibration.num_layers: load_file(path)["layers"].item() if path.is_file() else 0.0}
    for (program, _), line in calibration.journal().items():
        depth = len(program.split())
        layers[depth] = layers.get(depth, 0.0) + line["evaluated"] * len(line["sums"])
    full = calibration.num_layers * len(calibration.tokens)
    return {depth: total / full for depth, total in sorted(layers.items(), reverse=True)}


def _promising(costs: dict[Group, Cost], keep: float, objective: Objective) -> list[Group]:
    """The best wiring of each stretch of layers, for the `keep` best share of the stretches."""

    def rank(group: Group) -> tuple[float, str]:
        return objective.value(costs[group]), group.shorthand

    best: dict[tuple[int, ...], Group] = {}
    for group, cost in costs.items():
        rival = best.setdefault(group.layers, group)
        if objective.value(cost) < objective.value(costs[rival]):
            best[group.layers] = group
    ranked = sorted(best.values(), key=rank)
    chosen = set(ranked[: math.ceil(keep * len(ranked))])
    return [group for group in costs if group in chosen]


def _sums(lines: Journal, program: Program, batches: Iterable[int]) -> np.ndarray:
    """`token_scores` summed per window, shape [num_windows, 4]."""
    name = name_of(program)
    return np.concatenate([np.asarray(lines[name, batch]["sums"]) for batch in batches])


def _cost(calibration: Calibration, sums: np.ndarray, batches: Iterable[int]) -> Cost:
    """From sums per window of these batches: columns nll, the original's nll, KL.

    Of several texts the one that costs most, where the settings say so.
    """
    sample, windows = calibration.sample, calibration.windows_of(batches)
    texts = sample.texts[windows]
    costs = [sample.cost(sums[texts == t], windows[texts == t]) for t in np.unique(texts)]
    return max(costs, key=calibration.objective.value)


def _geometry(calibration: Calibration) -> dict[str, np.ndarray]:
    """Arrays of `geometry`, kept in the folder once computed."""
    path = calibration.folder / GEOMETRY
    if path.is_file():
        return dict(load_file(path))
    few = math.ceil(len(calibration.tokens) / DEPENDENCY_SHARE)
    arrays = geometry(
        calibration.model, calibration.tokens, calibration.size, few, calibration.prefix
    )
    with replacing(path) as staging:
        save_file(arrays, staging)
    return arrays
