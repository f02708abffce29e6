"""`convert` against `cp` on synthetic checkpoints: throughput and peak memory.

Sources are dense Llamas of 32 layers, and with --experts a model of 14 layers with 64 experts each,
stored one by one (3 GB). Each lies in a cache like the Hub's, whose files have their sha256 for a
name, and in a plain folder (hard links to the same bytes). Each round copies the source with `cp`
and converts it from either place, in turn, in a process of its own; the source is in the page cache
for all. "seconds" ends when the command does, with much of what it wrote still on its way to the
disk; "durable" ends when all of it is there (after sync).

Targets: from the cache at least half the throughput of `cp` (experts 0.4) in 9 of 10 rounds, peak
resident memory at most 1 GB over the interpreter with its imports, whatever the size.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from abreast.checkpoint.tensors import NewTensor, lay_out, write_shards
from abreast.families.row import all_tensors
from abreast.families.table import CONVERTIBLE

SHAPES = {1: (1024, 3072), 2: (1536, 4096), 4: (2048, 6144)}  # GB: hidden size, FFN size
EXPERTS = {
    "model_type": "olmoe",
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 14,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
WAYS = ("cp", "cache", "folder")
CHILD = """
import json, os, sys, time
import abreast.modeling, transformers  # what reading a tokenizer takes
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


def config_of(gigabytes: int | None) -> dict[str, Any]:
    """config.json of a dense model of about that size, or of the one with experts."""
    own: dict[str, Any] = EXPERTS
    if gigabytes is not None:
        hidden, ffn = SHAPES[gigabytes]
        own = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn}
        own["num_hidden_layers"] = 32
    heads = own["hidden_size"] // 64
    own = {**own, "num_attention_heads": heads, "num_key_value_heads": heads}
    family = CONVERTIBLE[own["model_type"]]
    return {
        **own,
        "architectures": [family.stock],
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
    }


def stored(config: dict[str, Any]) -> Iterator[NewTensor]:
    """The tensors of a checkpoint, every expert's by themselves."""
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    for name, shape in all_tensors(CONVERTIBLE[config["model_type"]], config).items():
        above, _, last = name.rpartition(".")
        if last not in names:
            yield NewTensor(name, "BF16", shape)
            continue
        for expert in range(shape[0]):
            for part in names[last]:
                rows = (shape[1] // len(names[last]), shape[2])
                yield NewTensor(f"{above}.{expert}.{part}.weight", "BF16", rows)


def make_source(folder: Path, config: dict[str, Any]) -> int:
    """Write a random bf16 checkpoint to folder/folder and folder/cache; return its bytes."""
    plain, model = folder / "folder", folder / "hub" / "models--synthetic--source"
    cached, blobs = model / "snapshots" / ("1" * 40), model / "blobs"
    for path in (plain, cached, blobs):
        path.mkdir(parents=True)
    for path in (plain, cached):
        (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def chunks() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in stored(config):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            yield tensor.name, (noise * 0.02).to(torch.bfloat16)

    written = write_shards(plain, lay_out(stored(config), 1_000_000_000), chunks())
    for path in plain.glob("*.index.json"):
        shutil.copy(path, cached)
    for name, entry in written.items():
        os.link(plain / name, blobs / entry["sha256"])
        (cached / name).symlink_to(blobs / entry["sha256"])
    (folder / "cache").symlink_to(cached)
    return sum(entry["bytes"] for entry in written.values())


def timed(way: str, folder: Path, plan: str, target: Path) -> dict[str, float]:
    if way != "cp":
        source = (folder / way).resolve()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(source), plan, str(target)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_CACHE": str(folder / "hub")},
        )
        measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return measured
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder / "folder"), str(target)], check=True)
    seconds = time.perf_counter() - start
    os.sync()
    return {"seconds": seconds, "durable": time.perf_counter() - start}


def run(gigabytes: int | None, rounds: int, folder: Path) -> dict[str, object]:
    config, target = config_of(gigabytes), folder / "target"
    size = make_source(folder / "source", config)
    count = config["num_hidden_layers"]
    plan = " ".join(f"{i}+{i + 1}" for i in range(count // 3 // 2 * 2, count * 3 // 4, 2))
    os.sync()
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for way in (WAYS[(turn + index) % len(WAYS)] for index in range(len(WAYS))):
            measured = timed(way, folder / "source", plan, target)
            if turn:  # the first round only warms up
                taken[way].append(measured)
            shutil.rmtree(target)
            os.sync()
    shutil.rmtree(folder / "source")
    aim = 0.4 if gigabytes is None else 0.5
    result: dict[str, object] = {
        "model": config["model_type"],
        "gigabytes": round(size / 1e9, 2),
        "rounds": rounds,
        "plan": plan,
    }
    for key in ("seconds", "durable"):
        speeds = {way: [size / 1e9 / row[key] for row in rows] for way, rows in taken.items()}
        row: dict[str, object] = {
            f"{way}_GB_per_s": round(statistics.median(values), 2) for way, values in speeds.items()
        }
        for way in WAYS[1:]:
            ratios = [own / copied for own, copied in zip(speeds[way], speeds["cp"], strict=True)]
            row[f"{way}_ratio"] = {
                "median": round(statistics.median(ratios), 2),
                "min": round(min(ratios), 2),
                "max": round(max(ratios), 2),
                f"rounds_at_least_{aim}": sum(ratio >= aim for ratio in ratios),
            }
        result[key] = row
    memory = max(row["memory"] for way in WAYS[1:] for row in taken[way])
    result["peak_memory_over_baseline_MB"] = round(memory / 1e6)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs="*", choices=SHAPES, default=[2], help="GB.")
    parser.add_argument("--experts", action="store_true", help="Also the model with experts.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    options = parser.parse_args()
    models = [*options.size, *([None] if options.experts else [])]
    results = []
    for gigabytes in models:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results.append(run(gigabytes, options.rounds, Path(folder)))
        print(results[-1], file=sys.stderr)
    print(json.dumps({"benchmark": "convert_throughput", "results": results}))


if __name__ == "__main__":
    main()
