"""`convert` against `cp` on synthetic checkpoints: throughput and peak memory.

Each round copies the source with `cp` and converts it, in turn, in a process of its own; the
source is in the page cache for both. "seconds" ends when the command does, with much of what it
wrote still on its way to the disk; "durable" ends when all of it is there (after sync).
Target: at least half the throughput of `cp` (2 GB, 32 layers), peak resident memory at most 1 GB
over the interpreter with its imports, whatever the size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from abreast.checkpoint.tensors import NewTensor, lay_out, write_shards
from abreast.families.row import all_tensors
from abreast.families.table import CONVERTIBLE

SHAPES = {1: (1024, 3072), 2: (1536, 4096), 4: (2048, 6144)}  # GB: hidden size, FFN size
LAYERS = 32
PLAN = " ".join(f"{i}+{i + 1}" for i in range(10, 24, 2))
CHILD = """
import json, os, sys, time
from abreast.convert import convert

def peak():  # in bytes; ru_maxrss will not do, a child inherits it from its parent
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

base, start = peak(), time.perf_counter()
convert(sys.argv[1], sys.argv[2], sys.argv[3])
seconds = time.perf_counter() - start
os.sync()
durable = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "durable": durable, "memory": peak() - base}))
"""


def make_source(folder: Path, gigabytes: int) -> int:
    """Write a random bf16 Llama checkpoint of about that size; return its bytes."""
    hidden, ffn = SHAPES[gigabytes]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "num_hidden_layers": LAYERS,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = [
        NewTensor(n, "BF16", s) for n, s in all_tensors(CONVERTIBLE["llama"], config).items()
    ]
    generator = torch.Generator().manual_seed(0)

    def chunks():  # type: ignore[no-untyped-def]
        for tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            yield tensor.name, (noise * 0.02).to(torch.bfloat16)

    written = write_shards(folder, lay_out(tensors, 1_000_000_000), chunks())
    return sum(entry["bytes"] for entry in written.values())


def timed_copy(source: Path, target: Path) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    os.sync()
    return {"seconds": seconds, "durable": time.perf_counter() - start}


def timed_convert(source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, str(source), PLAN, str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(gigabytes: int, rounds: int, folder: Path) -> dict[str, object]:
    source, target = folder / f"source-{gigabytes}", folder / "target"
    size = make_source(source, gigabytes)
    os.sync()
    taken: dict[str, list[dict[str, float]]] = {"cp": [], "convert": []}
    for turn in range(rounds + 1):
        for name in ("cp", "convert") if turn % 2 else ("convert", "cp"):
            found = timed_copy(source, target) if name == "cp" else timed_convert(source, target)
            if turn:  # the first round only warms up
                taken[name].append(found)
            shutil.rmtree(target)
            os.sync()
    shutil.rmtree(source)
    result: dict[str, object] = {"gigabytes": round(size / 1e9, 2), "rounds": rounds}
    for key in ("seconds", "durable"):
        ratios = [a[key] / b[key] for a, b in zip(taken["cp"], taken["convert"], strict=True)]
        speed = {n: size / statistics.median(t[key] for t in taken[n]) / 1e9 for n in taken}
        result[key] = {
            **{f"{name}_GB_per_s": round(value, 2) for name, value in speed.items()},
            "ratio_median": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
        }
    memory = max(found["memory"] for found in taken["convert"])
    result["peak_memory_over_baseline_MB"] = round(memory / 1e6)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = [run(size, options.rounds, Path(folder)) for size in options.sizes]
    for result in results:
        print(result, file=sys.stderr)
    print(json.dumps({"benchmark": "convert_throughput", "results": results}))


if __name__ == "__main__":
    main()
