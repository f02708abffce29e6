"""Decode time of the grouped runtime under a plan without groups, against the untouched model.

Target: at most 3 % slower. Interleaved; ratio untouched / grouped with its 95 % interval.
"""

from __future__ import annotations

import json

from abreast.demo import model_folder
from abreast.model.grouping import apply, load
from abreast.plan import Plan
from abreast.speed.benchmark import bench


def main() -> None:
    untouched, _ = load(model_folder(), dtype="float32")
    model, _ = load(model_folder(), dtype="float32")
    apply(model, Plan(num_layers=16))
    models = {"untouched": untouched, "grouped": model}
    timing = bench(models, task="decode", context=64, new_tokens=64, rounds=30).timings["grouped"]
    result = {"ratio": timing.ratio, "low": timing.ratio_low, "high": timing.ratio_high}
    print(
        json.dumps({"benchmark": "grouped_overhead", **{k: round(v, 3) for k, v in result.items()}})
    )


if __name__ == "__main__":
    main()
