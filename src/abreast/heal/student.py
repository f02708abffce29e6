"""The model as it is trained: which weights, by which optimisers, at which rate, on which text."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.heal.recipe import Recipe
from abreast.model import decoder_layers
from abreast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def windows_of(step: int, count: int, batch_size: int, seed: int) -> np.ndarray:
    """Which windows a step trains on: its place in an endless run of seeded shuffles of them."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count)
        for epoch in np.unique(places // count).tolist()
    }
    return np.array([orders[place // count][place % count] for place in places.tolist()])


def schedule_of(recipe: Recipe) -> Callable[[int], float]:
    rising = max(1, round(recipe.warmup * recipe.steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, recipe.steps - rising)))

    return factor


def optimizers_of(student: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Optimisers that share out what is trainable, embeddings and head never to Muon."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            suits = recipe.optimizer == "muon" and parameter.dim() == 2 and ".layers." in name
            (matrices if suits else rest).append(parameter)
    found: list[torch.optim.Optimizer] = []
    if rest:
        found.append(torch.optim.AdamW(rest, lr=rate, betas=recipe.betas, weight_decay=decay))
    if matrices:
        # Steps of AdamW's size (Moonlight, arXiv 2502.16982, section 2.2): one rate suits both.
        found.append(
            torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    return found


def student_of(model: PreTrainedModel, plan: Plan, recipe: Recipe) -> Any:
    """The model with the right weights trainable; for LoRA in peft's wrapper."""
    if recipe.checkpointing:
        set_checkpointing(model, True)
    members = [layer for group in plan.groups for layer in group.layers]
    if recipe.train == "lora":
        peft = need("peft")
        layers = decoder_layers(model)
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in layers[members[0]].named_modules()
            if isinstance(module, nn.Linear)
        }
        unknown = sorted(set(recipe.lora_targets) - linear)
        if unknown:
            raise AbreastError(
                f"LoRA target '{unknown[0]}' is no matrix of a layer; "
                f"choose from {', '.join(sorted(linear))}"
            )
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=recipe.lora_rank,
                lora_alpha=recipe.lora_alpha,
                target_modules=sorted(recipe.lora_targets or linear),
                layers_to_transform=members,
                layers_pattern="layers",
                task_type="CAUSAL_LM",
            ),
        )
    model.requires_grad_(recipe.train == "all")
    for member in members:
        decoder_layers(model)[member].requires_grad_(True)
    return model


def set_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Recompute activations in the backward pass, or keep them."""
    # transformers renames these methods in version 6 and warns from 5.2x on.
    verb, given = ("enable", ({"use_reentrant": False},)) if on else ("disable", ())
    renamed = getattr(model, f"activation_checkpointing_{verb}", None)
    (renamed or getattr(model, f"gradient_checkpointing_{verb}"))(*given)


def need(package: str) -> Any:
    """Import a package of the heal extra. Raises AbreastError without it."""
    try:
        return import_module(package)
    except ImportError:
        raise AbreastError(
            f"healing by training needs '{package}': pip install 'abreast[heal]'"
        ) from None
