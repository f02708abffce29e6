"""Prove a converted checkpoint: its tensors against the original's, then its outputs.

Every number is folded again from the original, from the mathematics alone and in numpy, without
fold.py's rules and arithmetic, and must come out with the same bits. That proves the tensors; that
they are read as meant (layout, widths, wiring, configuration) the outputs show: those of the
converted checkpoint in stock layers against the original weights executed member by member, with
the one rounding that folding brings. What is left is the noise of float32 arithmetic, which is
measured. It all says nothing about quality, which the plan decides.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from abreast.checkpoint import (
    as_loaded,
    damaged,
    finite,
    open_checkpoint,
    read_manifest,
    resolve,
    unpacked,
)
from abreast.convert.refold import Refold, main_dtype
from abreast.data import check_tokenizers
from abreast.errors import CheckpointError
from abreast.families import family_of, num_layers_of, sizes
from abreast.model import cache_name, cache_of, device_of, grouped, load, load_tokenizer

# The logits may differ by so many times what the noise of float32 arithmetic, put on the original's
# weights at random, changes in them.
NOISE_FACTOR = 4.0
# How large it is: sums run in another order in wider layers, and a dot product rounds many times.
ARITHMETIC = 2.0**-21


@dataclass(frozen=True)
class Verification:
    """Result of `verify`. Differences are fractions of the range of the original's logits.

    tensors: how many tensors were folded again and compared bit by bit. tolerance: the largest
    difference that passes, NOISE_FACTOR times what rounding noise makes in the original's logits.
    uncached: one forward over all tokens. cached: a prefill, then the last 32, but at most half of
    them, one at a time. prefill: for a checkpoint with sequential prefill, one forward against the
    original in its own order; else None. kl: mean KL(original under the plan || converted) in nats
    per position. same_tokens: how many of generated_tokens greedy ones agree before the first that
    differs. healed: the weights are healed ones and `against` the model they were healed from, so
    that only files were checked and the differences, which no tolerance bounds, tell how far
    healing and plan have led. faults: one sentence each, none when the checkpoint is right.
    """

    plan: str
    dtype: str
    tensors: int = 0
    tolerance: float = math.nan
    uncached: float = math.nan
    cached: float = math.nan
    prefill: float | None = None
    kl: float = math.nan
    same_tokens: int = 0
    generated_tokens: int = 0
    num_tokens: int = 0
    faults: tuple[str, ...] = ()
    healed: bool = False

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values (NaN and infinity become None)."""
        return finite({"ok": self.ok, **asdict(self)})


def verify(
    out: str | Path,
    against: str | Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    num_tokens: int = 256,
    new_tokens: int = 32,
    seed: int = 0,
) -> Verification:
    """Fold the original's tensors again, and compare the outputs of both models, in float32.

    out: the converted folder, with abreast.json. against: the original it was made from (Hugging
    Face id or folder). Every file of `out` is compared with the recorded hash, every number of its
    tensors with what the original's fold to. Then both models, one after the other in memory, read
    num_tokens seeded random tokens, and generate new_tokens from 16 of them, the same ones. What
    folding and casting round is rounded in the original's weights, too.
    A healed checkpoint is compared so with the healed weights it was made from, if these were kept;
    against the model that was healed, files are checked and differences reported, not judged.
    Raises AbreastError when `out` is no conversion, `against` is not its original, or the two read
    text differently.
    """
    folder, _ = resolve(out)
    original, _ = resolve(against, revision=revision)
    manifest = read_manifest(folder)
    plan, weights = manifest.plan, manifest.healed_files
    faults = list(damaged(folder, manifest.files))
    healed = bool(weights) and next(damaged(original, weights), None) is not None
    for name in damaged(original, manifest.source_files) if healed or not weights else ():
        raise CheckpointError(
            f"'{out}' was not made from '{against}': {name}; name the original it was made from"
        )
    stored = main_dtype(folder)
    result = Verification(str(plan.shorthand), str(stored).removeprefix("torch."), healed=healed)
    if faults:
        return replace(result, faults=tuple(faults))
    tokenizers = [load_tokenizer(path) for path in (folder, original)]
    if None not in tokenizers:
        check_tokenizers(*tokenizers)
    source = open_checkpoint(original)
    family = family_of(source.config)
    source = as_loaded(source, family)
    plan.check_layers(num_layers_of(source.config))
    made = open_checkpoint(folder)
    made = replace(made, tensors={**unpacked(made), **made.others})
    source = replace(source, tensors={**source.tensors, **source.others})
    refold = Refold(made, source, family, plan)
    if not healed:
        if faults := list(refold.misfits()):
            return replace(result, faults=tuple(faults))
        result = replace(result, tensors=len(refold.made.tensors), faults=tuple(refold.faults()))
    generator = torch.Generator().manual_seed(seed)
    shape = (1, num_tokens)
    ids = torch.randint(0, sizes(source.config)["V"], shape, generator=generator)
    for key, value in (source.wrapper or {}).items():  # these stand for what is no text
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            ids = ids.where(ids != value, int(value == 0))
    return _compare_models(refold, ids, device, new_tokens, result)


