"""The text of a run: which one fits the model, what it was like, and what the model itself writes.

The default, ``auto``, is wikitext-2 where it can be had, the training part to calibrate on and the
test part to judge on; to heal on, half of it is Python's source. Elsewhere it is ``self`` and
Python's own source, in equal parts: ``self`` is what the model writes, see own_text.py. What
serves to calibrate begins with other prompts and random numbers than what serves to judge, and
comes from other modules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from abreast.checkpoint import read_json, write
from abreast.data import (
    AUTO,
    CALIBRATION,
    CHAT,
    HELD_OUT,
    OWN,
    WIKITEXT,
    DataError,
    Part,
    TokenStream,
    documents,
    load_tokens,
    prefix_of,
    tokenized,
)
from abreast.errors import AbreastError, first_line
from abreast.runs.folder import TEXT_FOLDER
from abreast.runs.own_text import Author, Role, own_stream

# What the default lets a model write at most: more takes as long as training on it.
MOST_OWN_TOKENS = 2**17


def token_stream(
    data: str | TokenStream,
    tokenizer: Any,
    model: str | Path,
    *,
    max_tokens: int,
    window: int,
    seed: int,
    add_bos: bool | None,
    role: Role = "calibrate",
    author: Author | None = None,
    folder: Path | None = None,
    option: str = "--data",
    mixed: bool = False,
    step: Callable[[str], None] = lambda message: None,
) -> TokenStream:
    """`data` itself if it is a stream, else the source, or sources, of this name in tokens.

    data: as for `load_tokens`, ``chat:FILE``, ``auto``, ``self``, or several with commas between
    them, of which the stream holds a window of each in turn. tokenizer: that of the model, a folder
    or name; None, where it has none, is an AbreastError. window: tokens, prefix included. author:
    loads the model, called only where it has to write; without it `self` is refused and the default
    does without. folder: of the run; its folder "text" then says what the text was like and keeps
    what the model wrote, and a later call takes the same default. option: names another text.
    mixed: the default is of two kinds, half Python's source also where wikitext-2 is in reach.
    step(message) is told which text the default is, and how long writing takes.

    Raises AbreastError as `load_tokens`, for chats that cannot be rendered, and for a model whose
    logits are not finite.
    """
    if isinstance(data, TokenStream):
        return data
    if tokenizer is None:
        raise AbreastError(f"'{model}' has no tokenizer; give a folder with its files")
    record = None if folder is None else folder / TEXT_FOLDER / f"{role}.json"
    source = data
    if data == AUTO:
        source, reason = _default(role, author is not None, record, mixed)
        step(f"the text to {role} on is {reason}; name your own with {option} FILE")
    prefix = prefix_of(tokenizer, add_bos)
    names = _sources(source)
    if data == AUTO and OWN in names:
        max_tokens = min(max_tokens, 2 * MOST_OWN_TOKENS)
    if OWN in names and author is None:
        raise AbreastError(
            "no model is judged on text of its own, or writes it in several processes; "
            f"name another text with {option}, or in eval the original with --against"
        )
    piece = max(1, window - len(prefix))
    share = max_tokens
    if len(names) > 1:
        share = math.ceil(max_tokens / len(names) / piece) * piece

    def stream_of(name: str) -> TokenStream:
        if name == OWN and author is not None:
            return own_stream(
                author,
                tokenizer,
                model,
                prefix=prefix,
                max_tokens=share,
                length=piece,
                seed=seed,
                role=role,
                folder=folder,
                step=step,
            )
        if name.startswith(CHAT):
            chats = _chats(Path(name.removeprefix(CHAT)).expanduser(), tokenizer, seed)
            return tokenized(tokenizer, chats, name, prefix, max_tokens=share, templated=True)
        return load_tokens(tokenizer, name, max_tokens=share, seed=seed, add_bos=add_bos)

    # what can be wrong with files comes before minutes of writing
    streams = {name: stream_of(name) for name in sorted(names, key=lambda name: name == OWN)}
    stream = _mixed([streams[name] for name in names], piece, max_tokens)
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        about = {"role": role, "default": data == AUTO, **stream.about()}
        write(record, json.dumps(about, indent=1) + "\n")
    return stream


def _default(role: Role, writes: bool, record: Path | None, mixed: bool) -> tuple[str, str]:
    """The source that ``auto`` stands for, and in words; the one on record, if there is one."""
    wikitext = f"hub:{WIKITEXT}@wikitext-2-raw-v1:{'train' if role == 'calibrate' else 'test'}"
    library = CALIBRATION if role == "calibrate" else HELD_OUT
    words = {
        wikitext: f"wikitext-2 ({wikitext})",
        f"{wikitext},{library}": f"half wikitext-2, half Python's source ({wikitext},{library})",
        f"{OWN},{library}": f"half what the model itself writes, half Python's source ({library})",
        library: f"Python's source ({library})",
    }
    if record is not None and record.is_file():
        known = read_json(record)
        if known.get("default") and known.get("source") in words:
            return str(known["source"]), words[str(known["source"])]
    source, why = (f"{OWN},{library}" if writes else library), ""
    try:
        if find_spec("datasets") is None:
            why = ", as wikitext-2 needs the package 'datasets'"
        else:
            next(documents(wikitext), None)
            source = f"{wikitext},{library}" if mixed else wikitext
    except DataError:
        why = ", as wikitext-2 is out of reach"
    return source, f"{words[source]}{why}"


def share_written(data: str, role: Role, folder: Path) -> float:
    """The share of a text that the model itself writes; folder: of the run."""
    names = _sources(
        _default(role, True, folder / TEXT_FOLDER / f"{role}.json", False)[0]
        if data == AUTO
        else data
    )
    return names.count(OWN) / len(names)


def _sources(data: str) -> list[str]:
    """The sources that a name stands for: one, or several with commas between them."""
    path = Path(data.removeprefix(CHAT)).expanduser()
    names = [data] if path.exists() else data.split(",")
    if AUTO in names or len({*names}) < len(names):
        raise AbreastError(f"'{data}' names a source twice, or '{AUTO}' beside another; mend it")
    return names


def _mixed(streams: Sequence[TokenStream], piece: int, max_tokens: int) -> TokenStream:
    """Several streams as one: a piece of each in turn, of a given size, until all have ended.

    So any long enough stretch of it holds all of them in equal shares.
    """
    if len(streams) == 1:
        return streams[0]
    cuts = [np.split(s.tokens, range(piece, len(s), piece)) for s in streams]
    turns = [
        (number, tokens)
        for turn in zip_longest(*cuts)
        for number, tokens in enumerate(turn)
        if tokens is not None
    ]
    owners = np.concatenate([np.full(len(tokens), number) for number, tokens in turns])
    counts = np.bincount(owners[:max_tokens], minlength=len(streams)).tolist()
    parts = tuple(
        Part(
            source=stream.source,
            tokens=count,
            documents=stream.num_documents,
            num_bytes=round(stream.num_bytes * count / len(stream)),
            beginnings=stream.parts[0].beginnings,
        )
        for stream, count in zip(streams, counts, strict=True)
    )
    return TokenStream(
        np.concatenate([tokens for _, tokens in turns])[:max_tokens],
        ",".join(stream.source for stream in streams),
        sum(part.documents for part in parts),
        sum(part.num_bytes for part in parts),
        streams[0].prefix,
        parts,
    )


def _chats(path: Path, tokenizer: Any, seed: int) -> Iterator[str]:
    """The conversations in a file of JSON lines in seeded order, as the model's template has them.

    Every line is checked before the first is rendered. Raises DataError for whatever is none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the model's tokenizer has no chat template to render conversations with; "
            "give plain text with --data"
        )
    lines = conversations(path)
    for index in np.random.default_rng(seed).permutation(len(lines)):
        number, messages, tools = lines[index]
        try:
            yield tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception as error:  # a template raises what its author chose
            raise DataError(
                f"the chat template refuses '{path}', line {number} ({first_line(error)}); "
                "mend the line or leave it out"
            ) from None


