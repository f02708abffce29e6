"""One calibration run: the cost of every candidate group alone, and how the layers depend.

The run's folder has measure.json (model, text and settings), the journal (every plan measured on
every batch of windows, those of later searches included), geometry.safetensors (similarities) and
stats.safetensors (the result). Nothing on disk is measured again.

All candidates are measured on a part of the text (`screen`), only the better ones (`keep`) on all
of it: the others would be in no good plan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from abreast.checkpoint import DTYPES, Checkpoint, open_checkpoint, replacing
from abreast.convert import obstacle
from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.evaluate import ratio_of_means
from abreast.families import FAMILIES, num_layers_of, positive
from abreast.model import (
    Program,
    geometry,
    load,
    load_tokenizer,
    name_of,
    named_dtype,
    run_programs,
)
from abreast.plan import WIRING_NAMES, Group, Plan
from abreast.planner.front import GEOMETRY_ARRAYS, STATS_FILE, CalibrationSettings, Stats
from abreast.planner.objective import KL, Cost, Objective
from abreast.runs import (
    JOURNAL,
    Author,
    Journal,
    Role,
    check_least,
    check_run,
    check_window,
    identity_of,
    open_run,
    read_journal,
    token_stream,
    whole_windows,
    window_bytes,
    windows_at_once,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
KIND = "measure"
GEOMETRY = "geometry.safetensors"
MIN_CALIBRATION_WINDOWS = 8
DEPENDENCY_SHARE = 8  # the dependency matrix is taken on one window in so many


@dataclass(frozen=True)
class Calibration:
    """A model and the windows that its plans are measured on; made by `calibrate`.

    folder: of the run; checkpoint: of the model, named `source` by the user, of this revision where
    it comes from the Hub. tokens: int64
    [num_windows, window]. size: windows at once. candidates: the groups to measure.
    """

    folder: Path
    checkpoint: Path
    source: str
    tokens: np.ndarray
    size: int
    candidates: tuple[Group, ...]
    identity: dict[str, Any]
    settings: CalibrationSettings
    load: Author
    revision: str | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.load()

    @property
    def prefix(self) -> int:
        """How many tokens at the beginning of every window are there before the text."""
        return len(self.identity.get("prefix", ()))

    @property
    def scored(self) -> int:
        """Scored tokens per window: those of the text, without a prefix all but the first."""
        return int(self.tokens.shape[1]) - max(self.prefix, 1)

    @property
    def num_layers(self) -> int:
        return int(self.identity["num_layers"])

    @property
    def batches(self) -> range:
        return range(math.ceil(len(self.tokens) / self.size))


@dataclass(frozen=True)
class Expected:
    """Cost of a calibration run: full forward passes, at most, and bytes held at once.

    activations: hidden states and logits that are kept; a layer's working memory comes on top.
    """

    candidates: int
    full_forwards: float
    weights: int
    activations: int


def candidates(
    config: dict[str, Any],
    *,
    max_group: int = 2,
    wirings: Sequence[str] = ("lp",),
    force: bool = False,
) -> tuple[Group, ...]:
    """Every group of 2 to max_group layers that could be formed, in each of the wirings.

    Left out: groups with the first or last layer unless force is set, groups that cannot be fused
    (see `obstacle`), and, in families whose FFN reads the layer's input, wirings other than lp,
    which are the same there. Raises AbreastError for unknown wirings and when nothing is left.
    """
    unknown = [wiring for wiring in wirings if wiring not in WIRING_NAMES]
    if unknown or not wirings:
        wrong = f"wiring '{unknown[0]}' is unknown" if unknown else "no wiring is named"
        raise AbreastError(f"{wrong}; choose from {', '.join(WIRING_NAMES)}")
    num_layers = num_layers_of(config)
    if not 2 <= max_group <= num_layers:
        raise AbreastError(f"groups of up to {max_group} layers: choose from 2 to {num_layers}")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None and family.parallel:
        wirings = ("lp",)
    edge = 0 if force else 1
    groups = []
    for size in range(2, max_group + 1):
        for first in range(edge, num_layers - size + 1 - edge):
            layers = tuple(range(first, first + size))
            if obstacle(config, layers) is None:
                groups += [Group.wired(layers, name) for name in wirings]
    if not groups:
        raise AbreastError("no group of this model can be formed; see `abreast inspect`")
    return tuple(groups)


def calibrate(
    model: str | Path,
    out: str | Path,
    settings: CalibrationSettings,
    *,
    stream: TokenStream | None = None,
    role: Role = "calibrate",
    option: str = "--data",
    step: Callable[[str], None] = lambda message: None,
) -> Calibration:
    """Read a model's headers and its calibration text, and open folder `out` for a run on them.

    model: folder or Hugging Face id of an original of any family that can run grouped. stream:
    measure on this instead of the source in the settings. role, option, step: see `token_stream`.

    Raises AbreastError for fewer than MIN_CALIBRATION_WINDOWS windows of text, a folder with a run
    on another model, other text or sizes, or anything else in it, and as `load` and `load_tokens`.
    """
    window = settings.window
    check_least(
        {
            "the number of windows": (settings.num_windows, MIN_CALIBRATION_WINDOWS),
            "the window": (window, 2),
            "the batch size": (settings.batch_size, 1),
        }
    )
    checkpoint = open_checkpoint(model, revision=settings.revision)
    config = checkpoint.config
    groups = _candidates(config, settings)
    at_once = windows_at_once(_window_cache(checkpoint, settings), settings.max_cache_bytes)
    longest, run = config.get("max_position_embeddings"), Path(out)
    check_window(window, longest)
    check_run(run, KIND)
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    tokenizer = load_tokenizer(checkpoint.folder, **options) if stream is None else None
    options |= {"dtype": settings.dtype, "device": settings.device}
    loaded = cache(lambda: load(checkpoint.folder, **options)[0])
    stream = token_stream(
        settings.data if stream is None else stream,
        tokenizer,
        checkpoint.folder,
        max_tokens=settings.num_windows * window,
        window=window,
        seed=settings.seed,
        add_bos=settings.add_bos,
        role=role,
        author=loaded,
        folder=run,
        option=option,
        step=step,
    )
    vocabulary, most = positive(config, "vocab_size"), settings.num_windows
    tokens = whole_windows(stream, most, window, longest=longest, vocabulary=vocabulary)
    if len(tokens) < MIN_CALIBRATION_WINDOWS:
        raise AbreastError(
            f"the data gives {len(tokens)} windows of {window} tokens, too few to tell plans "
            f"apart; name a text of at least {MIN_CALIBRATION_WINDOWS * window} tokens"
        )
    size = min(len(tokens), settings.batch_size, at_once)
    identity = identity_of(
        checkpoint.folder,
        tokens,
        stream.prefix,
        num_layers=num_layers_of(config),
        batch=size,
        seed=settings.seed,
        dtype=settings.dtype,
    )
    return Calibration(
        folder=open_run(run, KIND, identity),
        checkpoint=checkpoint.folder,
        source=str(model),
        tokens=tokens,
        size=size,
        candidates=groups,
        identity=identity,
        settings=settings,
        load=loaded,
        revision=checkpoint.revision,
    )


def expect(model: str | Path, settings: CalibrationSettings) -> Expected:
    """Cost of `measure` with these settings, from config and headers, reading no weights.

    full_forwards is an upper limit: as if the candidates that take longest were kept.
    """
    checkpoint = open_checkpoint(model, revision=settings.revision, weights=False)
    groups = _candidates(checkpoint.config, settings)
    num_layers, cache = num_layers_of(checkpoint.config), _window_cache(checkpoint, settings)
    num_windows, at_once = settings.num_windows, windows_at_once(cache, settings.max_cache_bytes)
    size = min(num_windows, settings.batch_size, at_once)
    batches = math.ceil(num_windows / size)
    share = _num_screened(batches, settings.screen) / batches
    # A candidate shares the layers before it with the original.
    screened = sum(num_layers - group.layers[0] for group in groups)
    stretches = {group.layers for group in groups}
    longest_first = sorted((num_layers - layers[0] for layers in stretches), reverse=True)
    measured = sum(longest_first[: math.ceil(settings.keep * len(stretches))])
    dependency = num_layers * (num_layers - 1) / 2 / DEPENDENCY_SHARE
    layers_run = 2 * num_layers + dependency + share * screened + (1 - share) * measured
    return Expected(
        candidates=len(groups),
        full_forwards=layers_run / num_layers,
        weights=sum(math.prod(t.shape) for t in checkpoint.tensors.values())
        * _loaded_dtype(checkpoint, settings.dtype).itemsize,
        activations=size * cache,
    )


def score(calibration: Calibration, plans: Sequence[Plan], **how: Any) -> list[Cost]:
    """The cost of each plan on the calibration text, or on some of its batches (see below)."""
    return [cost for cost, *_ in score_programs(calibration, [*map(_program, plans)], **how)]


def score_programs(
    calibration: Calibration,
    programs: Sequence[Program],
    *,
    batches: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> list[tuple[Cost, float, float]]:
    """Each program's cost, its share of next tokens that stay the same, and the error of that.

    Nothing in the journal runs again; each evaluation (a program on a batch) is on disk before the
    next. progress(done, in all). Raises AbreastError where a model's logits are not finite.
    """
    chosen = list(calibration.batches if batches is None else batches)
    lines = read_journal(calibration.folder)
    todo = {
        batch: [p for p in dict.fromkeys(programs) if (name_of(p), batch) not in lines]
        for batch in chosen
    }
    total = len(chosen) * len(set(programs))
    finished = total - sum(map(len, todo.values()))
    with open(calibration.folder / JOURNAL.format(0), "a", encoding="utf-8") as journal:
        for batch, missing in todo.items():
            for line in _evaluate(calibration, batch, missing) if missing else ():
                lines[line["program"], batch] = line
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                finished += 1
                if progress is not None:
                    progress(finished, total)
    sums, n = [_sums(lines, program, chosen) for program in programs], calibration.scored
    return [(_cost(s, n), *ratio_of_means(s[:, 3], np.full(len(s), n))) for s in sums]


def measured_plans(calibration: Calibration, *, least: int | None = None) -> dict[Plan, Cost]:
    """The cost of every plan in the journal, the deepest first, whatever call it was measured for.

    least: also plans that were measured on so many batches only; None: those on the whole text.
    """
    lines = read_journal(calibration.folder)
    batches_of: dict[str, list[int]] = {}
    for program, batch in sorted(lines):
        batches_of.setdefault(program, []).append(batch)
    costs = {}
    for program, batches in batches_of.items():
        if len(batches) >= (least or len(calibration.batches)):
            groups = " ".join(word for word in program.split() if not word.isdigit())
            plan = Plan.parse(groups, calibration.num_layers)
            costs[plan] = _cost(_sums(lines, _program(plan), batches), calibration.scored)
    return dict(sorted(costs.items(), key=lambda item: (-item[0].depth, item[0].shorthand)))


def _evaluate(
    calibration: Calibration, batch: int, programs: Sequence[Program]
) -> Iterator[dict[str, Any]]:
    """Run programs on a batch; yield the journal's line of each."""
    original = _program(Plan(num_layers=calibration.num_layers))
    ids = torch.from_numpy(calibration.tokens[batch * calibration.size :][: calibration.size])
    layers_run = 0
    for program, sums, evaluated in run_programs(
        calibration.model, ids, programs, prefix=calibration.prefix, reference=original
    ):
        name = name_of(program)
        if not np.isfinite(sums).all():
            raise AbreastError(
                f"the model gives logits that are not finite (plan '{name}'); "
                "use --dtype bfloat16 or float32, or check its weights"
            )
        layers_run += evaluated
        if program != original:  # whose layers count as run for the program after it
            yield {"program": name, "batch": batch, "evaluated": layers_run, "sums": sums.tolist()}
            layers_run = 0


