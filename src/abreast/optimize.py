"""The whole job: heal, convert, verify, evaluate, time, report; each step resumes.

A run folder holds

    text/                     what the text to evaluate on was like, what the original wrote
    calibration/, held-out/   costs of plans on the two texts (see planner)
    front.json                every plan measured as a whole; another budget chooses from it again
    profile.json              seconds per kind of stage, unless --hardware was named
    pareto.png                quality against depth, beside published ways to choose a plan
    plans/NAME/               plan.yaml, why.md, converted/ with its model card, verify.json,
                              quality.json, speed.json, samples.json, tasks.json if asked for;
                              healed conversions and their files have a suffix
    tasks/                    every answer to every task
    results.json              all numbers of the last call
    environment.json          versions, machine, and the last call's command
    report/                   report.html with its charts and numbers
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abreast.checkpoint import open_checkpoint, read_json, read_manifest, resolve, write
from abreast.convert import convert, verify
from abreast.data import AUTO, TokenStream
from abreast.errors import AbreastError
from abreast.evaluate import Tasks, check_length, compare, evaluate_tasks, sample
from abreast.heal import Recipe, heal
from abreast.model import fitting_dtype, load, load_tokenizer
from abreast.plan import Plan
from abreast.planner import Planned, explain
from abreast.report import check_extra, read_run, write_card, write_report
from abreast.runs import Author, record_environment, token_stream
from abreast.speed import bench, verdict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Healing:
    """How to heal: arguments of `heal`. candidates: number of top plans to heal."""

    method: str = "both"
    data: str = AUTO
    tokens: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    candidates: int = 1

    def digest(self, seed: int) -> str:
        """Tells apart the healed conversions of one plan."""
        settings = [self.data, self.tokens, self.recipe.to_dict(), seed]
        return _digest(json.dumps(settings, sort_keys=True))


@dataclass(frozen=True)
class Checks:
    """How a conversion is loaded, evaluated and timed.

    data, max_tokens, window: of the evaluation against the original. rounds, context, new_tokens:
    of the timing, at batch 1. tasks: from `find_tasks`, to evaluate both models on as well.
    add_bos: whether texts, those of healing and tasks included, begin with a beginning-of-text
    token, see `prefix_of`.
    """

    data: str = AUTO
    max_tokens: int = 100_000
    window: int = 256
    rounds: int = 12
    context: int = 128
    new_tokens: int = 64
    tasks: Tasks | None = None
    add_bos: bool | None = None
    dtype: str = "auto"
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Optimized:
    """Results of `optimize`. verification, quality, speed and tasks are the verbs' JSON.

    plan: the chosen one, another than planned.plan where that one heals better. healed: KL before
    and after, on text that healing did not see, for every plan that was healed. samples: "data",
    and the list that `sample` returns under "samples".
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
    checks: Checks | None = None,
    command: Sequence[str] | None = None,
    report: bool = True,
    step: Step = lambda message: None,
    progress: Progress | None = None,
) -> Optimized:
    """Convert a model under the chosen plan, then verify, evaluate and time the conversion.

    healing: heal the chosen plan and the next best ones, and continue with the one that is then
    nearest to the original on text that healing did not see. Every step leaves a file in
    out/plans/NAME and is skipped where that file rests on the same settings. command: the command
    line, for the record. report: write out/report at the end.
    Raises AbreastError as the verbs do, and when the conversion fails its verification.
    """
    if report:
        check_extra()
    checks, out = checks or Checks(), Path(out)
    if checks.dtype == "auto":  # as the search has it, which may go on with an earlier one
        checks = replace(checks, dtype=planned.front.stats.identity.get("dtype", "auto"))
    record_environment(out, checks.device, command)
    job = _Job(model, out, planned, checks, step, progress)
    plan, healed = planned.plan, dict[str, dict[str, float]]()
    if healing is None:
        target = job.convert(plan)
    else:
        plan, target, healed = job.heal_best(healing)
    conversion = _Conversion(job, target)
    tasks = conversion.answer_tasks()
    result = Optimized(
        planned=planned,
        plan=plan.shorthand,
        folder=str(target.parent),
        converted=str(target),
        healed=healed,
        verification=conversion.resume("verify", conversion.verify),
        quality=conversion.resume("quality", conversion.compare, "data", "max_tokens", "window"),
        speed=conversion.resume("speed", conversion.time, "rounds", "context", "new_tokens"),
        samples=conversion.resume("samples", conversion.sample, "data", "max_tokens"),
        tasks=tasks,
    )
    write(out / "results.json", json.dumps(result.to_dict(), indent=1) + "\n")
    if (last := read_run(out).last) is not None:
        write_card(last)
    if report:
        step(f"wrote {write_report(out)}")
    return result


