"""Healing by training: the grouped model learns to predict what the original predicts.

Self-distillation as in CQIL (arXiv 2404.06709, section 3.3, and its published recipe): the teacher
is the original model, the student the same weights run under the plan, the loss KL(teacher ||
student) over the logits. With LoRA adapters on unchanged weights both are one model in memory: the
teacher runs with adapters and plan switched off. The plain language-model loss, on the grouped
layers only, is the recipe of the LP paper (arXiv 2502.02790). Before that, each group may learn
alone: from the original's state at its beginning, to end at the original's state there.

accelerate places and wraps the model, and scales, reduces and clips gradients; peft makes the
adapters. What a step trains on, its learning rate and its random numbers follow from its number
alone, so a run that was stopped goes on exactly where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.heal.compiled import check_compiler, compiled
from abreast.heal.losses import Losses
from abreast.heal.recipe import Recipe, check_enough, processes
from abreast.heal.student import (
    Checkpoints,
    align,
    full,
    local,
    make_trainable,
    need,
    optimizers_of,
    set_checkpointing,
    shard,
)
from abreast.model import decoder_layers, grouped, weighted_mean
from abreast.plan import Plan
from abreast.runs import check_tokens, open_run, tokens_hash

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

HELD_OUT_TOKENS = 8192


@dataclass(frozen=True)
class Point:
    """One line of the curves: the state after `step` steps, of which the last had learning_rate
    (see `Recipe.rate_at`).

    loss: mean training loss since the point before (NaN at step 0). held_out: what decides, on
    windows that are not trained on: KL(original || grouped) in nats, or for the objective "lm" the
    language-model loss, in both phases: a group that learns alone may move nearer to its target and
    the model away from the original. cpu_seconds: processor time so far, of all threads; seconds:
    on the wall. phase: "groups" while each learned alone (loss is then `gap`), else "model".
    """

    step: int
    tokens: int
    learning_rate: float
    loss: float
    held_out: float
    cpu_seconds: float
    seconds: float
    phase: str


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
    seconds: float


def distill(
    model: PreTrainedModel,
    plan: Plan,
    tokens: np.ndarray,
    work: str | Path,
    *,
    prefix: int = 0,
    recipe: Recipe | None = None,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    on_point: Callable[[Sequence[Point]], None] | None = None,
) -> Distilled:
    """Train `model` in place until it predicts, run under `plan`, what `teacher` predicts.

    model: not grouped, on one device; in float32 unless adapters are trained. tokens: ids of shape
    [windows, window]; the last tenth (at most 8,192 tokens) is held out, the rest trained on in
    seeded random order, again and again if it is short. prefix: how many tokens of each window are
    there before the text: context, on which no loss is taken. work: folder of the checkpoints; a
    later call with the same arguments goes on from the last one and, on a CPU, ends with the very
    bits of an uninterrupted one. teacher: the original; left out, it is `model` itself with
    adapters and plan switched off, which needs recipe.train "lora". progress: called with (steps
    done, steps). on_point: called with the curve so far at every new point.

    The model ends with the weights that were best on the held-out text, adapters merged. A loss or
    gradient that is not finite ends the run, and so does a held-out measure far above the one
    before training, or no new best in recipe.patience evaluations. Started by `accelerate launch`
    or torchrun, each process trains its share of every batch; with recipe.shard it also keeps only
    its share of model, teacher and optimiser state, and both models stay so (see `shard`).

    Raises AbreastError for missing packages, numbers that make no sense, too little text, a plan or
    teacher of another model, or a work folder of another run.
    """
    recipe = (recipe or Recipe()).suited(model.device.type)
    _check_training(model, plan, tokens, recipe, teacher)
    with _prepared(model, plan, tokens, prefix, recipe, teacher, seed) as training:
        training.on_point = on_point
        return training.run(Path(work), progress)


def step_seconds(
    model: PreTrainedModel, plan: Plan, tokens: np.ndarray, recipe: Recipe, prefix: int = 0
) -> tuple[float, float]:
    """How long a step of each phase takes, 0 for a phase that is left out.

    `model`, the original, is not changed; the arguments are those of `distill`.
    """
    _check_training(model, plan, tokens, recipe, model)
    with _prepared(model, plan, tokens, prefix, recipe, None, 0) as training:
        alone = training.time_step(in_groups=True) if recipe.group_share > 0 else 0.0
        return alone, training.time_step(in_groups=False) if recipe.group_share < 1 else 0.0


@contextmanager
def _prepared(
    model: PreTrainedModel,
    plan: Plan,
    tokens: np.ndarray,
    prefix: int,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    seed: int,
) -> Iterator[_Training]:
    """What trains `model`, which runs under the plan inside; adapters are merged at the end."""
    # Only where there are several processes, or a GPU would be taken that was not named.
    accelerator = need("accelerate").Accelerator(
        cpu=model.device.type == "cpu", device_placement=processes() > 1, mixed_precision="no"
    )
    windows = torch.from_numpy(np.ascontiguousarray(tokens))
    num_held_out = max(1, min(HELD_OUT_TOKENS // windows.shape[1], len(windows) // 10))
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        members = [layer for group in plan.groups for layer in group.layers]
        student = make_trainable(model, members, recipe)
        try:
            if processes() > 1:
                align(model)
            if recipe.shard:
                shard(model, accelerator.device)
                if teacher is not None:
                    shard(teacher, accelerator.device)
            wrapped, optimizers = model, optimizers_of(student, recipe)
            if not recipe.shard:
                wrapped, *optimizers = accelerator.prepare(student, *optimizers)
            models = [model] if teacher is None else [model, teacher]
            with grouped(model, plan), compiled(*models) if recipe.compile else nullcontext():
                yield _Training(
                    accelerator=accelerator,
                    learning=Losses(model, student, wrapped, teacher, plan, recipe, prefix),
                    windows=windows[:-num_held_out],
                    held_out=windows[-num_held_out:],
                    seed=seed,
                    optimizers=optimizers,
                )
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
                parameter.requires_grad_(required[name])
            model.zero_grad(set_to_none=True)
            model.eval()
            accelerator.free_memory()


def windows_of(step: int, count: int, batch_size: int, seed: int) -> list[int]:
    """Which windows a step trains on: its part of an endless run of seeded shuffles of them."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {at // count for at in positions}
    orders = {e: np.random.default_rng((seed, e)).permutation(count).tolist() for e in epochs}
    return [orders[at // count][at % count] for at in positions]


@dataclass
class _Training:
    """A run: its parts and how far it is.

    windows, held_out: token ids [n, window]. began, started: processor and wall time, less those of
    earlier calls. step: steps done. rate: the last one. in_groups: whether each group still learns
    alone. losses: of the steps since the last point. best: the weights of best_point, on the CPU.
    """

    accelerator: Accelerator
    learning: Losses
    windows: torch.Tensor
    held_out: torch.Tensor
    seed: int
    optimizers: list[Any]
    on_point: Callable[[Sequence[Point]], None] | None = None
    step: int = 0
    rate: float = 0.0
    losses: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began, self.started = time.process_time(), time.monotonic()
        self.saved, self.save_seconds = time.monotonic(), 0.0
        self.recipe, self.device = self.learning.recipe, self.learning.model.device
        named = self.learning.student.named_parameters()
        self.weights: dict[str, nn.Parameter] = {n: p for n, p in named if p.requires_grad}
        self.in_groups = self.recipe.group_share > 0

    @property
    def tokens(self) -> int:
        return self.step * self.recipe.windows * self.windows.shape[1]

    @property
    def best_point(self) -> Point:
        return min(self.points, key=lambda point: point.held_out)

    def run(self, work: Path, progress: Callable[[int, int], None] | None) -> Distilled:
        recipe, accelerator = self.recipe, self.accelerator
        if accelerator.is_main_process:
            open_run(work, "training", self._identity())
        accelerator.wait_for_everyone()
        checkpoints = Checkpoints(work, accelerator, self.weights, self.optimizers, recipe.shard)
        reason = ""
        if (saved := checkpoints.load()) is not None:
            state, self.best = saved
            self.step, self.losses, self.in_groups = (
                state[name] for name in ("step", "losses", "in_groups")
            )
            self.points = [Point(**point) for point in state["points"]]
            self.began -= self.points[-1].cpu_seconds
            self.started -= state["seconds"]
        elif not (reason := self._evaluate()):
            checkpoints.save(self.step, self._state(), self.best)
        done = self._done()
        while not reason and done < 1:
            if self.in_groups and done >= recipe.group_share:
                self._end_groups()
            loss, norm = self._train_step(done)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                reason = f"diverged: loss {loss}, gradient norm {norm} in step {self.step + 1}"
                break
            self.step += 1
            self.losses.append(loss)
            done = self._done()
            is_last = done >= (recipe.group_share if self.in_groups else 1)
            if self.step % recipe.evaluate_every == 0 or is_last:
                reason = self._evaluate()
            if not reason and (is_last or self._must_save()):
                began = time.monotonic()
                checkpoints.save(self.step, self._state(), self.best)
                self.saved = time.monotonic()
                self.save_seconds = self.saved - began
            if progress is not None:
                total = round(60 * recipe.minutes) if recipe.minutes else recipe.steps
                progress(min(total, round(done * total)), total)
        self._take_best()
        return Distilled(
            points=tuple(self.points),
            best_step=self.best_point.step,
            before=self.points[0].held_out,
            after=self.best_point.held_out,
            tokens=self.tokens,
            reason=reason or ("time is up" if recipe.minutes else "all steps done"),
            diverged=reason.startswith("diverged"),
            cpu_seconds=self.points[-1].cpu_seconds,
            seconds=self.points[-1].seconds,
        )

    def _must_save(self) -> bool:
        """Every `save_every` steps, but checkpoints that take seconds only a tenth of the time."""
        if self.step % self.recipe.save_every:
            return False
        took = self._mean(self.save_seconds)
        return took <= 2 or self._mean(time.monotonic() - self.saved) >= 10 * took

    def _done(self) -> float:
        """The share of the training that is done, the same in all processes."""
        if self.recipe.minutes is None:
            return self.step / self.recipe.steps
        return self._mean(time.monotonic() - self.started) / (60 * self.recipe.minutes)

    def _end_groups(self) -> None:
        """Go on with the best weights; what the optimisers remember is of another loss."""
        self.in_groups = False
        self._take_best()
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def _take_best(self) -> None:
        with torch.no_grad():
            for name, parameter in self.weights.items():
                local(parameter).copy_(self.best[name])

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        points = [asdict(point) for point in self.points]
        return {
            "step": self.step,
            "losses": self.losses,
            "in_groups": self.in_groups,
            "seconds": time.monotonic() - self.started,
            "points": points,
        }

    def _evaluate(self) -> str:
        """Measure on the held-out text; the reason to stop if there is one, else an empty text."""
        losses = [
            (self.learning.held_out(ids.to(self.device)), len(ids))
            for ids in self.held_out.split(self.recipe.micro_batch)
        ]
        measure = self._mean(weighted_mean(losses))
        if not self.points and not math.isfinite(measure):
            raise AbreastError(
                "the model's loss is not finite before any training; load it in float32 or "
                "bfloat16, or check how its weights were made"
            )
        point = Point(
            step=self.step,
            tokens=self.tokens,
            learning_rate=self.rate,
            loss=sum(self.losses) / len(self.losses) if self.losses else math.nan,
            held_out=measure,
            cpu_seconds=time.process_time() - self.began,
            seconds=time.monotonic() - self.started,
            phase="groups" if self.in_groups else "model",
        )
        self.points.append(point)
        self.losses.clear()
        if self.on_point is not None:
            self.on_point(self.points)
        if self.best_point is point:
            for name, parameter in self.weights.items():
                self.best[name] = local(parameter.detach()).to("cpu", copy=True)
        start = self.points[0].held_out
        if not math.isfinite(measure):
            return f"diverged: the held-out loss is {measure} after step {self.step}"
        if measure > (start + 0.5 if self.recipe.objective == "lm" else 3 * start + 0.01):
            return f"diverged: the held-out loss rose from {start:.4g} to {measure:.4g}"
        best = self.best_point.step
        since_best = sum(later.step > best and later.phase == "model" for later in self.points)
        if since_best >= self.recipe.patience:
            return f"no better in {since_best} evaluations on held-out text"
        return ""

    def _train_step(self, done: float) -> tuple[float, float]:
        """One step of the optimisers; the mean loss, and the gradient's norm.

        Nothing is changed where one of them is not finite.
        """
        recipe, accelerator = self.recipe, self.accelerator
        torch.manual_seed(self.seed + self.step)  # dropout's, so that none of it need be stored
        rows = windows_of(self.step, len(self.windows), recipe.windows, self.seed)
        batch = self.windows[rows[accelerator.process_index :: accelerator.num_processes]]
        micro_batches = batch.split(recipe.micro_batch)
        total = 0.0
        for number, ids in enumerate(micro_batches, 1):
            # The groups are not trained through accelerate's wrapper, which would sum gradients.
            syncs = number == len(micro_batches) and not self.in_groups
            with nullcontext() if syncs else accelerator.no_sync(self.learning.wrapped):
                total += self._backward(ids, len(ids) / len(batch))
        total = self._mean(total)
        if self.in_groups and accelerator.num_processes > 1 and not recipe.shard:
            for weight in self.weights.values():
                if weight.grad is not None:
                    weight.grad = accelerator.reduce(weight.grad, reduction="mean")
        clip = recipe.clip or math.inf
        norm = float(full(accelerator.clip_grad_norm_(list(self.weights.values()), clip)))
        end = (self.step + 1) / recipe.steps if recipe.minutes is None else self._done()
        self.rate = recipe.rate_at(done, end)
        for optimizer in self.optimizers:
            if math.isfinite(total) and math.isfinite(norm):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * group["scale"]
                optimizer.step()
            optimizer.zero_grad()
        return total, norm

    def time_step(self, in_groups: bool) -> float:
        """Seconds that a step takes, without the optimisers; its gradients are dropped."""
        self.in_groups = in_groups
        size = min(self.recipe.micro_batch, self.recipe.windows)
        warms_up = self.recipe.compile or self.device.type != "cpu"
        for _ in range(1 + warms_up):
            began = time.monotonic()
            self._backward(self.windows[:size], 1.0)
            self.learning.model.zero_grad(set_to_none=True)
        return (time.monotonic() - began) * self.recipe.windows / size

    def _backward(self, ids: torch.Tensor, weight: float) -> float:
        """Add the gradients of the loss of these windows, times weight; returns the same of it."""
        ids, total = ids.to(self.device), 0.0
        parts = self.learning.of_groups(ids) if self.in_groups else [self.learning.of_model(ids)]
        for loss in parts:
            loss = loss * weight
            self.accelerator.backward(loss)
            total += float(loss.detach())
        return total

    def _mean(self, value: float) -> float:
        """Over the processes, so that all decide the same; else they would wait for each other."""
        if self.accelerator.num_processes == 1:
            return value
        own = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(own, reduction="mean"))

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on, as JSON would return it."""
        start = hashlib.sha256()
        for name, parameter in self.weights.items():
            sample = local(parameter.detach()).flatten()[:1024].float().cpu().contiguous()
            start.update(name.encode() + sample.numpy().tobytes())
        prefix = self.learning.prefix
        identity: dict[str, Any] = {
            "state format": "safetensors",
            # Earlier versions' runs know no "compile", which changes rounding only.
            "recipe": {k: v for k, v in self.recipe.to_dict().items() if k != "compile"},
            "plan": self.learning.plan.shorthand,
            "tokens": [tokens_hash(part.numpy()) for part in (self.windows, self.held_out)],
            "weights": start.hexdigest(),
            "seed": self.seed,
            "processes": self.accelerator.num_processes,
            **({"prefix length": prefix} if prefix else {}),
        }
        return dict(json.loads(json.dumps(identity)))


def _check_training(
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
    if recipe.compile:
        check_compiler()
    check_enough(tokens, "train")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    check_tokens(tokens, vocabulary)
    if recipe.train != "lora" and model.dtype != torch.float32:
        raise AbreastError(
            f"the weights are {str(model.dtype).removeprefix('torch.')}, in which small steps are "
            "lost; load the model in float32, or train adapters (lora)"
        )
    if teacher is None:
        if recipe.train != "lora" and recipe.is_taught:
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
