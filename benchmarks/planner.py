"""The planner against the published ways to choose, on text that none of them has seen.

For every depth from 15 to 9 of the bundled model: the plan found on calibration text; the best
contiguous stretch of pairs, every start tried and judged on the held-out text itself, first and
last layer included; and the grouping by similarity of inputs. Prints a table and writes
planner.json and planner.png to the folder given (default build/planner). An interrupted run goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from abreast.data import CALIBRATION, HELD_OUT
from abreast.demo import model_folder
from abreast.planner.calibration import calibrate, candidates
from abreast.planner.find import find_plan
from abreast.planner.front import Budget
from abreast.planner.measuring import difference, score
from abreast.planner.objective import KL
from abreast.planner.search import contiguous
from abreast.planner.settings import CalibrationSettings
from abreast.report import draw_costs
from abreast.rivals.choose import by_similarity

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("build/planner"))
parser.add_argument("--windows", type=int, default=128, help="of 256 tokens, to calibrate on")
parser.add_argument("--held-out-windows", type=int, default=128)
parser.add_argument("--max-group", type=int, default=2)
parser.add_argument("--wirings", default="lp")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

model = model_folder()
settings = CalibrationSettings(
    data=CALIBRATION,
    num_windows=arguments.windows,
    max_group=arguments.max_group,
    wirings=tuple(arguments.wirings.split(",")),
    dtype="float32",
    seed=arguments.seed,
)
made = calibrate(model, arguments.out / "calibration", settings)
planned = find_plan(
    made, arguments.out, Budget(depth=9), step=lambda text: print(f"  {text}", flush=True)
)
held_out = calibrate(
    model,
    arguments.out / "held-out",
    CalibrationSettings(
        data=HELD_OUT,
        num_windows=arguments.held_out_windows,
        dtype="float32",
        seed=arguments.seed,
    ),
)
stats = planned.front.stats
config = json.loads((model / "config.json").read_text())
pairs = dict.fromkeys(candidates(config, force=True), 0.0)
chosen = planned.front.best()
stretches = {depth: contiguous(16, depth, pairs) for depth in chosen}
similar = {
    depth: by_similarity(stats.similarity, depth, made_of)
    for depth, made_of in [(depth, dict.fromkeys(candidates(config), 0.0)) for depth in chosen]
}
every = [*chosen.values(), *similar.values(), *(p for of in stretches.values() for p in of)]
unique = list(dict.fromkeys(every))
cost = dict(zip(unique, score(held_out, unique), strict=True))

rows = []
print(f"\nheld-out text, {cost[unique[0]].tokens} tokens; loss increase and KL in nats per token\n")
print("| depth | planner | loss | KL | best stretch | loss | KL | similarity | loss | KL | planner")
print("  over the better: loss | KL | loss difference | forwards |")
for depth, plan in chosen.items():
    by_loss = min(stretches[depth], key=lambda p: cost[p].loss_increase)
    by_kl = min(stretches[depth], key=lambda p: cost[p].kl)
    rivals = [by_loss, by_kl, similar[depth]]
    best_loss = min(rivals, key=lambda p: cost[p].loss_increase)
    best_kl = min(rivals, key=lambda p: cost[p].kl)
    gap = difference(held_out, plan, best_loss)
    kl_gap = difference(held_out, plan, best_kl)
    row = {
        "depth": depth,
        "planner": plan.shorthand,
        "planner_cost": asdict(cost[plan]),
        "stretch": by_loss.shorthand,
        "stretch_cost": asdict(cost[by_loss]),
        "stretch_by_kl": by_kl.shorthand,
        "stretch_by_kl_cost": asdict(cost[by_kl]),
        "similarity": similar[depth].shorthand,
        "similarity_cost": asdict(cost[similar[depth]]),
        "loss_ratio": cost[plan].loss_increase / cost[best_loss].loss_increase,
        "kl_ratio": cost[plan].kl / cost[best_kl].kl,
        "loss_difference": [gap.loss_increase, gap.loss_stderr],
        "kl_difference": [kl_gap.kl, kl_gap.kl_stderr],
        "full_forwards": planned.front.full_forwards[depth],
    }
    rows.append(row)
    cells = [f"{depth}", plan.shorthand, f"{cost[plan].loss_increase:.4f}", f"{cost[plan].kl:.4f}"]
    for rival in (by_loss, similar[depth]):
        cells += [rival.shorthand, f"{cost[rival].loss_increase:.4f}", f"{cost[rival].kl:.4f}"]
    cells += [f"{row['loss_ratio']:.2f}", f"{row['kl_ratio']:.2f}"]
    cells += [f"{gap.loss_increase:+.4f} ± {gap.loss_stderr:.4f}", f"{row['full_forwards']:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
total = sum(planned.front.full_forwards.values())
print(f"\nmeasuring and searching took {total:.1f} full forward passes in all")
(arguments.out / "planner.json").write_text(json.dumps(rows, indent=1) + "\n")
series = {
    "planner": {float(d): cost[p] for d, p in chosen.items()},
    "best contiguous stretch": {
        float(d): min((cost[p] for p in of), key=lambda c: c.kl) for d, of in stretches.items()
    },
    "similarity": {float(d): cost[p] for d, p in similar.items()},
}
draw_costs(
    series, KL, "effective depth", "bundled model, held-out text", arguments.out / "planner.png"
)
