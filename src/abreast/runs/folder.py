"""Run folders, which a later call continues: identity, journal, records, environment.

At import this module needs no torch.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from abreast.checkpoint import LEAVING, finite, own_file, read_text, write
from abreast.data import TokenStream
from abreast.errors import AbreastError
from abreast.version import __version__

ENVIRONMENT_FILE = "environment.json"
TEXT_FOLDER = "text"  # what a run says about its text, and the text that the model wrote for it
RIVALS_FOLDER = "baselines"  # of a study: what published methods choose on, and are judged on
JOURNAL = "journal-{}.jsonl"
Journal = dict[tuple[str, int], dict[str, Any]]


def open_run(out: Path, kind: str, identity: dict[str, Any]) -> Path:
    """Make folder `out` with KIND.json, or check that the run there has the same identity.

    Raises AbreastError where it has another, naming what differs, and for a folder with something
    else in it. "prefix" in an identity: the tokens before every text, none where it is left out.
    """
    record = out / f"{kind}.json"
    if record.is_file():
        try:
            recorded = json.loads(read_text(record))["identity"]
            differing = [key for key in identity if recorded.get(key) != identity[key]]
            before, now = recorded.get("prefix", []), identity.get("prefix", [])
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            raise AbreastError(f"'{record}' is damaged; choose a new folder") from None
        if before != now and {*differing} <= {"prefix", "tokens", "data"}:
            option = "--add-bos" if before else "--no-add-bos"
            raise AbreastError(
                f"'{out}' holds a {kind} on texts that begin {_beginning(before)}, and now they "
                f"would begin {_beginning(now)}; choose a new folder, or go on with {option}"
            )
        if differing:
            raise AbreastError(
                f"'{out}' holds a {kind} with other {', '.join(differing)}; choose a new folder"
            )
        return out
    check_run(out, kind)
    out.mkdir(parents=True, exist_ok=True)
    write(record, json.dumps({"identity": identity}, indent=2) + "\n")
    return out


def recorded_dtype(out: Path, kind: str) -> str | None:
    """The dtype of the run of this kind in folder `out`, None where there is none to read."""
    try:
        recorded = json.loads((out / f"{kind}.json").read_text(encoding="utf-8"))["identity"]
        return str(recorded["dtype"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_run(out: Path, kind: str) -> None:
    """Raise AbreastError for a folder that holds anything but a run of this kind, or its texts."""
    if not out.exists() or (out / f"{kind}.json").is_file():
        return
    names = [path.name for path in out.iterdir()] if out.is_dir() else [""]
    texts = (TEXT_FOLDER, RIVALS_FOLDER)
    if any(name not in texts and not LEAVING.fullmatch(name) for name in names):
        raise AbreastError(f"'{out}' exists and is not a {kind}; choose a new folder")


def _beginning(prefix: Sequence[int]) -> str:
    tokens = ", ".join(map(str, prefix))
    return f"with token {tokens}" if prefix else "without a beginning-of-text token"


def read_journal(out: Path, windows: Callable[[int], int] | None = None) -> Journal:
    """Merge the workers' journals in `out` into one; return its lines by program and batch.

    A line that an interruption left incomplete, or that is damaged, is dropped. windows: how many
    there are in a batch, none in one that does not exist.
    """
    journals = sorted(out.glob(JOURNAL.format("*")))
    lines: Journal = {}
    shapes: dict[int, Counter[tuple[int, ...]]] = {}  # by batch
    for journal in journals:
        own_file(journal, most=None)
        for written in journal.read_bytes().splitlines():
            with suppress(ValueError, LookupError, TypeError, RecursionError):
                line = json.loads(written)
                key = str(line["program"]), int(line["batch"])
                shape = np.asarray(line["sums"], dtype=float).shape
                if line["evaluated"] >= 0 and key not in lines:
                    lines[key] = line
                    shapes.setdefault(key[1], Counter())[shape] += 1
    usual = {batch: counter.most_common(1)[0][0] for batch, counter in shapes.items()}
    if windows is not None:
        usual = {batch: (windows(batch), *shape[1:]) for batch, shape in usual.items()}
    lines = {key: line for key, line in lines.items() if np.shape(line["sums"]) == usual[key[1]]}
    if journals:
        text = "".join(json.dumps(line) + "\n" for line in lines.values())
        write(out / JOURNAL.format(0), text)
    for journal in journals:
        if journal.name != JOURNAL.format(0):
            journal.unlink()
    return lines


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object, with None for numbers that are not finite; None where there is no file.

    Raises AbreastError for a file that cannot be read or holds something else.
    """
    try:
        record = json.loads(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError):
        raise damaged_record(path) from None
    if not isinstance(record, dict):
        raise damaged_record(path)
    return {key: finite(value) for key, value in record.items()}


