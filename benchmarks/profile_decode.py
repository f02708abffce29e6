"""Where the time goes: operations per token, matrix products against the rest, bytes per token.

A random Llama (hidden 512, 16 layers) as it is, converted (lp and cqil) and grouped in memory.
Counted: operations that the dispatcher runs, those that compute apart from views. Timed with
torch.profiler: the share of matrix products and attention. Measured beside it, for hardware.yaml:
memory bandwidth (triad), matrix products, one small operation, and an all-reduce of two gloo
processes.

Counts and bytes hold on a busy machine; times do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from abreast.convert.rewrite import convert
from abreast.model import cache_name, cache_of
from abreast.model.grouping import load

LAYERS, CONTEXT, STEPS = 16, 64, 8
STARTS = range(2, 14, 2)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "attention")


class Counted(TorchDispatchMode):
    """Counts operations, apart by whether they compute something or only look at it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.compute: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        returned = operation._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
        (self.views if is_view else self.compute)[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def step_of(model: Any, tokens: int) -> Callable[[], None]:
    ids = torch.arange(CONTEXT)[None] % model.config.vocab_size
    new, name = torch.arange(tokens)[None], cache_name(model)

    def run() -> None:
        cache = run.cache  # type: ignore[attr-defined]
        model(input_ids=new, **{name: cache}, use_cache=True)

    run.cache = cache_of(model(input_ids=ids, use_cache=True))  # type: ignore[attr-defined]
    return run


def examine(model: Any, tokens: int) -> dict[str, Any]:
    step = step_of(model, tokens)
    step()
    with Counted() as counted:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            step()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    total = sum(times.values())
    products = sum(t for key, t in times.items() if any(name in key for name in PRODUCTS))
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in step.cache.layers)  # type: ignore[attr-defined]
    return {
        "computing_operations": sum(counted.compute.values()),
        "views": sum(counted.views.values()),
        "share_of_products": round(products / total, 3),
        "weight_bytes": weights,
        "cache_bytes": cache,
    }


def fastest(run: Callable[[], object], repeats: int = 30) -> float:
    """Least seconds of a run: what other processes take away is left out."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> dict[str, float]:
    """Bytes/s of a triad (a = b + s c, 3 x 128 MB), FLOP/s, seconds of one small operation."""
    b, c = torch.ones(32_000_000), torch.ones(32_000_000)
    a = torch.empty_like(b)
    triad = fastest(lambda: torch.add(b, c, alpha=2.0, out=a), 10)
    rates = {"triad_bytes_per_s": 3 * a.nbytes / triad}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1024, 1024).to(dtype)
        seconds = fastest(lambda x=x: x @ x, 10)
        rates[f"flops_{str(dtype).removeprefix('torch.')}"] = 2 * 1024**3 / seconds
        matrix, vector = torch.randn(8192, 4096).to(dtype), torch.randn(1, 4096).to(dtype)
        seconds = fastest(lambda m=matrix, v=vector: torch.nn.functional.linear(v, m), 20)
        rates[f"gemv_bytes_per_s_{str(dtype).removeprefix('torch.')}"] = matrix.nbytes / seconds
    small = torch.ones(1, 1, 64)

    def many() -> None:
        for _ in range(1000):
            small + 1

    rates["small_operation_s"] = fastest(many, 20) / 1000
    return rates


ALL_REDUCE = """
import time, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
x = torch.ones(1, 1, 512)
for _ in range(200):
    dist.all_reduce(x)
found = []
for _ in range(50):
    start = time.perf_counter()
    for _ in range(20):
        dist.all_reduce(x)
    found.append((time.perf_counter() - start) / 20)
if dist.get_rank() == 0:
    print(min(found), sorted(found)[len(found) // 2])
dist.destroy_process_group()
"""


def all_reduce() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="abreast-gloo-") as folder:
        script = Path(folder) / "worker.py"
        script.write_text(ALL_REDUCE)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [sys.executable, *launcher, str(script)], capture_output=True, text=True, check=True
        )
    least, median = map(float, done.stdout.split())
    return {"all_reduce_least_s": least, "all_reduce_median_s": median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts-only", action="store_true", help="Leave the machine out.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    plans = {"lp": "+", "cqil": "|"}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="abreast-profile-") as folder:
        source = Path(folder) / "original"
        LlamaForCausalLM(config).save_pretrained(source)
        models = {"original": load(source)[0]}
        for name, sign in plans.items():
            plan = " ".join(f"{k}{sign}{k + 1}" for k in STARTS)
            convert(source, plan, Path(folder) / name)
            models[name] = load(Path(folder) / name)[0]
            models[f"{name} grouped in memory"] = load(source, plan=plan)[0]
        plan = " ".join(f"{k}|{k + 1}:1" for k in STARTS)
        convert(source, plan, Path(folder) / "bypass")
        models["cqil, bypass 1"] = load(Path(folder) / "bypass")[0]
        with torch.inference_mode():
            for name, model in models.items():
                for phase, tokens in (("decode", 1), ("prefill", 256)):
                    rows.append({"model": name, "phase": phase, **examine(model, tokens)})
                    print(rows[-1], file=sys.stderr)
    result: dict[str, Any] = {"benchmark": "profile_decode", "rows": rows}
    if not options.counts_only:
        result["machine"] = {name: float(f"{v:.3g}") for name, v in machine().items()}
        reductions = [all_reduce() for _ in range(3)]
        for key in reductions[0]:
            result["machine"][key] = statistics.median(reduction[key] for reduction in reductions)
        print(result["machine"], file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
