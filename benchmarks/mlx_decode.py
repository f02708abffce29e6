"""Decoding in mlx-lm on one rank: a conversion's model file against mlx-lm's own llama.

Both run as many layers, since on one rank nothing is left out: the time of a token is compared as
it is. Batch 1, float32, a random llama; rounds of both in turn. Target: 1.05 of mlx-lm's time.

python benchmarks/mlx_decode.py [ROUNDS] converts, and measures in .venv-mlx (`make test-stock`),
which knows no abreast.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HIDDEN, CONTEXT, TOKENS = 16, 512, 32, 8
PLANS = {"lp": "+", "cqil": "|", "ff": "~"}


def main(rounds: str = "10") -> None:
    import torch
    import transformers

    from abreast.convert import convert

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=4096,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "original")
        for wiring, sign in PLANS.items():
            plan = " ".join(f"{layer}{sign}{layer + 1}" for layer in range(4, 12, 2))
            convert(folder / "original", plan, folder / wiring, form="mlx")
        python = ROOT / ".venv-mlx" / "bin" / "python"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [python, __file__, "--in-mlx", str(folder), rounds]
        subprocess.run(command, check=True, env=environment)


def in_mlx(folder: str, rounds: str) -> None:
    from mlx_lm.utils import load_model

    models = {
        name: load_model(Path(folder) / name, trust_remote_code=name != "original")[0]
        for name in ("original", *PLANS)
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(int(rounds) + 1):
        for name, model in models.items():
            seconds = seconds_per_token(model)
            if turn:  # the first one compiles
                times[name].append(seconds)
    layer = statistics.median(times["original"]) / LAYERS
    rows = {"benchmark": "mlx_decode", "ms_per_layer_of_mlx_lm": round(1e3 * layer, 3)}
    for name in PLANS:
        ratios = [a / b for a, b in zip(times[name], times["original"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = f"{middle:.3f} of mlx-lm's time (quartiles {low:.3f} to {high:.3f})"
    print(json.dumps(rows))


def seconds_per_token(model: Any) -> float:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    logits = model(mx.arange(CONTEXT)[None], cache=cache)
    mx.eval(logits)
    start = time.perf_counter()
    for _ in range(TOKENS):
        logits = model(logits[:, -1:].argmax(-1), cache=cache)
        mx.eval(logits)
    return (time.perf_counter() - start) / TOKENS


if __name__ == "__main__":
    in_mlx(*sys.argv[2:]) if sys.argv[1:2] == ["--in-mlx"] else main(*sys.argv[1:])
