"""What two models write: greedy continuations of the same prompts, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.model import inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sample(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    tokenizer: Any,
    stream: TokenStream,
    *,
    count: int = 5,
    prompt_tokens: int = 48,
    new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """Let both models continue `count` prompts, cut from evenly spaced places of the stream.

    Prompts begin at the beginning of a line where there is one near. Both models decode greedily
    and stop at the end of text. Per prompt: prompt, original, converted (text), new_tokens (how
    many each wrote), first_difference: the position, from 0, of the first token that differs, None
    where all agree; shared: how many characters of text both begin with up to there. Shorter where
    a model cannot hold so many tokens.
    """
    limits = [
        limit
        for model in (original, converted)
        if (limit := getattr(model.config.get_text_config(), "max_position_embeddings", None))
    ]
    room = min([prompt_tokens + new_tokens, *limits])
    prompt_tokens = min(prompt_tokens, room // 2)
    new_tokens = min(new_tokens, room - prompt_tokens)
    count = min(count, len(stream) // max(1, prompt_tokens))
    if count < 1 or prompt_tokens < 1:
        raise AbreastError("the text is too short to cut prompts from; name a longer one")
    found = []
    with inference(original, converted):
        for place in range(0, count * (len(stream) // count), len(stream) // count):
            ids = _prompt(tokenizer, stream.tokens[place:], prompt_tokens)
            ours, theirs = (_continue(m, ids, new_tokens) for m in (original, converted))
            texts = [tokenizer.decode(each, skip_special_tokens=True) for each in (ours, theirs)]
            first = first_difference(ours, theirs)
            agreed = tokenizer.decode(ours[:first], skip_special_tokens=True)
            found.append(
                {
                    "prompt": tokenizer.decode(ids, skip_special_tokens=True),
                    "original": texts[0],
                    "converted": texts[1],
                    "new_tokens": [len(ours), len(theirs)],
                    "first_difference": first,
                    # a token may end within a character, so the agreed text need not be a prefix
                    "shared": shared(agreed, *texts),
                }
            )
    return found


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Where two lists of token ids first differ, counted from 0; None where they are the same."""
    pairs = zip(ours, theirs, strict=False)
    unlike = (place for place, (a, b) in enumerate(pairs) if a != b)
    end = min(len(ours), len(theirs)) if len(ours) != len(theirs) else None
    return next(unlike, end)


def shared(*texts: str) -> int:
    """How many characters all texts begin with."""
    columns = enumerate(zip(*texts, strict=False))
    ends = (place for place, letters in columns if len(set(letters)) > 1)
    return next(ends, min(map(len, texts)))


def _prompt(tokenizer: Any, tokens: Any, prompt_tokens: int) -> list[int]:
    """The first tokens of a text, from the first beginning of a line in it on."""
    text = tokenizer.decode(tokens[: 3 * prompt_tokens], skip_special_tokens=True)
    _, _, rest = text.partition("\n")
    ids = list(tokenizer(rest.lstrip("\n"), add_special_tokens=False)["input_ids"])
    if len(ids) < prompt_tokens:
        return [int(token) for token in tokens[:prompt_tokens]]
    return ids[:prompt_tokens]


def _continue(model: PreTrainedModel, ids: list[int], new_tokens: int) -> list[int]:
    prompt = torch.tensor([ids], device=model.device)
    generate: Any = model.generate
    text = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,  # one row needs no padding; without it transformers warns
    )
    written: list[int] = text[0, len(ids) :].tolist()
    return written
