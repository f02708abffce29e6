"""The whole job: measure, plan, heal, convert, verify, evaluate, time, report; each step resumes.

A run folder holds

    calibration/, held-out/   what plans cost on the two texts (see measure.py)
    front.json                every plan measured as a whole; another budget chooses anew from it
    profile.json              seconds per kind of stage, unless --hardware was named
    pareto.png                quality against depth, with the published ways to choose beside it
    plans/NAME/               plan.yaml, why.md, converted/ with its model card, verify.json,
                              quality.json, speed.json, samples.json, tasks.json if asked; healed
                              conversions and their files have a suffix
    tasks/                    every answer to every task (see harness.py)
    results.json              the last call's numbers, all of them
    environment.json          versions, machine, and the last call's command
    report/                   report.html, its pictures and numbers (see report.py)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from abreast.checkpoint import MANIFEST, read_json, write
from abreast.convert import convert, verify
from abreast.data import CALIBRATION, HELD_OUT, load_tokens
from abreast.errors import AbreastError
from abreast.evaluate import Tasks, compare, evaluate_tasks, sample
from abreast.heal import Recipe, heal
from abreast.model import load
from abreast.plan import Plan
from abreast.planner import Planned, explain
from abreast.report import check_extra, read_run, write_card, write_report
from abreast.runs import record_environment
from abreast.speed import bench, verdict

Step = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Healing:
    """How `optimize` is to heal: arguments of `heal`. candidates: how many plans to try it on."""

    method: str = "both"
    data: str = CALIBRATION
    tokens: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    candidates: int = 1


@dataclass(frozen=True)
class Optimized:
    """What `optimize` did. verification, quality, speed and tasks are what the verbs' JSON has.

    plan: the one that was kept, another than planned.plan where that one heals better. healed: for
    every plan that was healed, KL before and after, on text that healing did not see. samples: see
    `sample`, its list under "samples".
    """

    planned: Planned
    plan: str
    folder: str
    converted: str
    healed: dict[str, dict[str, float]]
    verification: dict[str, Any]
    quality: dict[str, Any]
    speed: dict[str, Any]
    samples: dict[str, Any]
    tasks: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "planned": self.planned.to_dict()}


def optimize(
    model: str | Path,
    out: str | Path,
    planned: Planned,
    *,
    healing: Healing | None = None,
    data: str = HELD_OUT,
    max_tokens: int = 100_000,
    window: int = 256,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    rounds: int = 12,
    context: int = 128,
    new_tokens: int = 64,
    tasks: Tasks | None = None,
    seed: int = 0,
    command: Sequence[str] | None = None,
    report: bool = True,
    step: Step = lambda message: None,
    progress: Progress | None = None,
) -> Optimized:
    """Convert a model under the plan that was chosen, verify it, evaluate it, time it.

    healing: heal the chosen plan and the next best ones, and go on with the one that is nearest to
    the original afterwards, on text that healing did not see. data, max_tokens, window: of the
    evaluation against the original. rounds, context, new_tokens: of the timing, at batch 1. tasks:
    from `harness.find_tasks`, to put to both models as well. Every step leaves a file in
    out/plans/NAME and is skipped where that file rests on the same settings. command: the command
    line, for the record. report: write out/report at the end.
    Raises AbreastError as the verbs do, and when the conversion does not pass its verification.
    """
    if report:
        check_extra()
    record_environment(out, device, command)
    stats = planned.front.stats
    healed: dict[str, dict[str, float]] = {}
    made: dict[Plan, Path] = {}
    for each in (planned.plan, *planned.others[: healing.candidates - 1 if healing else 0]):
        made[each] = _converted(
            model,
            Path(out),
            each,
            planned,
            healing,
            {"device": device, "revision": revision, "trust_remote_code": trust_remote_code},
            seed,
            step,
            progress,
        )
        if healing is not None:
            record = read_json(made[each] / MANIFEST)["healed"]
            healed[each.shorthand] = {key: record[key] for key in ("kl_before", "kl_after")}
    plan = planned.plan
    if healing is not None:
        plan = min(made, key=lambda p: (healed[p.shorthand]["kl_after"], p.shorthand))
        step(f"the best after healing is {plan.shorthand}")
    target = made[plan]
    folder, suffix = target.parent, target.name.removeprefix("converted")
    about = {"model": stats.identity["model"], "files": read_json(target / MANIFEST)["files"]}
    options: dict[str, Any] = {"dtype": dtype, "device": device, "seed": seed}

    def resumed(name: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> Any:
        path, rests_on = folder / f"{name}{suffix}.json", {**about, **options, **settings}
        found = read_json(path) if path.is_file() else {}
        if found.get("rests_on") != json.loads(json.dumps(rests_on)):
            text = json.dumps({"rests_on": rests_on, "result": make()}, indent=1)
            write(path, text + "\n")
            found = json.loads(text)
        return found["result"]

    def verified() -> dict[str, Any]:
        step("verify against the original weights run under the same plan")
        found = verify(target, model, revision=revision, device=device, seed=seed)
        if not found.ok:
            raise AbreastError(f"the conversion is wrong: {'; '.join(found.faults)}")
        return found.to_dict()

    @cache
    def models() -> dict[str, Any]:
        placed: dict[str, Any] = {"dtype": dtype, "device": device}
        original = load(model, revision=revision, trust_remote_code=trust_remote_code, **placed)
        return {"original": original, "converted": load(target, **placed)}

    def evaluated() -> dict[str, Any]:
        step("compare next-token predictions with the original's on held-out text")
        (original, tokenizer), (converted, _) = models().values()
        stream = load_tokens(tokenizer, data, max_tokens=max_tokens, seed=seed)
        sizes = {"window": window, "stride": window, "batch_size": 8}
        return compare(converted, original, stream, progress=progress, **sizes).to_dict()

    def timed() -> dict[str, Any]:
        step("time both models in turn")
        pair = {name: loaded for name, (loaded, _) in models().items()}
        found: dict[str, Any] = {}
        for task in ("prefill", "decode"):
            result = bench(
                pair,
                task=task,
                context=context,
                new_tokens=new_tokens,
                rounds=rounds,
                seed=seed,
                progress=progress,
            )
            found[task] = {**result.to_dict(), "verdict": verdict(result)}
        return found

    def written() -> dict[str, Any]:
        step("let both models continue the same prompts")
        (original, tokenizer), (converted, _) = models().values()
        stream = load_tokens(tokenizer, data, max_tokens=max_tokens, seed=seed)
        return {"data": data, "samples": sample(original, converted, tokenizer, stream)}

    scored = {"data": data, "max_tokens": max_tokens, "window": window}
    timing = {"rounds": rounds, "context": context, "new_tokens": new_tokens}
    asked = None
    if tasks is not None:
        asked = evaluate_tasks(
            target,
            tasks,
            against=model,
            out=Path(out) / "tasks",
            batch_size=8,
            against_revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            device=device,
            step=step,
            progress=progress,
        ).to_dict()
        write(folder / f"tasks{suffix}.json", json.dumps(asked, indent=1) + "\n")
    result = Optimized(
        planned=planned,
        plan=plan.shorthand,
        folder=str(folder),
        converted=str(target),
        healed=healed,
        verification=resumed("verify", {}, verified),
        quality=resumed("quality", scored, evaluated),
        speed=resumed("speed", timing, timed),
        samples=resumed("samples", {"data": data, "max_tokens": max_tokens}, written),
        tasks=asked,
    )
    write(Path(out) / "results.json", json.dumps(result.to_dict(), indent=1) + "\n")
    if (last := read_run(out).last) is not None:
        write_card(last)
    if report:
        step(f"wrote {write_report(out)}")
    return result


def _converted(
    model: str | Path,
    out: Path,
    plan: Plan,
    planned: Planned,
    healing: Healing | None,
    source: dict[str, Any],
    seed: int,
    step: Step,
    progress: Progress | None,
) -> Path:
    """The folder of the conversion under a plan, healed if asked; made now where it is missing."""
    key = hashlib.sha256(plan.shorthand.encode()).hexdigest()[:8]
    folder = out / "plans" / f"depth-{plan.depth}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    recorded = plan.model_copy(update={"source": planned.front.stats.source})
    recorded.save(folder / "plan.yaml")
    write(folder / "why.md", explain(plan, planned.front))
    depths = f"{plan.num_layers} layers into {plan.depth} stages: {plan.shorthand}"
    if healing is None:
        target = folder / "converted"
        if not target.is_dir():
            step(f"convert {depths}")
            revision = source["revision"]
            convert(model, recorded, target, revision=revision, force=True, progress=progress)
        return target
    settings = json.dumps(
        [healing.data, healing.tokens, healing.recipe.to_dict(), seed], sort_keys=True
    )
    key = hashlib.sha256(settings.encode()).hexdigest()[:8]
    target = folder / f"converted-{healing.method}-{key}"
    if not target.is_dir():
        step(f"heal and convert {depths}")
        heal(
            model,
            recorded,
            target,
            method=healing.method,
            data=healing.data,
            tokens=healing.tokens,
            recipe=healing.recipe,
            seed=seed,
            force=True,
            step=step,
            progress=progress,
            **source,
        )
    return target
