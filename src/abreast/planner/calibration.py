"""One calibration run: what every candidate group costs alone, and what the layers depend on.

A folder holds a run: measure.json says what it rests on, the journal has every plan measured on
every batch of windows (also those that a search asks for later), geometry.safetensors the
similarities, stats.safetensors the result. Whatever is on disk is not measured again.

Candidates are first measured on a part of the text (`screen`); of those that no good plan would use
the rest is not worth its time, so only the better ones (`keep`) go on to all of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from abreast.checkpoint import DTYPES, Checkpoint, open_checkpoint
from abreast.convert import obstacle
from abreast.data import CALIBRATION, TokenStream
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
from abreast.planner.front import STATS_FILE, Stats
from abreast.planner.objective import KL, Cost, Objective
from abreast.runs import (
    JOURNAL,
    cut,
    gather,
    model_hash,
    open_run,
    stream_of,
    tokens_hash,
    window_bytes,
    windows_at_once,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
KIND = "measure"
GEOMETRY = "geometry.safetensors"
MIN_WINDOWS = 8
SCREEN, KEEP = 0.125, 0.6
DEPENDENCY_SHARE = 8  # the dependency matrix is taken on one window in so many


@dataclass(frozen=True)
class Calibration:
    """A model and the windows that its plans are measured on; made by `calibrate`.

    load(): the model, loaded at the first call. tokens: int64 [num_windows, window]. size: windows
    at once. candidates: the groups to measure.
    """

    folder: Path
    load: Callable[[], PreTrainedModel]
    tokens: np.ndarray
    size: int
    candidates: tuple[Group, ...]
    identity: dict[str, Any]
    source: str

    @property
    def num_layers(self) -> int:
        return int(self.identity["num_layers"])

    @property
    def batches(self) -> range:
        return range(math.ceil(len(self.tokens) / self.size))


@dataclass(frozen=True)
class Expected:
    """What a calibration run would take: full forward passes, at most, and bytes held at once.

    activations: hidden states and logits that are kept; a layer's own working memory comes on top.
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
    alike = family is not None and family.parallel
    edge = 0 if force else 1
    found = []
    for size in range(2, max_group + 1):
        for first in range(edge, num_layers - size + 1 - edge):
            layers = tuple(range(first, first + size))
            if obstacle(config, layers) is not None:
                continue
            found += [Group.wired(layers, name) for name in (("lp",) if alike else wirings)]
    if not found:
        raise AbreastError("no group of this model can be formed; see `abreast inspect`")
    return tuple(found)


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    data: str | TokenStream = CALIBRATION,
    num_windows: int = 128,
    window: int = 256,
    max_group: int = 2,
    wirings: Sequence[str] = ("lp",),
    force: bool = False,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    batch_size: int = 16,
    max_cache_bytes: int = 2**30,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Calibration:
    """Read a model's headers and its calibration text, and open folder `out` for a run on them.

    model: folder or Hugging Face id of an original of any family that can run grouped. data: a
    source as for `load_tokens`, or a stream. num_windows: windows of `window` tokens, of which all
    but the first are scored. max_group, wirings, force: see `candidates`. batch_size: windows at
    once, fewer where what is kept of them, hidden states and logits, would exceed max_cache_bytes.

    Raises AbreastError for less than MIN_WINDOWS windows of text, a folder with a run on another
    model, other text or other sizes, or something else, in it, and as `load` and `load_tokens` do.
    """
    for label, value, least in (
        ("the number of windows", num_windows, MIN_WINDOWS),
        ("the window", window, 2),
        ("the batch size", batch_size, 1),
    ):
        if value < least:
            raise AbreastError(f"{label} is {value}; give at least {least}")
    checkpoint = open_checkpoint(model, revision=revision)
    config = checkpoint.config
    groups = candidates(config, max_group=max_group, wirings=wirings, force=force)
    tokenizer = None
    if not isinstance(data, TokenStream):
        tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    data = stream_of(data, tokenizer, str(model), max_tokens=num_windows * window, seed=seed)
    tokens = cut(
        data,
        num_windows,
        window,
        longest=config.get("max_position_embeddings"),
        vocabulary=positive(config, "vocab_size"),
    )
    if len(tokens) < MIN_WINDOWS:
        raise AbreastError(
            f"the data gives {len(tokens)} windows of {window} tokens, too few to tell plans "
            f"apart; name a text of at least {MIN_WINDOWS * window} tokens"
        )
    each = _kept_bytes(checkpoint, window, dtype)
    size = min(len(tokens), batch_size, windows_at_once(each, max_cache_bytes))
    identity = {
        "model": model_hash(checkpoint.folder),
        "tokens": tokens_hash(tokens),
        "num_layers": num_layers_of(config),
        "num_windows": len(tokens),
        "window": window,
        "batch": size,
        "seed": seed,
        "dtype": dtype,
    }
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    return Calibration(
        folder=open_run(Path(out), KIND, identity),
        load=cache(lambda: load(checkpoint.folder, dtype=dtype, **options)[0]),
        tokens=tokens,
        size=size,
        candidates=groups,
        identity=identity,
        source=str(model),
    )


