"""How to train a grouped model: every setting once, for Python and for the command line.

Fields with a help text are options of `abreast heal`. This module is read without torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from abreast.errors import AbreastError
from abreast.runs import option

ADAPTERS_RATE = 1e-4
FOLDS = 3  # of the text, to choose how strongly refit regularises
Train = Literal["lora", "groups", "all"]
Objective = Literal["kl", "lm"]
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear"]
AdaptedLayers = Literal["groups", "all"]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Training has two phases. In the first, which takes `group_share` of the steps, every group
    learns alone to end where the original's layers end, from the original's own states (blockwise
    local distillation, arXiv 2411.19146); in the second the whole model learns. train: "lora" for
    adapters of rank lora_rank on the matrices named in lora_targets (empty: all linear ones) of
    lora_layers; "groups" for every weight of the grouped layers; "all" for every weight of the
    model. learning_rate: the same for all weights; None for relative_rate times the size (RMS) of
    each, as Adafactor does it (arXiv 1804.04235, section 8), since a step that is right for weights
    of 0.2 destroys those of 0.02, and for 1e-4 of adapters, which begin at 0. group_learning_rate:
    None for learning_rate; lora_alpha: None for lora_rank.
    hidden_weight: weight, beside "kl", of the squared distance between the residual streams after
    every stage from the first group on, as a fraction of the original's size. optimizer: "muon"
    trains the layers' matrices, in steps of AdamW's size, and AdamW the rest. minutes: wall time of
    training, evaluations included, that takes the place of `steps`; `steps` then only says how much
    text is read. In either phase the learning rate rises over `warmup`, a fraction of it, then
    falls to zero. batch_size: None for what suits the device. betas: AdamW's. clip: largest
    gradient norm, 0 for none. bf16: None where the device has it natively; the weights keep their
    dtype. compile: see `heal.compiled`. evaluate_every, save_every: steps between held-out
    evaluations and between checkpoints. patience: stop after this many evaluations of the second
    phase without a new best; the late decay of the learning rate wins much, so keep it high.
    """

    train: Train = option("groups", "Train adapters, the grouped layers, or the whole model.")
    group_share: float = option(0.5, "Share of the training that trains each group alone first.")
    objective: Objective = option(
        "kl", "Learn to predict like the original (kl), or the text (lm)."
    )
    optimizer: Optimizer = option("adamw", "Muon trains the layers' matrices; AdamW the rest.")
    temperature: float = option(1.0, "Softmax temperature of both distributions.")
    hidden_weight: float = option(20.0, "Weight of the hidden-state loss beside the KL.")
    lm_weight: float = option(0.0, "Weight of the language-model loss beside the KL.")
    steps: int = option(400, "Training steps.")
    minutes: float | None = option(None, "Minutes to train; replaces --steps.")
    batch_size: int | None = option(
        None, "Windows per step. Default: 8, or 2 for --minutes on a CPU."
    )
    micro_batch: int = option(8, "Windows per forward pass on a device.")
    relative_rate: float = option(
        1.5e-3, "Peak learning rate, as a share of the size (RMS) of each weight."
    )
    learning_rate: float | None = option(
        None, "Peak learning rate of all weights, instead. Default for adapters: 1e-4."
    )
    group_learning_rate: float | None = option(
        None, "Peak while each group is trained alone. Default: --learning-rate."
    )
    schedule: Schedule = option("cosine", "How the learning rate falls to zero.")
    warmup: float = option(0.05, "Share of the training in which the learning rate rises.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's betas.")
    clip: float = option(1.0, "Largest gradient norm; 0 for none.")
    lora_rank: int = option(32, "Rank of the adapters.")
    lora_alpha: int | None = option(None, "Alpha of the adapters. Default: the rank.")
    lora_layers: AdaptedLayers = option("groups", "Adapt the grouped layers, or all.")
    lora_targets: tuple[str, ...] = option((), "Matrices to adapt: q_proj,v_proj. Default: all.")
    bf16: bool | None = option(
        None,
        "Compute matrix products in bfloat16. Default: where it is native.",
        "--bf16/--no-bf16",
    )
    checkpointing: bool = option(False, "Recompute activations to save memory.")
    compile: bool = option(False, "Run attentions, FFNs and norms through torch.compile.")
    shard: bool = option(False, "Shard weights and optimizer state across processes (FSDP).")
    evaluate_every: int = 50
    save_every: int = 50
    patience: int = 12

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def suited(self, device: str) -> Recipe:
        """This recipe on a device; without its first phase if sharded: FSDP gathers norms for
        whole passes.

        A CPU has time for few steps, and in a given time many small ones win more than few large
        ones (benchmarks/LOG.md).
        """
        few = device == "cpu" and self.minutes is not None and processes() == 1
        windows = 2 if few and self.batch_size is None else self.windows
        share = 0.0 if self.shard else self.group_share
        return replace(self, batch_size=windows, group_share=share)

    @property
    def windows(self) -> int:
        """Windows per step, 8 where none are given."""
        return 8 if self.batch_size is None else self.batch_size

    @property
    def is_taught(self) -> bool:
        """Whether the original is needed."""
        return self.objective == "kl" or self.group_share > 0

    @property
    def is_relative(self) -> bool:
        """Whether learning rates are shares of the weights' sizes."""
        return self.learning_rate is None and self.train != "lora"

    def rate_at(self, begin: float, end: float) -> float:
        """The learning rate of a step that begins and ends when so much of the training is done.

        A share of the weights' sizes where it `is_relative`. The second phase begins where
        `group_share` is done.
        """
        first = begin < self.group_share
        start, stop = (0.0, self.group_share) if first else (self.group_share, 1.0)
        usual = self.relative_rate if self.is_relative else self.learning_rate or ADAPTERS_RATE
        peak = (self.group_learning_rate if first else None) or usual
        begin, end = ((share - start) / (stop - start) for share in (begin, end))
        if begin < self.warmup:
            return peak * min(1.0, end / self.warmup)
        left = (1 - begin) / (1 - self.warmup)
        return peak * (left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))

    def check(self) -> None:
        """Raise AbreastError for values that make no sense, alone or with this many processes."""
        choices = {
            "train": Train,
            "objective": Objective,
            "optimizer": Optimizer,
            "schedule": Schedule,
            "lora_layers": AdaptedLayers,
        }
        for name, literal in choices.items():
            if (value := getattr(self, name)) not in get_args(literal):
                known = ", ".join(get_args(literal))
                raise AbreastError(f"{name} '{value}' is not one of {known}")
        counts = ("steps", "batch_size", "micro_batch", "lora_rank", "patience")
        for name in (*counts, "evaluate_every", "save_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise AbreastError(f"{name} is {value}; give at least 1")
        for name in (
            "relative_rate",
            "learning_rate",
            "group_learning_rate",
            "temperature",
            "minutes",
            "lora_alpha",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise AbreastError(f"{name} is {value}; give a positive number")
        if self.is_relative and self.group_learning_rate is not None:
            raise AbreastError("group_learning_rate is for all weights; give learning_rate as well")
        for name in ("hidden_weight", "lm_weight", "weight_decay", "clip"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise AbreastError(f"{name} is {value}; give 0 or more")
        for name in ("warmup", "group_share"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise AbreastError(f"{name} is {value}; give a fraction of the steps, 0 to 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise AbreastError(f"betas are {self.betas}; give two numbers from 0 to below 1")
        if self.shard and processes() == 1:
            raise AbreastError(
                "sharding needs several processes, and this is the only one; "
                "start them with 'accelerate launch' or torchrun, or do without"
            )
        if self.shard and self.compile:
            raise AbreastError("sharded layers cannot be compiled; leave --shard or --compile out")
        if self.shard and self.optimizer == "muon":
            raise AbreastError(
                "Muon needs whole matrices and cannot be sharded; use the optimizer 'adamw'"
            )
        if self.windows % processes():
            raise AbreastError(
                f"a batch of {self.windows} windows cannot be split evenly over {processes()} "
                f"processes; give a multiple of {processes()}"
            )

    def pace(self, seconds: tuple[float, float], window: int) -> str:
        """How fast and how long training is, in words; seconds: of a step in either phase.

        Raises AbreastError for a budget of minutes in which no step of both ends.
        """
        least = sum(seconds) / 60
        if self.minutes is not None and self.minutes < least:
            raise AbreastError(
                f"a step of each phase of training takes {least:.2g} minutes here; "
                "give more --minutes, or a smaller --batch-size"
            )
        phases = [
            (name, share, time)
            for name, share, time in zip(
                ("group by group", "end to end"),
                (self.group_share, 1 - self.group_share),
                seconds,
                strict=True,
            )
            if time
        ]
        tokens = self.windows * window
        rates = ", ".join(f"{tokens / time:.0f} tokens/s {name}" for name, _, time in phases)
        if self.minutes is None:
            minutes = self.steps / 60 * sum(share * time for _, share, time in phases)
            return f"{rates}; {self.steps} steps take about {minutes:.1f} minutes"
        steps = sum(60 * self.minutes * share / time for _, share, time in phases)
        return f"{rates}; about {steps:.0f} steps fit into {self.minutes:g} minutes"

    def check_targets(self, matrices: Collection[str]) -> None:
        """Raise AbreastError for lora_targets that are none of a layer's matrices."""
        for name in self.lora_targets if self.train == "lora" else ():
            if name not in matrices:
                raise AbreastError(
                    f"LoRA target '{name}' is no matrix of this model's layers; "
                    f"give --lora-targets some of {','.join(sorted(matrices))}"
                )


# Published recipes as changes to ours; what their authors do not say is as in ours. CQIL: its
# training script, with transformers' betas. Layer Parallelism: the text of its section on training.
RECIPES: dict[str, dict[str, Any]] = {
    "ours": {},
    "lp-paper": {
        "group_share": 0.0,
        "train": "groups",
        "objective": "lm",
        "learning_rate": 1e-4,
    },
    "cqil": {
        "group_share": 0.0,
        "train": "lora",
        "lora_layers": "all",
        "lora_rank": 32,
        "lora_alpha": 32,
        "lora_targets": (
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ),
        "hidden_weight": 0.0,
        "learning_rate": 1e-4,
        "schedule": "linear",
        "warmup": 0.0,
        "weight_decay": 0.1,
        "betas": (0.9, 0.999),
        "clip": 0.0,
        "steps": 8000,
        "batch_size": 32,
    },
}


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
