"""The text of a run: which one fits the model, what it was like, and what the model itself writes.

The default, ``auto``, is wikitext-2 where it can be had, the training part to calibrate on and the
test part to judge on; to heal on, half of it is Python's source. Elsewhere it is ``self`` and
Python's own source, in equal parts: ``self`` is what the model writes, sampled at temperature 1.
What serves to calibrate begins with other prompts and random numbers than what serves to judge, and
comes from other modules.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from abreast.checkpoint import open_checkpoint, own_file, read_json, replacing, write
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
    beginning,
    documents,
    load_tokens,
    prefix_of,
    tokenized,
)
from abreast.errors import AbreastError, first_line
from abreast.model import cache_name, cache_of, device_of, inference, keeps_last
from abreast.runs.folder import TEXT_FOLDER, check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Role = Literal["calibrate", "judge"]
Author = Callable[[], "PreTrainedModel"]
# What the default lets a model write at most: more takes as long as training on it.
MOST_OWN_TOKENS = 2**17
ROWS, LEAST_TOKENS, TIMED = 32, 8, 128  # texts at once, tokens of each; steps timed
_VERSION = 1
_BEGINNINGS = {  # every second text begins with one of them, the others with what the model likes
    "calibrate": ("The", "In", "It was", "How to", "When", "A", "1.", "I", "There are", "For"),
    "judge": ("This", "On", "We", "What is", "After", "An", "-", "You", "She said", "If"),
}


def _silent(message: str) -> None:
    """Says nothing."""


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
    step: Callable[[str], None] = _silent,
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
            return _own(
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


def _own(
    author: Author,
    tokenizer: Any,
    model: str | Path,
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

    length: tokens of a text, of which at most ROWS are written at a time. The last batch has only
    as many as are missing, by the mean length so far.
    """
    identity = {
        "version": _VERSION,
        "model": open_checkpoint(model).sha256,
        "prefix": list(prefix),
        "tokens": max_tokens,
        "length": length,
        "seed": seed,
        "role": role,
    }
    path = None if folder is None else folder / TEXT_FOLDER / f"{role}.safetensors"
    texts = [] if path is None else saved_texts(path, identity)
    writer = None
    while (left := max_tokens - sum(map(len, texts))) > 0:
        writer = writer or author()
        mean = sum(map(len, texts)) / len(texts) if texts else length
        rows = min(ROWS, math.ceil(left / mean))
        texts += _write(
            writer,
            tokenizer,
            prefix=prefix,
            rows=rows,
            length=length,
            first=len(texts),
            seed=seed,
            role=role,
            batches=math.ceil(left / (rows * mean)),
            step=step,
        )
        step = _silent
        if path is not None:
            save_texts(path, identity, texts, tokenizer)
    tokens = np.concatenate(texts)[:max_tokens].astype(np.int64)
    whole = sum(len(tokenizer.decode(text, skip_special_tokens=True).encode()) for text in texts)
    size = round(whole * len(tokens) / sum(map(len, texts)))
    words = tuple(beginning(tokenizer.decode(t[:64], skip_special_tokens=True)) for t in texts[:3])
    part = Part(OWN, len(tokens), len(texts), size, words)
    return TokenStream(tokens, OWN, len(texts), size, prefix, (part,))


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


def _write(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    prefix: tuple[int, ...],
    rows: int,
    length: int,
    first: int,
    seed: int,
    role: Role,
    batches: int,
    step: Callable[[str], None],
) -> list[np.ndarray]:
    """A batch of texts, int32 each: its first tokens, if any, and what the model continues with.

    They begin with the prefix, or what else begins a text, which is left out of them. Every second
    one then has a beginning from the list. first: number of the first. batches: still to write.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    start = (
        prefix
        or tuple(t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None)[:1]
    )
    starts = [
        tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"][:length]
        for words in _BEGINNINGS[role]
    ]
    forced = [
        list(starts[row // 2 % len(starts)]) if row % 2 or not start else []
        for row in range(first, first + rows)
    ]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    check_tokens(np.array([*start, *(t for tokens in starts for t in tokens)]), vocabulary)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    steps = int(max(1, min(length - 1, limit - len(start))))  # room for the end of text
    digest = hashlib.sha256(f"{seed} {role} {first}".encode()).digest()
    device = device_of(model)
    random = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    texts: list[list[int]] = [[] for _ in range(rows)]
    if start:
        inputs, done = torch.tensor([start] * rows, device=device), 0
    else:
        texts = [tokens[:1] for tokens in forced]
        inputs, done = torch.tensor(texts, device=device), 1
    cache, ended, timed = None, list[float](), min(TIMED, (steps - done) // 2)
    options, name = {"use_cache": True, **keeps_last(model, 1)}, cache_name(model)
    with inference(model):
        for at in range(done, steps):
            out = model(input_ids=inputs, **{name: cache}, **options)
            cache = cache_of(out)
            logits = out.logits[:, -1].float()
            if not logits.max(dim=-1).values.isfinite().all():
                raise AbreastError(
                    "the model gives logits that are not finite (NaN or infinite); "
                    "load it in float32, or check how its weights were made"
                )
            logits[:, len(tokenizer) :] = -torch.inf
            if at < LEAST_TOKENS:  # or a model that has nothing to say would never fill the text
                logits[:, list(ends)] = -torch.inf
            drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=random)[:, 0].tolist()
            drawn = [f[at] if at < len(f) else t for f, t in zip(forced, drawn, strict=True)]
            for text, token in zip(texts, drawn, strict=True):
                if not text or text[-1] not in ends:
                    text.append(token)
            if all(text[-1] in ends for text in texts):
                break
            inputs = torch.tensor([[token] for token in drawn], device=device)
            if at <= done + timed:
                ended.append(time.monotonic())
            if at == done + timed:
                seconds = writing_seconds(ended, steps - done) * batches
                step(f"the model writes its own text, about {_duration(seconds)}")
    closing = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return [
        np.array(text if not closing or text[-1] in ends else text + closing, dtype=np.int32)
        for text in texts
    ]


def writing_seconds(ended: Sequence[float], steps: int) -> float:
    """How long a batch takes, from the seconds at which its first steps ended.

    A step copies the cache, which grows, so each takes longer than the one before: by as much as
    the later ones took longer than the earlier. The first reads the prefix and warms up.
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
