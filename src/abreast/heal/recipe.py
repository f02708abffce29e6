"""How to train a grouped model: the numbers, and what follows from them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from abreast.errors import AbreastError
from abreast.model import decoder_layers
from abreast.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Train = Literal["lora", "groups", "all"]
Objective = Literal["kl", "lm"]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    train: "lora" for adapters of rank lora_rank on the matrices named in lora_targets (empty: all
    linear ones) of the grouped layers; "groups" for every weight of the grouped layers; "all" for
    every weight of the model. objective: "kl" or "lm". temperature: of both distributions.
    hidden_weight: weight, beside "kl", of the squared distance between the residual streams after
    every stage from the first group on, as a fraction of the original's size, in the mean over
    stages. lm_weight: weight of the language-model loss beside "kl". optimizer: "adamw", or "muon"
    for the matrices of the layers, in steps of AdamW's size, and AdamW for the rest. steps: of the
    optimiser, each on batch_size windows, micro_batch of them at once on a device. learning_rate
    rises over `warmup` (a share of the steps) and then follows a half cosine to zero. weight_decay:
    of both optimisers; betas: AdamW's. clip: largest norm of a gradient. bf16: matrix products in
    bfloat16 (the weights keep their dtype). checkpointing: recompute activations instead of keeping
    them. shard: spread weights, gradients and optimiser state over the processes (FSDP) instead of
    keeping all of them on each. evaluate_every: steps between looks at the held-out KL, save_every:
    between checkpoints. patience: stop after so many looks without a new best; the rate's late
    decay wins much, so few are too few.
    """

    train: Train = "groups"
    objective: Objective = "kl"
    optimizer: Optimizer = "adamw"
    temperature: float = 1.0
    hidden_weight: float = 20.0
    lm_weight: float = 0.0
    steps: int = 400
    batch_size: int = 8
    micro_batch: int = 8
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    lora_rank: int = 32
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = ()
    bf16: bool = True
    checkpointing: bool = False
    shard: bool = False
    evaluate_every: int = 50
    save_every: int = 50
    patience: int = 12

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> None:
        """Raise AbreastError for what makes no sense, here or in so many processes."""
        for label, value, known in (
            ("train", self.train, get_args(Train)),
            ("objective", self.objective, get_args(Objective)),
            ("optimizer", self.optimizer, get_args(Optimizer)),
        ):
            if value not in known:
                raise AbreastError(f"{label} '{value}' is not one of {', '.join(known)}")
        for label, number in (
            ("steps", self.steps),
            ("batch size", self.batch_size),
            ("micro batch", self.micro_batch),
            ("LoRA rank", self.lora_rank),
            ("steps between looks", self.evaluate_every),
            ("steps between checkpoints", self.save_every),
            ("patience", self.patience),
        ):
            if number < 1:
                raise AbreastError(f"the {label} is {number}; give at least 1")
        for label, amount in (
            ("learning rate", self.learning_rate),
            ("temperature", self.temperature),
            ("gradient clip", self.clip),
        ):
            if not 0 < amount < math.inf:
                raise AbreastError(f"the {label} is {amount}; give a positive number")
        for label, amount in (
            ("hidden weight", self.hidden_weight),
            ("language-model weight", self.lm_weight),
            ("weight decay", self.weight_decay),
        ):
            if not 0 <= amount < math.inf:
                raise AbreastError(f"the {label} is {amount}; give 0 or more")
        if not 0 <= self.warmup <= 1:
            raise AbreastError(f"the warm-up is {self.warmup}; give a share of the steps, 0 to 1")
        if self.shard and processes() == 1:
            raise AbreastError(
                "to shard is to spread over several processes, and this is the only one; "
                "start them with 'accelerate launch' or torchrun, or do without"
            )
        if self.shard and self.optimizer == "muon":
            raise AbreastError(
                "Muon needs whole matrices and cannot be sharded; use the optimizer 'adamw'"
            )
        if self.batch_size % processes():
            raise AbreastError(
                f"a batch of {self.batch_size} windows cannot be shared evenly by {processes()} "
                f"processes; give a multiple of {processes()}"
            )


def processes() -> int:
    """How many processes train together, as `accelerate launch` and torchrun say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
