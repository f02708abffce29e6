"""Token streams: seeded, hashed, and available offline.

A *source* names text: a file, a folder, ``hub:NAME[@CONFIG][:SPLIT[:COLUMN]]`` for a data set on
the Hugging Face Hub, ``chat:FILE`` for conversations, a JSON object per line, or ``stdlib``: real
text that every Python has, the modules of the running interpreter's own standard library. One
module in twenty, chosen by the hash of its name, is *held out*: the bundled model never saw it, so
it can be evaluated on it. The others (``stdlib-train``) serve for calibration, and the two never
overlap. Sources that need a model as well, ``auto`` and ``self``, are in `runs`.

What a tokenizer puts before a text, its *prefix*, is most often a beginning-of-text token, and
models trained with it predict badly without it. Text is cut into windows, and every window is the
prefix, then text: the prefix is context and is never scored.

At import this module needs the standard library and numpy only.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from abreast.errors import AbreastError, first_line, install

HELD_OUT = "stdlib"
CALIBRATION = "stdlib-train"
PROSE = "pydoc"
AUTO, OWN, CHAT = "auto", "self", "chat:"
WIKITEXT = "Salesforce/wikitext"
REACH_TIMEOUT = 2  # seconds to wait for the Hub, where it is asked whether it is there
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".text", ".csv"})
# What tokenizers that look equal read differently.
TRICKY = (
    *("", " ", "a", " a", "a ", "   a   b", "\t\ta", "\n\n\n", " \n \n", "a\r\n\r\nb"),
    "def f(x):\n\treturn x ** 2  # comment\n\n    pass\n",
    "  leading, trailing  ",
    "It's we'RE they'Ve I'll 'quoted' don''t ’s",
    *("0", "12 123 1234 12345.678", "1,000,000 0x1F 1e-9", "½ ³ ٣ Ⅷ 一二三"),
    *("Grüße, naïve façade", "e\u0301 and o\u0308, not composed", "ﬁne ﬀ ™ ａｂ"),
    *("Ελληνικά, Русский, עברית", "中文字符 日本語 ひらがな 한국어", "ไทย हिन्दी ខ្មែរ"),
    *(
        "🚀 👩\u200d👩\u200d👧 🏳️\u200d🌈",
        "hard\u00a0space, em\u2003space, zero\u200bwidth",
        "\ufeffmark",
    ),
    *("x\u0000y\u0007", "\u2581 \u2581a a\u2581\u2581b", "Ġ Ċ <0x41> <0x0A> [PAD5]"),
    *("<unk> <s> </s> <pad> <mask>", "<|endoftext|> <|im_end|> [INST] <bos> <eos>"),
    "a" * 40 + " " * 17 + "=" * 33 + "\t" * 5,
    "camelCaseHTTPServer __init__ snake_case/path-like\\thing",
    '{"key": [1, -2.5e3, null], "k2": "v\\n"}',
    "<div class='a'>&amp;<br/></div>  <!-- no -->",
    "https://example.com/a?b=c&d=%20e#f",
    "... --- *** ### $$$ @@@ !!! ?!",
    "SHOUTING, Title Case, mIxEd; and: so (on)",
    *("end of a line.\n  Next one.", "\u202eright to left\u202c"),
)
_TURNS = (  # what user and assistant say in turn
    ("Hi",),
    ("  Hi \n",),
    ("\nWhat is 12 * 34?\n\n", "408"),
    ("Say it's done.", " It's done! ", "Thanks"),
    ("def f(x):\n    return x\n", "```python\nf(1)\n```", "  and now?"),
    ("Grüße, 中文 🚀", "naïve", "ça va"),
    ("a", "b", "c", "d", "e"),
    ("<|im_end|> </s> [INST]", "no", "yes"),
    ("1,000,000\t0x1F", "1e-9", "..."),
    ("one\n\ntwo\n\n\nthree", "four.", " five"),
)
CHATS = tuple(
    [
        {"role": "assistant" if index % 2 else "user", "content": text}
        for index, text in enumerate(turns)
    ]
    for turns in _TURNS
)
PROBE = "The first words of a text, and 12 more."
# Tokens read beyond those that are used: where a text is cut, tokenizers see its last ones
# differently.
MARGIN = 256


class DataError(AbreastError):
    """A data source that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Part:
    """What one source gave to a stream. beginnings: the first words of its first documents."""

    source: str
    tokens: int
    documents: int
    num_bytes: int
    beginnings: tuple[str, ...]


