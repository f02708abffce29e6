"""What a study runs and how: fields with a help text are options of `abreast study`.

Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from abreast.data import AUTO
from abreast.plan import WIRING_NAMES, Norms
from abreast.runs import option

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

    data: str = option(AUTO, "Text to score; as in eval.")
    add_bos: bool | None = option(
        None,
        "Start texts with the BOS token. Default: as the tokenizer does.",
        "--add-bos/--no-add-bos",
    )
    num_windows: int = option(16, "Number of windows to score.", "--windows")
    window: int = option(256, "Tokens per window.")
    batch_size: int = option(8, "Windows per forward pass.")
    max_cache_bytes: int = option(
        10**9, "Memory for hidden states and logits kept for reuse.", "--max-cache", bytes=True
    )
    devices: tuple[str, ...] = option(("cpu",), "One worker on each: cuda:0,cuda:1")
    dtype: str = option("auto", "float32, bfloat16, float16 or auto.")
    norms: Norms = option("own", "Norms of a group's members: own, or as other code computes them.")
    revision: str | None = option(None, "Branch, tag or commit of a Hugging Face model.")
    trust_remote_code: bool = option(False, "Allow code inside the checkpoint to run.")
    seed: int = option(0, "Random seed.")


@dataclass(frozen=True)
class Changes:
    """What is done to every stretch of layers.

    interventions: see `model.INTERVENTIONS`; a name may be a pattern, such as 2-parallel*.
    max_length: longest stretch, in layers. permutations: orders per stretch for shuffle (fewer
    where there are fewer).
    """

    interventions: tuple[str, ...] = option(
        PAPERS, "Comma-separated; also ff and K-parallel-WIRING, K up to 6; * stands for any."
    )
    max_length: int | None = option(None, "Longest stretch of layers. Default: all layers.")
    permutations: int = option(3, "Orders per shuffled stretch.")


@dataclass(frozen=True)
class Grid:
    """The plans of a sweep: groups of one size and wiring, one after another from a first layer on.

    sizes: layers per group. max_groups, min_depth: bounds on the plans, None for as many groups as
    fit. hardware: predict decoding on it, as `abreast estimate` does, one row with 1,024 tokens in
    its cache. parquet: write sweep.parquet as well.
    """

    sizes: tuple[int, ...] = option((2, 3, 4), "With --sweep: layers per group, comma-separated.")
    wirings: tuple[str, ...] = option(WIRING_NAMES, "With --sweep: comma-separated.")
    max_groups: int | None = option(None, "With --sweep: most groups in a plan. Default: no limit.")
    min_depth: int | None = option(
        None, "With --sweep: smallest effective depth. Default: no limit."
    )
    hardware: str | None = option(
        None, "With --sweep: predict decoding on this hardware, as in estimate."
    )
    parquet: bool = option(False, "With --sweep: write OUT/sweep.parquet as well.")
