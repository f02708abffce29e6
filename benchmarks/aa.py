"""The same model twice, timed as if it were two: how often does the bench claim a difference?

Each of 20 comparisons loads two copies of the bundled model and times them in turns. Target: the
95 % interval of the ratio holds 1.00 in at least 19. With --shared both names stand for one model
in memory: what is then left out is that two copies do not lie in memory alike.
"""

from __future__ import annotations

import argparse
import json
import sys

from abreast.demo import model_folder
from abreast.model.grouping import load
from abreast.speed.benchmark import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--shared", action="store_true")
    options = parser.parse_args()
    held, ratios, widths = 0, [], []
    for seed in range(options.comparisons):
        first, _ = load(model_folder(), dtype="float32")
        second = first if options.shared else load(model_folder(), dtype="float32")[0]
        outcome = bench(
            {"original": first, "again": second},
            task="decode",
            context=64,
            new_tokens=options.steps,
            rounds=options.rounds,
            seed=seed,
        ).timings["again"]
        holds = outcome.ratio_low <= 1 <= outcome.ratio_high
        held += holds
        ratios.append(round(outcome.ratio, 4))
        widths.append(outcome.ratio_high - outcome.ratio_low)
        print(
            f"{outcome.ratio:.4f} [{outcome.ratio_low:.4f}, {outcome.ratio_high:.4f}] "
            f"{'holds' if holds else 'MISSES'} 1",
            file=sys.stderr,
        )
    result = {
        "benchmark": "aa",
        "shared": options.shared,
        "rounds": options.rounds,
        "comparisons": options.comparisons,
        "interval_holds_1": held,
        "ratios": ratios,
        "median_interval_width": round(sorted(widths)[len(widths) // 2], 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
