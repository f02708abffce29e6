"""Kill the verbs, starve them, and run them again; `make N=200 kill`.

Every verb runs twice undisturbed, then in N runs, which give each verb as much time, three times
in four, a signal comes after a random part of that time; else the disk is full, memory short, the
folder read-only, or two run at once.
After SIGINT, SIGTERM and SIGHUP nothing that a run stages may be left; after any signal the same
command must succeed, with the files of an undisturbed run, and leave nothing. Left out of the
comparison are times, counts of the work done, the order of journals, files that two undisturbed
runs do not agree on, and what `plan` and `optimize` say about all plans measured: a resumed search
knows more of them.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from forked import Ended, memory, run, warm_up
from ledger import add
from samples import checkpoint

from abreast.checkpoint import LEAVING

FEW = ["--data", "text.txt", "--window", "32", "--windows", "8"]
SEARCH = [*FEW, "--max-group", "2", "--per-group", "1", "--no-plots", "--hardware", "A100"]
HEAL = ["--data", "text.txt", "--window", "32", "--tokens", "2000", "--no-plots"]
TRAIN = ["--steps", "4", "--batch-size", "2", "--micro-batch", "2", "--lora-rank", "2"]
VERBS = {  # name -> its command, without --out
    "convert": ["convert", "model", "--plan", "1+2 3|4", "--max-shard-size", "100KB"],
    "export": ["export", "model", "--gguf", "out"],
    "measure": ["measure", "model", *FEW, "--max-group", "2"],
    "plan": ["plan", "model", *SEARCH, "--depth", "4"],
    "study": ["study", "model", *FEW, "--max-length", "2", "--no-plots"],
    "refit": ["heal", "model", "--plan", "1+2", "--method", "refit", *HEAL],
    "distill": ["heal", "model", "--plan", "1+2", "--method", "distill", *HEAL, *TRAIN],
    "optimize": [
        *("optimize", "model", *SEARCH, "--depth", "4", "--rounds", "3", "--no-baselines"),
        *("--eval-data", "text.txt", "--max-tokens", "200", "--no-report"),
    ],
}
RESUMED = ("measure", "plan", "study", "optimize")  # the others name a new folder or file
_VARIES = re.compile(
    rb'"(created|date|seconds|cpu_seconds|evaluated|spent|full_forwards)": '
    rb'("[^"]*"|[\d.e-]+|{[^}]*})'
)
_NUMBER = re.compile(rb"-?\d+\.\d+(?:e-?\d+)?")
_LOOSE = {
    "plan": ("front.json", "why.md"),
    "optimize": ("front.json", "why.md", "results.json", "environment.json"),
}
_SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def command(verb: str) -> list[str]:
    return [*VERBS[verb], *(() if verb == "export" else ("-o", "out"))]


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> content, without what may vary, of what a run wrote."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in ("model", "text.txt", "tmp")
    }


def content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:size])
        header.pop("__metadata__", None)
        return json.dumps(header).encode() + data[size:]
    data = _VARIES.sub(b"", data)
    return b"".join(sorted(data.splitlines())) if path.suffix == ".jsonl" else data


def alike(made: bytes, expected: bytes) -> bool:
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


def left_behind(folder: Path) -> list[str]:
    """Staging files and folders, and whatever is in the folder of temporary files."""
    staged = [p for p in folder.rglob("*") if LEAVING.fullmatch(p.name)]
    return [str(p.relative_to(folder)) for p in (*staged, *folder.glob("tmp/*"))]


def prepare(origin: Path, folder: Path) -> Path:
    folder.mkdir()
    os.symlink(origin / "model", folder / "model")
    os.symlink(origin / "text.txt", folder / "text.txt")
    return folder


def fault_of(stopped: Ended, killed: bool, folder: Path) -> str | None:
    if "Traceback" in stopped.err:
        return f"traceback: {stopped.err.strip().splitlines()[-1]}"
    if not killed and (left := left_behind(folder)):
        return f"left {left}"
    return None


def refusal(ended: Ended) -> str | None:
    """What is wrong with a run that met trouble: it ends well, or with status 2 and one line."""
    fine = ended.status == 0 or (ended.status == 2 and "abreast: " in ended.err)
    return None if fine else f"status {ended.status}: {ended.err.strip()[-200:]}"


def full_disk(verb: str, folder: Path, chance: random.Random) -> tuple[Ended, str | None]:
    """No file can be longer than so many bytes."""
    most = chance.randrange(8000, 60_000)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    ended = run(command(verb), folder, limited=False, before=limit)
    return ended, refusal(ended)


def no_memory(verb: str, folder: Path, chance: random.Random) -> tuple[Ended, str | None]:
    most = chance.randrange(1 << 20, 64 << 20)
    ended = run(command(verb), folder, limited=False, before=partial(memory, most))
    return ended, refusal(ended)


def read_only(verb: str, folder: Path, chance: random.Random) -> tuple[Ended, str | None]:
    def give_up() -> None:
        if os.geteuid() == 0:  # whom permissions do not stop
            os.setresuid(65534, 65534, 65534)

    (folder / "tmp").mkdir()
    folder.chmod(0o555)
    ended = run(command(verb), folder, limited=False, before=give_up)
    folder.chmod(0o755)
    return ended, refusal(ended)


def two_at_once(verb: str, folder: Path, chance: random.Random) -> tuple[Ended, str | None]:
    """One ends well; the other says who holds the folder, or comes when the first has ended."""
    first = os.fork()
    if first == 0:
        os._exit(run(command(verb), folder, limited=False).status & 255)
    time.sleep(chance.uniform(0, 0.2))
    ended = run(command(verb), folder, limited=False)
    other = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    one = replace(ended, status=min(ended.status, other))
    if sorted((ended.status, other)) not in ([0, 0], [0, 2]):
        return one, f"statuses {ended.status} and {other}: {ended.err.strip()[-200:]}"
    said = ("is working in", "is writing", "exists")
    return one, None if ended.status == 0 or any(s in ended.err for s in said) else ended.err


TROUBLES = {
    "disk full": full_disk,
    "no memory": no_memory,
    "read-only": read_only,
    "two at once": two_at_once,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so many")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--record", action="store_true", help="add the counts to the ledger")
    options = parser.parse_args()
    verbs, chance = options.verbs.split(","), random.Random(options.seed)
    warm_up()
    counts: Counter[str] = Counter()
    faults: list[str] = []
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as place:
        origin = Path(place, "origin")
        checkpoint(origin)
        expected, lasting, unstable = {}, {}, {}
        for verb in verbs:
            trees = []
            for turn in range(2):
                folder = prepare(origin, Path(place, f"{verb}-{turn}"))
                ended = run(command(verb), folder, limited=False, learn=turn == 0)
                if ended.status:
                    print(f"{verb} fails undisturbed: {ended.err.strip()[-500:]}", file=sys.stderr)
                    return 1
                trees.append(tree(folder))
                lasting[verb] = ended.seconds
            expected[verb], other = trees
            differ = {name for name, data in expected[verb].items() if data != other.get(name)}
            loose = {n for n in expected[verb] if n.endswith(_LOOSE.get(verb, ("/",)))}
            unstable[verb] = differ | loose
            print(
                f"{verb}: {lasting[verb]:.1f} s, {len(trees[0])} files; differ by themselves: "
                f"{sorted(unstable[verb]) or 'none'}",
                flush=True,
            )
        for turn in range(options.n):
            if time.monotonic() > end:
                break
            (verb,) = chance.choices(verbs, [1 / lasting[verb] for verb in verbs])
            folder = prepare(origin, Path(place, f"case-{turn}"))
            kind = chance.choices([*TROUBLES, "signal"], (1, 1, 1, 1, 12))[0]
            if kind == "signal":
                number = chance.choices(_SIGNALS, (15, 1, 1, 1))[0]
                after = chance.uniform(0, lasting[verb])
                stopped = run(command(verb), folder, stop=(number, after), limited=False)
                kind = f"{signal.Signals(number).name} after {after:.2f} s"
                fault = fault_of(stopped, number == signal.SIGKILL, folder)
            else:
                stopped, fault = TROUBLES[kind](verb, folder, chance)
                fault = fault or fault_of(stopped, False, folder)
            if stopped.status == 0:
                lasting[verb] = min(lasting[verb], stopped.seconds)
            counts["ended well" if stopped.status == 0 else kind.split(" after")[0]] += 1
            done = verb not in RESUMED and (folder / "out").exists()
            if stopped.status and not done:
                again = run(command(verb), folder, limited=False)
                if again.status:
                    fault = fault or f"the rerun fails: {again.err.strip()[-300:]}"
            made = tree(folder)
            names = {*made, *expected[verb]} - unstable[verb]
            same = alike if kind == "no memory" else operator.eq
            wrong = [
                name
                for name in sorted(names)
                if not same(made.get(name, b""), expected[verb].get(name, b""))
            ]
            if not fault and wrong:
                fault = f"other files than undisturbed: {wrong}"
            if not fault and (left := left_behind(folder)):
                fault = f"the rerun left {left}"
            if fault:
                faults.append(f"{verb}, {kind}: {fault}")
                print(faults[-1], flush=True)
            shutil.rmtree(folder)
    print(f"seed {options.seed}: {dict(counts)}, {len(faults)} faults")
    if options.record:
        add("kill", options.seed, dict(counts), len(faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
