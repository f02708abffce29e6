"""Prove a converted checkpoint: against the original, run ungrouped under the same plan.

The two share no code beyond the plan: one side is the folded checkpoint in stock layers, the other
the original weights executed member by member. Agreement shows that folding, file layout and
configuration are right; it says nothing about quality, which the plan decides.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from abreast.checkpoint import damaged, read_json, read_manifest, resolve
from abreast.errors import CheckpointError
from abreast.model import grouped, load

# Largest allowed logit difference as a fraction of the range of the original's logits. In float32
# only the order of summation differs. A half-precision checkpoint stores W diag(g) rounded once,
# half a unit in the last place per weight; the logits of a correct fold then stay within a few
# units of that type's epsilon, those of a wrong one (a norm mixed up, say) within none.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Differences are fractions of the range of the original's logits.

    uncached: one forward over all tokens. cached: a prefill of half of them, then one at a time.
    prefill: for a checkpoint with sequential prefill, one forward against the original in its own
    order; else None. kl: mean KL(original under the plan || converted) in nats per position.
    same_tokens: how many of generated_tokens greedy ones agree before the first that differs.
    healed: the weights are healed ones and `against` the model they were healed from, so that only
    files were checked and the differences, which no tolerance bounds, tell how far healing and plan
    have led. faults: in words, empty when the checkpoint is right.
    """

    plan: str
    dtype: str
    tolerance: float
    uncached: float
    cached: float
    prefill: float | None
    kl: float
    same_tokens: int
    generated_tokens: int
    num_tokens: int
    faults: tuple[str, ...]
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
    Raises AbreastError when `out` is no conversion, or `against` is not its original.
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
    dtype, tolerance = _name(stored), TOLERANCE[stored]
    if faults:
        nothing = (math.nan, math.nan, None, math.nan, 0, 0, 0)
        return Verification(plan.shorthand, dtype, tolerance, *nothing, tuple(faults), healed)
    converted, _ = load(folder, dtype="float32", device=device)
    reference, _ = load(original, dtype="float32", device=device)
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(stored).float()
    sequential = getattr(converted.config, "abreast_prefill", None) == "sequential"
    converted.config.abreast_prefill = "grouped"  # the plan is to be checked on long inputs, too
    generator = torch.Generator().manual_seed(seed)
    vocab = reference.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocab, (1, num_tokens), generator=generator).to(device)
    prefill = None
    with torch.inference_mode():
        got, got_cached, got_text = _run(converted, ids, new_tokens)
        with grouped(reference, plan):
            want, want_cached, want_text = _run(reference, ids, new_tokens)
        if sequential:
            converted.config.abreast_prefill = "sequential"
            stock = reference(ids, use_cache=False).logits[0].float()
            prefill = _difference(converted(ids, use_cache=False).logits[0].float(), stock)
    uncached, cached = _difference(got, want), _difference(got_cached, want_cached)
    agree = itertools.takewhile(lambda p: p[0] == p[1], zip(got_text, want_text, strict=True))
    same = sum(1 for _ in agree)
    found = {"without cache": uncached, "with cache": cached, "of sequential prefill": prefill}
    for name, value in found.items():
        if value is not None and not value <= (math.inf if healed else tolerance):
            faults.append(f"logits {name} differ by {value:.1e} of their range")
    if stored == torch.float32 and same < len(want_text) and not healed:
        faults.append(f"greedy generation differs from token {same} on")
    log_want, log_got = want.log_softmax(-1), got.log_softmax(-1)
    kl = float((log_want.exp() * (log_want - log_got)).sum(-1).mean())
    return Verification(
        plan=plan.shorthand,
        dtype=dtype,
        tolerance=tolerance,
        uncached=uncached,
        cached=cached,
        prefill=prefill,
        kl=kl,
        same_tokens=same,
        generated_tokens=len(want_text),
        num_tokens=num_tokens,
        faults=tuple(faults),
        healed=healed,
    )


def _stored_dtype(folder: Path) -> torch.dtype:
    name = str(read_json(folder / "config.json").get("dtype", "float32"))
    dtype = getattr(torch, name, torch.float32)
    return dtype if dtype in TOLERANCE else torch.float32


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / (want.max() - want.min()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(
    model: Any, ids: torch.Tensor, new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits [length, vocab] of ids [1, length] at once, through the cache, and greedy text."""
    whole = model(ids, use_cache=False).logits[0].float()
    half = ids.shape[1] // 2
    step = model(ids[:, :half], use_cache=True)
    pieces = [step.logits[0]]
    for place in range(half, ids.shape[1]):
        step = model(
            ids[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True
        )
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
    return whole, torch.cat(pieces).float(), text[0, prompt.shape[1] :].tolist()
