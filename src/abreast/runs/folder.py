"""Folders of results that a later call goes on with, and the windows of text that they rest on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from abreast.checkpoint import open_checkpoint, sha256_of, write
from abreast.data import TokenStream, load_tokens
from abreast.errors import AbreastError

JOURNAL = "journal-{}.jsonl"
Journal = dict[tuple[str, int], dict[str, Any]]


def open_run(out: Path, kind: str, identity: dict[str, Any]) -> Path:
    """Make folder `out` with KIND.json, or check that the one there rests on the same identity.

    Raises AbreastError where it rests on another, naming what differs, and for a folder with
    something else in it.
    """
    record = out / f"{kind}.json"
    if record.is_file():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))["identity"]
            differing = [key for key in identity if found.get(key) != identity[key]]
        except (ValueError, LookupError, AttributeError, TypeError):
            raise AbreastError(f"'{record}' is damaged; choose a new folder") from None
        if differing:
            raise AbreastError(
                f"'{out}' holds a {kind} with other {', '.join(differing)}; choose a new folder"
            )
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AbreastError(f"'{out}' exists and is not a {kind}; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write(record, json.dumps({"identity": identity}, indent=2) + "\n")
    return out


def gather(out: Path) -> Journal:
    """Merge the workers' journals in `out` into one; return its lines by program and batch.

    A line that an interruption cut short is dropped.
    """
    journals = sorted(out.glob(JOURNAL.format("*")))
    found: Journal = {}
    for journal in journals:
        for text in journal.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            found.setdefault((line["program"], line["batch"]), line)
    if journals:
        write(out / JOURNAL.format(0), "".join(json.dumps(x) + "\n" for x in found.values()))
    for journal in journals:
        if journal.name != JOURNAL.format(0):
            journal.unlink()
    return found


def model_hash(folder: Path) -> str:
    """Hash of the whole content of the config and every shard."""
    names = ["config.json", *open_checkpoint(folder).shards]
    listed = "".join(f"{name} {sha256_of(folder / name)}\n" for name in names)
    return hashlib.sha256(listed.encode()).hexdigest()


def tokens_hash(tokens: np.ndarray) -> str:
    """Hash of token ids of any shape."""
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()


def stream_of(
    data: str | TokenStream, tokenizer: Any, model: str, *, max_tokens: int, seed: int
) -> TokenStream:
    """`data` itself if it is a stream, else that source in the model's tokens (see `load_tokens`).

    tokenizer: the model's, None if it has none, which is an AbreastError for a source.
    """
    if isinstance(data, TokenStream):
        return data
    if tokenizer is None:
        raise AbreastError(f"'{model}' has no tokenizer; give a folder with its files")
    return load_tokens(tokenizer, data, max_tokens=max_tokens, seed=seed)


def cut(
    stream: TokenStream, num_windows: int, window: int, *, longest: int | None, vocabulary: int
) -> np.ndarray:
    """The stream's first whole windows, int64 [at most num_windows, window].

    longest: how many tokens the model holds, None for no limit. vocabulary: how many it knows.
    Raises AbreastError where there is no whole window, where it is too long for the model, and for
    token ids that the model does not know.
    """
    if window > (longest or window):
        raise AbreastError(f"the window is {window}, the model holds {longest} tokens; shorten it")
    count = min(num_windows, len(stream) // window)
    if not count:
        raise AbreastError(
            f"the data has {len(stream)} tokens, less than one window of {window}; "
            "name a longer text or use a shorter window"
        )
    tokens = stream.tokens[: count * window].reshape(count, window)
    check_tokens(tokens, vocabulary)
    return tokens


def check_tokens(tokens: np.ndarray, vocabulary: int) -> None:
    """Raise AbreastError for token ids that a model of so many tokens does not know."""
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise AbreastError(
            f"the data has token ids outside the model's vocabulary ({vocabulary} tokens); "
            "tokenise it with the model's own tokenizer"
        )


def window_bytes(
    window: int, num_layers: int, hidden: int, itemsize: int, vocabulary: int = 0
) -> int:
    """What `run_programs` keeps of a window: a state per layer and one more.

    vocabulary: with a reference, whose logits are kept as well.
    """
    return window * ((num_layers + 1) * hidden + vocabulary) * itemsize


def windows_at_once(each: int, max_cache_bytes: int) -> int:
    """How many windows of `each` bytes fit the limit. Raises AbreastError where none does."""
    if each > max_cache_bytes:
        raise AbreastError(
            f"what is kept of one window needs {each} bytes, the limit is {max_cache_bytes}; "
            "raise it or use a shorter window"
        )
    return max_cache_bytes // each


def to_csv(rows: Iterable[Any], kind: type[Any]) -> str:
    """The rows, data classes of this kind, as CSV with a line of names; numbers to eight digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(entry.name for entry in fields(kind))
    for row in rows:
        values = asdict(row).values()
        writer.writerow(f"{v:.8g}" if isinstance(v, float) else v for v in values)
    return text.getvalue()
