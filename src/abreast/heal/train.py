"""Healing by training: the grouped model learns to predict what the original predicts.

Self-distillation as in CQIL (arXiv 2404.06709, section 3.3, and its published recipe): the teacher
is the original model, the student the same weights run under the plan, the loss KL(teacher ||
student) over the logits. With LoRA adapters on unchanged weights both are one model in memory: the
teacher runs with adapters and plan switched off. The plain language-model loss, on the grouped
layers only, is the recipe of the LP paper (arXiv 2502.02790).

accelerate places and wraps the model, scales, reduces and clips gradients, and stores and restores
the state; peft makes the adapters. What a step trains on follows from its number alone, so a run
that was stopped goes on exactly where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.heal.recipe import Recipe, processes
from abreast.heal.resume import keep_only, last_checkpoint, save_checkpoint
from abreast.heal.shard import align, full, local, shard
from abreast.heal.student import (
    need,
    optimizers_of,
    schedule_of,
    set_checkpointing,
    student_of,
    windows_of,
)
from abreast.model import (
    apply,
    batches_of,
    decoder_layers,
    divergence,
    next_token_loss,
    remove,
    weighted_mean,
)
from abreast.plan import Plan
from abreast.runs import check_tokens, open_run, tokens_hash

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

HELD_OUT_TOKENS = 8192
MIN_WINDOWS = 10
Report = Callable[[tuple["Point", ...]], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Point:
    """One line of the curves: the state after `step` steps.

    loss: mean training loss since the point before (NaN at step 0). held_out: what decides, on
    windows that are not trained on: KL(original || grouped) in nats, or for the objective "lm" the
    language-model loss. cpu_seconds: processor time so far, of all threads.
    """

    step: int
    tokens: int
    learning_rate: float
    loss: float
    held_out: float
    cpu_seconds: float


@dataclass(frozen=True)
class Distilled:
    """What `distill` did. before, after: the held-out measure of `Point`, before training and with
    the weights that the model has now, those of best_step (0: no training helped, and they are
    the ones it began with). reason: why training ended. tokens: trained on, with repetitions.
    """

    points: tuple[Point, ...]
    best_step: int
    before: float
    after: float
    tokens: int
    reason: str
    diverged: bool
    cpu_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _State:
    """What a checkpoint holds beside weights, optimiser, schedule and random generators."""

    step: int = 0
    best_step: int = 0
    best: float = math.inf
    losses: list[float] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class _Job:
    """The parts of a run. student: `model`, or peft's wrapper of it; wrapped: the student as
    accelerate wants it called. trained, held: windows [n, window]."""

    accelerator: Accelerator
    model: PreTrainedModel
    student: Any
    wrapped: Any
    teacher: PreTrainedModel | None
    plan: Plan
    trained: torch.Tensor
    held: torch.Tensor
    recipe: Recipe
    seed: int
    optimizers: list[Any]
    schedules: list[Any]
    work: Path

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.student.named_parameters() if p.requires_grad}


def distill(
    model: PreTrainedModel,
    plan: Plan,
    tokens: np.ndarray,
    work: str | Path,
    *,
    recipe: Recipe | None = None,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Distilled:
    """Train `model` in place until it predicts, run under `plan`, what `teacher` predicts.

    model: not grouped, on one device; in float32 unless adapters are trained. tokens: ids of
    shape [windows, window]; the last tenth (at most 8,192 tokens) is held out, the rest trained on
    in seeded random order, again and again if it is short. work: folder of the checkpoints; a later
    call with the same arguments goes on from the last one and, on a CPU, ends with the very bits
    of an uninterrupted one. teacher: the original; left out, it is `model` itself with adapters and
    plan switched off, which needs recipe.train "lora". progress: called with (steps done, steps).
    report: called with the curves
    at every new point.

    The model ends with the weights that were best on the held-out text, adapters merged. A loss or
    gradient that is not finite ends the run, and so does a held-out measure far above the one
    before training, or no new best in recipe.patience looks. Started by `accelerate launch` or
    torchrun, each process trains its share of every batch; with recipe.shard it also keeps only its
    share of model, teacher and optimiser state, and both models stay so (see sharding.py).

    Raises AbreastError for missing packages, numbers that make no sense, too little text, a plan or
    teacher of another model, or a work folder of another run.
    """
    recipe = recipe or Recipe()
    _check(model, plan, tokens, recipe, teacher)
    accelerator = _accelerator(model)
    windows = torch.from_numpy(np.ascontiguousarray(tokens))
    held_out = max(1, min(HELD_OUT_TOKENS // windows.shape[1], len(windows) // 10))
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        student = student_of(model, plan, recipe)
        try:
            if recipe.shard:
                align(model)
                for each in (model, teacher) if teacher is not None else (model,):
                    shard(each, accelerator.device)
            optimizers = optimizers_of(student, recipe)
            # Not handed to accelerate, which would take a step for every process.
            schedules = [
                torch.optim.lr_scheduler.LambdaLR(each, schedule_of(recipe)) for each in optimizers
            ]
            if recipe.shard:
                wrapped, prepared = model, optimizers
            else:
                wrapped, *prepared = accelerator.prepare(student, *optimizers)
            job = _Job(
                *(accelerator, model, student, wrapped, teacher, plan),
                *(windows[:-held_out], windows[-held_out:], recipe, seed),
                *(prepared, schedules, Path(work)),
            )
            apply(model, plan)
            try:
                found = _run(job, progress, report)
            finally:
                remove(model)
            if recipe.train == "lora":
                student.merge_and_unload()
        except BaseException:
            if recipe.train == "lora":
                student.unload()
            raise
        finally:
            if recipe.checkpointing:
                set_checkpointing(model, False)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(needed[name])
            model.zero_grad(set_to_none=True)
            model.eval()
            accelerator.free_memory()
    return found


def _run(job: _Job, progress: Progress | None, report: Report | None) -> Distilled:
    state = _State()
    best: dict[str, torch.Tensor] = {}
    sharded = job.optimizers[0] if job.recipe.shard else None
    keep_only(job.accelerator, job.weights, best, sharded)
    job.accelerator.register_for_checkpointing(state, *job.schedules)
    if job.accelerator.is_main_process:
        open_run(job.work, "training", _identity(job))
    job.accelerator.wait_for_everyone()
    recipe, began = job.recipe, time.process_time()

    def look() -> str:
        """Measure on the held-out text, and say why to stop if there is a reason to."""
        measure = _held_out(job)
        if not state.points and not math.isfinite(measure):
            raise AbreastError(
                "the model's loss is not finite before any training; load it in float32 or "
                "bfloat16, or check how its weights were made"
            )
        loss = sum(state.losses) / len(state.losses) if state.losses else math.nan
        state.losses.clear()
        point = Point(
            step=state.step,
            tokens=state.step * recipe.batch_size * job.trained.shape[1],
            learning_rate=float(job.schedules[0].get_last_lr()[0]),
            loss=loss,
            held_out=measure,
            cpu_seconds=spent + time.process_time() - began,
        )
        state.points.append(asdict(point))
        if report is not None:
            report(tuple(Point(**each) for each in state.points))
        if measure < state.best:
            state.best, state.best_step = measure, state.step
            best.update({n: local(p.detach()).to("cpu", copy=True) for n, p in job.weights.items()})
        start = state.points[0]["held_out"]
        if not math.isfinite(measure):
            return f"diverged: the held-out loss is {measure} after step {state.step}"
        if measure > (start + 0.5 if recipe.objective == "lm" else 3 * start + 0.01):
            return f"diverged: the held-out loss rose from {start:.4g} to {measure:.4g}"
        looks = sum(point["step"] > state.best_step for point in state.points)
        if looks >= recipe.patience:
            return f"no better for {looks} looks at the held-out text"
        return ""

    last = last_checkpoint(job.work)
    resumed = last is not None
    if last is not None:
        job.accelerator.load_state(str(last))
    spent = state.points[-1]["cpu_seconds"] if state.points else 0.0
    reason = "" if resumed else look()
    if not resumed and not reason:
        save_checkpoint(job.accelerator, job.work, state.step)
    while not reason and state.step < recipe.steps:
        loss, norm = _train_step(job, state.step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"diverged: loss {loss}, gradient norm {norm} in step {state.step + 1}"
            break
        state.step += 1
        state.losses.append(loss)
        if state.step % recipe.evaluate_every == 0 or state.step == recipe.steps:
            reason = look()
        if not reason and (state.step % recipe.save_every == 0 or state.step == recipe.steps):
            save_checkpoint(job.accelerator, job.work, state.step)
        if progress is not None:
            progress(state.step, recipe.steps)
    with torch.no_grad():
        for name, parameter in job.weights.items():
            local(parameter).copy_(best[name])
    points = tuple(Point(**point) for point in state.points)
    return Distilled(
        points=points,
        best_step=state.best_step,
        before=points[0].held_out,
        after=state.best,
        tokens=state.step * recipe.batch_size * job.trained.shape[1],
        reason=reason or "all steps done",
        diverged=reason.startswith("diverged"),
        cpu_seconds=points[-1].cpu_seconds,
    )


def _train_step(job: _Job, step: int) -> tuple[float, float]:
    """One step of the optimiser; the mean loss, and the gradient's norm.

    Nothing is changed where one of them is not finite.
    """
    recipe, accelerator = job.recipe, job.accelerator
    rows = windows_of(step, len(job.trained), recipe.batch_size, job.seed)
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    parts = [mine[at : at + recipe.micro_batch] for at in range(0, len(mine), recipe.micro_batch)]
    total = 0.0
    for number, part in enumerate(parts):
        ids = job.trained[torch.from_numpy(part)].to(job.model.device)
        last = number == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(job.wrapped):
            loss = _loss(job, ids) * (len(part) / len(mine))
            accelerator.backward(loss)
        total += float(loss.detach())
    total = _mean(job, total)
    norm = float(full(accelerator.clip_grad_norm_(list(job.weights.values()), recipe.clip)))
    if math.isfinite(total) and math.isfinite(norm):
        for each in (*job.optimizers, *job.schedules):
            each.step()
    for optimizer in job.optimizers:
        optimizer.zero_grad()
    return total, norm


def _loss(job: _Job, ids: torch.Tensor) -> torch.Tensor:
    recipe = job.recipe
    taught = recipe.objective == "kl"
    with ExitStack() as stack:
        stack.enter_context(_autocast(job))
        theirs: list[torch.Tensor] = []
        ours: list[torch.Tensor] = []
        if taught:
            with _teaching(job) as teacher, torch.no_grad(), _ends(job, teacher, theirs):
                wanted = teacher(input_ids=ids, use_cache=False).logits
        job.student.train()
        stack.enter_context(_ends(job, job.model, ours))
        logits = job.wrapped(input_ids=ids, use_cache=False).logits
        loss = torch.zeros((), device=logits.device)
        if taught:
            loss = divergence(logits, wanted, recipe.temperature)
        if not taught or recipe.lm_weight:
            loss = loss + next_token_loss(logits, ids) * (recipe.lm_weight if taught else 1.0)
        for our, their in zip(ours, theirs, strict=False):
            gap = (our.float() - their.float()).square().sum(-1) / their.float().square().sum(-1)
            loss = loss + gap.mean() * recipe.hidden_weight / len(theirs)
    return loss


def _held_out(job: _Job) -> float:
    """KL(original || grouped), or the language-model loss, in nats on the held-out windows."""
    found = []
    with torch.no_grad(), _autocast(job):
        for ids in batches_of(job.held, job.recipe.micro_batch):
            ids = ids.to(job.model.device)
            job.student.eval()
            logits = job.model(input_ids=ids, use_cache=False).logits
            if job.recipe.objective == "lm":
                found.append((float(next_token_loss(logits, ids)), len(ids)))
                continue
            with _teaching(job) as teacher:
                wanted = teacher(input_ids=ids, use_cache=False).logits
            found.append((float(divergence(logits, wanted)), len(ids)))
    return _mean(job, weighted_mean(found))


def _mean(job: _Job, value: float) -> float:
    """Over the processes, so that all decide alike; else they would wait for each other."""
    if job.accelerator.num_processes == 1:
        return value
    mine = torch.tensor(value, dtype=torch.float64, device=job.accelerator.device)
    return float(job.accelerator.reduce(mine, reduction="mean"))


@contextmanager
def _teaching(job: _Job) -> Iterator[PreTrainedModel]:
    if job.teacher is not None:
        yield job.teacher
        return
    job.student.eval()
    remove(job.model)
    try:
        with job.student.disable_adapter():
            yield job.model
    finally:
        apply(job.model, job.plan)


@contextmanager
def _ends(job: _Job, model: PreTrainedModel, found: list[torch.Tensor]) -> Iterator[None]:
    """Collect the residual stream after every stage from the first group on, if it is taught."""
    layers = decoder_layers(model)

    def collect(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    taught = job.recipe.hidden_weight and job.recipe.objective == "kl"
    first = job.plan.groups[0].layers[0]
    ends = [stage[-1] for stage in job.plan.stages if stage[0] >= first] if taught else []
    hooks = [layers[end].register_forward_hook(collect) for end in ends]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _autocast(job: _Job) -> Any:
    kind = job.model.device.type
    # The cache would hold the whole model in bfloat16 on every process.
    caching = not job.recipe.shard
    return torch.autocast(kind, torch.bfloat16, enabled=job.recipe.bf16, cache_enabled=caching)


def _accelerator(model: PreTrainedModel) -> Accelerator:
    accelerate = need("accelerate")
    distributed = processes() > 1
    found: Accelerator = accelerate.Accelerator(
        cpu=model.device.type == "cpu", device_placement=distributed, mixed_precision="no"
    )
    return found


def _identity(job: _Job) -> dict[str, Any]:
    """What must be the same for a run to go on, as JSON would give it back."""
    start = hashlib.sha256()
    for name, parameter in job.weights.items():
        some = local(parameter.detach()).flatten()[:1024].float().cpu().contiguous()
        start.update(name.encode() + some.numpy().tobytes())
    identity: dict[str, Any] = {
        "recipe": job.recipe.to_dict(),
        "plan": job.plan.shorthand,
        "tokens": [tokens_hash(windows.numpy()) for windows in (job.trained, job.held)],
        "weights": start.hexdigest(),
        "seed": job.seed,
        "processes": job.accelerator.num_processes,
    }
    return dict(json.loads(json.dumps(identity)))


def _check(
    model: PreTrainedModel,
    plan: Plan,
    tokens: np.ndarray,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
) -> None:
    num_layers = len(decoder_layers(model))
    plan.check_layers(num_layers)
    if not plan.groups:
        raise AbreastError("the plan has no groups, so there is nothing to heal; add some")
    recipe.check()
    if tokens.ndim != 2 or len(tokens) < MIN_WINDOWS or tokens.shape[1] < 2:
        raise AbreastError(
            f"{tokens.size} tokens in {len(tokens)} windows are too little text to train on; "
            f"give at least {MIN_WINDOWS} windows"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    check_tokens(tokens, vocabulary)
    if recipe.train != "lora" and model.dtype != torch.float32:
        raise AbreastError(
            f"the weights are {str(model.dtype).removeprefix('torch.')}, in which small steps are "
            "lost; load the model in float32, or train adapters (lora)"
        )
    if teacher is None:
        if recipe.train != "lora" and recipe.objective == "kl":
            raise AbreastError(
                f"training '{recipe.train}' changes the weights, so the teacher must be a second "
                "model; give one, or train adapters (lora)"
            )
        return
    theirs = teacher.get_input_embeddings().weight.shape
    if theirs[0] != vocabulary or len(decoder_layers(teacher)) != num_layers:
        raise AbreastError(
            f"the teacher has {len(decoder_layers(teacher))} layers and {theirs[0]} tokens, the "
            f"model {num_layers} and {vocabulary}; the teacher must be the plan's original"
        )
