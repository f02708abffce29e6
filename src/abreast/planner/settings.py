"""How a search measures groups of layers, and what it looks for."""

from __future__ import annotations

from dataclasses import dataclass, field

from abreast.data import AUTO
from abreast.planner.objective import Scoring
from abreast.speed import Hardware, hardware_of
from abreast.targets import Unpaired


@dataclass(frozen=True)
class CalibrationSettings:
    """How to measure groups of layers.

    window: in tokens, of which those of the text are scored, and without a prefix all but the
    first. add_bos: see `prefix_of`. max_group, wirings, engines, force: see `candidates`. screen:
    share of the text that candidates are measured on. larger: share of the stretches of more than
    the fewest layers that are measured at all, those within which the smallest groups cost least.
    keep: share of the stretches whose best wiring is then measured on the rest. batch_size: windows
    at once, fewer where their hidden states and logits would exceed max_cache_bytes.
    Fields with a help text are options.
    """

    data: str = field(default=AUTO, metadata={"help": "Text to measure on; sources as for eval."})
    add_bos: bool | None = field(
        default=None,
        metadata={
            "help": "Start texts with the BOS token. Default: as the tokenizer does.",
            "option": "--add-bos/--no-add-bos",
        },
    )
    num_windows: int = field(
        default=32, metadata={"help": "Number of windows of text.", "option": "--windows"}
    )
    window: int = field(default=256, metadata={"help": "Tokens per window."})
    max_group: int = field(default=4, metadata={"help": "Most layers in a group."})
    wirings: tuple[str, ...] = field(
        default=("lp", "cqil-full", "ff"),
        metadata={"help": "Comma-separated, of lp, cqil, cqil-full and ff."},
    )
    engines: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Only plans that these load, of vllm, transformers and llama.cpp.",
            "option": "--for",
        },
    )
    screen: float = field(
        default=0.125, metadata={"help": "Fraction of the text that every group is measured on."}
    )
    keep: float = field(
        default=0.1, metadata={"help": "Fraction of the groups measured on the rest of the text."}
    )
    larger: float = field(
        default=0.3,
        metadata={"help": "Fraction of the larger groups measured: those of the best pairs."},
    )
    batch_size: int = field(default=4, metadata={"help": "Windows per forward pass."})
    max_cache_bytes: int = field(
        default=10**9,
        metadata={
            "help": "Memory for hidden states kept for reuse.",
            "option": "--max-cache",
            "bytes": True,
        },
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16 or auto."})
    force: bool = field(
        default=False, metadata={"help": "Allow groups with the first or last layer."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hugging Face model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow code inside the checkpoint to run."}
    )
    device: str = field(
        default="cpu",
        metadata={"help": "cpu, cuda, cuda:1, ..., or auto: all devices, then memory and disk."},
    )
    seed: int = field(default=0, metadata={"help": "Random seed."})
    scoring: Scoring = field(default=Scoring(), metadata={"options": True})


@dataclass(frozen=True)
class Search:
    """How `plan` and `optimize` search within a budget."""

    hardware: str | None = field(
        default=None,
        metadata={
            "help": "Predict speed for this hardware, as in estimate, and with a limit on quality "
            "make that fastest. Default: measure it here."
        },
    )
    ranks: int | None = field(
        default=None,
        metadata={"help": "Predict for so many of --hardware (H100 where it is not named)."},
    )
    link: float | None = field(
        default=None,
        metadata={"help": "Predict for a link on which an all-reduce takes so many microseconds."},
    )
    unpaired: Unpaired = field(
        default="shard", metadata={"help": "How devices hold layers in no group, as in estimate."}
    )
    per_group: int = field(
        default=4, metadata={"help": "Plans to measure at each depth, per group of the plan."}
    )
    held_out_data: str | None = field(
        default=None,
        metadata={
            "help": "Text to judge plans on. Default: another part of that of --data.",
            "option": "--held-out-data --baseline-data",
        },
    )
    questions: int = field(
        default=240, metadata={"help": "With --keep-quality: questions to judge plans on."}
    )
    plots: bool = field(default=True, metadata={"help": "Draw no charts (needs no altair)."})

    @property
    def machine(self) -> Hardware | None:
        """What to predict speed for, None where it is measured here. Raises AbreastError."""
        if self.hardware is None and self.ranks is None and self.link is None:
            return None
        return hardware_of(self.hardware or "H100").joined(self.ranks, self.link)