@dataclass(frozen=True)
class TokenStream:
    """One long sequence of token ids and where it came from.

    tokens: int64 array of shape [num_tokens]. source: its name, as the caller gave it.
    num_documents: how many documents went into it. num_bytes: UTF-8 bytes of the text that the
    tokens stand for. prefix: token ids that every window cut from the stream begins with. parts:
    what each source gave, where that is known.
    """

    tokens: np.ndarray
    source: str
    num_documents: int
    num_bytes: int
    prefix: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of tokens and prefix: two results with the same hash rest on the same data."""
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens, dtype="<i8").tobytes())
        if self.prefix:
            digest.update(f"prefix {self.prefix}".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def about(self) -> dict[str, Any]:
        """What text it is, JSON-ready."""
        parts = [asdict(part) for part in self.parts]
        return {"source": self.source, "sha256": self.sha256, "tokens": len(self), "parts": parts}


def prefix_of(tokenizer: Any, add_bos: bool | None = None) -> tuple[int, ...]:
    """Ids of the tokens that a transformers tokenizer puts before a text; what follows one is not.

    add_bos: False for none; True for the beginning-of-text token where the tokenizer would put
    nothing. Raises DataError where there is no such token, and for a tokenizer that reads a text
    otherwise when it adds special tokens.
    """
    if add_bos is False:
        return ()
    plain, full = (
        list(tokenizer(PROBE, add_special_tokens=special, verbose=False)["input_ids"])
        for special in (False, True)
    )
    starts = range(len(full) - len(plain) + 1 if plain else 0)
    start = next((i for i in starts if full[i : i + len(plain)] == plain), None)
    if start is None:
        raise DataError(
            "what the tokenizer puts before a text cannot be told, because it reads the text "
            "differently then; use --no-add-bos"
        )
    if start or not add_bos:
        return tuple(full[:start])
    if tokenizer.bos_token_id is None:
        raise DataError("the tokenizer has no beginning-of-text token; leave out --add-bos")
    return (tokenizer.bos_token_id,)


def is_held_out(name: str) -> bool:
    """Whether the standard-library module file `name` (posix path relative to Lib) is held out."""
    return int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16) % 20 == 0


def stdlib_files() -> dict[str, Path]:
    """Every module file of the running standard library, without its tests: name -> path.

    Names are posix paths relative to the library folder, in sorted order.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        parts = name.split("/")
        if parts[0] == "test" or {"site-packages", "dist-packages", "__pycache__"} & set(parts):
            continue
        modules[name] = path
    return dict(sorted(modules.items()))


