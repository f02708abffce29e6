"""Prove a converted checkpoint: against the original, run ungrouped under the same plan.

The two share no code beyond the plan: one side is the folded checkpoint in stock layers, the other
the original weights executed member by member. Agreement shows that folding, file layout and
configuration are right; it says nothing about quality, which the plan decides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from abreast.checkpoint import damaged, read_json, read_manifest, resolve
from abreast.data import check_tokenizers
from abreast.errors import CheckpointError
from abreast.model import device_of, grouped, load
from abreast.plan import Plan

# Largest allowed logit difference as a fraction of the range of the original's logits. In float32
# only the order of summation differs. A half-precision checkpoint stores W diag(g) rounded once,
# half a unit in the last place per weight; the logits of a correct fold then stay within a few
# units of that type's epsilon, those of a wrong one (a norm mixed up, say) within none.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Verification:
    """Result of `verify`. Differences are fractions of the range of the original's logits.

    uncached: one forward over all tokens. cached: a prefill of half of them, then one at a time.
    prefill: for a checkpoint with sequential prefill, one forward against the original in its own
    order; else None. kl: mean KL(original under the plan || converted) in nats per position.
    same_tokens: how many of generated_tokens greedy ones agree before the first that differs.
    healed: the weights are healed ones and `against` the model they were healed from, so that only
    files were checked and the differences, which no tolerance bounds, tell how far healing and plan
    have led. faults: one sentence each, none when the checkpoint is right.
    """

    plan: str
    dtype: str
    tolerance: float
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
        return {"ok": self.ok, **asdict(self)}


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
    """Reload a converted checkpoint and its original and compare them, in float32.

    out: the converted folder, with abreast.json. against: the original it was made from (Hugging
    Face id or folder). Every file of `out` is compared with the recorded hash; both models read
    num_tokens seeded random tokens, and generate new_tokens from 16 of them. Greedy tokens must
    agree for float32 checkpoints; for half-precision ones the number is reported. Where the
    conversion also cast to a narrower dtype, the original's weights are rounded to it first.
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
    stored = _stored_dtype(folder)
    result = Verification(
        plan=plan.shorthand,
        dtype=str(stored).removeprefix("torch."),
        tolerance=TOLERANCE[stored],
        faults=tuple(faults),
        healed=healed,
    )
    if faults:
        return result
    converted, tokenizer = load(folder, dtype="float32", device=device)
    reference, original_tokenizer = load(original, dtype="float32", device=device)
    if tokenizer is not None and original_tokenizer is not None:
        check_tokenizers(tokenizer, original_tokenizer)
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(stored).float()
    generator = torch.Generator().manual_seed(seed)
    vocab = reference.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocab, (1, num_tokens), generator=generator).to(device_of(reference))
    return _compare_models(converted, reference, plan, ids, new_tokens, result)


def _compare_models(
    converted: Any,
    reference: Any,
    plan: Plan,
    ids: torch.Tensor,
    new_tokens: int,
    result: Verification,
) -> Verification:
    """Fill a result in with what both models make of ids [1, length]."""
    sequential = getattr(converted.config, "abreast_prefill", None) == "sequential"
    converted.config.abreast_prefill = "grouped"  # the plan is to be checked on long inputs, too
    prefill = None
    with torch.inference_mode():
        ours = _Outputs.of(converted, ids, new_tokens)
        with grouped(reference, plan):
            theirs = _Outputs.of(reference, ids, new_tokens)
        if sequential:
            converted.config.abreast_prefill = "sequential"
            stock = reference(ids, use_cache=False).logits[0].float()
            prefill = _difference(converted(ids, use_cache=False).logits[0].float(), stock)
    pairs = zip(ours.tokens, theirs.tokens, strict=True)
    log_ours, log_theirs = ours.logits.log_softmax(-1), theirs.logits.log_softmax(-1)
    result = replace(
        result,
        uncached=_difference(ours.logits, theirs.logits),
        cached=_difference(ours.cached_logits, theirs.cached_logits),
        prefill=prefill,
        kl=float((log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean()),
        same_tokens=sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)),
        generated_tokens=len(theirs.tokens),
        num_tokens=ids.shape[1],
    )
    return replace(result, faults=tuple(_faults(result)))


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
    exact = result.dtype == "float32" and not result.healed
    if exact and result.same_tokens < result.generated_tokens:
        yield f"greedy generation differs from token {result.same_tokens} on"


def _stored_dtype(folder: Path) -> torch.dtype:
    name = str(read_json(folder / "config.json").get("dtype", "float32"))
    dtype = getattr(torch, name, torch.float32)
    return dtype if dtype in TOLERANCE else torch.float32


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@dataclass(frozen=True)
class _Outputs:
    """What a model makes of ids [1, length]: logits [length, vocab] and the text that follows.

    logits: of one forward. cached_logits: of a prefill of half, then one token at a time. tokens:
    generated greedily after the first 16.
    """

    logits: torch.Tensor
    cached_logits: torch.Tensor
    tokens: list[int]

    @classmethod
    def of(cls, model: Any, ids: torch.Tensor, new_tokens: int) -> _Outputs:
        whole = model(ids, use_cache=False).logits[0].float()
        half = ids.shape[1] // 2
        step = model(ids[:, :half], use_cache=True)
        pieces = [step.logits[0]]
        for token in ids[:, half:].split(1, dim=1):
            step = model(token, past_key_values=step.past_key_values, use_cache=True)
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
