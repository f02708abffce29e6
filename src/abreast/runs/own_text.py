"""What a model writes itself, and the file that keeps it.

It is sampled from the nucleus of the model's distribution (arXiv 1904.09751, section 3.1): of the
whole one, texts of small models drift into what no author writes (benchmarks/LOG.md, 2026-11-28).
On a GPU, long texts are written in vLLM where it is installed, all others in transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from abreast.checkpoint import open_checkpoint, own_file, replacing, write
from abreast.data import OWN, Part, TokenStream, beginning
from abreast.engines.vllm import Continue, Sampling, VllmFailure, writer
from abreast.errors import AbreastError
from abreast.families import FAMILIES
from abreast.model import (
    cache_name,
    cache_of,
    device_of,
    inference,
    is_native,
    keep_rows,
    keeps,
    reserve,
)
from abreast.runs.folder import TEXT_FOLDER, check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Role = Literal["calibrate", "judge"]
Author = Callable[[], "PreTrainedModel"]
ROWS, LEAST_ROWS, LEAST_TOKENS, TIMED = 64, 8, 8, 128  # texts at once, tokens of each; steps timed
MOST_CACHE = 2**32  # bytes that the texts written at once should fill
VLLM_ROWS, WORTH_VLLM = 256, 2**14  # texts at once; tokens, before which it has not started
VLLM_DEVICES = ("cuda",)  # on two cores it takes longer than transformers
NUCLEUS = 0.95  # of the probability, from which tokens are drawn
# So many tokens usually hold the nucleus; sorting the whole vocabulary takes as long as a step.
_COMMON = 1024
_VERSION = 2
_BEGINNINGS = {  # every second text begins with one of them, the others with what the model likes
    "calibrate": ("The", "In", "It was", "How to", "When", "A", "1.", "I", "There are", "For"),
    "judge": ("This", "On", "We", "What is", "After", "An", "-", "You", "She said", "If"),
}


def own_stream(
    author: Author,
    tokenizer: Any,
    source: str | Path,
    *,
    prefix: tuple[int, ...],
    max_tokens: int,
    length: int,
    seed: int,
    role: Role,
    folder: Path | None,
    step: Callable[[str], None],
) -> TokenStream:
    """Text that the model writes. A later call finds it in the run's folder, or continues it.

    source: folder or name of the model. length: tokens of a text. The last batch has only as many
    texts as are missing, by the mean length so far.
    """
    checkpoint = open_checkpoint(source)
    identity = {
        "version": _VERSION,
        "model": checkpoint.sha256,
        "prefix": list(prefix),
        "tokens": max_tokens,
        "length": length,
        "seed": seed,
        "role": role,
    }
    path = None if folder is None else folder / TEXT_FOLDER / f"{role}.safetensors"
    texts: list[np.ndarray] = []
    if path is not None and not (texts := saved_texts(path, identity)):
        # Version 1 drew from the whole distribution. What it began keeps its name.
        former = {**identity, "version": 1}
        if texts := saved_texts(path, former):
            identity = former
    with ExitStack() as stack:
        model, vllm, at_once = None, None, 0
        while (left := max_tokens - sum(map(len, texts))) > 0:
            if model is None:
                model = author()
                vllm = _in_vllm(model, checkpoint.folder, len(prefix), length, left, stack)
                at_once = rows_at_once(model, length)
            mean = sum(map(len, texts)) / len(texts) if texts else length
            rows = min(VLLM_ROWS if vllm else at_once, math.ceil(left / mean))
            task = task_of(
                model,
                tokenizer,
                prefix=prefix,
                rows=rows,
                length=length,
                first=len(texts),
                seed=seed,
                role=role,
            )
            if vllm is not None:
                step("the model writes its own text in vLLM")
                try:
                    texts += _write_in_vllm(vllm, task)
                except VllmFailure as error:
                    step(f"{error}; so it writes in transformers")
                    vllm = None
                    continue
            else:
                batches = math.ceil(left / (rows * mean))
                texts += _write(model, task, batches=batches, step=step)
            step = _silent
            if path is not None:
                save_texts(path, identity, texts, tokenizer)
    tokens = np.concatenate(texts)[:max_tokens].astype(np.int64)
    whole = sum(len(tokenizer.decode(text, skip_special_tokens=True).encode()) for text in texts)
    size = round(whole * len(tokens) / sum(map(len, texts)))
    words = tuple(beginning(tokenizer.decode(t[:64], skip_special_tokens=True)) for t in texts[:3])
    part = Part(OWN, len(tokens), len(texts), size, words)
    return TokenStream(tokens, OWN, len(texts), size, prefix, (part,))


def _silent(message: str) -> None:
    """Says nothing."""


def rows_at_once(model: PreTrainedModel, length: int) -> int:
    """How many texts of so many tokens the model writes at once, by the size of its cache."""
    start = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
    with inference(model):
        output = model(input_ids=start, use_cache=True, **keeps(model, 1))
    row = 0
    for layer in getattr(cache_of(output), "layers", []):
        states = (getattr(layer, name, None) for name in ("keys", "values"))
        kept = min(length, getattr(layer, "sliding_window", None) or length)
        row += kept * sum(state.nbytes for state in states if state is not None)
    return max(LEAST_ROWS, min(ROWS, MOST_CACHE // max(1, row)))


def saved_texts(path: Path, identity: dict[str, Any]) -> list[np.ndarray]:
    """The texts in a file, token ids each, none where it is damaged or was written otherwise."""
    try:
        own_file(path, most=None)
        with safe_open(path, framework="np") as file:
            if json.loads((file.metadata() or {})["identity"]) != identity:
                return []
            tokens, ends = file.get_tensor("tokens"), file.get_tensor("ends")
    except (OSError, SafetensorError, LookupError, ValueError, TypeError):
        return []
    texts = np.split(tokens, ends) if tokens.ndim == ends.ndim == 1 else []
    return texts[:-1] if texts and not len(texts[-1]) and all(map(len, texts[:-1])) else []


def save_texts(
    path: Path, identity: dict[str, Any], texts: Sequence[np.ndarray], tokenizer: Any
) -> None:
    """Write a file that `saved_texts` reads, and one for people beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([len(text) for text in texts])
    with replacing(path) as staging:
        arrays = {"tokens": np.concatenate(texts), "ends": ends}
        save_file(arrays, staging, metadata={"identity": json.dumps(identity)})
    pages = (f"--- {n} ---\n{tokenizer.decode(text)}\n" for n, text in enumerate(texts, start=1))
    write(path.with_suffix(".txt"), "".join(pages))


