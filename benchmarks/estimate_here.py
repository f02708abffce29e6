"""What `abreast estimate` computes for this kind of CPU beside what is measured on this machine.

Random Llamas of several widths, one thread, float32: time per token of the original and of its
conversion into pairs, and their ratio. With --ranks 2 the same over two gloo processes, bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from abreast.convert.rewrite import convert
from abreast.families.row import num_layers_of
from abreast.plan import Plan
from abreast.speed import Case, Contender, Job, run
from abreast.speed.hardware import hardware_of
from abreast.speed.prediction import Setting, forward_cost

# hidden size, FFN size, layers, heads
SHAPES = ((128, 344, 32, 4), (512, 1376, 16, 8), (1024, 2752, 8, 16))
CONTEXT = 64


def compare(shape: tuple[int, int, int, int], ranks: int, rounds: int) -> dict[str, Any]:
    hidden, ffn, layers, heads = shape
    dtype = "float32" if ranks == 1 else "bfloat16"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    text = " ".join(f"{k}+{k + 1}" for k in range(1, layers - 2, 2))
    with tempfile.TemporaryDirectory(prefix="abreast-estimate-") as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(source)
        convert(source, text, out)
        report = run(
            Job(
                (Contender("original", str(source)), Contender("lp", str(out))),
                (Case("decode", 1, CONTEXT, 16),),
                backend="eager" if ranks == 1 else "tp",
                rounds=rounds,
                ranks=ranks,
            )
        )
        known = json.loads((source / "config.json").read_text())
    timing = report.results[0].timings
    measured = [timing[name].median / 16 for name in ("original", "lp")]
    plan = Plan.parse(text, num_layers_of(known))
    hardware = hardware_of("Xeon" if ranks == 1 else f"{ranks}xXeon-gloo")
    setting = Setting(hardware, context=CONTEXT, runtime="eager", dtype=dtype)
    computed = [forward_cost(known, p, setting).seconds for p in (None, plan)]
    return {
        "hidden": hidden,
        "layers": layers,
        "depth": plan.depth,
        "ranks": ranks,
        "measured_ms": [round(1e3 * seconds, 3) for seconds in measured],
        "computed_ms": [round(1e3 * seconds, 3) for seconds in computed],
        "measured_ratio": round(timing["lp"].ratio, 3),
        "interval": [round(timing["lp"].ratio_low, 3), round(timing["lp"].ratio_high, 3)],
        "computed_ratio": round(computed[0] / computed[1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        rows.append(compare(shape, options.ranks, options.rounds))
        print(rows[-1], file=sys.stderr)
    print(json.dumps({"benchmark": "estimate_here", "rows": rows}))


if __name__ == "__main__":
    main()
