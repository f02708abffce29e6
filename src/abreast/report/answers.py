"""Two models answer one prompt, token by token in turn: what the playground shows.

The original and the conversion take turns, one token each, so that both meet the same moments of a
busy machine; each one's clock runs during its own steps only. Both get the same settings, and when
sampling the same random numbers, so what differs between the answers is the models' doing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from abreast.checkpoint import open_checkpoint
from abreast.data import check_tokenizers, prefix_of
from abreast.errors import AbreastError, first_line
from abreast.evaluate import shared
from abreast.model import (
    cache_name,
    cache_of,
    device_of,
    fitting_dtype,
    grouped,
    keeps,
    load,
)
from abreast.plan import Plan
from abreast.report.records import Choice, Choices

MOST_CHARACTERS, MOST_TOKENS = 100_000, 4096  # of a prompt, of an answer


@dataclass(frozen=True)
class Models:
    """The models that answer.

    limit: tokens of prompt and answer together, None for no limit. ends: tokens that end an answer.
    options: of `load`. converted: the checkpoint that is in memory, at most one. lock: held during
    every step.
    """

    run: Choices
    original: Any
    tokenizer: Any
    limit: int | None
    ends: frozenset[int]
    options: dict[str, Any]
    converted: dict[Path, Any]
    lock: threading.RLock

    def of(self, choice: Choice) -> Any:
        """The model that a choice runs on, loaded when it is first needed."""
        if choice.folder is None:
            return self.original
        with self.lock:
            if choice.folder not in self.converted:
                self.converted.clear()  # before loading, so that there are never two
                model, tokenizer = load(choice.folder, **self.options)
                if tokenizer is not None:
                    check_tokenizers(tokenizer, self.tokenizer)
                _warm(model)
                self.converted[choice.folder] = model
            return self.converted[choice.folder]


def open_models(
    run: Choices,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    step: Callable[[str], None] = lambda message: None,
) -> Models:
    """Load the original and its tokenizer. Raises AbreastError as `load` does, and without one."""
    options: dict[str, Any] = {
        "dtype": fitting_dtype(open_checkpoint(run.model), dtype, device, step=step),
        "device": device,
    }
    original, tokenizer = load(run.model, trust_remote_code=trust_remote_code, **options)
    if tokenizer is None:
        raise AbreastError(f"'{run.model}' has no tokenizer; give a folder with its files")
    _warm(original)
    ends = getattr(original.generation_config, "eos_token_id", None)
    return Models(
        run=run,
        original=original,
        tokenizer=tokenizer,
        limit=getattr(original.config.get_text_config(), "max_position_embeddings", None),
        ends=frozenset([ends] if isinstance(ends, int) else ends or ()),
        options=options,
        converted={},
        lock=threading.RLock(),
    )


def _warm(model: Any) -> None:
    """Read the weights into memory and let libraries set up, which is not to be timed."""
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device_of(model)))


@dataclass(frozen=True)
class Settings:
    """How to generate. temperature 0 takes the likeliest token. top_p: 1 leaves all tokens in."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, valid in (
            (
                "the number of new tokens",
                self.max_new_tokens,
                1 <= self.max_new_tokens <= MOST_TOKENS,
            ),
            ("the temperature", self.temperature, 0 <= self.temperature <= 5),
            ("top-p", self.top_p, 0 < self.top_p <= 1),
            ("the seed", self.seed, 0 <= self.seed < 2**63),
        ):
            if not valid:
                raise AbreastError(f"{name} cannot be {value:g}; choose another")


@dataclass(frozen=True)
class Answer:
    """An answer so far. tokens: ids, a closing one included.

    prefill: seconds to the first token. decode: seconds of all later steps. ended: the model
    closed it.
    """

    tokens: tuple[int, ...] = ()
    prefill: float = 0.0
    decode: float = 0.0
    ended: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the prompt's pass left out; NaN before the second token."""
        return (len(self.tokens) - 1) / self.decode if self.decode else math.nan


