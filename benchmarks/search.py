"""The search alone: seconds to search plans of 80 layers, groups of 2 to 4 in three wirings.

Costs of groups and of whole plans are made up, so nothing but the search takes time. Prints CPU
seconds, plans measured and depths, down to each of the depths named.

    python benchmarks/search.py --layers 80 --depths 72,60
"""

from __future__ import annotations

import argparse
import random
import time

from abreast.plan import Group
from abreast.planner.search import Candidates, refine, total

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--layers", type=int, default=80)
parser.add_argument("--depths", default="72,60")
arguments = parser.parse_args()

draw = random.Random(0)
costs = {
    Group.wired(range(first, first + size), wiring): draw.uniform(0.01, 0.03) * (size - 1) ** 1.5
    for size in (2, 3, 4)
    for first in range(1, arguments.layers - size)
    for wiring in ("lp", "cqil-full", "ff")
}
print(f"{len(costs)} candidate groups of {arguments.layers} layers\n")
print("| down to depth | CPU seconds | plans measured |")
print("|---|---|---|")
for depth in map(int, arguments.depths.split(",")):
    begin, measured = time.process_time(), 0
    candidates = Candidates.of(arguments.layers, costs)
    for _, plans in refine(
        candidates,
        lambda plans: [total(plan, costs) * draw.uniform(1.0, 1.1) for plan in plans],
        least_depth=depth,
    ):
        measured += len(plans)
    print(f"| {depth} | {time.process_time() - begin:.2f} | {measured} |")
