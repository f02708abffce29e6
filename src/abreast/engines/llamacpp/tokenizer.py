"""A GGUF file's tokenizer in transformers' terms: the reverse of `vocabulary`.

transformers makes one as well, but with the splitting, the space before a text and the merges of a
class that it guesses; this one does what llama.cpp does with the same metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from abreast.engines.llamacpp.vocabulary import (
    BY_STEPS,
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    VocabularyError,
)
from abreast.errors import AbreastError, first_line, is_fault

_GGML = "tokenizer.ggml."
# Names of ways to split text into words -> that of BY_STEPS (llama.cpp, src/llama-vocab.cpp)
SPLITS = {name: name for name in BY_STEPS.values()} | {
    name: main
    for main, names in {
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        "dbrx": "smaug-bpe",
        "qwen2": "deepseek-r1-qwen kormo megrez",
        "gpt-2": "phi-2 gigachat a.x-4.0 mellum",
        "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    }.items()
    for name in names.split()
}
_ADD_BOS = {"llama-bpe", "tekken"}  # unless the file says otherwise


def special_ids(facts: Mapping[str, Any]) -> dict[str, int | None]:
    """bos_token_id and its like, None for those that a file's metadata lack."""
    kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {f"{kind}_token_id": facts.get(f"{_GGML}{n}_token_id") for kind, n in kinds.items()}


def make_tokenizer(facts: Mapping[str, Any], name: str, rows: int) -> Any:
    """The tokenizer that llama.cpp runs for the file `name` with these metadata.

    rows: of the embedding. Raises VocabularyError for one that transformers cannot run like that.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    kind, tokens = facts.get(f"{_GGML}model"), facts.get(f"{_GGML}tokens") or []
    if not tokens or len(tokens) > rows:
        raise VocabularyError(f"'{name}' has {len(tokens)} tokens, its embedding {rows} rows")
    if kind not in ("gpt2", "llama"):
        raise VocabularyError(f"'{name}' has a tokenizer of kind {kind}, not gpt2 or llama")
    try:
        backend = (_byte_level if kind == "gpt2" else _sentencepiece)(facts, name, tokens)
        backend.add_tokens(_added(facts, tokens))
        for key, index in facts.items():
            if key.startswith(_GGML) and key.endswith("_token_id") and not isinstance(index, int):
                raise ValueError(f"{key} is no number")
        ids = special_ids(facts)
        special: dict[str, Any] = {
            name.removesuffix("_id"): tokens[index]
            for name, index in ids.items()
            if index is not None
        }
        default = kind == "llama" or SPLITS.get(str(facts.get(f"{_GGML}pre"))) in _ADD_BOS
        around = []
        for end, add in (("bos", default), ("eos", False)):
            is_added = facts.get(f"{_GGML}add_{end}_token", add) and f"{end}_token" in special
            around.append([special[f"{end}_token"]] if is_added else [])
        backend.post_processor = TemplateProcessing(
            single=[*around[0], "$A", *around[1]],
            pair=[*around[0], "$A", *around[1], *around[0], "$B:1", *around[1]],
            special_tokens=[(token, tokens.index(token)) for end in around for token in end],
        )
    except AbreastError:
        raise
    except BaseException as error:  # tokenizers raises nothing narrower
        if not is_fault(error):
            raise
        raise VocabularyError(
            f"the tokenizer in '{name}' is damaged: {first_line(error)}"
        ) from None
    templates = {
        key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": text
        for key, text in facts.items()
        if key.startswith("tokenizer.chat_template") and isinstance(text, str)
    }
    if templates:
        only = next(iter(templates.values()))
        special["chat_template"] = templates if len(templates) > 1 else only
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(facts: Mapping[str, Any], name: str, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    split = SPLITS.get(str(facts.get(f"{_GGML}pre")))
    steps, ignore_merges = next((key for key, pre in BY_STEPS.items() if pre == split), ((), False))
    if not steps:
        raise VocabularyError(
            f"'{name}' splits text into words in a way ({facts.get(_GGML + 'pre')}) that is not "
            "known here; give the checkpoint that it was made from"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in facts[f"{_GGML}merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    made: list[Any] = []
    for step, setting in steps:
        if step == "Split":
            made.append(pre_tokenizers.Split(Regex(setting), "isolated"))
        elif step == "Digits":
            made.append(pre_tokenizers.Digits(setting))
        else:
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=setting))
    backend.pre_tokenizer = pre_tokenizers.Sequence(made)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(facts: Mapping[str, Any], name: str, tokens: list[str]) -> Any:
    """Merges follow from the scores: the piece with the highest is made first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tokens)}
    scores = facts[f"{_GGML}scores"]
    made = sorted(
        (-scores[index], index, token[:split], token[split:])
        for token, index in vocab.items()
        for split in range(1, len(token))
        if token[:split] in vocab and token[split:] in vocab
    )
    unknown = facts.get(f"{_GGML}unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for *_, left, right in made],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = facts.get(f"{_GGML}add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend


def _added(facts: Mapping[str, Any], tokens: list[str]) -> list[Any]:
    """Tokens that are looked for in a text before everything else."""
    from tokenizers import AddedToken

    # llama.cpp knows Phi 3's special tokens, which take the space after them, by the model's name.
    phi3 = re.search("phi-?3", str(facts.get("general.name")), re.IGNORECASE) is not None
    added = []
    for token, kind in zip(tokens, facts.get(f"{_GGML}token_type") or (), strict=False):
        if token and kind in (CONTROL, USER_DEFINED, UNKNOWN):
            special = kind != USER_DEFINED
            rstrip = phi3 and special and token not in ("<unk>", "<s>", "<|endoftext|>")
            added.append(AddedToken(token, normalized=False, special=special, rstrip=rstrip))
    return added