def measure(
    calibration: Calibration, *, objective: Objective = KL, progress: Progress | None = None
) -> Stats:
    """Measure every candidate alone and how layers depend on each other; write stats.safetensors.

    The file also has the groups that earlier calls measured. After a part of the text (`screen` in
    the settings) only the candidates best by the objective (`keep`) are measured on the rest; both
    1: everything on everything. progress: as for `score`, of the current step. Raises as `score`.
    """
    screen, keep = calibration.settings.screen, calibration.settings.keep
    if not (0 < screen <= 1 and 0 < keep <= 1):
        raise AbreastError(
            f"screen and keep are shares, not {screen} and {keep}; use 0.125 and 0.6"
        )
    arrays = _geometry(calibration)
    num_layers, batches = calibration.num_layers, calibration.batches
    alone = {
        group: Plan(num_layers=num_layers, groups=(group,)) for group in calibration.candidates
    }
    screened = batches[: _num_screened(len(batches), screen)]
    part = score(calibration, [*alone.values()], batches=screened, progress=progress)
    costs = dict(zip(alone, part, strict=True))
    plans = [alone[group] for group in _promising(costs, keep, objective)]
    score(calibration, plans, progress=progress)
    measured = measured_plans(calibration, least=len(screened))
    original_nll = _sums(read_journal(calibration.folder), _program(plans[0]), batches)[:, 1]
    stats = Stats(
        identity=calibration.identity,
        source=calibration.source,
        num_layers=num_layers,
        loss=float(original_nll.mean()) / calibration.scored,
        groups={plan.groups[0]: c for plan, c in measured.items() if len(plan.groups) == 1},
        full_forwards=sum(full_forwards(calibration).values()),
        revision=calibration.revision,
        **{name: arrays[name] for name in GEOMETRY_ARRAYS},
    )
    stats.check()
    stats.save(calibration.folder / STATS_FILE)
    return stats


