"""What two runs of a verb must agree on, and how far: see `content`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_VARIES = re.compile(
    rb'"(created|date|seconds|cpu_seconds|evaluated|spent|full_forwards)": '
    rb'("[^"]*"|[\d.e-]+|{[^}]*})'
)
_LOG_HASH = re.compile(rb'"heal.csv": {\s*"sha256": "\w+",\s*"bytes": \d+')
_NUMBER = re.compile(rb"-?\d+\.\d+(?:e-?\d+)?")
_MEASURED = re.compile(r"the best of [\d,]+ plans")
_SEARCHED = ("full_forwards", "full_forwards_by_depth")
_TIMED = ("timings", "memory", "verdict")


def content(path: Path) -> bytes:
    """A file's bytes without times, counts of work done, and the order of journals.

    A search that resumes knows more plans than an undisturbed one. So of what `plan` and `optimize`
    say about plans, the rows of the chosen ones are kept, and not what they were chosen over.
    """
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:size])
        header.pop("__metadata__", None)
        return json.dumps(header).encode() + data[size:]
    if path.name in _REDUCED:
        return _REDUCED[path.name](data)
    data = _VARIES.sub(b"", data)
    return b"".join(sorted(data.splitlines())) if path.suffix == ".jsonl" else data


def _front(data: bytes) -> bytes:
    front = json.loads(data)
    del front["full_forwards"]
    chosen = {row["plan"] for row in front["held_out"]}
    front["plans"] = [row for row in front["plans"] if row["plan"] in chosen]
    return json.dumps(front).encode()


def _why(data: bytes) -> bytes:
    """Without how many plans were measured, and the last two columns: the best plan without."""
    lines = _MEASURED.sub("the best", data.decode()).split("\n")
    return "\n".join(
        "|".join(line.split("|")[:-3]) if line.startswith("|") else line for line in lines
    ).encode()


def _results(data: bytes) -> bytes:
    """What `optimize` and `report` sum up."""
    results = json.loads(data)
    planned = results.get("planned", {})
    for name in _SEARCHED:
        planned.pop(name, None)
    for reason in planned.get("reasons", ()):
        del reason["without"], reason["extra_kl"]
    _untimed(results)
    return _VARIES.sub(b"", json.dumps(results).encode())


def _speed(data: bytes) -> bytes:
    speed = json.loads(data)
    _untimed(speed)
    return json.dumps(speed).encode()


def _untimed(value: Any) -> None:
    """Remove what was timed at any depth."""
    if isinstance(value, dict):
        for name in _TIMED:
            value.pop(name, None)
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _untimed(inner)


def _environment(data: bytes) -> bytes:
    environment = json.loads(data)
    del environment["date"], environment["folder"]
    return json.dumps(environment).encode()


def _log(data: bytes) -> bytes:
    rows = csv.DictReader(io.StringIO(data.decode()))
    return json.dumps(
        [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    ).encode()


_REDUCED: dict[str, Callable[[bytes], bytes]] = {
    "front.json": _front,
    "why.md": _why,
    "results.json": _results,
    "speed.json": _speed,
    "environment.json": _environment,
    "heal.csv": _log,
    "abreast.json": lambda data: _VARIES.sub(b"", _LOG_HASH.sub(b"", data)),
    "report.html": lambda data: re.sub(rb"Report written [\d-]+ [\d:]+ UTC", b"", data),
    "README.md": lambda data: re.sub(rb"\nMade \S+ from", b"", data),
}


def same_content(made: bytes, expected: bytes) -> bool:
    """Whether contents agree up to rounding: short of memory, torch multiplies another way."""
    if made.startswith(b"{") and b'"data_offsets"' in made[:1000]:
        (header, tensors), (other, others) = map(_tensors, (made, expected))
        return header == other and all(map(_close, tensors, others))
    numbers, others = (_NUMBER.findall(data) for data in (made, expected))
    rest, other = (_NUMBER.sub(b"", data) for data in (made, expected))
    return rest == other and _close(np.array(numbers, float), np.array(others, float))


def _close(made: np.ndarray, expected: np.ndarray) -> bool:
    return np.allclose(made, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def _tensors(data: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Header and tensors of a safetensors file as `content` leaves it."""
    header, end = json.JSONDecoder().raw_decode(data.decode("latin-1"))
    kinds = {"F64": "f8", "F32": "f4", "I64": "i8"}
    return header, [
        np.frombuffer(data[end:][slice(*entry["data_offsets"])], kinds[entry["dtype"]])
        for entry in header.values()
    ]
