"""What a search, `optimize` and `heal` will take, said before they begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abreast.checkpoint import open_checkpoint, plan_for
from abreast.cli.console import bytes_text
from abreast.convert import preview
from abreast.families import num_layers_of
from abreast.heal import REFIT_TOKENS, Recipe, memory_needed, step_seconds
from abreast.model import Pace, load, pace_here, pace_of
from abreast.plan import Group
from abreast.planner import (
    PROFILED_TOKENS,
    CalibrationSettings,
    Search,
    candidates_of,
    expect,
    likely_depth,
)
from abreast.rivals import METHODS, work_of
from abreast.runs import JOURNAL, Role, in_bfloat16, rows_at_once, share_written
from abreast.speed import bench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from abreast.optimize import Checks
    from abreast.study import StudySettings


def resumed(out: str | Path) -> str | None:
    """What an earlier call left in a run folder; None where there is nothing to go on with."""
    out = Path(out)
    journals = sorted(out.glob("*/" + JOURNAL.format("*")))
    measured = sum(path.read_bytes().count(b"\n") for path in journals)
    conversions = len([*out.glob("plans/*/converted*")])
    if not measured:
        return None
    return f"goes on in '{out}', where {measured} measurements and {conversions} conversions are"


@dataclass(frozen=True)
class Forecast:
    """Seconds that the stages of `optimize` will take; healing and tasks are not among them.

    text: writing by the model itself. search: measuring and judging plans. checks: comparing the
    conversion with the original. timing: both models, and each kind of stage.
    """

    text: float
    search: float
    checks: float
    timing: float

    @property
    def words(self) -> str:
        minutes = {name: seconds / 60 for name, seconds in asdict(self).items()}
        parts = ", ".join(f"{name} {share:.0f}" for name, share in minutes.items())
        return f"all of it takes about {max(1, round(sum(minutes.values())))} minutes ({parts})"


def forecast(
    original: PreTrainedModel,
    model: str | Path,
    out: str | Path,
    settings: CalibrationSettings,
    checks: Checks,
    *,
    depth: int | None,
    per_group: int,
    held_out_data: str | None = None,
) -> Forecast:
    """How long `optimize` takes here, from one window scored and a few tokens decoded.

    original: the model, loaded. out: the run folder. depth: a budget, None for one of quality.
    """
    num_layers = num_layers_of(original.config.to_dict())
    least = depth or likely_depth(num_layers)
    work = expect(model, settings, depth=least, per_group=per_group)
    window, calibrated = settings.window, settings.num_windows * settings.window
    texts: tuple[tuple[str, Role, int], ...] = (
        (settings.data, "calibrate", calibrated),
        (held_out_data or settings.data, "judge", calibrated),
        (checks.data, "judge", checks.max_tokens),
    )
    written = [tokens * share_written(data, role, Path(out)) for data, role, tokens in texts]

    def decode(batch_size: int) -> float:
        """Seconds of a step."""
        timed = bench(
            {"original": original},
            task="decode",
            batch_size=batch_size,
            context=16,
            new_tokens=4,
            rounds=2,
            warmup=1,
        )
        return timed.timings["original"].median / 4

    pace = pace_of(original, window)
    step = decode(1)
    decoded = checks.new_tokens * step + 2 * checks.context / window * pace.layers
    profiled = 4 * (PROFILED_TOKENS * step + checks.context / window * pace.layers)
    writing, texts_written = 0.0, [tokens for tokens in written if tokens]
    if texts_written:
        at_once = rows_at_once(original, window)
        rows = [min(at_once, math.ceil(tokens / window)) for tokens in texts_written]
        with in_bfloat16(original):
            seconds = {count: decode(count) for count in {*rows}}
        writing = sum(
            math.ceil(tokens / (count * window)) * window * seconds[count]
            for tokens, count in zip(texts_written, rows, strict=True)
        )
    return Forecast(
        text=writing,
        search=pace.seconds(settings.num_windows, work.likely, work.scored),
        checks=checks.max_tokens / window * 2 * (pace.layers + pace.logits),
        timing=2 * checks.rounds * (decoded + profiled),
    )


def searching(
    model: str | Path,
    settings: CalibrationSettings,
    search: Search | None = None,
    *,
    depth: int | None = None,
    baselines: bool = False,
    repeat: int = 1,
) -> dict[str, Any]:
    """What measuring takes, and with `search` so many searches down to a depth: JSON-ready values.

    depth: None for a budget of quality. minutes rest on one window of random tokens timed here;
    None where the weights are not here. baselines: what comparing with rivals takes.
    """
    config = open_checkpoint(model, revision=settings.revision, weights=False).config
    num_layers, per_group, least = num_layers_of(config), 0, None
    if search is not None:
        per_group, least = search.per_group, depth or likely_depth(num_layers)
    expected = expect(model, settings, depth=least, per_group=per_group)
    pace = pace_with(model, settings)
    count = settings.num_windows
    seconds = pace and repeat * pace.seconds(count, expected.likely, expected.scored)
    record = {**asdict(expected), "least_depth": least, "searches": repeat}
    record["minutes"] = seconds and seconds / 60
    if baselines and least is not None:
        groups, depths = candidates_of(config, settings, in_memory=True), range(least, num_layers)
        record["baselines"] = comparing(groups, depths, [*METHODS], settings, num_layers, pace)
    return record


def pace_with(
    model: str | Path, settings: CalibrationSettings | StudySettings, device: str = "cpu"
) -> Pace | None:
    """The pace of a model loaded as the settings say; None where its weights are not here."""
    return pace_here(
        model,
        settings.window,
        revision=settings.revision,
        dtype=settings.dtype,
        device=getattr(settings, "device", device),
        trust_remote_code=settings.trust_remote_code,
    )


def comparing(
    groups: Sequence[Group],
    depths: Sequence[int],
    methods: Sequence[str],
    settings: CalibrationSettings,
    num_layers: int,
    pace: Pace | None,
) -> str:
    """What it takes to compare with rivals at these depths, in words."""
    count = settings.num_windows
    tokens = count * settings.window
    work = work_of(num_layers, groups, depths, methods, refit=True, tokens=tokens)
    words = work.text(tokens, tokens)
    return words if pace is None else f"{words}, {work.minutes(pace, count, count)}"


def healing(
    model: str,
    plan: str,
    recipe: Recipe,
    *,
    method: str,
    window: int,
    revision: str | None,
    force: bool,
    **loading: Any,
) -> dict[str, str]:
    """What healing takes here, in words: memory of refit, pace of training on random tokens.

    Raises AbreastError for what `heal` refuses of plan and recipe.
    """
    preview(model, plan, revision=revision, force=force)
    recipe.check()
    source = open_checkpoint(model, revision=revision)
    parsed, rows = plan_for(source, plan), dict[str, str]()
    rows["plan"] = f"{parsed.num_layers} -> {parsed.depth} stages: {parsed.shorthand}"
    if method != "distill":
        largest = max(len(group.layers) for group in parsed.groups)
        needs = memory_needed(source.config, largest_group=largest, bytes_per_weight=4)
        rows["refit"] = f"{REFIT_TOKENS:,} tokens of text, {bytes_text(needs['total'])} of memory"
    if method != "refit":
        original, _ = load(source.folder, **loading)
        vocabulary = original.get_input_embeddings().weight.shape[0]
        size = (max(10, 2 * recipe.windows), window)
        ids = np.random.default_rng(0).integers(vocabulary, size=size)
        rows["training"] = recipe.pace(step_seconds(original, parsed, ids, recipe), window)
    return rows
