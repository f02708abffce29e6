"""Everything that needs an accelerator, in one command: `python benchmarks/accelerator.py`.

Random weights in the shapes of SmolLM2 135M, Llama 3.2 3B and Llama 2 7B, bf16, five pairs, and the
LP paper's plans 28 -> 23 and 32 -> 25. Original, lp fused, lp grouped in memory (eager only), cqil
and ff in turns; decode with CUDA graphs, prefill and decode eager and compiled; batch 1, 8 and 64,
contexts 128, 1024 and 4096. Beside every time per token stands which fraction of the
memory-bandwidth floor it reaches: the bytes of the weights and the KV cache over the bandwidth that
a triad measures on the same device.

Results are written after every case, as JSON and as a table in Markdown; the same command goes on
where it was interrupted. What does not fit into memory is noted and left out.
`--smoke` runs tiny shapes, also on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import abreast.modeling as modeling
from abreast.convert.config import converted_config
from abreast.errors import AbreastError
from abreast.families.table import family_of
from abreast.model.grouping import apply
from abreast.plan import Plan
from abreast.speed import BenchResult, bench

LLAMA = {"model_type": "llama", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        **LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-3B": {
        **LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Llama-2-7B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}
GROUPED = {
    "SmolLM2-135M": (18, 27),
    "Llama-3.2-3B": (15, 24),
    "Llama-2-7B": (14, 27),
    "tiny": (2, 5),
}
TINY = {
    **LLAMA,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def random_model(config: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A model of this config.json with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in config.items() if key not in ("auto_map", "dtype")}
    converted = str(config["model_type"]).startswith("abreast_")
    config_class = modeling.AbreastLlamaConfig if converted else LlamaConfig
    model_class = modeling.AbreastLlamaForCausalLM if converted else LlamaForCausalLM
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return model_class(config_class(**settings)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def contenders(
    name: str, config: dict[str, Any], device: str, dtype: torch.dtype
) -> dict[str, Any]:
    first, last = GROUPED[name]
    models = {"original": random_model(config, device, dtype)}
    for kind, sign in (("lp", "+"), ("cqil", "|"), ("ff", "~")):
        text = " ".join(f"{k}{sign}{k + 1}" for k in range(first, last, 2))
        plan = Plan.parse(text, config["num_hidden_layers"])
        row = converted_config(config, family_of(config), plan, dtype="bfloat16")
        models[kind] = random_model(row, device, dtype)
        if kind == "lp":
            original = models["original"]
            shared = {id(t): t for t in (*original.parameters(), *original.buffers())}
            models["lp grouped"] = copy.deepcopy(original, memo=shared)
            apply(models["lp grouped"], plan)
    return models


def bandwidth(device: str) -> float:
    """Bytes/s of a triad a = b + s c over arrays far larger than any cache; the fastest of 20."""
    count = 2**28 if device.startswith("cuda") else 2**24
    b, c = (torch.ones(count, dtype=torch.float32, device=device) for _ in range(2))
    a = torch.empty_like(b)
    best = float("inf")
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        torch.add(b, c, alpha=2.0, out=a)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 3 * a.nbytes / best


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def rows_of(result: BenchResult, models: dict[str, Any], speed: float) -> dict[str, Any]:
    rows = {}
    for name, timing in result.timings.items():
        memory, model = result.memory[name], models[name]
        row: dict[str, Any] = {
            "median_s": timing.median,
            "iqr_s": timing.iqr,
            "tokens_per_second": timing.tokens_per_second,
            "ratio": timing.ratio,
            "low": timing.ratio_low,
            "high": timing.ratio_high,
            "device_peak": memory.device_peak,
            "kv_cache": memory.kv_cache,
            "weights": memory.weights,
        }
        if result.task == "decode":
            # A tied embedding is read as the output head; an untied one only row by row.
            tied = model.config.tie_word_embeddings
            unread = 0 if tied else model.get_input_embeddings().weight.nbytes
            floor = (memory.weights - unread + memory.kv_cache) / speed
            row["tpot_s"] = timing.median / result.new_tokens
            row["fraction_of_floor"] = floor / row["tpot_s"]
        rows[name] = row
    return rows


def markdown(record: dict[str, Any]) -> str:
    lines = [
        f"{record['device']}, torch {record['torch']}, {record['dtype']}; triad "
        f"{record['bandwidth'] / 1e9:.0f} GB/s. Ratio: original / this, with its 95 % interval; "
        "floor: share of the memory-bandwidth floor reached.",
        "",
        "| model | execution | task | batch | context | | ms | ratio | floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"].values():
        about = f"| {case['model']} | {case['execution']} | {case['task']} | {case['batch']} "
        about += f"| {case['context']} "
        if "failure" in case:
            lines.append(f"{about}| | {case['failure']} | | |")
        for name, row in case.get("rows", {}).items():
            ratio = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            reached = row.get("fraction_of_floor")
            lines.append(
                f"{about}| {name} | {1e3 * row.get('tpot_s', row['median_s']):.3f} "
                f"| {'' if name == 'original' else ratio} "
                f"| {'' if reached is None else f'{reached:.0%}'} |"
            )
    return "\n".join(lines) + "\n"


def write(record: dict[str, Any], out: Path) -> None:
    for path, text in (
        (out, json.dumps(record, indent=1)),
        (out.with_suffix(".md"), markdown(record)),
    ):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", default="accelerator.json")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--executions", default="cudagraphs,eager,compile")
    parser.add_argument("--tasks", default="decode,prefill")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--contexts", default="128,1024,4096")
    parser.add_argument("--most", type=int, default=2**18, help="Tokens of all prompts of a case.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=1e9, help="Start no case after so many.")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    device, dtype = options.device, torch.bfloat16
    if device.startswith("cuda") and not torch.cuda.is_available():
        # Not a failure: `make bench` runs every script, wherever it is.
        print("no CUDA device here; run this on one, or try --smoke --device cpu", file=sys.stderr)
        return print(json.dumps({"benchmark": "accelerator", "measured": False}))
    names = options.models.split(",")
    batches, contexts = options.batches, options.contexts
    if options.smoke:
        SHAPES["tiny"] = TINY
        names, batches, contexts = ["tiny"], "1,2", "16"
    out = Path(options.out)
    record: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"cases": {}}
    on_gpu = device.startswith("cuda")
    record.update(
        benchmark="accelerator",
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        dtype="bfloat16",
        bandwidth=bandwidth(device),
    )
    for name in names:
        models = contenders(name, SHAPES[name], device, dtype)
        for execution in options.executions.split(","):
            taking = dict(models)
            if execution != "eager":
                del taking["lp grouped"]
            for task in options.tasks.split(","):
                for context in map(int, contexts.split(",")):
                    for batch in map(int, batches.split(",")):
                        key = f"{name} {execution} {task} {batch} {context}"
                        is_late = time.monotonic() - start > 60 * options.minutes
                        is_large = batch * context > options.most
                        # Prompts run under CUDA graphs as they do without.
                        is_eager = (execution, task) == ("cudagraphs", "prefill")
                        if key in record["cases"] or is_late or is_large or is_eager:
                            continue
                        case: dict[str, Any] = {
                            "model": name,
                            "execution": execution,
                            "task": task,
                            "batch": batch,
                            "context": context,
                        }
                        try:
                            result = bench(
                                taking,
                                task=task,  # type: ignore[arg-type]
                                batch_size=batch,
                                context=context,
                                new_tokens=options.steps,
                                rounds=options.rounds,
                                execution=execution,  # type: ignore[arg-type]
                            )
                            case["rows"] = rows_of(result, models, record["bandwidth"])
                        except (torch.OutOfMemoryError, AbreastError) as error:
                            memory = isinstance(error, torch.OutOfMemoryError)
                            case["failure"] = "out of memory" if memory else str(error)
                        record["cases"][key] = case
                        write(record, out)
                        print(key, case.get("failure", "done"), file=sys.stderr)
                        torch.compiler.reset()
                        gc.collect()
                        if on_gpu:
                            torch.cuda.empty_cache()
        del models, taking
        gc.collect()
    print(json.dumps({"benchmark": "accelerator", "cases": len(record["cases"]), "out": str(out)}))


if __name__ == "__main__":
    main()