def documents(source: str = HELD_OUT) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document of a source, in a fixed order.

    Raises DataError when the source does not exist, holds no text, or needs a package that is not
    installed.
    """
    for name, document in _documents(source):
        yield name, _read(document)


def load_tokens(
    tokenizer: Any,
    source: str = HELD_OUT,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    add_bos: bool | None = None,
) -> TokenStream:
    """Tokenise a source into one stream, its documents in seeded random order.

    tokenizer: a transformers tokenizer. Each document is followed by the end-of-text token if the
    tokenizer has one; add_bos: see `prefix_of`. max_tokens cuts the stream, and nothing is read
    that lies far behind the cut; a Hub data set is never shuffled. The order depends on the seed
    and the documents' number only, so the same source, tokenizer and seed give the same stream.
    Raises DataError when fewer than 2 tokens come out, and as `prefix_of`.
    """
    prefix = prefix_of(tokenizer, add_bos)
    return tokenized(tokenizer, _shuffled(source, seed), source, prefix, max_tokens=max_tokens)


def tokenized(
    tokenizer: Any,
    documents: Iterable[str | Path],
    source: str,
    prefix: tuple[int, ...],
    *,
    max_tokens: int | None,
    templated: bool = False,
) -> TokenStream:
    """Documents, or files of them, as a stream, see `load_tokens`.

    templated: a chat template wrote them, with the prefix and the end of text where it has them.
    """
    if max_tokens is not None and max_tokens < 2:
        raise DataError(f"{max_tokens} tokens are too few; ask for at least 2")
    pieces: list[np.ndarray] = []
    beginnings: list[str] = []
    total = num_bytes = 0
    for document in documents:
        most = None if max_tokens is None else max_tokens - total
        ids, size = _encode(tokenizer, document, most, prefix if templated else None)
        pieces.append(np.asarray(ids, dtype=np.int64))
        total += len(ids)
        num_bytes += size
        if len(beginnings) < 3:
            beginnings.append(beginning(_read(document, 400)))
        if max_tokens is not None and total >= max_tokens:
            break
    tokens = np.concatenate(pieces)
    if len(tokens) < 2:
        raise DataError(f"data source '{source}' gives {len(tokens)} tokens; name a longer text")
    part = Part(source, len(tokens), len(pieces), num_bytes, tuple(beginnings))
    return TokenStream(tokens, source, len(pieces), num_bytes, prefix, (part,))


def beginning(text: str) -> str:
    """The first words of a text, to show what it is like."""
    return " ".join(text[:400].split()[:16])[:100]


def _encode(
    tokenizer: Any, document: str | Path, most: int | None, written: tuple[int, ...] | None
) -> tuple[list[int], int]:
    """The first `most` tokens of a document, its end-of-text token included, and their bytes.

    written: what a template put before its text, to be taken off; None without a template.
    """
    characters = -1 if most is None else 8 * (most + MARGIN)
    while True:
        text = _read(document, characters)
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        whole = characters < 0 or len(text) < characters
        if written and tuple(ids[: len(written)]) == written:
            ids = ids[len(written) :]
        ended = written is not None and tokenizer.eos_token_id in ids[-2:]
        if whole and tokenizer.eos_token_id is not None and not ended:
            ids.append(tokenizer.eos_token_id)
        if whole or len(ids) >= (most or 0) + MARGIN:
            break
        characters *= 4
    size = len(text.encode())
    if most is None or len(ids) <= most:
        return ids, size
    return ids[:most], round(size * most / len(ids))


def _shuffled(source: str, seed: int) -> Iterator[str | Path]:
    if source.startswith("hub:"):
        # A data set may be far larger than memory: it is read as far as needed, in its own order.
        yield from (document for _, document in _documents(source))
        return
    every = [document for _, document in _documents(source)]
    for index in np.random.default_rng(seed).permutation(len(every)):
        yield every[index]


def _documents(source: str) -> Iterator[tuple[str, str | Path]]:
    """(name, text) of every document of a source, or the path of its file."""
    if not source:
        raise DataError(f"the data source is empty; name a text file, a folder or '{HELD_OUT}'")
    if source in (HELD_OUT, CALIBRATION):
        yield from _stdlib_documents(held_out=source == HELD_OUT)
    elif source == PROSE:
        yield from _reference_topics()
    elif source.startswith("hub:"):
        yield from _hub_documents(source)
    else:
        yield from _file_documents(Path(source).expanduser())


def _read(document: str | Path, characters: int = -1) -> str:
    """A document's text, or its first characters where that is no negative number."""
    if isinstance(document, str):
        return document if characters < 0 else document[:characters]
    try:
        with document.open(encoding="utf-8") as file:
            return file.read(characters)
    except UnicodeDecodeError:
        raise DataError(f"'{document}' is not UTF-8 text; convert it or leave it out") from None
    except OSError as error:
        raise DataError(f"'{document}' cannot be read: {error.strerror}") from None


@cache
def _stdlib_documents(held_out: bool) -> tuple[tuple[str, Path], ...]:
    readable = []
    for name, path in stdlib_files().items():
        if is_held_out(name) == held_out and not name.startswith("pydoc_data/"):
            with suppress(DataError):
                if _read(path).strip():
                    readable.append((name, path))
    if not readable:
        raise DataError(
            "this Python has no source files of its standard library; name a text file or folder"
        )
    return tuple(readable)


def _reference_topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python has no documentation of its own; name a text file or folder"
        ) from None
    yield from sorted(topics.items())


