"""Decode at batch 1 on one device: a group as one wide layer against its members one by one.

Random Llamas under a plan of pairs, the same weights fused (converted) and grouped in memory, in
turns. Targets: fused is faster in every shape, at least 1.15 times where starting operations takes
the time (hidden size up to 256).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from abreast.convert.rewrite import convert
from abreast.model.grouping import load
from abreast.speed.benchmark import bench

# hidden size, FFN size, layers, heads, KV heads
SHAPES = (
    (128, 344, 32, 4, 2),
    (256, 688, 24, 4, 2),
    (512, 1376, 16, 8, 4),
    (1024, 2752, 8, 16, 8),
)
LAUNCH_BOUND = 256


def compare(
    shape: tuple[int, int, int, int, int], dtype: str, device: str, rounds: int, steps: int
) -> dict[str, object]:
    hidden, ffn, layers, heads, kv_heads = shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
    )
    # All layers but the first and the last two, in pairs.
    plan = " ".join(f"{k}+{k + 1}" for k in range(1, layers - 2, 2))
    with tempfile.TemporaryDirectory(prefix="abreast-fused-") as folder:
        source, fused = Path(folder) / "source", Path(folder) / "fused"
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(source)
        convert(source, plan, fused)
        models = {
            "grouped": load(source, plan=plan, device=device)[0],
            "fused": load(fused, device=device)[0],
            "original": load(source, device=device)[0],
        }
        timings = bench(models, task="decode", context=64, new_tokens=steps, rounds=rounds).timings
    return {
        "hidden": hidden,
        "layers": layers,
        "groups": len(plan.split()),
        "ratio": round(timings["fused"].ratio, 3),
        "low": round(timings["fused"].ratio_low, 3),
        "high": round(timings["fused"].ratio_high, 3),
        "grouped_over_original": round(1 / timings["original"].ratio, 3),
        "tpot_ms": {name: round(1e3 * t.median / steps, 3) for name, t in timings.items()},
        "target": 1.15 if hidden <= LAUNCH_BOUND else 1.0,
        "met": timings["fused"].ratio_low > (1.15 if hidden <= LAUNCH_BOUND else 1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        rows.append(compare(shape, options.dtype, options.device, options.rounds, options.steps))
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"benchmark": "fused_vs_grouped", **vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
