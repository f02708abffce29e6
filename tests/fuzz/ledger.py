"""The committed record of fuzzing and killing: a line of JSON per run of a harness."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LEDGER = Path(__file__).with_name("ledger.jsonl")


def add(harness: str, seed: int, counts: Mapping[str, int], faults: int, **more: Any) -> None:
    """Append a run: date, commit (with + where files differ from it), seed, counts, faults.

    more: what else is to be kept: survivors among mutants, the server's memory early and late, the
    seconds that inputs took.
    """
    git = ["git", "-C", str(LEDGER.parent)]
    words = ([*git, "rev-parse", "--short", "HEAD"], [*git, "status", "--porcelain", "-uno"])
    commit, changed = (
        subprocess.run(w, capture_output=True, text=True).stdout.strip() for w in words
    )
    line = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit + "+" * bool(changed),
        "harness": harness,
        "seed": seed,
        "counts": dict(counts),
        "faults": faults,
        **more,
    }
    with LEDGER.open("a", encoding="utf-8") as ledger:
        ledger.write(json.dumps(line) + "\n")


def total() -> dict[str, dict[str, int]]:
    """The sums of all runs by harness, faults included."""
    sums: dict[str, dict[str, int]] = {}
    for text in LEDGER.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        row = sums.setdefault(line["harness"], {})
        for name, count in (*line["counts"].items(), ("faults", line["faults"])):
            row[name] = row.get(name, 0) + count
    return sums


if __name__ == "__main__":
    for harness, counts in total().items():
        print(harness, ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
