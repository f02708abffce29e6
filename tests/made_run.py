"""A run folder as `optimize` leaves it, with made-up numbers; only the conversion is real."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from abreast.convert.rewrite import convert
from abreast.evaluate.text import Comparison, Perplexity
from abreast.plan import Group, Plan
from abreast.planner.front import Front, Stats, explain, reasons
from abreast.planner.objective import Cost
from abreast.rivals import Measured
from abreast.speed.timing import BenchResult, Measurement, timings, verdict

LAYERS = 8
PLAN = "2+3 5|6"
NAME = "depth-6-made"


def cost(kl: float) -> Cost:
    return Cost(kl, kl / 10, kl - 0.01, 0.004, 1000)


def make_front(source: str) -> Front:
    groups = {Group(layers=(i, i + 1)): cost(0.01 * i) for i in range(1, 6)}
    groups[Group(layers=(5, 6), wiring="cqil")] = cost(0.07)
    square = np.full((9, 9), 0.9)
    stats = Stats({}, source, LAYERS, 3.0, groups, square, square, square[0], square[:8, :8], 1.0)
    plans = {Plan.parse(p, LAYERS): cost(0.02 * len(p)) for p in ("2+3", "3+4", PLAN, "2+3 5+6")}
    return Front(stats, plans, {7: 2.0, 6: 3.0})


def quality(**more: Any) -> dict[str, Any]:
    windows = {"tokens": np.array([1.0])}
    ours, theirs = (
        Perplexity(nll, 0.04, float(np.exp(nll)), 0.4, 1.2, 5000, 256, 256, windows)
        for nll in (2.5, 2.4)
    )
    values = dict.fromkeys((f.name for f in fields(Comparison) if f.type == "float"), 0.1)
    values |= {"nll_difference_stderr": 0.002, "kl": 0.0625, "kl_stderr": 0.0012}
    values |= {"kl_p50": 0.01, "kl_p95": 0.2, "kl_p99": 0.3, "kl_max": 2.0}
    values |= {"top1_agreement": 0.91, "top1_agreement_stderr": 0.002, "windows_worse": 0.9}
    sizes = {"num_tokens": 5000, "window": 256, "stride": 256, "windows": windows}
    comparison = Comparison(ours, theirs, bootstrap={}, kl_by_position=(), **values, **sizes)
    return {**comparison.to_dict(), **more}


def speed(rounds: int = 8) -> dict[str, Any]:
    results = {}
    for task, factor in (("prefill", 1.0), ("decode", 0.8)):
        times = 0.01 * (1 + 0.01 * np.arange(rounds))
        seconds = {"original": times, "converted": factor * times * (1 + 0.001 * np.arange(rounds))}
        timed = timings(Measurement(seconds, {"original": 64, "converted": 64}))
        sizes = (1, 128, 64 if task == "decode" else 0, rounds, 2, 0, "cpu", "float32", 2)
        result = BenchResult(task, "original", *sizes, timed, seconds)
        results[task] = {**result.to_dict(), "verdict": verdict(result)}
    return results


SAMPLES = [
    {
        "prompt": "import os\n</pre><script>alert(2)</script>",
        "original": "one two three",
        "converted": "one two four",
        "new_tokens": [3, 3],
        "first_difference": 2,
        "shared": 9,
    },
    {
        "prompt": "def f():",
        "original": "return 1",
        "converted": "return 1",
        "new_tokens": [2, 2],
        "first_difference": None,
        "shared": 8,
    },
]
TASKS = {
    name: {
        **{"metric": "acc", "original": 0.6, "original_stderr": 0.02, "converted": 0.57},
        **{"converted_stderr": 0.02, "kept": 0.95, "p_value": 0.04, "num_items": 600},
    }
    for name in ("first_task", "second_task")
}


def make_run(run: Path, model: Path, source: str, data: str = "stdlib") -> Path:
    """Make the folder `run` about a conversion of `model`, whose name is said to be `source`."""
    front = make_front(source)
    plan = Plan.parse(PLAN, LAYERS)
    folder = run / "plans" / NAME
    for parent in (run / "calibration", folder):
        parent.mkdir(parents=True)
    save(run / "calibration" / "measure.json", {"identity": {}})
    front.stats.save(run / "calibration" / "stats.safetensors")
    save(run / "front.json", {**front.to_dict(), "identity": {"num_layers": LAYERS}})
    rows = [
        Measured(
            method,
            p.depth,
            "without 4" if method == "sleb" else p.shorthand,
            cost(factor * c.kl),
            agreement=0.9,
            seconds=0.1 * p.depth,
            speedup=LAYERS / p.depth,
        ).to_dict()
        for method, factor in (("planner", 1.0), ("sleb", 1.5), ("random", 3.0))
        for p, c in front.plans.items()
        if p.shorthand in ("2+3", PLAN)
    ]
    save(run / "baselines.json", {"rests_on": {}, "plans": rows})
    plan.model_copy(update={"source": source}).save(folder / "plan.yaml")
    (folder / "why.md").write_text(explain(plan, front), encoding="utf-8")
    convert(model, plan, folder / "converted")
    manifest = json.loads((folder / "converted" / "abreast.json").read_text())
    manifest["source"]["name"] = source
    save(folder / "converted" / "abreast.json", manifest)
    places = [{"start": i, "end": i + 64, "kl": 0.05, "stderr": 0.01} for i in (0, 64, 128)]
    ends = {"nll_difference": [0.09, 0.11], "kl": [0.06, 0.065]}
    rests_on = {"model": "1", "files": {}, "data": data, "dtype": "float32"}
    results = {
        "verify": {"ok": True, "uncached": 1e-7, "healed": False, "faults": []},
        "quality": quality(kl_by_position=places, bootstrap=ends),
        "speed": speed(),
        "samples": {"data": data, "samples": SAMPLES},
    }
    for name, result in results.items():
        save(folder / f"{name}.json", {"rests_on": rests_on, "result": result})
    save(folder / "tasks.json", {"tasks": TASKS, "kept_mean": 0.95, "settings": {}})
    planned = {"plan": plan.shorthand, "reasons": reasons(plan, front)}
    where = {"folder": f"elsewhere/plans/{NAME}", "converted": f"elsewhere/plans/{NAME}/converted"}
    save(run / "results.json", {"planned": planned, "plan": plan.shorthand, **where, **results})
    command = ["abreast", "optimize", source, "-o", "my run", "--depth", "6"]
    environment = {"date": "2026-11-21", "command": command, "folder": "/home/me"}
    environment |= {"system": "Linux", "device": "cpu", "hardware": {"cores": 2}, "versions": {}}
    save(run / "environment.json", environment)
    return run


def add_plan(run: Path, text: str, name: str) -> Path:
    """Another plan in the run, converted to nothing, but evaluated."""
    folder = run / "plans" / name
    shutil.copytree(run / "plans" / NAME, folder, ignore=shutil.ignore_patterns("converted"))
    Plan.parse(text, LAYERS).save(folder / "plan.yaml")
    return folder


def save(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
