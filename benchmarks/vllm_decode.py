"""vLLM on a latency-bound model: original against lp, cqil and ff, with one rank and with two.

A random Llama of many thin layers is made on the fly, and 7 pairs in its middle joined: 32 layers
become 25 stages. All run in vLLM's own layers: the original in its Llama, the conversions in
ours. Each has engines of its own, which stay up and take turns: round by round, in an order that
rotates. What is reported is the median over rounds of the ratio within a round, and its quartiles.

With two ranks the gain has two sources, fewer layers and fewer exchanges. To tell them apart, a
second set of engines waits a given time in every exchange: a simulated link. With E exchanges per
token and a wait of w, a token should take T + E w, with T measured at w = 0: that is the prediction
next to the measurement. The wait itself is a call that costs something, hence the separate set and
its own w = 0.

In bfloat16, the default, and in float32 members' matrices have other forms (abreast's engines/vllm/
packed.py): which ones they had is said below the table.

Needs vLLM: run it in the environment of the engine tests, .venv-vllm (`make bench` does).
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_DISABLE_COMPILE_CACHE="1",  # engines with and without a wait must not share code
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "real_engines"))

import numpy as np
import torch
import vllm
from agreement import free_port

from abreast.convert.rewrite import convert

PAIRS = 7
VOCABULARY = 2048
WAIT = [0.0]  # seconds in every exchange; a rank changes its own between measurements


def make(folder: Path, hidden: int, layers: int, dtype: str) -> dict[str, tuple[Path, int]]:
    """The checkpoints, each with the number of exchanges per token under two ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        dtype=dtype,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder / "original")
    first = (layers - 2 * PAIRS) // 2
    starts = range(first, first + 2 * PAIRS, 2)
    for name, sign in (("lp", "+"), ("cqil", "|"), ("ff", "~")):
        plan = " ".join(f"{start}{sign}{start + 1}" for start in starts)
        convert(folder / "original", plan, folder / name)
    ends = 2  # the embedding and the logits
    return {
        "original": (folder / "original", 2 * layers + ends),
        "lp": (folder / "lp", 2 * (layers - PAIRS) + ends),
        "cqil": (folder / "cqil", 2 * (layers - PAIRS) - PAIRS + ends),
        "ff": (folder / "ff", 2 * layers - PAIRS + ends),
    }


