"""Find the best plan of a depth, convert the model under it, and measure the cost in quality.

python examples/plan_and_convert.py [MODEL] [--depth 14] [--out converted]
"""

from __future__ import annotations

import argparse
import tempfile

import abreast
from abreast.data import load_tokens
from abreast.demo import model_folder
from abreast.evaluate import compare
from abreast.planner import Budget, CalibrationSettings, calibrate, find_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(model_folder()))
    parser.add_argument("--depth", type=int, default=14, help="stages of the plan")
    parser.add_argument("--data", default="stdlib-train", help="calibration text")
    parser.add_argument("--windows", type=int, default=32, help="windows of calibration text")
    parser.add_argument("--dtype", default="float32", help="dtype to measure in")
    parser.add_argument("--out", default="converted", help="new folder for the checkpoint")
    arguments = parser.parse_args()

    # Measure every candidate group, then whole plans. Keep the folder to search again for less.
    with tempfile.TemporaryDirectory() as run:
        settings = CalibrationSettings(
            data=arguments.data,
            num_windows=arguments.windows,
            window=128,
            dtype=arguments.dtype,
        )
        calibration = calibrate(arguments.model, run, settings)
        planned = find_plan(calibration, run, Budget(depth=arguments.depth), step=print)
    print(f"plan {planned.plan.shorthand}, expected KL {planned.expected.kl:.4f} nats per token")

    abreast.convert(arguments.model, planned.plan, arguments.out)
    assert abreast.verify(arguments.out, arguments.model).ok

    # Judge it on text that the search has not seen.
    original, tokenizer = abreast.load(arguments.model, dtype=arguments.dtype)
    converted, _ = abreast.load(arguments.out, dtype=arguments.dtype)
    text = load_tokens(tokenizer, max_tokens=4096)
    cost = compare(converted, original, text, window=256, stride=256)
    print(f"held-out KL {cost.kl:.4f}, loss {cost.nll_difference:+.4f} nats per token")


if __name__ == "__main__":
    main()
