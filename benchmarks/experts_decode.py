"""Decode at batch 1, 32 -> 25 stages: a model with experts against a dense one of its active size.

Random Qwen 3 of 32 layers, hidden size 512: one with an FFN 1,024 wide, one with 16 experts of 256
of which a token chooses 4. Each against its conversion (7 lp pairs), in turns, and what `estimate`
says of both on a GPU and on such a CPU. Reading weights takes both equally long; starting
operations takes the one with experts longer, so joining layers should bring it more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abreast.convert import convert
from abreast.model import load
from abreast.plan import Plan
from abreast.speed import Setting, bench, estimate, hardware_of

LAYERS = 32
PLAN = Plan.parse(" ".join(f"{k}+{k + 1}" for k in range(12, 26, 2)), LAYERS)
COMMON = {
    "hidden_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 512,
    "intermediate_size": 1024,
    "max_position_embeddings": 2048,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3"},
    "experts": {
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
}


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    config = AutoConfig.for_model(**COMMON, **MODELS[name])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="abreast-experts-") as folder:
        source, converted = Path(folder) / "source", Path(folder) / "converted"
        dtype = getattr(torch, options.dtype)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(source)
        convert(source, PLAN, converted)
        stored = json.loads((source / "config.json").read_text())
        models = {
            "original": load(source, device=options.device)[0],
            "converted": load(converted, device=options.device)[0],
        }
        timings = bench(
            models, task="decode", context=64, new_tokens=options.steps, rounds=options.rounds
        ).timings
    under, here = timings["converted"], {"runtime": "eager", "dtype": options.dtype, "context": 64}
    settings = {"H100": Setting(hardware_of("H100")), "Xeon": Setting(hardware_of("Xeon"), **here)}
    return {
        "model": name,
        "tpot_ms": {n: round(1e3 * t.median / options.steps, 3) for n, t in timings.items()},
        "ratio": round(under.ratio, 3),
        "low": round(under.ratio_low, 3),
        "high": round(under.ratio_high, 3),
        "estimated": {d: round(estimate(stored, PLAN, s).speedup, 3) for d, s in settings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = []
    for name in MODELS:
        rows.append(compare(name, options))
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"benchmark": "experts_decode", **vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