def evaluation_text(
    model: str | Path,
    out: str | Path,
    checks: Checks,
    author: Author | None = None,
    *,
    step: Step = lambda message: None,
) -> TokenStream:
    """The text that `optimize` evaluates on; the original writes its part, if any, into out/text.

    Called first, it shows what is wrong with the text before hours of search. author: gives the
    original, None to load it if need be. Raises AbreastError as `token_stream`, and for a text
    shorter than a window.
    """
    folder, _ = resolve(model, revision=checks.revision)
    stream = token_stream(
        checks.data,
        load_tokenizer(folder, trust_remote_code=checks.trust_remote_code),
        folder,
        max_tokens=checks.max_tokens,
        window=checks.window,
        seed=checks.seed,
        add_bos=checks.add_bos,
        role="judge",
        author=author or (lambda: original_of(model, checks)),
        folder=Path(out),
        option="--eval-data",
        step=step,
    )
    check_length(stream, min(checks.window, checks.max_tokens))
    return stream


def original_of(model: str | Path, checks: Checks) -> PreTrainedModel:
    """The original, loaded as the checks say."""
    folder, _ = resolve(model, revision=checks.revision)
    dtype = fitting_dtype(open_checkpoint(folder), checks.dtype, checks.device)
    remote = checks.trust_remote_code
    return load(folder, dtype=dtype, device=checks.device, trust_remote_code=remote)[0]


@dataclass(frozen=True)
class _Job:
    """The arguments of one call, and the conversions that it makes or finds."""

    model: str | Path
    out: Path
    planned: Planned
    checks: Checks
    step: Step
    progress: Progress | None

    def convert(self, plan: Plan) -> Path:
        """The folder of the conversion under a plan, made now where it is missing."""
        folder, recorded = self._plan_folder(plan)
        target = folder / "converted"
        if not target.is_dir():
            self.step(f"convert {_stages(plan)}")
            revision, progress = self.checks.revision, self.progress
            convert(self.model, recorded, target, revision=revision, force=True, progress=progress)
        return target

    def heal(self, plan: Plan, healing: Healing) -> Path:
        """The folder of the healed conversion under a plan, made now where it is missing."""
        folder, recorded = self._plan_folder(plan)
        target = folder / f"converted-{healing.method}-{healing.digest(self.checks.seed)}"
        if not target.is_dir():
            self.step(f"heal and convert {_stages(plan)}")
            heal(
                self.model,
                recorded,
                target,
                method=healing.method,
                data=healing.data,
                texts=self.out,
                add_bos=self.checks.add_bos,
                tokens=healing.tokens,
                recipe=healing.recipe,
                seed=self.checks.seed,
                device=self.checks.device,
                revision=self.checks.revision,
                trust_remote_code=self.checks.trust_remote_code,
                force=True,
                step=self.step,
                progress=self.progress,
            )
        return target

    def heal_best(self, healing: Healing) -> tuple[Plan, Path, dict[str, dict[str, float]]]:
        """The plan that is best after healing, its conversion, and KL of all plans healed."""
        targets: dict[Plan, Path] = {}
        healed: dict[str, dict[str, float]] = {}
        for plan in (self.planned.plan, *self.planned.others[: healing.candidates - 1]):
            targets[plan] = self.heal(plan, healing)
            record = read_manifest(targets[plan]).healed or {}
            healed[plan.shorthand] = {key: record[key] for key in ("kl_before", "kl_after")}
        best = min(targets, key=lambda plan: (healed[plan.shorthand]["kl_after"], plan.shorthand))
        self.step(f"the best after healing is {best.shorthand}")
        return best, targets[best], healed

    def _plan_folder(self, plan: Plan) -> tuple[Path, Plan]:
        """The plan's folder with plan.yaml and why.md, and the plan as recorded there."""
        folder = self.out / "plans" / f"depth-{plan.depth}-{_digest(plan.shorthand)}"
        folder.mkdir(parents=True, exist_ok=True)
        front = self.planned.front
        recorded = front.stats.on_record(plan)
        recorded.save(folder / "plan.yaml")
        write(folder / "why.md", explain(plan, front))
        return folder, recorded


