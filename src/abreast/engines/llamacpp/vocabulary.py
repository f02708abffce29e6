"""A checkpoint's tokenizer in llama.cpp's terms: tokens, their types, merges, pre-tokenizer.

llama.cpp has two tokenizers for these models. "gpt2" is byte-level BPE; how it first splits text
into words is code of its own, which a GGUF file names (`pre`). "llama" is SentencePiece's BPE:
spaces are written as U+2581, unknown characters as bytes, and no words are split off.

gguf.SpecialVocab reads special tokens too, but from the files, and by its own words gets unusual
ones wrong; here the tokenizer itself is asked.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from abreast.data import CHATS, TRICKY
from abreast.errors import AbreastError
from abreast.model import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
_UNREACHABLE = -1e9  # score of pieces that no merge makes


class VocabularyError(AbreastError):
    """A tokenizer that is missing, broken, or that llama.cpp has no equal of."""


@dataclass(frozen=True)
class Vocabulary:
    """tokens, types: one entry per row of the embedding. scores: of "llama" only. merges: of "gpt2"
    only, "left right", in order. special: kind ("bos", "eos", ...) -> id. add_bos, add_eos: whether
    encoding adds them. space_prefix: whether text is encoded as if it began with a space.
    eats_space: whether special tokens take the space after them, as Phi 3's do. warnings: what
    llama.cpp reads differently, in text that is rare.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    eats_space: bool
    chat_template: str | None
    warnings: tuple[str, ...]


# The sha256 over the token ids of PROBE tells tokenizers apart; that is how llama.cpp's own
# converter (conversion/base.py, get_vocab_base_pre) finds the pre-tokenizer. These are its entries
# for tokenizers that come with the families written here.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 "
    "3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's "
    "there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
BY_HASH = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",  # Granite 3
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
}

# What a tokenizer with words of its own (and so with a hash of its own) does, step by step, and the
# type that does the same in llama.cpp (src/llama-vocab.cpp).
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_SEED = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)
_WORDS = ("ByteLevel", True)  # GPT-2's own splitting
_BYTES = ("ByteLevel", False)
BY_STEPS: dict[tuple[tuple[tuple[str, Any], ...], bool], str] = {  # steps, ignore_merges
    ((_WORDS,), False): "gpt-2",
    ((("Digits", True), _WORDS), False): "smollm",
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES), False): "dbrx",
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
    ((("Split", _SEED), _BYTES), False): "seed-coder",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
}


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer in a checkpoint's folder; `size` is the number of rows of the embedding.

    Raises VocabularyError when there is none, when it has more tokens than `size`, or when
    llama.cpp would give other ids than transformers does; the message names the token or text.
    """
    tokenizer, state = _load(folder)
    ids: dict[int, str] = {index: token for token, index in tokenizer.get_vocab().items()}
    if ids and max(ids) >= size:
        raise VocabularyError(
            f"the tokenizer in '{folder}' has token {max(ids)}, the embedding only {size} rows; "
            "they do not belong together"
        )
    model = state["model"]
    if model.get("type") != "BPE":
        raise VocabularyError(
            f"the tokenizer in '{folder}' is of kind {model.get('type')}; "
            "llama.cpp runs only BPE tokenizers for these models"
        )
    pieces = bool(model.get("byte_fallback"))
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    added = {entry["id"]: entry for entry in state.get("added_tokens") or ()}
    if pieces:
        marks = {entry["content"] for entry in added.values()}
        _check_merges(folder, merges, model["vocab"].keys() - marks)
    tokens = _texts(size, ids, added, pieces)
    scores = _scores(tokens, merges) if pieces else ()
    types = [_type(index, ids, added, model) for index in range(size)]
    for index, score in enumerate(scores):
        # what merges make as well is read so, and shown with spaces
        if types[index] == USER_DEFINED and SPACE in tokens[index] and score != _UNREACHABLE:
            types[index] = NORMAL
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer("a")["input_ids"]
    vocabulary = Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _pre(folder, tokenizer, state),
        tokens=tuple(tokens),
        types=tuple(types),
        scores=scores,
        merges=() if pieces else tuple(f"{left} {right}" for left, right in merges),
        special=_special(tokenizer),
        add_bos=bos is not None and encoded[:1] == [bos],
        add_eos=eos is not None and encoded[-1:] == [eos],
        space_prefix=pieces and _space_prefix(folder, state),
        eats_space=_eats_space(added),
        chat_template=_chat_template(tokenizer),
        warnings=tuple(_warnings(state)),
    )
    _check_ids(folder, tokenizer, added, vocabulary)
    return vocabulary


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The tokenizer as transformers runs it, and its description in the form of tokenizer.json."""
    import abreast.modeling  # noqa: F401  else transformers asks whether to run remote code

    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    there = any((folder / name).is_file() for name in names)
    tokenizer: Any = load_tokenizer(folder) if there else None
    if not getattr(tokenizer, "is_fast", False):
        raise VocabularyError(
            f"'{folder}' has no tokenizer that llama.cpp could run; "
            "copy tokenizer.json and tokenizer_config.json from the original"
        )
    return tokenizer, json.loads(tokenizer.backend_tokenizer.to_str())