def _file_documents(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES)
        if not files:
            known = " ".join(sorted(TEXT_SUFFIXES))
            raise DataError(f"folder '{path}' holds no text files (looked for {known})")
    else:
        raise DataError(
            f"data source '{path}' not found; name a text file, a folder, '{HELD_OUT}', "
            f"'{CALIBRATION}', '{PROSE}', '{OWN}', '{AUTO}', '{CHAT}FILE' or 'hub:DATASET'"
        )
    empty = True
    for file in files:
        if _holds_text(file):
            empty = False
            yield file.name if path.is_file() else file.relative_to(path).as_posix(), file
    if empty:
        raise DataError(f"data source '{path}' holds no text; name a longer text")


def _holds_text(file: Path) -> bool:
    characters = 4096
    while not (text := _read(file, characters)).strip():
        if len(text) < characters:
            return False
        characters *= 16
    return True


def _hub_documents(source: str) -> Iterator[tuple[str, str]]:
    whole, _, rest = source.removeprefix("hub:").partition(":")
    name, _, config = whole.partition("@")
    split, _, column = rest.partition(":")
    split, column = split or "test", column or "text"
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise DataError(
            f"reading a Hub data set needs the 'datasets' package: {install('eval')}"
        ) from None
    try:
        with hub_or_cache():
            rows = load_dataset(name, config or None, split=split, streaming=True)
        texts = (_column(row, column, f"hub:{whole}:{split}", name) for row in rows)
        for number, text in enumerate(_articles(texts) if name == WIKITEXT else texts):
            if text.strip():
                yield str(number), text
    except DataError:
        raise
    except ConnectionError:
        raise DataError(
            f"data set '{name}' is not in the cache, and the Hugging Face Hub is out of reach; "
            "go online, or name a text file"
        ) from None
    except Exception as error:  # the Hub client raises many kinds; all mean "not available"
        reason = first_line(error)
        if "Config name" in reason:  # and the next line has the names
            reason = f"{str(error).partition(chr(10) + 'Example')[0]}: use hub:{name}@CONFIG"
        raise DataError(f"data set '{name}' cannot be read: {reason}") from None


def _column(row: Mapping[str, str], column: str, source: str, name: str) -> str:
    if column not in row:
        raise DataError(
            f"data set '{name}' has no column '{column}'; it has {', '.join(row)}: "
            f"use {source}:COLUMN"
        )
    return row[column]


def _articles(lines: Iterator[str]) -> Iterator[str]:
    """The articles of wikitext, whose rows are lines; one begins with a heading in single ='s."""
    article: list[str] = []
    for line in lines:
        if line.startswith(" = ") and not line.startswith(" = = ") and article:
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


@cache
def hub_in_reach() -> bool:
    """Whether the Hugging Face Hub answers; asked once in a process, for REACH_TIMEOUT seconds."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: list[Any] = []

    def ask() -> None:
        with suppress(Exception):  # of whichever HTTP library it uses
            answers.append(get_session().head(constants.ENDPOINT, timeout=REACH_TIMEOUT))

    if not constants.is_offline_mode():
        asking = Thread(target=ask, daemon=True)  # no timeout covers the look-up of a name
        asking.start()
        asking.join(REACH_TIMEOUT)
    return bool(answers)


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Let `datasets` go straight to its cache where the Hub does not answer, instead of retrying.

    Raises nothing: where the cache lacks the data, the error is that of `datasets`.
    """
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not hub_in_reach():
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def tricky_texts(tokenizer: Any) -> list[str]:
    """`TRICKY`, and every token that was added to a tokenizer, with text and spaces around it."""
    return [*TRICKY, *(f"x{token}y {token} \n z" for token in tokenizer.get_added_vocab())]


def check_tokenizers(tokenizer: Any, reference: Any) -> None:
    """Raise AbreastError unless two tokenizers share one vocabulary and read texts alike."""
    ours, theirs = tokenizer.get_vocab(), reference.get_vocab()
    if ours != theirs:
        differing = len(set(ours.items()) ^ set(theirs.items()))
        raise AbreastError(
            f"the two models have different tokenizers ({differing} entries differ), so their "
            "token probabilities cannot be compared; compare bits_per_byte of each instead"
        )
    texts = tricky_texts(reference)
    pairs = (read(texts, verbose=False)["input_ids"] for read in (tokenizer, reference))
    for text, own, other in zip(texts, *pairs, strict=True):
        if own != other:
            raise AbreastError(
                f"the two models read {text!r} as different tokens, so they cannot be compared; "
                "give both the tokenizer of one, or convert again"
            )
