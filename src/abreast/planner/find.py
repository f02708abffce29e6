"""From a budget to a plan: measure, search, choose."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from abreast.checkpoint import open_checkpoint, read_json, scratch, write
from abreast.convert import convert
from abreast.errors import AbreastError
from abreast.families import CONVERTIBLE, FAMILIES, num_layers_of
from abreast.model import decoder_layers, load, logits_of
from abreast.plan import Group, Plan
from abreast.planner.calibration import PLAN_SCREEN, Calibration, expect, share_of
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
from abreast.planner.search import BEAM, PER_GROUP, additive, refine
from abreast.speed import Setting, bench, hardware_of, read_config, stage_cost, stage_seconds
from abreast.targets import SERVERS, Target, Unpaired, refusals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from abreast.speed import Hardware

PROFILED_TOKENS = 16  # decoded per round of a profile


class NoisyTiming(AbreastError):
    """Timings that tell nothing about the speed of a stage."""


@dataclass(frozen=True)
class Planned:
    """The plan chosen within a budget.

    others: the next best plans of its depth, as many as requested. searched: the plan's cost on the
    text that it was searched on; expected: on held-out text, where it was measured there. engines:
    see `best_per_engine`. on_tasks: see `keep_accuracy`.
    """

    plan: Plan
    others: tuple[Plan, ...]
    expected: Cost
    searched: Cost
    front: Front
    profile: Profile | None
    engines: Mapping[str, tuple[Plan, Cost] | None] = field(default_factory=dict)
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
                name: best and {"plan": best[0].shorthand, **asdict(best[1])}
                for name, best in self.engines.items()
            },
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
    step(_expected_work(calibration, budget.depth, per_group, beam))
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
    least = -math.inf if timed else least_depth
    for depth, values in refine(
        candidates, screened, least_depth=least, per_group=per_group, beam=beam
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


def best_per_engine(
    planned: Planned,
    calibration: Calibration,
    held_out: Calibration | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, tuple[Plan, Cost] | None]:
    """For each engine the best plan of the chosen one's depth that it loads, and what that costs.

    Where an engine does not load the chosen plan: the best of those measured that it loads, and of
    the best as predicted of groups that it loads; None where it loads none of this depth. A search
    for that engine alone (`engines` in the settings) may find a better one.
    """
    config = open_checkpoint(calibration.checkpoint, weights=False).config
    family = FAMILIES.get(str(config.get("model_type")))
    front, depth = planned.front, planned.plan.depth
    costs = candidate_costs(calibration, front.objective)
    rows: dict[str, tuple[Plan, Cost] | None] = {}
    for server in SERVERS:

        def loads(*groups: Group, server: Target = server) -> bool:
            plan = Plan(num_layers=calibration.num_layers, groups=groups)
            return next(refusals(server, config, family, plan), None) is None

        rows[server.name] = (planned.plan, planned.expected)
        if loads(*planned.plan.groups):
            continue
        measured = [p for p in front.plans if p.depth == depth and loads(*p.groups)]
        alone = {g: c for g, c in zip(costs.groups, costs.costs, strict=True) if loads(g)}
        optima = additive(calibration.num_layers, alone, best=BEAM).get(depth, [])
        if len(optima) > 1:
            screened = _screened(calibration, front.objective, progress, optima)
            optima = [optima[screened.index(min(screened))]]
        plans = [*dict.fromkeys([*measured, *optima])]
        scores = dict(zip(plans, score(calibration, plans, progress=progress), strict=True))
        best = min(plans, key=lambda plan: front.objective.value(scores[plan]), default=None)
        if best is None:
            rows[server.name] = None
        else:
            rows[server.name] = best, score(held_out or calibration, [best], progress=progress)[0]
    return rows


def likely_depth(num_layers: int) -> int:
    """How deep a search without a depth probably goes, the depth that is too much included.

    DEFAULT_KL is reached at 28 of SmolLM2's 30 layers, see benchmarks/RESULTS.md.
    """
    return num_layers - max(2, round(num_layers / 10))


def _expected_work(calibration: Calibration, depth: int | None, per_group: int, beam: int) -> str:
    """What a search takes; in minutes as well where it begins, from a pass over a few windows."""
    least = depth or likely_depth(calibration.num_layers)
    expected = expect(
        calibration.checkpoint, calibration.settings, depth=least, per_group=per_group, beam=beam
    )
    work = (
        f"about {expected.likely:.0f} full forward passes over {calibration.tokens.size:,} tokens "
        f"down to {least} stages"
    )
    if (done := sum(full_forwards(calibration).values())) > 0:
        return f"{work}, of which earlier calls made {done:.0f}"
    ids = torch.from_numpy(calibration.tokens[: calibration.size])
    begin = time.perf_counter()
    logits_of(calibration.model, ids, len(ids))
    seconds = (time.perf_counter() - begin) * len(calibration.batches) * expected.likely
    return f"{work}, {seconds / 60:.0f} minutes here"


def profile_here(
    calibration: Calibration,
    kinds: Set[str],
    out: str | Path,
    *,
    rounds: int = 12,
    context: int = 128,
    step: Callable[[str], None] = lambda message: None,
) -> Profile:
    """As `saved_profile`, of these kinds of groups, packed from the candidates of a calibration."""
    settings = calibration.settings
    timing = ProfileSettings(settings.dtype, settings.device, rounds, context, settings.seed)
    return saved_profile(
        calibration.checkpoint,
        [group for group in calibration.candidates if kind_of(group) in kinds],
        Path(out),
        timing,
        trust_remote_code=settings.trust_remote_code,
        step=step,
    )


def saved_profile(
    folder: Path,
    groups: Sequence[Group],
    out: Path,
    timing: ProfileSettings,
    *,
    trust_remote_code: bool = False,
    step: Callable[[str], None] = lambda message: None,
) -> Profile:
    """The profile in out/profile.json, measured now (see `measured_profile`) where it has none.

    One of more rounds and with more kinds of stage than are needed will do.
    """
    path = out / "profile.json"
    kinds = {kind_of(group) for group in groups}
    record = read_json(path) if path.is_file() else {}
    about = record.get("rests_on", {})
    rounds = max(timing.rounds, about.get("rounds", 0))
    if kinds <= {*about.get("kinds", ())} and about == {
        **about,
        **asdict(timing),
        "rounds": rounds,
    }:
        saved = Profile(**record["profile"])
        if saved.impossible() is None:
            return saved
    step("time each kind of stage")
    profile = measured_profile(folder, groups, out, timing, trust_remote_code=trust_remote_code)
    rests_on = {"kinds": sorted(kinds), **asdict(timing)}
    write(path, json.dumps({"rests_on": rests_on, "profile": asdict(profile)}, indent=1) + "\n")
    return profile


def estimated_profile(
    model: str | Path,
    groups: Sequence[Group],
    hardware: str | Hardware,
    *,
    unpaired: Unpaired = "shard",
    batch: int = 1,
    context: int = 1024,
    revision: str | None = None,
) -> Profile:
    """Predicted seconds of decoding per kind of stage on other hardware (see `estimate`).

    hardware: or a name such as "2xA100-NVLink". unpaired: as in `torch_tp`; under replicate groups
    with fewer members than devices take for ever. Raises AbreastError for unknown hardware.
    """
    config = read_config(model, revision=revision)
    hardware = hardware_of(hardware) if isinstance(hardware, str) else hardware
    setting = Setting(hardware, batch=batch, context=context, unpaired=unpaired)
    kinds = {kind_of(group): group for group in groups}
    *_, rest = stage_seconds(config, Plan(num_layers=num_layers_of(config)), setting)
    return Profile(
        about=f"estimate for {hardware.name}, {unpaired}, decode at batch {batch}, "
        f"context {context}",
        single=stage_cost(config, None, setting),
        groups={
            kind: math.inf
            if unpaired == "replicate" and len(group.layers) < hardware.count
            else stage_cost(config, group, setting)
            for kind, group in kinds.items()
        },
        rest=rest,
    )


@dataclass(frozen=True)
class ProfileSettings:
    """How decoding is timed for a profile; context in tokens."""

    dtype: str
    device: str
    rounds: int = 12
    context: int = 128
    seed: int = 0


def measured_profile(
    folder: Path,
    groups: Sequence[Group],
    work: Path,
    settings: ProfileSettings,
    *,
    trust_remote_code: bool = False,
) -> Profile:
    """Time decoding here and solve for the seconds per kind of stage.

    Timed in turn against the model: the model with half of its layers, and for each kind among
    `groups` a conversion (grouped in memory for families that cannot be converted) with as many
    groups of that kind as fit one after another; one of them is in memory at a time. work: folder
    for the conversions. Raises NoisyTiming where noise leaves no time for a kind of stage, and as
    `convert`, `load` and `bench` do.
    """

    seconds: dict[str, float] = {}

    def loaded(checkpoint: Path, plan: Plan | None = None) -> PreTrainedModel:
        model, _ = load(
            checkpoint,
            plan=plan,
            dtype=settings.dtype,
            device=settings.device,
            trust_remote_code=trust_remote_code,
        )
        return model

    def timed(kind: str, model: PreTrainedModel) -> tuple[float, float]:
        timings = bench(
            {"whole": whole, kind: model},
            task="decode",
            rounds=settings.rounds,
            context=settings.context,
            new_tokens=PROFILED_TOKENS,
            seed=settings.seed,
        ).timings
        return timings["whole"].median, timings[kind].median

    whole, shorter = loaded(folder), loaded(folder)
    layers = decoder_layers(shorter)
    count, half = len(layers), len(layers) // 2
    del layers[half:]
    original, seconds["half"] = timed("half", shorter)
    seconds["whole"] = original
    del shorter, layers
    plans = _plans_by_kind(groups, count)
    for kind, plan in plans.items():
        with scratch(".profile.partial-", work) as staging:
            target, converted = staging / "converted", None
            row = CONVERTIBLE.get(whole.config.model_type)
            if row is not None and row.converts(whole.config.to_dict()):
                convert(folder, plan, target, force=True)
                converted = loaded(target)
            # what the machine does at the time slows both
            beside, own = timed(kind, converted or loaded(folder, plan))
            seconds[kind] = own * original / beside
    seconds = {name: median / PROFILED_TOKENS for name, median in seconds.items()}
    # What lies outside the layers takes no less than nothing; the layers then take all there is.
    rest = max(0.0, (count * seconds["half"] - half * seconds["whole"]) / (count - half))
    single = (seconds["whole"] - rest) / count
    profile = Profile(
        about=f"decode at context {settings.context}, {settings.dtype}, {settings.device}, "
        f"median of {settings.rounds} rounds",
        single=single,
        groups={
            kind: (seconds[kind] - rest - (plan.depth - len(plan.groups)) * single)
            / len(plan.groups)
            for kind, plan in plans.items()
        },
        rest=rest,
    )
    if (stage := profile.impossible()) is not None:
        raise NoisyTiming(
            f"the timing is too noisy to predict speed: {stage} would take no time; "
            "try again when this machine is quiet, or name one with --hardware"
        )
    return profile


def _plans_by_kind(groups: Sequence[Group], num_layers: int) -> dict[str, Plan]:
    """For each kind of group, a plan with as many of them as fit one after another."""
    plans: dict[str, Plan] = {}
    for group in groups:
        plan = plans.get(kind_of(group), Plan(num_layers=num_layers))
        if not plan.groups or plan.groups[-1].layers[-1] < group.layers[0]:
            longer = Plan(num_layers=num_layers, groups=(*plan.groups, group))
            plans[kind_of(group)] = longer
    return plans
