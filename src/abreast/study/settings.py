"""What a study runs and how: fields with a help text are options of `abreast study`.

Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from abreast.data import AUTO
from abreast.plan import WIRING_NAMES, Norms

PAPERS = (
    *("shuffle", "prune", "merge", "parallel", "2-parallel", "3-parallel"),
    *("cqil", "cqil-full", "2-parallel-cqil-full", "2-parallel-ff"),
)


@dataclass(frozen=True)
class StudySettings:
    """How changed models are run.

    data: cut into num_windows windows of `window` tokens, prefix and text, that do not overlap; the
    text is scored, without a prefix all but its first token. add_bos: see `prefix_of`. batch_size:
    windows at once, fewer where what is kept for reuse would exceed max_cache_bytes per worker.
    devices: one worker each; name "cpu" twice for two. norms: see `model.apply`.
    """

    data: str = field(default=AUTO, metadata={"help": "Text to score; as in eval."})
    add_bos: bool | None = field(
        default=None,
        metadata={
            "help": "Start texts with the BOS token. Default: as the tokenizer does.",
            "option": "--add-bos/--no-add-bos",
        },
    )
    num_windows: int = field(
        default=16, metadata={"help": "Number of windows to score.", "option": "--windows"}
    )
    window: int = field(default=256, metadata={"help": "Tokens per window."})
    batch_size: int = field(default=8, metadata={"help": "Windows per forward pass."})
    max_cache_bytes: int = field(
        default=10**9,
        metadata={
            "help": "Memory for hidden states and logits kept for reuse.",
            "option": "--max-cache",
            "bytes": True,
        },
    )
    devices: tuple[str, ...] = field(
        default=("cpu",), metadata={"help": "One worker on each: cuda:0,cuda:1"}
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16 or auto."})
    norms: Norms = field(
        default="own",
        metadata={"help": "Norms of a group's members: own, or as other code computes them."},
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hugging Face model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow code inside the checkpoint to run."}
    )
    seed: int = field(default=0, metadata={"help": "Random seed."})


@dataclass(frozen=True)
class Changes:
    """What is done to every stretch of layers.

    interventions: see `model.INTERVENTIONS`; a name may be a pattern, such as 2-parallel*.
    max_length: longest stretch, in layers. permutations: orders per stretch for shuffle (fewer
    where there are fewer).
    """

    interventions: tuple[str, ...] = field(
        default=PAPERS,
        metadata={
            "help": "Comma-separated; also ff and K-parallel-WIRING, K up to 6; * stands for any."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest stretch of layers. Default: all layers."}
    )
    permutations: int = field(default=3, metadata={"help": "Orders per shuffled stretch."})


@dataclass(frozen=True)
class Grid:
    """The plans of a sweep: groups of one size and wiring, one after another from a first layer on.

    sizes: layers per group. max_groups, min_depth: bounds on the plans, None for as many groups as
    fit. hardware: predict decoding on it, as `abreast estimate` does, one row with 1,024 tokens in
    its cache. parquet: write sweep.parquet as well.
    """

    sizes: tuple[int, ...] = field(
        default=(2, 3, 4), metadata={"help": "With --sweep: layers per group, comma-separated."}
    )
    wirings: tuple[str, ...] = field(
        default=WIRING_NAMES, metadata={"help": "With --sweep: comma-separated."}
    )
    max_groups: int | None = field(
        default=None, metadata={"help": "With --sweep: most groups of a plan. Default: all."}
    )
    min_depth: int | None = field(
        default=None, metadata={"help": "With --sweep: least effective depth. Default: any."}
    )
    hardware: str | None = field(
        default=None,
        metadata={"help": "With --sweep: predict decoding on this hardware, as in estimate."},
    )
    parquet: bool = field(
        default=False, metadata={"help": "With --sweep: write OUT/sweep.parquet as well."}
    )