def damaged_record(path: Path) -> AbreastError:
    """The error for a record that does not hold what it should."""
    return AbreastError(f"'{path}' is damaged; delete it and run the command that made it again")


def identity_of(
    model: Path,
    tokens: np.ndarray,
    prefix: Sequence[int],
    *,
    num_layers: int,
    batch: int,
    seed: int,
    dtype: str,
) -> dict[str, Any]:
    """What the numbers measured on windows of tokens, [num_windows, window], depend on.

    prefix: what each window begins with.
    """
    from abreast.checkpoint import open_checkpoint

    return {
        "model": open_checkpoint(model).sha256,
        "tokens": tokens_hash(tokens),
        "num_layers": num_layers,
        "num_windows": len(tokens),
        "window": tokens.shape[1],
        "batch": batch,
        "seed": seed,
        "dtype": dtype,
        **({"prefix": list(prefix)} if prefix else {}),
    }


def tokens_hash(tokens: np.ndarray) -> str:
    """Hash of token ids of any shape."""
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()


def check_least(sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise AbreastError for a size below its minimum. sizes: label -> (value, minimum)."""
    for label, (value, least) in sizes.items():
        if value < least:
            raise AbreastError(f"{label} is {value}; give at least {least}")


def whole_windows(
    stream: TokenStream, num_windows: int, window: int, *, longest: int | None, vocabulary: int
) -> np.ndarray:
    """The stream's first whole windows, int64 [at most num_windows, window], prefix included.

    longest: how many tokens the model holds, None for no limit. vocabulary: size of the model's.
    Raises AbreastError where there is no whole window, where it is too long for the model or holds
    no token to score, and for token ids outside the vocabulary.
    """
    check_window(window, longest)
    text = window - len(stream.prefix)
    if text < 1 or window < 2:
        raise AbreastError(
            f"the window is {window} with {len(stream.prefix)} tokens before the text; lengthen it"
        )
    count = min(num_windows, len(stream) // text)
    if not count:
        raise AbreastError(
            f"the data has {len(stream)} tokens, less than one window of {text}; "
            "name a longer text or use a shorter window"
        )
    before = np.tile(np.asarray(stream.prefix, dtype=np.int64), (count, 1))
    tokens = np.hstack([before, stream.tokens[: count * text].reshape(count, text)])
    check_tokens(tokens, vocabulary)
    return tokens


def check_window(window: int, longest: int | None) -> None:
    """Raise AbreastError for a window that is too long for the model, see `whole_windows`."""
    if window > (longest or window):
        raise AbreastError(f"the window is {window}, the model holds {longest} tokens; shorten it")


def check_tokens(tokens: np.ndarray, vocabulary: int) -> None:
    """Raise AbreastError for token ids outside a vocabulary of this size."""
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise AbreastError(
            f"the data has token ids outside the model's vocabulary ({vocabulary} tokens); "
            "tokenise it with the model's own tokenizer"
        )


def window_bytes(
    window: int, num_layers: int, hidden: int, itemsize: int, vocabulary: int = 0
) -> int:
    """Bytes that `run_programs` keeps of a window: a state per layer and one more.

    vocabulary: with a reference, whose logits are kept as well.
    """
    return window * ((num_layers + 1) * hidden + vocabulary) * itemsize


def windows_at_once(bytes_per_window: int, max_cache_bytes: int) -> int:
    """How many windows of this size fit the limit. Raises AbreastError where none does."""
    if bytes_per_window > max_cache_bytes:
        raise AbreastError(
            f"what is kept of one window needs {bytes_per_window} bytes, the limit is "
            f"{max_cache_bytes}; raise it or use a shorter window"
        )
    return max_cache_bytes // bytes_per_window


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV, with a header line; numbers to eight digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(f"{v:.8g}" if isinstance(v, float) else v for v in row.values())
    return text.getvalue()


def record_environment(out: str | Path, device: str, command: Sequence[str] | None = None) -> None:
    """Write out/environment.json: versions, machine, date, command line, working folder.

    command: the words of the command line, None for a call from Python. The folder must exist.
    """
    write(Path(out) / ENVIRONMENT_FILE, json.dumps(environment(device, command), indent=1) + "\n")


def environment(device: str, command: Sequence[str] | None = None) -> dict[str, Any]:
    """The record of `record_environment`."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command) if command is not None else None,
        "folder": os.getcwd(),
        "device": device,
        "hardware": {"cores": os.cpu_count(), **hardware(device)},
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions_of(packages)},
    }


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Versions of abreast and of those packages that are installed."""
    versions = {"abreast": __version__}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def hardware(device: str) -> dict[str, Any]:
    """CPU, GPU and threads behind a measurement."""
    import torch

    machine: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        machine["cpu"] = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    if device.startswith(("cuda", "auto")) and torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name(None if device == "auto" else device)
        machine["cuda"] = torch.version.cuda
    return machine