def _compare_models(
    refold: Refold, ids: torch.Tensor, device: str, new_tokens: int, result: Verification
) -> Verification:
    """Fill a result in with what both models make of ids [1, length]."""
    plan, prefill = refold.plan, None
    with torch.inference_mode():
        model: Any = load(refold.made.folder, dtype="float32", device=device)[0]
        ids = ids.to(device_of(model))
        sequential = getattr(model.config, "abreast_prefill", None) == "sequential"
        model.config.abreast_prefill = "grouped"  # the plan is to be checked on long inputs, too
        ours = _Outputs.of(model, ids, new_tokens)
        if sequential:
            model.config.abreast_prefill = "sequential"
            prefill = _logits(model, ids)
        del model
        gc.collect()  # so that there is never more than one whole model
        model = load(refold.source.folder, dtype="float32", device=device)[0]
        if any(parameter.is_meta for parameter in model.parameters()):
            raise CheckpointError(
                f"'{refold.source.source}' in float32 is larger than the devices here, and verify "
                "rounds its weights where they compute; use --device cpu or more devices"
            )
        refold.round_as_folded(model)
        ids = ids.to(device_of(model))
        with grouped(model, plan):
            theirs = _Outputs.of(model, ids, new_tokens)
        stock = _logits(model, ids) if sequential else None
        _add_noise(model)
        with grouped(model, plan):
            noise = _difference(_logits(model, ids), theirs.logits)
        if stock is not None:
            noise = max(noise, _difference(_logits(model, ids), stock))
    pairs = zip(ours.tokens, theirs.tokens, strict=True)
    compared = replace(
        result,
        tolerance=NOISE_FACTOR * noise,
        uncached=_difference(ours.logits, theirs.logits),
        cached=_difference(ours.cached_logits, theirs.cached_logits),
        prefill=None if prefill is None or stock is None else _difference(prefill, stock),
        kl=_divergence(theirs.logits, ours.logits),
        same_tokens=sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)),
        generated_tokens=len(theirs.tokens),
        num_tokens=ids.shape[1],
    )
    return replace(compared, faults=(*result.faults, *_faults(compared)))


def _add_noise(model: Any) -> None:
    """Change every parameter at random by as much as arithmetic in float32 does."""
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator(parameter.device).manual_seed(index)
        for piece in parameter.view(-1).split(1 << 22):
            random = torch.rand(piece.shape, generator=generator, device=piece.device)
            piece.mul_(random.mul_(2 * ARITHMETIC).add_(1 - ARITHMETIC))


def _faults(result: Verification) -> Iterator[str]:
    """What is wrong with the outputs of a conversion."""
    differences = {
        "without cache": result.uncached,
        "with cache": result.cached,
        "of sequential prefill": result.prefill,
    }
    limit = math.inf if result.healed else result.tolerance
    for name, value in differences.items():
        if value is not None and not value <= limit:
            yield f"logits {name} differ by {value:.1e} of their range"
    if not result.healed and result.same_tokens < result.generated_tokens:
        yield f"greedy generation differs from token {result.same_tokens} on"


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def _divergence(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Mean KL(theirs || ours) in nats, of logits [length, vocab]."""
    total = 0.0
    for pair in zip(theirs.split(32), ours.split(32), strict=True):
        log_theirs, log_ours = (logits.log_softmax(-1) for logits in pair)
        total += float((log_theirs.exp() * (log_theirs - log_ours)).sum())
    return total / len(theirs)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, use_cache=False).logits[0].float()
    return logits


@dataclass(frozen=True)
class _Outputs:
    """What a model makes of ids [1, length]: logits [length, vocab] and the text that follows.

    logits: of one forward. cached_logits: of a prefill, then at most 32 tokens one at a time.
    tokens: generated greedily after the first 16.
    """

    logits: torch.Tensor
    cached_logits: torch.Tensor
    tokens: list[int]

    @classmethod
    def of(cls, model: Any, ids: torch.Tensor, new_tokens: int) -> _Outputs:
        whole = _logits(model, ids)
        length = ids.shape[1]
        first = max(length // 2, length - 32)
        step, name = model(ids[:, :first], use_cache=True), cache_name(model)
        pieces = [step.logits[0]]
        for token in ids[:, first:].split(1, dim=1):
            step = model(token, **{name: cache_of(step)}, use_cache=True)
            pieces.append(step.logits[0])
        prompt = ids[:, :16]
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return cls(whole, torch.cat(pieces).float(), text[0, prompt.shape[1] :].tolist())
