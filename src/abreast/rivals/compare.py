"""Published methods beside the planner: chosen on its text, judged on held-out text, in memory.

A rival is a *program* (see `model.programs`): a plan's stages, or the layers that are left, so a
family's mixed kinds of attention are no obstacle. Everything that is scored is in the journals of
out/rivals, so an interrupted comparison goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from abreast.checkpoint import open_checkpoint, write
from abreast.errors import AbreastError
from abreast.model import Mapped, Program, name_of, pace_of, program_of
from abreast.plan import Group, Plan
from abreast.planner import (
    KL,
    Calibration,
    Cost,
    Objective,
    Profile,
    candidates_of,
    contiguous,
    kind_of,
    score_programs,
)
from abreast.rivals.choose import at_random, by_similarity, least_influence, least_turn
from abreast.rivals.measured import BASELINES_FILE, METHODS, Measured
from abreast.rivals.repair import Streams, marked
from abreast.rivals.work import FINALISTS, REFIT_TOKENS, SCREEN, work_of
from abreast.runs import open_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAPS_BYTES = 2**28  # of fitted programs, before they are scored
Step = Callable[[str], None]
Progress = Callable[[int, int], None]
Way = tuple[str, int]  # method, depth


class _Text:
    """Windows of text on which programs are scored, in batches small enough to screen with one."""

    def __init__(self, calibration: Calibration, model: PreTrainedModel, folder: Path) -> None:
        count = len(calibration.tokens)
        size = max(1, min(calibration.size, math.ceil(count / SCREEN)))
        identity = {**calibration.identity, "batch": size}
        open_run(folder, "rivals", identity)
        # loaded once for both texts
        self.run = replace(
            calibration, folder=folder, size=size, identity=identity, load=lambda: model
        )

    def costs(
        self,
        programs: Sequence[Program],
        *,
        screen: bool = False,
        progress: Progress | None = None,
    ) -> list[tuple[Cost, float, float]]:
        batches = self.run.batches[:1] if screen else None
        return score_programs(self.run, programs, batches=batches, progress=progress)

    def best(
        self,
        programs: Sequence[Program],
        value: Callable[[Cost], float],
        progress: Progress | None = None,
    ) -> Program:
        """The program of least cost on all windows, of the FINALISTS of least cost on a few."""

        def ranked(some: Sequence[Program], screen: bool) -> list[Program]:
            costs = self.costs(some, screen=screen, progress=progress)
            values = {p: value(cost) for p, (cost, *_) in zip(some, costs, strict=True)}
            return sorted(values, key=lambda p: (values[p], name_of(p)))

        first = ranked(programs, True) if len(programs) > FINALISTS else list(programs)
        return ranked(first[:FINALISTS], False)[0]

    def full_forwards(self, programs: Iterable[Program]) -> float:
        """What scoring these programs took, in full forward passes of this text."""
        names, layers = {name_of(program) for program in programs}, 0.0
        for (name, _), line in self.run.journal().items():
            layers += line["evaluated"] * len(line["sums"]) if name in names else 0
        return layers / (self.run.num_layers * len(self.run.tokens))


class _Choices:
    """The program of every method at every depth, and the programs tried for each method."""

    def __init__(
        self,
        text: _Text,
        geometry: Mapping[str, np.ndarray],
        groups: Sequence[Group],
        value: Callable[[Cost], float],
        progress: Progress | None,
    ) -> None:
        self.text, self.geometry, self.groups = text, geometry, groups
        self.value, self.progress = value, progress
        self.num_layers = text.run.num_layers
        self.tried: dict[str, list[Program]] = {}

    def choose(self, method: str, depths: Sequence[int], seed: int) -> dict[int, Program]:
        if method == "sleb":
            return self._greedy(depths)
        choices = {}
        for depth in depths:
            programs = self._proposed(method, depth, seed)
            if len(programs) > 1:
                self.tried.setdefault(method, []).extend(programs)
                choices[depth] = self.text.best(programs, self.value, self.progress)
            elif programs:
                choices[depth] = programs[0]
        return choices

    def _proposed(self, method: str, depth: int, seed: int) -> list[Program]:
        """What a method would choose from at a depth; most choose without scoring."""
        left_out = self.num_layers - depth
        if method == "contiguous":
            costs = dict.fromkeys(self.groups, 0.0)
            return [program_of(plan) for plan in contiguous(self.num_layers, depth, costs)]
        if method == "similarity":
            plan = by_similarity(self.geometry["similarity"], depth, self.groups)
            return [program_of(wired) for wired in _bypasses(plan)] if plan is not None else []
        if method == "random":
            plan = at_random(self.num_layers, depth, self.groups, seed)
            return [program_of(plan)] if plan is not None else []
        if method == "shortgpt":
            layers = least_influence(self.geometry["influence"], left_out)
        elif method == "angular":
            layers = least_turn(self.geometry["angular"], left_out)
        else:
            layers = least_turn(1 - self.geometry["similarity"], left_out, first=1)
        return [tuple(layer for layer in range(self.num_layers) if layer not in layers)]

    def _greedy(self, depths: Sequence[int]) -> dict[int, Program]:
        """SLEB: leave out the layer without which the loss is least, again and again."""
        program: Program = tuple(range(self.num_layers))
        choices = {}
        while len(program) > min(depths):
            shorter = [program[:at] + program[at + 1 :] for at in range(len(program))]
            self.tried.setdefault("sleb", []).extend(shorter)
            program = self.text.best(shorter, lambda cost: cost.loss_increase, self.progress)
            choices[len(program)] = program
        return {depth: choices[depth] for depth in depths}


def compare_rivals(
    ours: Mapping[int, Plan],
    geometry: Mapping[str, np.ndarray],
    calibration: Calibration,
    held_out: Calibration,
    out: str | Path,
    *,
    depths: Sequence[int] = (),
    profile: Profile | None = None,
    objective: Objective = KL,
    methods: Sequence[str] = tuple(METHODS),
    refit: bool = True,
    seed: int = 0,
    step: Step = lambda message: None,
    progress: Progress | None = None,
) -> tuple[Measured, ...]:
    """Cost on held-out text of our plan of each depth, and of what published methods choose.

    depths: others than those of our plans. geometry: similarity, angular and influence, as in
    `Stats`. Every choice rests on the calibration's text. contiguous: Layer Parallelism (arXiv
    2502.02790), the best by the objective of all starts and of the sizes and wirings searched;
    similarity: CQIL's groups (arXiv 2404.06709) with the best bypass; shortgpt (arXiv 2403.03853),
    angular (arXiv 2403.17887), sleb (arXiv 2402.09025) and replaceme (arXiv 2505.02819) leave
    layers out. refit: also with the outputs of our groups, and of the layers before a cut, refitted
    on the calibration text; not for random plans. profile: predicts the decode speed, that of
    layers left out included. Also written to out/baselines.json. Raises AbreastError for an unknown
    method and as `score`.
    """
    if unknown := set(methods) - set(METHODS):
        raise AbreastError(f"unknown rivals {', '.join(sorted(unknown))}; of {', '.join(METHODS)}")
    out, model, depths = Path(out), calibration.model, sorted({*ours, *depths}, reverse=True)
    text = _Text(calibration, model, out / "rivals" / "calibration")
    judge = _Text(held_out, model, out / "rivals" / "held-out")
    config = open_checkpoint(calibration.checkpoint).config
    groups = candidates_of(config, calibration.settings, in_memory=True)
    size = calibration.tokens.size
    work = work_of(calibration.num_layers, groups, depths, methods, refit=refit, tokens=size)
    count, window = calibration.tokens.shape
    ahead = f"rivals: {work.text(size, held_out.tokens.size)}"
    if text.run.journal() or judge.run.journal():
        step(f"{ahead}, less what earlier calls did")
    else:
        pace = pace_of(model, window, min(count, calibration.size))
        step(f"{ahead}, {work.minutes(pace, count, len(held_out.tokens))} here")
    choices = _Choices(text, geometry, groups, objective.value, progress)
    chosen: dict[Way, Program] = {("planner", depth): program_of(p) for depth, p in ours.items()}
    for method in methods:
        if method != "planner":
            step(f"choose: {METHODS[method]}")
            programs = choices.choose(method, depths, seed)
            chosen |= {(method, depth): program for depth, program in programs.items()}
    repaired = _with_repairs(chosen, calibration.num_layers, refit)
    _fit_and_score(repaired, judge, text, step, progress)
    scores = judge.costs([program for *_, program in repaired])
    rows = tuple(
        Measured(
            method=method,
            depth=depth,
            plan=described(chosen[method, depth], calibration.num_layers),
            cost=cost,
            refit=again,
            agreement=same,
            agreement_stderr=same_stderr,
            **_speed(chosen[method, depth], calibration.num_layers, profile),
        )
        for (method, depth, again, _), (cost, same, same_stderr) in zip(
            repaired, scores, strict=True
        )
    )
    spent = {method: text.full_forwards(programs) for method, programs in choices.tried.items()}
    record = {
        "rests_on": held_out.identity,
        "full_forwards": spent,
        "speed": profile.about if profile is not None else None,
        "plans": [row.to_dict() for row in rows],
    }
    write(out / BASELINES_FILE, json.dumps(record, indent=1) + "\n")
    return rows


def described(program: Program, num_layers: int) -> str:
    """A program's plan in shorthand, or which layers it leaves out."""
    groups = [step for step in program if isinstance(step, Group)]
    layers = {layer for step in program for layer in getattr(step, "layers", (step,))}
    left_out = [str(layer) for layer in range(num_layers) if layer not in layers]
    return " ".join(["without", *left_out]) if left_out else " ".join(g.shorthand for g in groups)