def saved_or_measured(
    calibration: Calibration,
    *,
    objective: Objective = KL,
    step: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
) -> Stats:
    """The statistics on disk where they cover the candidates, else as `measure` with these."""
    path = calibration.folder / STATS_FILE
    if path.is_file():
        stats = Stats.load(path)
        if set(calibration.candidates) <= set(stats.groups):
            return replace(stats, source=calibration.source, revision=calibration.revision)
    step(f"measure {len(calibration.candidates)} groups alone")
    return measure(calibration, objective=objective, progress=progress)


def difference(calibration: Calibration, first: Plan, second: Plan) -> Cost:
    """Cost of `first` over `second`, both measured before; errors paired over windows."""
    lines = read_journal(calibration.folder)
    one, two = (_sums(lines, _program(plan), calibration.batches) for plan in (first, second))
    return _cost(np.stack([one[:, 0], two[:, 0], one[:, 2] - two[:, 2]], 1), calibration.scored)


def full_forwards(calibration: Calibration) -> dict[int, float]:
    """Cost of the run so far, in full forward passes over the calibration text, by depth.

    Candidates alone count at their depth; what `Stats` has besides them at the full depth.
    """
    path = calibration.folder / GEOMETRY
    layers = {calibration.num_layers: load_file(path)["layers"].item() if path.is_file() else 0.0}
    for (program, _), line in read_journal(calibration.folder).items():
        depth = len(program.split())
        layers[depth] = layers.get(depth, 0.0) + line["evaluated"] * len(line["sums"])
    full = calibration.num_layers * len(calibration.tokens)
    return {depth: total / full for depth, total in sorted(layers.items(), reverse=True)}


