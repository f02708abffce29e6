"""What the grouped model learns: the losses of a batch, from the original, the text, or both.

Residual streams are numbered by depth: that many layers come before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from abreast.heal.recipe import Recipe
from abreast.model import (
    apply,
    decoder_layers,
    divergence,
    is_native,
    keeps,
    next_token_loss,
    remove,
    replaced,
)
from abreast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Losses:
    """The losses of windows of token ids [batch, window].

    model: under the plan; student: it, or peft's wrapper of it; wrapped: the student as accelerate
    wants it called. teacher: the original; None for `model` itself without adapters and plan.
    prefix: how many tokens of a window are there before its text.
    """

    model: PreTrainedModel
    student: Any
    wrapped: Any
    teacher: PreTrainedModel | None
    plan: Plan
    recipe: Recipe
    prefix: int

    def of_groups(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """`gap` of one group after the other, divided by their number.

        Each begins with the original's state. The tokens before the text count, too: nothing else
        would hold what all the others attend to.
        """
        groups = self.plan.groups
        ends = {group: (group.layers[0], group.layers[-1] + 1) for group in groups}
        depths = {depth for both in ends.values() for depth in both}
        with (
            self._autocast(),
            self._teaching() as teacher,
            torch.no_grad(),
            running(teacher, range(max(depths))),
            recorded(teacher, depths) as states,
        ):
            teacher(input_ids=ids, use_cache=False, **keeps(teacher, 1))
        self.student.train()
        for group, (start, end) in ends.items():
            with (
                self._autocast(),
                running(self.model, group.layers, states[start]),
                recorded(self.model, [end]) as ours,
            ):
                self.model(input_ids=ids, use_cache=False, **keeps(self.model, 1))
            yield self._compiled(gap)(ours[end], states[end]) / len(groups)

    def of_model(self, ids: torch.Tensor) -> torch.Tensor:
        """What the recipe's objective says, of the whole model."""
        recipe = self.recipe
        is_taught = recipe.objective == "kl"
        first = self.plan.groups[0].layers[0]
        depths = [stage[-1] + 1 for stage in self.plan.stages if stage[0] >= first]
        if not (is_taught and recipe.hidden_weight):
            depths = []
        trains_later = recipe.train == "groups" or (
            recipe.train == "lora" and recipe.lora_layers == "groups"
        )
        beginning: Any = nullcontext()
        with self._autocast():
            if is_taught:
                with (
                    self._teaching() as teacher,
                    torch.no_grad(),
                    recorded(teacher, {*depths, first}) as targets,
                ):
                    reference = self._scored(teacher(input_ids=ids, use_cache=False).logits)
                if trains_later:  # what comes before is the same in both
                    layers = range(first, len(decoder_layers(self.model)))
                    beginning = running(self.model, layers, targets[first])
            self.student.train()
            with beginning, recorded(self.model, depths) as states:
                logits = self._scored(self.wrapped(input_ids=ids, use_cache=False).logits)
            ids = self._scored(ids)
            if not is_taught:
                return next_token_loss(logits, ids)
            loss = self._compiled(divergence)(logits, reference, recipe.temperature)
            if recipe.lm_weight:
                loss = loss + next_token_loss(logits, ids) * recipe.lm_weight
            for depth in depths:
                ours, theirs = (streams[depth][:, self.prefix :] for streams in (states, targets))
                weight = recipe.hidden_weight / len(depths)
                loss = loss + self._compiled(gap)(ours, theirs).to(loss.device) * weight
        return loss

    def _compiled(self, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return compiled_once(loss) if self.recipe.compile else loss

    @torch.no_grad()
    def held_out(self, ids: torch.Tensor) -> float:
        """KL(original || grouped), or the language-model loss, in nats."""
        # Few windows, of which the last are fewer still: not worth a program for every shape.
        with self._autocast(), torch.compiler.set_stance("force_eager"):
            self.student.eval()
            logits = self._scored(self.model(input_ids=ids, use_cache=False).logits)
            if self.recipe.objective == "lm":
                return float(next_token_loss(logits, self._scored(ids)))
            with self._teaching() as teacher:
                reference = teacher(input_ids=ids, use_cache=False).logits
            return float(divergence(logits, self._scored(reference)))

    def _scored(self, windows: torch.Tensor) -> torch.Tensor:
        """Of ids or logits [batch, window, ...] those from the prefix's last token on."""
        return windows[:, max(0, self.prefix - 1) :]

    @contextmanager
    def _teaching(self) -> Iterator[PreTrainedModel]:
        if self.teacher is not None:
            yield self.teacher
            return
        self.student.eval()
        remove(self.model)
        try:
            adapted = self.recipe.train == "lora"
            with self.student.disable_adapter() if adapted else nullcontext():
                yield self.model
        finally:
            apply(self.model, self.plan)

    def _autocast(self) -> Any:
        return torch.autocast(
            self.model.device.type,
            torch.bfloat16,
            enabled=computes_bf16(self.recipe, self.model.device),
            # The cache would hold the whole model in bfloat16 on every process.
            cache_enabled=not self.recipe.shard,
        )


@cache  # asked for every stage of every step
def compiled_once(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(loss, dynamic=False)


@contextmanager
def running(
    model: nn.Module, members: Collection[int], start: torch.Tensor | None = None
) -> Iterator[None]:
    """Inside, `model` runs these of its layers only; the first of them reads `start` if there is
    one. The others hand their input on."""
    layers = decoder_layers(model)

    def forward_of(index: int) -> Callable[..., torch.Tensor]:
        plain = layers[index].forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if index not in members:
                return x
            entering = start if start is not None and index == min(members) else x
            result: torch.Tensor = plain(entering, *args, **kwargs)
            return result

        return forward

    with replaced(layers, forward_of):
        yield


@contextmanager
def recorded(model: nn.Module, depths: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Inside, keep the residual stream [batch, window, hidden] by number of layers before it.

    transformers' own output_hidden_states has the last one after the final norm only.
    """
    layers = decoder_layers(model)
    states: dict[int, torch.Tensor] = {}

    def keep_input(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        states[0] = arguments[0]

    def keep_output(depth: int) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            states[depth] = output[0] if isinstance(output, tuple) else output

        return keep

    with ExitStack() as hooks:
        for depth in depths:
            hook = (
                layers[depth - 1].register_forward_hook(keep_output(depth))
                if depth
                else layers[0].register_forward_pre_hook(keep_input)
            )
            hooks.enter_context(hook)
        yield states


def gap(state: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of their squared distance as a fraction of the target's size.

    By token, because the first ones of a text can be a hundred times as large as all others.
    """
    target = target.float().to(state.device)
    return ((state.float() - target).square().sum(-1) / target.square().sum(-1)).mean()


def computes_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether matrix products are computed in bfloat16: as the recipe says, or where it is native.

    A CPU that has to emulate it is several times as slow as in float32.
    """
    if recipe.bf16 is not None:
        return recipe.bf16
    return is_native(torch.bfloat16, device)