def conversations(path: Path) -> list[tuple[int, list[dict[str, Any]], Any]]:
    """(line number, messages, tools) of every line of a file of chats that is not empty.

    Raises DataError for a file that is missing or empty, and lines that hold something else.
    """
    if not path.is_file():
        raise DataError(f"no file '{path}' of conversations; check the path")
    chats = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read ({first_line(error)}); give UTF-8") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(
                f"'{path}', line {number} is not JSON; write one "
                '{"messages": [{"role": ..., "content": ...}]} per line'
            ) from None
        if not (messages := _messages(record)):
            raise DataError(
                f"'{path}', line {number} has no messages; write a list of objects with role and "
                'content under "messages"'
            )
        chats.append((number, messages, record.get("tools")))
    if not chats:
        raise DataError(f"'{path}' holds no conversation; name a longer file")
    return chats


def _messages(record: Any) -> list[dict[str, Any]]:
    """The messages of a line, ShareGPT's form included; none where any of them is malformed."""
    names = {"from": "role", "value": "content", "human": "user", "gpt": "assistant"}
    if not isinstance(record, dict):
        return []
    messages: Any = record.get("messages")
    if messages is None and isinstance(turns := record.get("conversations"), list):
        messages = [
            {names.get(k, k): names.get(v, v) if k == "from" else v for k, v in turn.items()}
            for turn in turns
            if isinstance(turn, dict)
        ]
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    )
    return messages if well_formed else []