def encode(models: Models, prompt: str, *, chat: bool = False) -> list[int]:
    """The prompt's token ids. chat: as a user's message in the tokenizer's chat template.

    Raises AbreastError for an empty prompt, one that leaves no room for an answer, and a template
    that does not take it.
    """
    if not prompt:
        raise AbreastError("the prompt is empty; write the beginning of a text")
    if len(prompt) > MOST_CHARACTERS:
        raise AbreastError(
            f"the prompt has {len(prompt):,} characters; give {MOST_CHARACTERS:,} at most"
        )
    tokenizer = models.tokenizer
    if chat:
        message = [{"role": "user", "content": prompt}]
        try:
            prompt = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template raises what its author chose
            reason = str(error) or first_line(error)
            raise AbreastError(f"the chat template refuses it ({reason}); switch it off") from None
    try:
        ids: list[int] = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    except Exception as error:  # of half a character, tokenizers of every kind raise their own
        raise AbreastError(
            f"the tokenizer refuses this prompt ({first_line(error)}); write another"
        ) from None
    if not ids:
        raise AbreastError("the tokenizer makes no token of this prompt; write another")
    if not chat:  # a template writes it itself
        ids = [*prefix_of(tokenizer), *ids]
    if models.limit is not None and len(ids) >= models.limit:
        raise AbreastError(
            f"the prompt has {len(ids):,} tokens, the model holds {models.limit:,} with the "
            "answer; shorten it"
        )
    vocabulary = models.original.get_input_embeddings().weight.shape[0]
    if max(ids) >= vocabulary:
        raise AbreastError(
            f"the tokenizer makes token {max(ids)} of this prompt, the model knows {vocabulary}; "
            "tokenizer and weights do not belong together"
        )
    return ids


def answers(
    models: Models, choice: Choice, ids: Sequence[int], settings: Settings
) -> Iterator[tuple[Answer, Answer]]:
    """The original's answer and the choice's, as they grow by a token each.

    Raises AbreastError for logits that are not finite, and as `grouped` and `load` do.
    """
    room = math.inf if models.limit is None else models.limit - len(ids)
    settings = replace(settings, max_new_tokens=int(min(settings.max_new_tokens, room)))
    sides = [
        _steps(models, model, plan, ids, settings)
        for model, plan in (
            (models.original, None),
            (models.of(choice), choice.plan if choice.folder is None else None),
        )
    ]
    original, converted = Answer(), Answer()
    while True:
        longer = [next(side, None) for side in sides]
        if longer == [None, None]:
            return
        original, converted = longer[0] or original, longer[1] or converted
        yield original, converted


def _steps(
    models: Models, model: Any, plan: Plan | None, ids: Sequence[int], settings: Settings
) -> Iterator[Answer]:
    sampler = Sampler(settings)
    last, name = keeps(model, 1), cache_name(model)
    answer, cache = Answer(), None
    inputs = torch.tensor([list(ids)], device=device_of(model))
    while len(answer.tokens) < settings.max_new_tokens and not answer.ended:
        # grouped anew for every token, because the original takes its turns on the same weights
        under = grouped(model, plan) if plan is not None and plan.groups else nullcontext()
        with models.lock, torch.inference_mode(), under:
            start = time.perf_counter()
            out = model(input_ids=inputs, **{name: cache}, use_cache=True, **last)
            token = sampler.choose(out.logits[0, -1])  # waits for the device
            seconds = time.perf_counter() - start
        cache, inputs = cache_of(out), torch.tensor([[token]], device=device_of(model))
        answer = Answer(
            tokens=(*answer.tokens, token),
            prefill=answer.prefill if answer.tokens else seconds,
            decode=answer.decode + seconds if answer.tokens else 0.0,
            ended=token in models.ends,
        )
        yield answer


class Sampler:
    """Chooses tokens with its own random numbers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._generator = torch.Generator().manual_seed(settings.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """A token by its logits [vocabulary]. Raises AbreastError where they are not finite."""
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        highest, token = logits.max(dim=-1)
        if not math.isfinite(highest.item()):
            raise AbreastError(
                "the model gives logits that are not finite (NaN or infinite); "
                "start again with --dtype float32"
            )
        if self._settings.temperature == 0:
            return int(token)
        scores = logits.float().cpu()[None]
        scores = TemperatureLogitsWarper(float(self._settings.temperature))(None, scores)
        if self._settings.top_p < 1:
            scores = TopPLogitsWarper(float(self._settings.top_p))(None, scores)
        # argmax of p / noise is a draw from p, and like distributions draw alike from one noise
        noise = torch.empty_like(scores).exponential_(generator=self._generator)
        return int((scores.softmax(dim=-1) / noise).argmax())


def parting(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; None while one only goes further."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (one, other) in pairs if one != other), None)


@dataclass(frozen=True)
class Segments:
    """An answer's text: what both share, the first differing token, what follows."""

    same: str
    first: str = ""
    rest: str = ""


def segments(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], index: int | None
) -> Segments:
    """Split an answer's text at the token of this index.

    A character whose bytes lie in several tokens goes to the part that completes it.
    """
    text = decode(tokens)
    if index is None:
        return Segments(text)
    same = shared(text, decode(tokens[:index]))
    through = max(same, shared(text, decode(tokens[: index + 1])))
    return Segments(text[:same], text[same:through], text[through:])
