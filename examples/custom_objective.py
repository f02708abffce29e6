"""Search for plans by an objective of your own: here the upper end of the KL's error bar.

python examples/custom_objective.py [MODEL] [--depth 14]

A plan whose KL is low only by luck on little text loses to one whose KL is low for sure.
"""

from __future__ import annotations

import argparse
import tempfile

from abreast.demo import model_folder
from abreast.planner import Budget, CalibrationSettings, Objective, calibrate, find_plan

CAUTIOUS = Objective(
    name="KL+2se",
    label="KL divergence plus two standard errors",
    unit="nats per token",
    value=lambda cost: cost.kl + 2 * cost.kl_stderr,
    stderr=lambda cost: cost.kl_stderr,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(model_folder()))
    parser.add_argument("--depth", type=int, default=14, help="stages of the plan")
    parser.add_argument("--data", default="stdlib-train", help="calibration text")
    parser.add_argument("--windows", type=int, default=32, help="windows of calibration text")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as run:
        settings = CalibrationSettings(
            data=arguments.data, num_windows=arguments.windows, window=128, dtype="float32"
        )
        calibration = calibrate(arguments.model, run, settings)
        budget = Budget(depth=arguments.depth)
        by_kl = find_plan(calibration, run, budget)
        # What was measured for the first search is not measured again.
        cautious = find_plan(calibration, run, budget, objective=CAUTIOUS)
    for name, planned in (("KL", by_kl), (CAUTIOUS.name, cautious)):
        cost = planned.expected
        print(f"by {name}: {planned.plan.shorthand}, KL {cost.kl:.5f} ± {cost.kl_stderr:.5f}")


if __name__ == "__main__":
    main()
