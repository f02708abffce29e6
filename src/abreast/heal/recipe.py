"""How to train a grouped model: every setting once, for Python and for the command line.

Fields with a help text are options of `abreast heal`. This module is read without torch.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from abreast.errors import AbreastError

FOLDS = 3  # of the text, to choose how strongly refit regularises
Train = Literal["lora", "groups", "all"]
Objective = Literal["kl", "lm"]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    train: "lora" for adapters of rank lora_rank on the matrices named in lora_targets (empty: all
    linear ones) of the grouped layers; "groups" for every weight of the grouped layers; "all" for
    every weight of the model. hidden_weight: weight, beside "kl", of the squared distance between
    the residual streams after every stage from the first group on, as a fraction of the original's
    size, averaged over stages. optimizer: "muon" trains the layers' matrices, in steps of AdamW's
    size, and AdamW the rest. learning_rate rises over `warmup` (a fraction of the steps), then
    follows a half cosine to zero. betas: AdamW's. clip: largest gradient norm. bf16: the weights
    keep their dtype. evaluate_every, save_every: steps between held-out evaluations and between
    checkpoints. patience: stop after this many evaluations without a new best; the late decay of
    the learning rate wins much, so keep it high.
    """

    train: Train = field(
        default="groups",
        metadata={"help": "Train adapters, the grouped layers, or the whole model."},
    )
    objective: Objective = field(
        default="kl",
        metadata={"help": "Learn to predict like the original (kl), or the text (lm)."},
    )
    optimizer: Optimizer = field(
        default="adamw", metadata={"help": "Muon trains the layers' matrices; AdamW the rest."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Softmax temperature of both distributions."}
    )
    hidden_weight: float = field(
        default=20.0, metadata={"help": "Weight of the hidden-state loss beside the KL."}
    )
    lm_weight: float = field(
        default=0.0, metadata={"help": "Weight of the language-model loss beside the KL."}
    )
    steps: int = field(default=400, metadata={"help": "Training steps."})
    batch_size: int = field(default=8, metadata={"help": "Windows per step."})
    micro_batch: int = field(default=8, metadata={"help": "Windows per forward pass on a device."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    warmup: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    lora_rank: int = field(default=32, metadata={"help": "Rank, and alpha, of the adapters."})
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = field(
        default=(), metadata={"help": "Matrices to adapt: q_proj,v_proj. Default: all."}
    )
    bf16: bool = field(
        default=True, metadata={"help": "Compute matrix products in float32, not bfloat16."}
    )
    checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations to save memory."}
    )
    shard: bool = field(
        default=False,
        metadata={"help": "Shard weights and optimizer state across processes (FSDP)."},
    )
    evaluate_every: int = 50
    save_every: int = 50
    patience: int = 12

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step; transformers' schedule would begin with a step of rate 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * ((step + 1) / rising)
        share = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * (0.5 * (1 + math.cos(math.pi * share)))

    def check(self) -> None:
        """Raise AbreastError for values that make no sense, alone or with so many processes."""
        choices = {"train": Train, "objective": Objective, "optimizer": Optimizer}
        for name, literal in choices.items():
            if (value := getattr(self, name)) not in get_args(literal):
                known = ", ".join(get_args(literal))
                raise AbreastError(f"{name} '{value}' is not one of {known}")
        counts = ("steps", "batch_size", "micro_batch", "lora_rank", "patience")
        for name in (*counts, "evaluate_every", "save_every"):
            if (value := getattr(self, name)) < 1:
                raise AbreastError(f"{name} is {value}; give at least 1")
        for name in ("learning_rate", "temperature", "clip"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise AbreastError(f"{name} is {value}; give a positive number")
        for name in ("hidden_weight", "lm_weight", "weight_decay"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise AbreastError(f"{name} is {value}; give 0 or more")
        if not 0 <= self.warmup <= 1:
            raise AbreastError(f"warmup is {self.warmup}; give a fraction of the steps, 0 to 1")
        if self.shard and processes() == 1:
            raise AbreastError(
                "sharding needs several processes, and this is the only one; "
                "start them with 'accelerate launch' or torchrun, or do without"
            )
        if self.shard and self.optimizer == "muon":
            raise AbreastError(
                "Muon needs whole matrices and cannot be sharded; use the optimizer 'adamw'"
            )
        if self.batch_size % processes():
            raise AbreastError(
                f"a batch of {self.batch_size} windows cannot be split evenly over {processes()} "
                f"processes; give a multiple of {processes()}"
            )


def check_enough(tokens: Any, purpose: str) -> None:
    """Raise AbreastError for windows of tokens, [windows, window], that are too few to heal on.

    purpose: "refit" or "train".
    """
    windows, least = (FOLDS + 1, 512) if purpose == "refit" else (10, 20)
    if tokens.ndim != 2 or len(tokens) < windows or tokens.size < least:
        raise AbreastError(
            f"{tokens.size} tokens in {len(tokens)} windows are too little text to {purpose} on; "
            f"give at least {least} tokens in {windows} windows"
        )


def processes() -> int:
    """How many processes train together, as `accelerate launch` and torchrun say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process speaks and writes for all."""
    return os.environ.get("RANK", "0") == "0"