def expect(
    model: str | Path,
    *,
    num_windows: int = 128,
    window: int = 256,
    max_group: int = 2,
    wirings: Sequence[str] = ("lp",),
    force: bool = False,
    dtype: str = "auto",
    batch_size: int = 16,
    max_cache_bytes: int = 2**30,
    screen: float = SCREEN,
    keep: float = KEEP,
    revision: str | None = None,
) -> Expected:
    """What `measure` would take with these arguments, from config and headers, reading no weights.

    full_forwards is an upper limit: as if those candidates were kept that take longest.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    config = checkpoint.config
    groups = candidates(config, max_group=max_group, wirings=wirings, force=force)
    num_layers = num_layers_of(config)
    each = _kept_bytes(checkpoint, window, dtype)
    size = min(num_windows, batch_size, windows_at_once(each, max_cache_bytes))
    batches = math.ceil(num_windows / size)
    part = _screening(batches, screen) / batches
    alone = [num_layers - group.layers[0] for group in groups]
    places = sorted((num_layers - layers[0] for layers in {g.layers for g in groups}), reverse=True)
    kept = places[: math.ceil(keep * len(places))]
    dependency = num_layers * (num_layers - 1) / 2 / DEPENDENCY_SHARE
    layers = 2 * num_layers + dependency + part * sum(alone) + (1 - part) * sum(kept)
    return Expected(
        candidates=len(groups),
        full_forwards=layers / num_layers,
        weights=sum(math.prod(t.shape) for t in checkpoint.tensors.values())
        * _dtype_of(checkpoint, dtype).itemsize,
        activations=size * each,
    )


def score(
    calibration: Calibration,
    plans: Sequence[Plan],
    *,
    batches: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> list[Cost]:
    """What each plan costs on the calibration text, or on some of its batches.

    What the journal has is not run again; everything else is on disk before the next is run.
    progress: called with (evaluations done, in all), one being a plan on a batch. Raises
    AbreastError where a model's logits are not finite.
    """
    original = _program(Plan(num_layers=calibration.num_layers))
    programs = [_program(plan) for plan in plans]
    chosen = list(calibration.batches if batches is None else batches)
    done = gather(calibration.folder)
    todo = {
        batch: [p for p in dict.fromkeys(programs) if (name_of(p), batch) not in done]
        for batch in chosen
    }
    total = len(chosen) * len(set(programs))
    finished = total - sum(map(len, todo.values()))
    with open(calibration.folder / JOURNAL.format(0), "a", encoding="utf-8") as journal:
        for batch, wanted in todo.items():
            if not wanted:
                continue
            ids = torch.from_numpy(calibration.tokens[batch * calibration.size :])
            runs = run_programs(
                calibration.load(), ids[: calibration.size], wanted, reference=original
            )
            spent = 0
            for program, sums, evaluated in runs:
                if not np.isfinite(sums).all():
                    raise AbreastError(
                        f"the model gives logits that are not finite (plan '{name_of(program)}'); "
                        "use --dtype bfloat16 or float32, or check its weights"
                    )
                spent += evaluated
                if program == original:
                    continue  # what it took is put down to the program after it
                line = {"program": name_of(program), "batch": batch, "evaluated": spent}
                done[name_of(program), batch] = {**line, "sums": sums.tolist()}
                journal.write(json.dumps(done[name_of(program), batch]) + "\n")
                journal.flush()
                spent = 0
                finished += 1
                if progress is not None:
                    progress(finished, total)
    return [
        _cost([done[name_of(program), batch]["sums"] for batch in chosen], calibration)
        for program in programs
    ]


def measure(
    calibration: Calibration,
    *,
    screen: float = SCREEN,
    keep: float = KEEP,
    objective: Objective = KL,
    progress: Progress | None = None,
) -> Stats:
    """Measure every candidate alone and how layers depend on each other; write stats.safetensors.

    screen: share of the batches that every candidate is measured on. keep: share of the stretches
    of layers that go on to the rest, those whose best wiring costs least; of the wirings of one
    stretch only that one does. Both 1: everything is measured on everything. progress: as for
    `score`, of the step at hand. Raises as `score`.
    """
    if not (0 < screen <= 1 and 0 < keep <= 1):
        raise AbreastError(
            f"screen and keep are shares, not {screen} and {keep}; use {SCREEN} and {KEEP}"
        )
    geometry = _geometry(calibration)
    alone = [_alone(group, calibration) for group in calibration.candidates]
    screened = calibration.batches[: _screening(len(calibration.batches), screen)]
    part = score(calibration, alone, batches=screened, progress=progress)
    costs = dict(zip(calibration.candidates, part, strict=True))
    chosen = _promising(costs, keep, objective)
    whole = score(calibration, [_alone(group, calibration) for group in chosen], progress=progress)
    costs |= zip(chosen, whole, strict=True)
    done = gather(calibration.folder)
    name = name_of(_program(_alone(chosen[0], calibration)))
    nll = np.concatenate([done[name, batch]["sums"] for batch in calibration.batches])[:, 1]
    stats = Stats(
        identity=calibration.identity,
        source=calibration.source,
        num_layers=calibration.num_layers,
        loss=float(nll.mean()) / (calibration.tokens.shape[1] - 1),
        groups=costs,
        **{name: geometry[name] for name in ("similarity", "angular", "influence", "dependency")},
        full_forwards=sum(spent(calibration).values()),
    )
    stats.check()
    stats.save(calibration.folder / STATS_FILE)
    return stats


def difference(calibration: Calibration, first: Plan, second: Plan) -> Cost:
    """What `first` costs more than `second`, both measured before; errors paired over windows."""
    done = gather(calibration.folder)
    sums = [
        np.concatenate([done[name_of(_program(plan)), b]["sums"] for b in calibration.batches])
        for plan in (first, second)
    ]
    counts = np.full(len(sums[0]), calibration.tokens.shape[1] - 1)
    kl, kl_stderr = ratio_of_means(sums[0][:, 2] - sums[1][:, 2], counts)
    loss, loss_stderr = ratio_of_means(sums[0][:, 0] - sums[1][:, 0], counts)
    return Cost(kl, kl_stderr, loss, loss_stderr, int(counts.sum()))


def spent(calibration: Calibration) -> dict[int, float]:
    """What the run has taken so far, in full forward passes over the calibration text, by depth.

    Candidates alone count at the depth they give; what `Stats` has beside them at the full depth.
    """
    path = calibration.folder / GEOMETRY
    layers = {calibration.num_layers: load_file(path)["layers"].item() if path.is_file() else 0.0}
    for (program, _), line in gather(calibration.folder).items():
        depth = len(program.split())
        layers[depth] = layers.get(depth, 0.0) + line["evaluated"] * len(line["sums"])
    each = calibration.num_layers * len(calibration.tokens)
    return {depth: total / each for depth, total in sorted(layers.items(), reverse=True)}


def _dtype_of(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """The dtype that a model is loaded in."""
    if dtype != "auto":
        return named_dtype(dtype)
    return max((DTYPES[t.dtype] for t in checkpoint.tensors.values()), key=lambda d: d.itemsize)


def _kept_bytes(checkpoint: Checkpoint, window: int, dtype: str) -> int:
    config, itemsize = checkpoint.config, _dtype_of(checkpoint, dtype).itemsize
    hidden, vocabulary = positive(config, "hidden_size"), positive(config, "vocab_size")
    return window_bytes(window, num_layers_of(config), hidden, itemsize, vocabulary)


def _screening(batches: int, screen: float) -> int:
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


def _alone(group: Group, calibration: Calibration) -> Plan:
    return Plan(num_layers=calibration.num_layers, groups=(group,))


def _program(plan: Plan) -> Program:
    return tuple(plan.group_of(stage) or stage[0] for stage in plan.stages)


def _cost(batches: Sequence[list[list[float]]], calibration: Calibration) -> Cost:
    """From the `token_scores` sums of each batch's windows."""
    sums = np.concatenate([np.asarray(batch) for batch in batches])
    counts = np.full(len(sums), calibration.tokens.shape[1] - 1)
    kl, kl_stderr = ratio_of_means(sums[:, 2], counts)
    loss, loss_stderr = ratio_of_means(sums[:, 0] - sums[:, 1], counts)
    return Cost(kl, kl_stderr, loss, loss_stderr, int(counts.sum()))


def _geometry(calibration: Calibration) -> dict[str, np.ndarray]:
    """What `geometry` finds, kept in the folder once found."""
    path = calibration.folder / GEOMETRY
    if path.is_file():
        return dict(load_file(path))
    few = math.ceil(len(calibration.tokens) / DEPENDENCY_SHARE)
    found = geometry(calibration.load(), calibration.tokens, calibration.size, few)
    staging = path.with_name(f".{path.name}.new")
    save_file(found, staging)
    os.replace(staging, path)
    return found