def slow_exchanges() -> None:
    """Make every exchange of this process wait WAIT seconds first, compiled or not."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    @torch.library.custom_op("abreast_bench::wait", mutates_args=("x",))
    def wait(x: torch.Tensor) -> None:
        until = time.perf_counter() + WAIT[0]
        while time.perf_counter() < until:
            pass

    for name in ("all_reduce", "all_gather", "gather"):
        stock = getattr(CpuCommunicator, name)

        def slowed(self: Any, x: torch.Tensor, *args: Any, _stock: Any = stock, **kw: Any) -> Any:
            wait(x)
            return _stock(self, x, *args, **kw)

        setattr(CpuCommunicator, name, slowed)


def rank_main(
    rank: int, size: int, port: int, folder: str, options: dict[str, Any], end: Any
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    try:
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

        _CPUSHMDistributed.make_group_name = staticmethod(
            lambda group: f"abreast-{port}-{group.unique_name}-{'-'.join(map(str, group.ranks))}"
        )
        if options.pop("slowed"):
            slow_exchanges()
        if size > 1:
            options["distributed_executor_backend"] = "external_launcher"
        llm = vllm.LLM(
            folder,
            tensor_parallel_size=size,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=512,
            max_num_seqs=32,
            kv_cache_memory_bytes=512 << 20,
            gpu_memory_utilization=0.1,
            seed=0,
            **options,
        )
        (held,) = llm.apply_model(forms)
        end.send(held)
        while (job := end.recv()) is not None:
            WAIT[0] = job.pop("wait")
            gc.collect()
            end.send(measure(llm, **job))
    except BaseException:
        end.send(traceback.format_exc())
    os._exit(0)


def forms(model: Any) -> dict[str, int]:
    """How many matrices of members that stand apart are held in which form."""
    from abreast.engines.vllm.packed import PackedLinear

    parts = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return dict(collections.Counter("packed" if part.packed else "batched" for part in parts))


def measure(llm: Any, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """Seconds for the prompts of a batch, and for each token after the first."""
    rng = np.random.default_rng(batch)
    prompts = [
        {"prompt_token_ids": rng.integers(3, VOCABULARY, prompt).tolist()} for _ in range(batch)
    ]
    seconds = []
    for count in (1, new_tokens):
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return {"prefill": seconds[0], "token": (seconds[1] - seconds[0]) / (new_tokens - 1)}


class Engine:
    """The ranks of one model: they hold it, and measure when told to."""

    def __init__(self, folder: Path, size: int, options: dict[str, Any]) -> None:
        context, self.port = multiprocessing.get_context("fork"), free_port()
        pipes = [context.Pipe() for _ in range(size)]
        self.ends = [here for here, _ in pipes]
        self.ranks = [
            context.Process(
                target=rank_main, args=(rank, size, self.port, str(folder), dict(options), there)
            )
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in self.ranks:
            process.start()
        self.forms, *_ = [self.answer(end) for end in self.ends]

    def answer(self, end: Any) -> Any:
        got = end.recv()
        if isinstance(got, str):
            raise SystemExit(got)
        return got

    def run(self, **job: Any) -> dict[str, float]:
        for end in self.ends:
            end.send(job)
        answers = [self.answer(end) for end in self.ends]
        return answers[0]

    def stop(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()
        for leftover in Path("/dev/shm").glob(f"*abreast-{self.port}-*"):
            leftover.unlink(missing_ok=True)


def compare(
    models: dict[str, tuple[Path, int]], size: int, slowed: bool, args: argparse.Namespace
) -> list[dict[str, Any]]:
    options = {"dtype": args.dtype, "enforce_eager": args.eager, "slowed": slowed}
    engines: dict[str, Engine] = {}
    rows = []
    try:
        for name, (folder, _) in models.items():
            engines[name] = Engine(folder, size, options)
        batches = args.batches[:1] if slowed else args.batches
        for batch in batches:
            waits = [0.0, *args.waits] if slowed else [0.0]
            times: dict[tuple[float, str], list[dict[str, float]]] = {}
            for turn in range(args.rounds + 1):
                order = sorted(models, key=lambda n: (list(models).index(n) + turn) % len(models))
                for wait in waits:
                    for name in order:
                        job = {"batch": batch, "prompt": args.prompt, "new_tokens": args.tokens}
                        seconds = engines[name].run(wait=wait * 1e-6, **job)
                        if turn:  # the first round warms up
                            times.setdefault((wait, name), []).append(seconds)
            rows += [
                row(times, wait, name, models, waits, size, slowed, batch)
                for wait in waits
                for name in models
            ]
        for made in rows:
            made["forms"] = engines[made["model"]].forms
    finally:
        for engine in engines.values():
            engine.stop()
    return rows


def row(
    times: dict[tuple[float, str], list[dict[str, float]]],
    wait: float,
    name: str,
    models: dict[str, tuple[Path, int]],
    waits: list[float],
    size: int,
    slowed: bool,
    batch: int,
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "tensor_parallel": size,
        "batch": batch,
        "simulated_link_us": wait if slowed else None,
        "model": name,
        "exchanges": models[name][1] if size > 1 else 0,
    }
    for what in ("token", "prefill"):
        mine = np.array([seconds[what] for seconds in times[wait, name]])
        base = np.array([seconds[what] for seconds in times[wait, "original"]])
        low, middle, high = np.quantile(base / mine, (0.25, 0.5, 0.75))
        made[f"{what}_ms"] = round(float(np.median(mine)) * 1e3, 3)
        made[f"{what}_speedup"] = [round(float(value), 3) for value in (low, middle, high)]
    if slowed:
        at_zero = {n: float(np.median([s["token"] for s in times[0.0, n]])) for n in models}
        there = {n: at_zero[n] + models[n][1] * wait * 1e-6 for n in models}
        made["predicted_speedup"] = round(there["original"] / there[name], 3)
    return made


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | batch | simulated link, µs | model | exchanges | ms per token "
        "| speed-up (quartiles) | predicted | prefill ms | speed-up (quartiles) |",
        "|---" * 10 + "|",
    ]
    for r in rows:
        spans = [
            "{1:.2f} ({0:.2f}-{2:.2f})".format(*r[f"{what}_speedup"])
            for what in ("token", "prefill")
        ]
        wait = "" if r["simulated_link_us"] is None else f"{r['simulated_link_us']:g}"
        lines.append(
            f"| {r['tensor_parallel']} | {r['batch']} | {wait} | {r['model']} | {r['exchanges']} "
            f"| {r['token_ms']:.2f} | {spans[0]} | {r.get('predicted_speedup', '')} "
            f"| {r['prefill_ms']:.1f} | {spans[1]} |"
        )
    forms = {f"{count} {form}" for r in rows for form, count in r.get("forms", {}).items()}
    lines += ["", f"Members' matrices: {', '.join(sorted(forms)) or 'none stand apart'}."]
    return "\n".join(lines)


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--ranks", type=numbers, default=[1, 2])
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32])
    parser.add_argument(
        "--waits", type=numbers, default=[25, 100], help="simulated links, in microseconds"
    )
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write all results here as JSON")
    args = parser.parse_args()
    args.batches = [int(batch) for batch in args.batches]
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = make(Path(folder), args.hidden, args.layers, args.dtype)
        for size in map(int, args.ranks):
            for slowed in (False, True) if size > 1 and args.waits else (False,):
                rows += compare(models, size, slowed, args)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    result = {
        "settings": settings,
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
        },
        "rows": rows,
    }
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