def _bypasses(plan: Plan) -> list[Plan]:
    """A plan of cqil groups with every bypass distance that some group of it has room for."""
    most = max((len(group.layers) for group in plan.groups), default=1)
    return [
        Plan(
            num_layers=plan.num_layers,
            groups=tuple(
                Group(layers=g.layers, wiring="cqil", bypass=min(bypass, len(g.layers) - 1))
                for g in plan.groups
            ),
        )
        for bypass in range(most)
    ]


def _with_repairs(
    chosen: Mapping[Way, Program], num_layers: int, refit: bool
) -> list[tuple[str, int, bool, Program]]:
    """(method, depth, refitted, program) of all that is judged; steps to be fitted are marked."""
    judged = []
    for (method, depth), program in chosen.items():
        plain = marked(program, num_layers, "map") if method == "replaceme" else program
        judged.append((method, depth, False, plain))
        again = marked(program, num_layers, "refit")
        if refit and method != "random" and again != program:
            judged.append((method, depth, True, again))
    return judged


def _fit_and_score(
    repaired: Sequence[tuple[str, int, bool, Program]],
    judge: _Text,
    text: _Text,
    step: Step,
    progress: Progress | None,
) -> None:
    """Score on held-out text whatever the journal lacks; fit the maps of only these."""
    known = judge.run.journal()
    missing = [
        program
        for program in dict.fromkeys(program for *_, program in repaired)
        if any((name_of(program), batch) not in known for batch in judge.run.batches)
    ]
    plain = [p for p in missing if not any(isinstance(s, Mapped) for s in p)]
    if plain:
        step(f"judge {len(plain)} plans on held-out text")
        judge.costs(plain, progress=progress)
    to_fit = [program for program in missing if program not in plain]
    if not to_fit:
        return
    tokens = text.run.tokens[: max(4, REFIT_TOKENS // text.run.tokens.shape[1])]
    step(f"fit {len(to_fit)} on {tokens.size} tokens, and judge them on held-out text")
    streams = Streams(judge.run.model, tokens, text.run.size)
    waiting: list[Program] = []
    for number, program in enumerate(to_fit):
        waiting.append(streams.fitted(program))
        if progress is not None:
            progress(number + 1, len(to_fit))
        if sum(map(_bytes_of, waiting)) > MAPS_BYTES or number + 1 == len(to_fit):
            judge.costs(waiting)  # together, for each call runs the original as well
            waiting = []


def _bytes_of(program: Program) -> int:
    maps = (weight for step in program if isinstance(step, Mapped) for weight in step.maps.values())
    return sum(weight.nbytes for weight in maps)


def _speed(program: Program, num_layers: int, profile: Profile | None) -> dict[str, float | None]:
    """Predicted seconds per token and speed-up; maps cost nothing, for they fold into matrices.

    A cqil group is timed as one of its size with a bypass where only that was profiled.
    """
    if profile is None:
        return {"seconds": None, "speedup": None}
    seconds = profile.rest
    for step in program:
        if not isinstance(step, Group):
            seconds += profile.single
            continue
        bypassed = step
        if step.ffn_band is not None:
            bypassed = step.model_copy(update={"bypass": len(step.layers) - 1})
        kind = next((k for k in map(kind_of, (step, bypassed)) if k in profile.groups), None)
        if kind is None:
            return {"seconds": None, "speedup": None}
        seconds += profile.groups[kind]
    original = profile.rest + num_layers * profile.single
    return {"seconds": seconds, "speedup": original / seconds}