def _check_merges(folder: Path, merges: list[list[str]], pieces: set[str]) -> None:
    """llama.cpp joins any two pieces that make a piece, in the order of the pieces' scores."""
    ways: dict[str, set[tuple[str, ...]]] = {piece: set() for piece in pieces}
    odd = set()
    for piece, pairs in groupby(merges, "".join):
        if ways.get(piece):
            odd.add(piece)
        ways.setdefault(piece, set()).update(map(tuple, pairs))
    sides = {piece for piece, made_by in ways.items() if made_by or len(piece) == 1}
    for piece, made_by in ways.items():
        splits = ((piece[:split], piece[split:]) for split in range(1, len(piece)))
        if piece in odd or any(
            sides.issuperset(split) and split not in made_by for split in splits
        ):
            raise VocabularyError(
                f"the tokenizer in '{folder}' does not join all that make {piece!r}, llama.cpp "
                "would; serve the checkpoint with vLLM or transformers"
            )


def _texts(
    size: int, ids: dict[int, str], added: dict[int, dict[str, Any]], pieces: bool
) -> list[str]:
    """One text per row, all different, as llama.cpp insists; rows without a token are padding."""
    texts = dict(ids)
    for index in added.keys() & ids.keys():
        if pieces and added[index]["normalized"]:  # looked for in text whose spaces are rewritten
            texts[index] = ids[index].replace(SPACE, " ")
    padding, missing = "PAD", [index for index in range(size) if index not in ids]
    while not {f"[{padding}{index}]" for index in missing}.isdisjoint(texts.values()):
        padding += "_"
    texts |= {index: f"[{padding}{index}]" for index in missing}
    return [texts[index] for index in range(size)]


def _type(index: int, ids: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> int:
    if index not in ids:
        return UNUSED
    if model.get("byte_fallback") and ids[index] == model.get("unk_token"):
        return UNKNOWN
    if index in added:
        return CONTROL if added[index]["special"] else USER_DEFINED
    token = ids[index]
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
        return BYTE
    return NORMAL


_KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}  # in llama.cpp's rule for Phi 3


def _eats_space(added: dict[int, dict[str, Any]]) -> bool:
    """Whether added tokens take the space after them just as llama.cpp has it for Phi 3."""
    takes = {entry["content"]: bool(entry["rstrip"]) for entry in added.values()}
    return takes.keys() > _KEEP_SPACE | {"</s>"} and all(
        rstrip != (token in _KEEP_SPACE) for token, rstrip in takes.items()
    )


def _warnings(state: dict[str, Any]) -> Iterator[str]:
    if (state.get("normalizer") or {}).get("type") == "NFC":
        yield (
            "llama.cpp does not compose Unicode (NFC) as the tokenizer does: text with separate "
            "accents gets other tokens there"
        )


def _check_ids(
    folder: Path, tokenizer: Any, added: dict[int, dict[str, Any]], vocabulary: Vocabulary
) -> None:
    """Refuse a tokenizer that llama.cpp, written down by these rules, would not run alike."""
    texts = {f"x{entry['content']}y {entry['content']} \n z": entry for entry in added.values()}
    chats = [_as_chat(tokenizer, chat) for chat in CHATS]
    reader = _Reader(tokenizer.backend_tokenizer, vocabulary)
    for text in (*texts, *filter(None, chats), *TRICKY):
        if vocabulary.warnings:
            text = unicodedata.normalize("NFC", text)
        theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
        if list(reader.read(text)) == theirs:
            continue
        what = f"{text!r}"
        if text in texts:
            marks = ("lstrip", "rstrip", "single_word", "normalized")
            own = ", ".join(mark for mark in marks if texts[text][mark])
            what = f"token {texts[text]['content']!r}{f' ({own})' if own else ''}"
        raise VocabularyError(
            f"llama.cpp would read {what} as other tokens than transformers does with the "
            f"tokenizer in '{folder}'; serve the checkpoint with vLLM or transformers"
        )


def _as_chat(tokenizer: Any, chat: list[dict[str, str]]) -> str | None:
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception:  # no template, or one that refuses such a conversation
        return None
    return str(text)


