"""Decode over two processes (gloo, one thread each): original, lp and cqil of the same depth.

A random Llama of hidden size 512 and 32 layers, the LP paper's plan 32 -> 25 in both wirings. All
three are spread over the same two processes and take turns there. Several FFN sizes: the wider, the
more of the time goes into reading weights, of which grouping saves nothing. Targets where latency
is the limit: lp at least 1.2 times as fast as the original, cqil at least 1.3 times.
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
from abreast.speed import Case, Contender, Job, run

PAIRS = range(14, 28, 2)


def original(folder: Path, hidden: int, ffn: int, layers: int, dtype: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def compare(ffn: int, options: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="abreast-tp-") as folder:
        source = Path(folder) / "original"
        original(source, options.hidden, ffn, 32, options.dtype)
        for name, sign in (("lp", "+"), ("cqil", "|")):
            convert(source, " ".join(f"{k}{sign}{k + 1}" for k in PAIRS), Path(folder) / name)
        report = run(
            Job(
                tuple(Contender(n, str(Path(folder) / n)) for n in ("original", "lp", "cqil")),
                (Case("decode", 1, options.context, options.steps),),
                backend="tp",
                rounds=options.rounds,
                warmup=3,
                ranks=options.ranks,
            )
        )
    (result,) = report.results
    return {
        "ffn": ffn,
        "weight_bytes_per_rank": result.memory["original"].weights,
        **{
            name: {
                "tpot_ms": round(1e3 * timing.median / options.steps, 3),
                "least_ms": round(1e3 * timing.min / options.steps, 3),
                "ratio": round(timing.ratio, 3),
                "low": round(timing.ratio_low, 3),
                "high": round(timing.ratio_high, 3),
            }
            for name, timing in result.timings.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffns", default="512,1024,1376", help="FFN sizes, by commas.")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    rows = []
    for ffn in map(int, options.ffns.split(",")):
        rows.append(compare(ffn, options))
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"benchmark": "tp_decode", **vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