class _Conversion:
    """One conversion beside the original, both loaded at most once."""

    def __init__(self, job: _Job, target: Path) -> None:
        self.job, self.checks, self.target = job, job.checks, target
        self.suffix = target.name.removeprefix("converted")
        identity = job.planned.front.stats.identity
        self.rests_on = {
            **{key: identity[key] for key in ("model", "prefix") if key in identity},
            "files": read_manifest(target).record["files"],
            **self._settings("dtype", "device", "seed"),
        }

    def resume(self, name: str, make: Callable[[], dict[str, Any]], *settings: str) -> Any:
        """The result in NAME.json if it was made under the same settings, else made now."""
        path, rests_on = self._path(name), {**self.rests_on, **self._settings(*settings)}
        record = read_json(path) if path.is_file() else {}
        if record.get("rests_on") != json.loads(json.dumps(rests_on)):
            text = json.dumps({"rests_on": rests_on, "result": make()}, indent=1)
            write(path, text + "\n")
            record = json.loads(text)
        return record["result"]

    def answer_tasks(self) -> dict[str, Any] | None:
        """Accuracy on tasks, None where there are none; out/tasks resumes item by item."""
        checks, job = self.checks, self.job
        if checks.tasks is None:
            return None
        result = evaluate_tasks(
            self.target,
            checks.tasks,
            against=job.model,
            out=job.out / "tasks",
            batch_size=8,
            add_bos=checks.add_bos,
            against_revision=checks.revision,
            trust_remote_code=checks.trust_remote_code,
            dtype=checks.dtype,
            device=checks.device,
            step=job.step,
            progress=job.progress,
        ).to_dict()
        write(self._path("tasks"), json.dumps(result, indent=1) + "\n")
        return result

    def _settings(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self.checks, name) for name in names}

    def _path(self, name: str) -> Path:
        return self.target.parent / f"{name}{self.suffix}.json"

    @cached_property
    def models(self) -> tuple[Any, Any, Any]:
        """The original, the conversion and the tokenizer, loaded when first needed."""
        checks = self.checks
        original, tokenizer = load(
            self.job.model,
            revision=checks.revision,
            trust_remote_code=checks.trust_remote_code,
            dtype=checks.dtype,
            device=checks.device,
        )
        converted, _ = load(self.target, dtype=checks.dtype, device=checks.device)
        return original, converted, tokenizer

    @cached_property
    def stream(self) -> TokenStream:
        original, _, _ = self.models
        job = self.job
        return evaluation_text(job.model, job.out, self.checks, lambda: original, step=job.step)

    def verify(self) -> dict[str, Any]:
        self.job.step("verify against the original weights run under the same plan")
        revision, device, seed = self.checks.revision, self.checks.device, self.checks.seed
        result = verify(self.target, self.job.model, revision=revision, device=device, seed=seed)
        if not result.ok:
            raise AbreastError(f"the conversion is wrong: {'; '.join(result.faults)}")
        return result.to_dict()

    def compare(self) -> dict[str, Any]:
        self.job.step("compare next-token predictions with the original's on held-out text")
        original, converted, _ = self.models
        window, progress = self.checks.window, self.job.progress
        sizes = {"window": window, "stride": window, "batch_size": 8}
        result = compare(converted, original, self.stream, progress=progress, **sizes)
        return {**result.to_dict(), "text": self.stream.about()}

    def time(self) -> dict[str, Any]:
        self.job.step("time both models in turn")
        original, converted, _ = self.models
        results: dict[str, Any] = {}
        for task in ("prefill", "decode"):
            result = bench(
                {"original": original, "converted": converted},
                task=task,
                context=self.checks.context,
                new_tokens=self.checks.new_tokens,
                rounds=self.checks.rounds,
                seed=self.checks.seed,
                progress=self.job.progress,
            )
            results[task] = {**result.to_dict(), "verdict": verdict(result)}
        return results

    def sample(self) -> dict[str, Any]:
        self.job.step("let both models continue the same prompts")
        original, converted, tokenizer = self.models
        samples = sample(original, converted, tokenizer, self.stream)
        return {"data": self.checks.data, "samples": samples}


def _stages(plan: Plan) -> str:
    return f"{plan.num_layers} layers into {plan.depth} stages: {plan.shorthand}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