class _Reader:
    """llama.cpp's tokenizers (src/llama-vocab.cpp) without BOS and EOS.

    backend: splits text that holds no special tokens into words; the rest is done here.
    """

    def __init__(self, backend: Any, vocabulary: Vocabulary) -> None:
        self.backend, self.vocabulary = backend, vocabulary
        self.ids = {token: index for index, token in enumerate(vocabulary.tokens)}
        kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
        marks = [token for token, kind in kinds if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
        self.marks = sorted(marks, key=lambda token: len(token.encode()), reverse=True)

    def read(self, text: str) -> Iterator[int]:
        fragments = [(text, False)] if text else []
        for mark in self.marks:
            if mark in text:
                fragments = [part for old in fragments for part in self._split_at(mark, *old)]
        after_mark = True
        for fragment, is_mark in fragments:
            if is_mark:
                yield self.ids[fragment]
            elif self.vocabulary.model == "llama":
                prefix = " " if self.vocabulary.space_prefix and after_mark else ""
                yield from self._pieces(prefix + fragment)
            else:
                for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(fragment):
                    yield from (token.id for token in self.backend.model.tokenize(word))
            after_mark = is_mark

    def _split_at(self, mark: str, text: str, is_mark: bool) -> Iterator[tuple[str, bool]]:
        if is_mark:
            yield text, True
            return
        first, *rest = text.split(mark)
        if first:
            yield first, False
        for part in rest:
            yield mark, True
            if self.vocabulary.eats_space and mark not in _KEEP_SPACE:
                part = part.lstrip(" \t\n\v\f\r")
            if part:
                yield part, False

    def _pieces(self, text: str) -> Iterator[int]:
        """Join the two neighbours that make the best piece until none do; else take bytes."""
        ids, scores = self.ids, self.vocabulary.scores
        symbols = list(text.replace(" ", SPACE))
        while True:
            pairs = [
                (scores[ids[left + right]], -index)
                for index, (left, right) in enumerate(pairwise(symbols))
                if left + right in ids
            ]
            if not pairs:
                break
            index = -max(pairs)[1]
            symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
        for symbol in symbols:
            if symbol in ids:
                yield ids[symbol]
            else:
                yield from (ids[f"<0x{byte:02X}>"] for byte in symbol.encode())


def _scores(tokens: list[str], merges: list[list[str]]) -> tuple[float, ...]:
    """A piece's score is the rank of the first merge that makes it: the lower, the earlier."""
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    return tuple(-float(rank[token]) if token in rank else _UNREACHABLE for token in tokens)


def _steps(state: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The pre-tokenizer's steps with whatever decides about their result."""
    outer = state.get("pre_tokenizer") or {}
    steps: list[tuple[str, Any]] = []
    for step in outer.get("pretokenizers", [outer] if outer else []):
        kind = step["type"]
        if kind == "ByteLevel" and not step.get("add_prefix_space", True):
            steps.append((kind, step.get("use_regex", True)))
        elif kind == "Digits":
            steps.append((kind, step["individual_digits"]))
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = str(step["pattern"].get("Regex", ""))
            steps.append((kind, pattern.replace("\r", r"\r").replace("\n", r"\n")))
        else:
            steps.append((json.dumps(step, sort_keys=True), None))  # equals nothing known
    return tuple(steps)


def _pre(folder: Path, tokenizer: Any, state: dict[str, Any]) -> str:
    steps = (_steps(state), bool(state["model"].get("ignore_merges")))
    if (state.get("normalizer") or {}).get("type") in (None, "NFC") and steps in BY_STEPS:
        return BY_STEPS[steps]  # first, because words that were learned by other steps hash alike
    name = BY_HASH.get(fingerprint(tokenizer))
    if name is None:
        raise VocabularyError(
            f"the tokenizer in '{folder}' splits text into words in a way that llama.cpp is not "
            "known to have; serve the checkpoint with vLLM or transformers"
        )
    return name


def fingerprint(tokenizer: Any) -> str:
    """The hash by which llama.cpp's converter recognises a tokenizer."""
    return hashlib.sha256(str(tokenizer.encode(PROBE)).encode()).hexdigest()


def _space_prefix(folder: Path, state: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before text. Refuses what else it may do."""
    outer = state.get("normalizer") or {}
    steps = outer.get("normalizers", [outer] if outer else [])
    splitter = state.get("pre_tokenizer") or {}
    prefix = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] != "Replace" or step["content"] != SPACE:
            raise VocabularyError(
                f"the tokenizer in '{folder}' rewrites text ({step['type']}) in a way that "
                "llama.cpp does not; serve the checkpoint with vLLM or transformers"
            )
    if splitter.get("type") == "Metaspace" and not splitter.get("split", True):
        return prefix or splitter.get("prepend_scheme", "always") != "never"
    no_spaces = any(step.get("pattern") == {"String": " "} for step in steps)
    if splitter and not (no_spaces and splitter.get("pattern") == {"String": " "}):
        raise VocabularyError(
            f"the tokenizer in '{folder}' splits text ({splitter['type']}) before it looks for "
            "pieces, which llama.cpp does not; serve the checkpoint with vLLM or transformers"
        )
    return prefix


def _special(tokenizer: Any) -> dict[str, int]:
    kinds = ("bos", "eos", "unk", "sep", "pad", "mask")
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds}
    return {kind: index for kind, index in ids.items() if isinstance(index, int)}


def _chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
