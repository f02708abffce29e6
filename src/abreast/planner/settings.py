"""How a search measures groups of layers, and what it looks for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from abreast.data import AUTO
from abreast.planner.objective import Scoring
from abreast.runs import option
from abreast.speed import Hardware, hardware_of
from abreast.targets import Unpaired

WIRINGS = ("lp", "cqil-full", "ff")  # tried unless others are named


@dataclass(frozen=True)
class CalibrationSettings:
    """How to measure groups of layers.

    window: in tokens, of which those of the text are scored, and without a prefix all but the
    first. add_bos: see `prefix_of`. max_group, wirings (none: WIRINGS), engines, degree, unpaired,
    force: see `candidates`. screen: share of the text that candidates are measured on. larger:
    share of the stretches of more than the fewest layers that are measured at all, those within
    which the smallest groups cost least. keep: share of the stretches whose best wiring is then
    measured on the rest. batch_size: windows at once, fewer where their hidden states and logits
    would exceed max_cache_bytes.
    Fields with a help text are options.
    """

    data: str = option(AUTO, "Text to measure on; sources as for eval.")
    add_bos: bool | None = option(
        None,
        "Start texts with the BOS token. Default: as the tokenizer does.",
        "--add-bos/--no-add-bos",
    )
    num_windows: int = option(32, "Number of windows of text.", "--windows")
    window: int = option(256, "Tokens per window.")
    max_group: int = option(4, "Most layers in a group.")
    wirings: tuple[str, ...] = option(
        (),
        "Comma-separated, of lp, cqil, cqil-full and ff. Default: lp,cqil-full,ff, "
        "and for several devices cqil as well.",
    )
    engines: tuple[str, ...] = option(
        (),
        "Only plans that these load: vllm, transformers, llama.cpp, sglang, torch_tp; "
        "in a format of convert vllm:deci, vllm:deci-ff, sglang:deci-ff, mlx-lm:mlx, "
        "mlx-lm:openelm, mlx-lm:deci-ff.",
        "--for",
    )
    screen: float = option(0.125, "Fraction of the text that every group is measured on.")
    keep: float = option(0.1, "Fraction of the groups measured on the rest of the text.")
    larger: float = option(0.3, "Fraction of the larger groups measured: those of the best pairs.")
    batch_size: int = option(4, "Windows per forward pass.")
    max_cache_bytes: int = option(
        10**9, "Memory for hidden states kept for reuse.", "--max-cache", bytes=True
    )
    dtype: str = option("auto", "float32, bfloat16, float16 or auto.")
    force: bool = option(False, "Allow groups with the first or last layer.")
    revision: str | None = option(None, "Branch, tag or commit of a Hugging Face model.")
    trust_remote_code: bool = option(False, "Allow code inside the checkpoint to run.")
    device: str = option(
        "cpu", "cpu, cuda, cuda:1, ..., or auto: all devices, then memory and disk."
    )
    seed: int = option(0, "Random seed.")
    degree: int = 1
    unpaired: Unpaired = "shard"
    scoring: Scoring = field(default=Scoring(), metadata={"options": True})


@dataclass(frozen=True)
class Search:
    """How `plan` and `optimize` search within a budget."""

    hardware: str | None = option(
        None,
        "Predict speed for this hardware, named as in estimate; with a limit on quality, "
        "find the fastest plan there. Default: measure speed here.",
    )
    ranks: int | None = option(None, "Predict for this many of --hardware (default: H100).")
    link: float | None = option(
        None, "Predict for a link on which an all-reduce takes this many microseconds."
    )
    unpaired: Unpaired = option("shard", "How devices hold layers in no group, as in estimate.")
    per_group: int = option(4, "Plans to measure at each depth, per group of the plan.")
    held_out_data: str | None = option(
        None,
        "Text to judge plans on. Default: another part of that of --data.",
        "--held-out-data --baseline-data",
    )
    questions: int = option(240, "With --keep-quality: questions to judge plans on.")
    plots: bool = option(True, "Draw no charts (needs no altair).")

    @property
    def machine(self) -> Hardware | None:
        """What to predict speed for, None where it is measured here. Raises AbreastError."""
        if self.hardware is None and self.ranks is None and self.link is None:
            return None
        return hardware_of(self.hardware or "H100").joined(self.ranks, self.link)

    def wired(self, settings: CalibrationSettings) -> CalibrationSettings:
        """The settings with the devices that engines share, and the wirings to try: on several
        devices by default cqil as well, whose FFNs cost more than those of cqil-full, but need no
        exchange. Raises AbreastError."""
        count = 1 if self.machine is None else self.machine.count
        wirings = settings.wirings or ((*WIRINGS, "cqil") if count > 1 else WIRINGS)
        return replace(settings, wirings=wirings, degree=count, unpaired=self.unpaired)
