"""Layers abreast against layers left out, at equal depth and at equal decode speed, per engine.

At every depth three models take turns: the original, our plan converted, and the rival that leaves
layers out at the least KL. What each loses comes from --results: baselines.json of `abreast plan
--baselines` or of benchmarks/rivals.py, or rows of benchmarks/real_models. Batch 1, float32.

    python benchmarks/buy.py MODEL -o OUT --results RUN/baselines.json
    python benchmarks/buy.py .real-models/smollm2 -o OUT --row smollm2    # docs/evidence.md's

Prints a table and the caption per engine, and draws OUT/buy-ENGINE.png. Engines are those of this
environment: eager and compile everywhere, vllm in .venv-vllm, llama.cpp in .venv-gguf. What was
timed is in OUT/buy.json, or in the row; the same call elsewhere adds its engines, and an
interrupted one goes on. An entry names its machine where that is not the record's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _evidence import MODELS, ROWS, buy_rows, buy_text, read_rows, rows_of

from abreast.checkpoint import open_checkpoint, publish, read_json, write
from abreast.convert import convert
from abreast.engines.llamacpp import export
from abreast.errors import AbreastError
from abreast.model import decoder_layers, load
from abreast.plan import Plan
from abreast.planner import ENGINES as LOADERS
from abreast.planner import KL
from abreast.report import draw_costs
from abreast.rivals import LEFT_OUT, Measured
from abreast.runs import hardware, versions_of
from abreast.speed import bench
from abreast.speed.timing import ratio_interval

Seconds = dict[str, np.ndarray]  # by contender, per token in each round
NEW_TOKENS = 16


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def in_torch(execution: str) -> Callable[..., Seconds]:
    def timed(folders: Mapping[str, Path], rounds: int, context: int) -> Seconds:
        models = {name: load(folder, dtype="float32")[0] for name, folder in folders.items()}
        sizes: dict[str, Any] = {"context": context, "new_tokens": NEW_TOKENS, "rounds": rounds}
        result = bench(models, task="decode", execution=execution, **sizes)
        torch.compiler.reset()
        return {name: seconds / NEW_TOKENS for name, seconds in result.seconds.items()}

    return timed


def in_turn(token: Mapping[str, Callable[[], float]], rounds: int) -> Seconds:
    """Seconds per token of each contender, every other round in reverse order, after one."""
    seconds: dict[str, list[float]] = {name: [] for name in token}
    for turn in range(rounds + 1):
        for name in sorted(token, reverse=bool(turn % 2)):
            seconds[name].append(token[name]())
    return {name: np.array(times[1:]) for name, times in seconds.items()}


def in_vllm(folders: Mapping[str, Path], rounds: int, context: int) -> Seconds:
    from vllm_decode import Engine

    options = {"dtype": "float32", "enforce_eager": False, "slowed": False}
    job = {"batch": 1, "prompt": context, "new_tokens": NEW_TOKENS + 1, "wait": 0.0}
    engines: dict[str, Any] = {}
    try:
        for name, folder in folders.items():
            engines[name] = Engine(folder, 1, options)
        return in_turn(
            {name: lambda e=engine: e.run(**job)["token"] for name, engine in engines.items()},
            rounds,
        )
    finally:
        for engine in engines.values():
            engine.stop()


def in_llamacpp(folders: Mapping[str, Path], rounds: int, context: int) -> Seconds:
    from quantization import serve

    request = {"prompt": [*range(10, 10 + context)], "temperature": 0, "ignore_eos": True}
    request |= {"max_tokens": NEW_TOKENS}
    token = {}
    for name, folder in folders.items():
        file = folder.with_name(f"{folder.name}.gguf")
        if not file.exists():
            export(folder, file)
        server = serve(file)
        token[name] = lambda s=server: (
            s.handle_completions(request)["timings"]["predicted_per_token_ms"] / 1000
        )
    return in_turn(token, rounds)


# name -> how to time in it, whether it is here, and which of the planner's names it has
ENGINES: dict[str, tuple[Callable[..., Seconds], bool, str]] = {
    "eager": (in_torch("eager"), True, "transformers"),
    "compile": (in_torch("compile"), True, "transformers"),
    "vllm": (in_vllm, find_spec("vllm") is not None, "vllm"),
    "llama.cpp": (in_llamacpp, find_spec("xllamacpp") is not None, "llama.cpp"),
}


def checkpoint(model: Path, plan: str, out: Path) -> Path:
    """Our plan converted, or the model without layers, in float32; made once."""
    folder = out / plan.replace("|", "p").replace(":", "b").replace(" ", "_")
    if folder.is_dir():
        return folder
    config = open_checkpoint(model).config
    if not plan.startswith("without"):
        convert(model, Plan.parse(plan, config["num_hidden_layers"]), folder, dtype="float32")
        return folder
    left, tokenizer = load(model, dtype="float32")
    layers, left_out = decoder_layers(left), [int(word) for word in plan.split()[1:]]
    for layer in reversed(left_out):
        del layers[layer]
    left.config.num_hidden_layers = len(layers)
    if kinds := getattr(left.config, "layer_types", None):
        left.config.layer_types = [kind for i, kind in enumerate(kinds) if i not in left_out]
    with publish(folder) as staging:
        left.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
    return folder


def contenders(rows: list[Measured], depth: int) -> tuple[str, str] | None:
    """Our plan of a depth, and the best way to leave layers out; None where one is missing."""
    plain = [row for row in rows if row.depth == depth and not row.refit]
    ours = next((row.plan for row in plain if row.method == "planner"), None)
    cuts = [row for row in plain if row.method in LEFT_OUT]
    return (ours, min(cuts, key=lambda row: row.cost.kl).plan) if ours and cuts else None


def measure(model: Path, rows: list[Measured], options: argparse.Namespace) -> dict[str, Any]:
    """What buy.json holds, with what was missing."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    source = open_checkpoint(model)
    rests_on = {
        "model": source.weights_sha256,
        "context": options.context,
        "rounds": options.rounds,
    }
    file, machine = out / "buy.json", hardware("cpu")
    known = read_rows().get(f"{options.row}-buy", {})
    record = read_json(file) if file.is_file() else known
    if record.get("rests_on") != rests_on:
        record = {"rests_on": rests_on, "engines": {}, "machine": machine}
    record |= {
        "layers": source.config["num_hidden_layers"],
        "command": f"python benchmarks/buy.py {model.name}",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    for name in options.engines.split(",") if options.engines else ENGINES:
        time_in, here, loader = ENGINES[name]
        if not here:
            say(f"{name}: not in this environment")
            continue
        timed = record["engines"].setdefault(name, {})
        record.setdefault("versions", {})[name] = versions_of(("torch", "transformers", name))
        for depth in sorted({row.depth for row in rows}, reverse=True):
            if (plans := contenders(rows, depth)) is None:
                continue
            ours, shortened = plans
            if timed.get(str(depth), {}).get("plan") == ours:
                continue
            plan = Plan.parse(ours, record["layers"])
            entry: dict[str, Any] = {"plan": ours, "cut": shortened}
            if reason := LOADERS[loader].refusal(source.config, plan):
                entry["refused"] = reason
            else:
                say(f"{name}: time {depth} of {record['layers']} stages")
                folders = {"original": model}
                folders |= {
                    "ours": checkpoint(model, ours, out),
                    "cut": checkpoint(model, shortened, out),
                }
                if name == "llama.cpp":  # GGUF files are written beside them
                    folders["original"] = link(model, out)
                seconds = time_in(folders, options.rounds, options.context)
                for key, times in seconds.items():
                    entry[f"{key}_ms"] = 1000 * float(np.median(times))
                    entry[f"{key}_ratio"] = list(ratio_interval(seconds["original"], times))
                if machine != record["machine"]:
                    entry["machine"] = machine
            timed[str(depth)] = entry
            write(file, json.dumps(record, indent=1) + "\n")
    return record


def link(model: Path, out: Path) -> Path:
    path = out / "original"
    if not path.exists():
        path.symlink_to(model.resolve(), target_is_directory=True)
    return path


def draw(rows: list[Measured], engine: str, path: Path) -> None:
    lines: dict[str, dict[float, Any]] = {}
    for row in rows:
        if row.speedup is not None and not row.refit:
            lines.setdefault(row.name, {})[row.speedup] = row.cost
    if lines:
        draw_costs(lines, KL, "measured speed of decoding, original = 1", engine, path)


def results(options: argparse.Namespace) -> list[Measured]:
    """From files of both kinds. Raises AbreastError for none."""
    rows = rows_of(read_rows(), options.row) if options.row else []
    for file in options.results:
        record = read_json(Path(file))
        if "plans" in record:
            rows += [Measured.from_dict(row, depth=int(row["depth"])) for row in record["plans"]]
        else:
            rows += rows_of({Path(file).stem: record}, Path(file).stem.partition("-")[0])
    if not rows:
        raise AbreastError("no results: name baselines.json, or rows of rivals, with --results")
    return rows


def main() -> None:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--out", required=True, help="checkpoints, times and figures")
    parser.add_argument("--results", nargs="*", default=[], help="what plans and rivals lose")
    parser.add_argument("--row", choices=MODELS, help="take, and keep, benchmarks/real_models' own")
    parser.add_argument("--engines", help=f"of {','.join(ENGINES)}; default: those here")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--context", type=int, default=128)
    options = parser.parse_args()
    try:
        rows = results(options)
        record = measure(options.model, rows, options)
    except AbreastError as error:
        sys.exit(f"buy: {error}")
    for engine in record["engines"] if find_spec("altair") else ():
        timed = buy_rows(rows, record["engines"][engine])
        draw(timed, engine, Path(options.out) / f"buy-{engine}.png")
    print(buy_text(rows, record))
    if options.row:
        write(ROWS / f"{options.row}-buy.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