@dataclass(frozen=True)
class Task:
    """Texts that a model writes together.

    start: tokens that it reads before each, which are left out of it. forced: the first tokens of
    each. steps: most tokens of one, without its end. ends: tokens that end one. closing: what a
    text without an end gets. known: tokens below this are the tokenizer's. seeds: of each text.
    """

    start: tuple[int, ...]
    forced: list[list[int]]
    steps: int
    ends: frozenset[int]
    closing: list[int]
    known: int
    seeds: list[int]

    def finished(self, texts: list[list[int]]) -> list[np.ndarray]:
        """The texts, int32 each, with an end."""
        return [
            np.array(
                text if not self.closing or text[-1] in self.ends else text + self.closing,
                dtype=np.int32,
            )
            for text in texts
        ]


def task_of(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    prefix: tuple[int, ...],
    rows: int,
    length: int,
    first: int,
    seed: int,
    role: Role,
) -> Task:
    """So many texts, the first of this number.

    They begin with the prefix, or what else begins a text. Every second one then has a beginning
    from the list.
    """
    start = (
        prefix
        or tuple(
            token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None
        )[:1]
    )
    begins = [
        list(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"][:length])
        for words in _BEGINNINGS[role]
    ]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    check_tokens(np.array([*start, *(token for tokens in begins for token in tokens)]), vocabulary)
    numbers = range(first, first + rows)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    digests = [hashlib.sha256(f"{seed} {role} {number}".encode()).digest() for number in numbers]
    return Task(
        start=start,
        forced=[begins[n // 2 % len(begins)] if n % 2 or not start else [] for n in numbers],
        steps=int(max(1, min(length - 1, limit - len(start)))),  # room for the end of text
        ends=frozenset(_ends(model, tokenizer)),
        closing=[tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [],
        known=len(tokenizer),
        seeds=[int.from_bytes(digest[:7], "big") for digest in digests],
    )


def _in_vllm(
    model: PreTrainedModel, folder: Path, prefix: int, length: int, tokens: int, stack: ExitStack
) -> Continue | None:
    """What continues texts in vLLM; None where there is none, or transformers is as fast."""
    device = device_of(model)
    if device.type not in VLLM_DEVICES or tokens < WORTH_VLLM or find_spec("vllm") is None:
        return None
    dtype = "bfloat16" if is_native(torch.bfloat16, device) else "float32"
    sizes = {"length": max(1, prefix) + length, "at_once": VLLM_ROWS}
    return stack.enter_context(writer(folder, **sizes, device=device.type, dtype=dtype))


def _write_in_vllm(go_on: Continue, task: Task) -> list[np.ndarray]:
    """A batch of texts. Raises VllmFailure."""
    samplings = []
    for seed, forced in zip(task.seeds, task.forced, strict=True):
        most = max(1, task.steps - len(forced))
        least = min(most, max(0, LEAST_TOKENS - len(forced)))
        samplings.append(Sampling(seed, most, least, NUCLEUS, tuple(task.ends)))
    written = go_on([[*task.start, *forced] for forced in task.forced], samplings)
    # tokens of the embedding that no text has, should it ever draw one
    texts = [
        [*forced, *takewhile(lambda token: token < task.known, text)]
        for forced, text in zip(task.forced, written, strict=True)
    ]
    return task.finished([text or task.closing for text in texts])


def _write(
    model: PreTrainedModel, task: Task, *, batches: int, step: Callable[[str], None]
) -> list[np.ndarray]:
    """A batch of texts, with each other in one pass. batches: still to write."""
    start, forced, ends, rows = task.start, task.forced, task.ends, len(task.forced)
    steps = task.steps
    device = device_of(model)
    random = torch.Generator(device).manual_seed(task.seeds[0])
    texts: list[list[int]] = [[] for _ in range(rows)] if start else [t[:1] for t in forced]
    inputs = torch.tensor([start] * rows if start else texts, device=device)
    done = 0 if start else 1
    cache, ended, timed = None, list[float](), min(TIMED, (steps - done) // 2)
    options, name = {"use_cache": True, **keeps(model, 1)}, cache_name(model)
    reading = list(range(rows))  # the texts that the model still reads
    with in_bfloat16(model), inference(model):
        for at in range(done, steps):
            out = model(input_ids=inputs, **{name: cache}, **options)
            if cache is None:
                reserve(cache_of(out), len(start) + steps)
            cache = cache_of(out)
            # a model that has nothing to say would never fill the text
            barred = list(ends) if at < LEAST_TOKENS else []
            drawn = _drawn(out.logits[:, -1].float(), task.known, barred, random)
            for index, row in enumerate(reading):
                if at < len(forced[row]):
                    drawn[index] = forced[row][at]
                if not texts[row] or texts[row][-1] not in ends:
                    texts[row].append(drawn[index])
            going = [index for index, row in enumerate(reading) if texts[row][-1] not in ends]
            if not going:
                break
            if 4 * len(going) <= 3 * len(reading) and keep_rows(cache, torch.tensor(going)):
                reading, drawn = (
                    [per_row[index] for index in going] for per_row in (reading, drawn)
                )
            inputs = torch.tensor(drawn, device=device)[:, None]
            if at <= done + timed:
                ended.append(time.monotonic())
            if at == done + timed:
                seconds = writing_seconds(ended, steps - done) * batches
                step(f"the model writes its own text, about {_duration(seconds)}")
    return task.finished(texts)


def _ends(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The tokens that end a text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}


def _drawn(
    logits: torch.Tensor, known: int, barred: list[int], random: torch.Generator
) -> list[int]:
    """A token for each row of logits [rows, vocab], of the first `known` less those barred, from
    the nucleus."""
    if not logits.max(dim=-1).values.isfinite().all():
        raise AbreastError(
            "the model gives logits that are not finite (NaN or infinite); "
            "load it in float32, or check how its weights were made"
        )
    logits[:, known:] = -torch.inf
    logits[:, barred] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    likely, tokens = probabilities.topk(min(_COMMON, probabilities.shape[-1]))
    drawn = _chosen(likely, tokens, random)
    if (flat := likely.sum(dim=-1) < NUCLEUS).any():
        drawn[flat] = _chosen(*probabilities[flat].sort(dim=-1, descending=True), random)
    return [int(token) for token in drawn.tolist()]


def _chosen(likely: torch.Tensor, tokens: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A token of the nucleus per row; likely: the probabilities [rows, n] of `tokens`, falling."""
    likely[likely.cumsum(dim=-1) - likely >= NUCLEUS] = 0
    return tokens.gather(-1, torch.multinomial(likely, 1, generator=random))[:, 0]


@contextmanager
def in_bfloat16(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a float32 model computes in bfloat16 where that is native and there is memory for it.

    Not where layers are offloaded, which are replaced with every pass, nor with recurrent layers,
    whose states and buffers stay float32.
    """
    weights = {parameter: parameter.data for parameter in model.parameters()}
    device, family = device_of(model), FAMILIES.get(model.config.model_type)
    if not (
        {(data.dtype, data.device) for data in weights.values()} == {(torch.float32, device)}
        and is_native(torch.bfloat16, device)
        and family is not None
        and family.matrices
        and _has_room(sum(data.nbytes for data in weights.values()), device)
    ):
        yield
        return
    try:
        for parameter in weights:
            parameter.data = parameter.data.to(torch.bfloat16)
        yield
    finally:
        for parameter, data in weights.items():
            parameter.data = data


def _has_room(size: int, device: torch.device) -> bool:
    """Whether a copy in half precision of so many bytes fits beside them."""
    if device.type == "cuda":
        return size / 2 < 0.8 * torch.cuda.mem_get_info(device)[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return device.type == "cpu" and 1.5 * size < 0.8 * memory


def writing_seconds(ended: Sequence[float], steps: int) -> float:
    """How long a batch takes, from the seconds at which its first steps ended.

    A step reads the cache, which grows, so each takes longer than the one before: by as much as the
    later ones took longer than the earlier. The first reads the prefix and warms up.
    """
    seconds = np.diff(ended)
    if not len(seconds):
        return 0.0
    few = max(1, len(seconds) // 4)
    first, last = np.median(seconds[:few]), np.median(seconds[-few:])
    growth = max(0.0, last - first) / max(1, len(seconds) - few)
    return float(steps * first + growth * steps * (steps - few) / 2)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