def _loaded_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """The dtype that a model is loaded in."""
    if dtype != "auto":
        return named_dtype(dtype)
    return max((DTYPES[t.dtype] for t in checkpoint.tensors.values()), key=lambda d: d.itemsize)


def _window_cache(checkpoint: Checkpoint, settings: CalibrationSettings) -> int:
    """Bytes of the states and logits kept of one window."""
    config, itemsize = checkpoint.config, _loaded_dtype(checkpoint, settings.dtype).itemsize
    hidden, vocabulary = positive(config, "hidden_size"), positive(config, "vocab_size")
    return window_bytes(settings.window, num_layers_of(config), hidden, itemsize, vocabulary)


def _candidates(config: dict[str, Any], settings: CalibrationSettings) -> tuple[Group, ...]:
    return candidates(
        config,
        max_group=settings.max_group,
        wirings=settings.wirings,
        force=settings.force,
    )


def _num_screened(batches: int, screen: float) -> int:
    return max(1, math.ceil(batches * screen))


def _promising(costs: dict[Group, Cost], keep: float, objective: Objective) -> list[Group]:
    """The best wiring of each stretch of layers, for the `keep` best share of the stretches."""

    def rank(group: Group) -> tuple[float, str]:
        return objective.value(costs[group]), group.shorthand

    best: dict[tuple[int, ...], Group] = {}
    for group, cost in costs.items():
        rival = best.setdefault(group.layers, group)
        if objective.value(cost) < objective.value(costs[rival]):
            best[group.layers] = group
    ranked = sorted(best.values(), key=rank)
    chosen = set(ranked[: math.ceil(keep * len(ranked))])
    return [group for group in costs if group in chosen]


def _program(plan: Plan) -> Program:
    return tuple(plan.group_of(stage) or stage[0] for stage in plan.stages)


def _sums(lines: Journal, program: Program, batches: Iterable[int]) -> np.ndarray:
    """`token_scores` summed per window, shape [num_windows, 4]."""
    name = name_of(program)
    return np.concatenate([np.asarray(lines[name, batch]["sums"]) for batch in batches])


def _cost(sums: np.ndarray, scored: int) -> Cost:
    """From sums per window: columns nll, the original's nll, KL."""
    counts = np.full(len(sums), scored)
    kl, kl_stderr = ratio_of_means(sums[:, 2], counts)
    loss, loss_stderr = ratio_of_means(sums[:, 0] - sums[:, 1], counts)
    return Cost(kl, kl_stderr, loss, loss_stderr, int(counts.sum()))


def _geometry(calibration: Calibration) -> dict[str, np.ndarray]:
    """Arrays of `geometry`, kept in the folder once computed."""
    path = calibration.folder / GEOMETRY
    if path.is_file():
        return dict(load_file(path))
    few = math.ceil(len(calibration.tokens) / DEPENDENCY_SHARE)
    arrays = geometry(
        calibration.model, calibration.tokens, calibration.size, few, calibration.prefix
    )
    with replacing(path) as staging:
        save_file(arrays, staging)
    return arrays
