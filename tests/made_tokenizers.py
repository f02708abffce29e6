"""Tokenizers of the kinds that models come with, trained on a little of the standard library."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing

from abreast.data import HELD_OUT, documents

WORDS = 600
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # how byte-level tokenizers split text into words; ignore_merges
    "gpt-2": (None, False),
    "llama 3": (_LETTERS + r"\p{N}{1,3}" + _REST, True),
    "qwen": (_LETTERS + r"\p{N}" + _REST, False),
}
KINDS = (*SPLITS, "prepended space", "no prepended space", "unigram")


@functools.cache
def corpus() -> tuple[str, ...]:
    return tuple(text for _, text in documents(HELD_OUT))[:12]


def byte_level(splits: str) -> Tokenizer:
    pattern, ignore_merges = SPLITS[splits]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    if pattern:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if splits == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS - 8,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if splits == "llama 3":
        tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer


def sentencepiece(prefix: bool) -> Tokenizer:
    """As converted from a .model file: every way to make a piece is a merge."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=WORDS - 270, show_progress=False)
    learner.train_from_iterator([text for text in corpus() if text.isascii()], trainer)
    learned = json.loads(learner.to_str())["model"]["vocab"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learned, key=learned.get)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:middle], piece[middle:])
        for piece in pieces[259:]
        for middle in range(1, len(piece))
        if piece[:middle] in vocabulary and piece[middle:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if not prefix:  # as Gemma's, where no spaces are left to split at
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=WORDS - 8,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([text[:4000] for text in corpus()], trainer)
    return tokenizer


@functools.cache
def made(kind: str) -> str:
    """tokenizer.json of a kind."""
    if kind in SPLITS:
        return byte_level(kind).to_str()
    return unigram().to_str() if kind == "unigram" else sentencepiece(kind[0] == "p").to_str()


def save(
    kind: str, folder: Path, change: Callable[[Tokenizer], None] | None = None, **settings: Any
) -> Path:
    """Write a tokenizer into a checkpoint's folder. settings: of tokenizer_config.json."""
    tokenizer = Tokenizer.from_str(made(kind))
    if change is not None:
        change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    if kind not in SPLITS:
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        names["chat_template"] = LLAMA_TEMPLATE
    settings = {"tokenizer_class": "TokenizersBackend", **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def chats(tokenizer: Any) -> Iterator[str]:
    """The conversations as the tokenizer's template writes them."""
    from abreast.data import CHATS

    for chat in CHATS:
        yield tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
