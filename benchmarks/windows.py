"""How many windows of text a search needs: plans found on 8, 16 and 32, judged on the same others.

Each of --repeat searches has a text of its own; of it the searches on fewer windows see the
beginning, so what they measured is not measured again. All plans are judged on --judge-windows
windows of --judge-data. Everything measured is kept in OUT; an interrupted run goes on, and another
depth adds to it. Prints a table in Markdown.

    python benchmarks/windows.py MODEL --data a.txt --judge-data b.txt --depths 25 -o OUT
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from abreast.data import TokenStream, load_tokens
from abreast.demo import model_folder
from abreast.model import load, load_tokenizer
from abreast.plan import Plan
from abreast.planner import Budget, Calibration, CalibrationSettings, calibrate, find_plan, score
from abreast.runs import JOURNAL

WINDOW = 256


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def stream_of(options: argparse.Namespace, data: str, windows: int) -> TokenStream:
    tokenizer = load_tokenizer(Path(options.model))
    stream = load_tokens(tokenizer, data, max_tokens=windows * WINDOW, seed=0)
    if len(stream) < windows * WINDOW:
        sys.exit(f"windows: '{data}' has {len(stream)} tokens of {windows * WINDOW}; name a longer")
    return stream


def part_of(stream: TokenStream, begin: int, windows: int) -> TokenStream:
    size = WINDOW - len(stream.prefix)
    return replace(stream, tokens=stream.tokens[begin * size : (begin + windows) * size])


def searches(
    options: argparse.Namespace, counts: list[int], depths: list[int], author: Any
) -> dict[tuple[int, int], Any]:
    """(windows, number of the text) -> what the search found."""
    most, planned = max(counts), {}
    stream = stream_of(options, options.data, options.repeat * most)
    for number in range(options.repeat):
        before: Calibration | None = None
        for count in counts:
            part = part_of(stream, number * most, count)
            settings = CalibrationSettings(num_windows=count, window=WINDOW, dtype=options.dtype)
            folder = Path(options.out) / f"{number}-{count}"
            new = not folder.exists()
            calibration = calibrate(options.model, folder, settings, stream=part, author=author)
            if before is not None and new:
                shutil.copy(before.folder / JOURNAL.format(0), calibration.folder)
            say(f"text {number + 1} of {options.repeat}, {count} windows")
            run = Path(options.out) / "found" / folder.name
            run.mkdir(parents=True, exist_ok=True)
            budget = Budget(depth=min(depths))
            planned[count, number] = find_plan(calibration, run, budget, step=say)
            before = calibration
    return planned


def main() -> None:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("model", nargs="?", default=str(model_folder()))
    parser.add_argument("--data", default="stdlib", help="text to search on")
    parser.add_argument("--judge-data", default="stdlib-train", help="another, to judge on")
    parser.add_argument("--windows", default="8,16,32", help="of 256 tokens, multiples of 4")
    parser.add_argument("--judge-windows", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--depths", default="12", help="the deepest cut is searched for")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("-o", "--out", help="folder; a later call goes on")
    options = parser.parse_args()
    options.out = options.out or tempfile.mkdtemp(prefix="windows-")
    counts, depths = (
        sorted(map(int, text.split(","))) for text in (options.windows, options.depths)
    )
    model, _ = load(options.model, dtype=options.dtype)
    settings = CalibrationSettings(
        num_windows=options.judge_windows, window=WINDOW, dtype=options.dtype
    )
    judge = calibrate(
        options.model,
        Path(options.out) / "judge",
        settings,
        stream=stream_of(options, options.judge_data, options.judge_windows),
        author=lambda: model,
    )
    planned = searches(options, counts, depths, lambda: model)
    print(
        "| stages | windows | KL of each search | mean | best to worst | optimism | same groups |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for depth in reversed(depths):
        for count in counts:
            fronts = [planned[count, number].front for number in range(options.repeat)]
            plans: list[Plan] = [front.best()[depth] for front in fronts]
            held = np.array([cost.kl for cost in score(judge, plans)])
            seen = np.array([front.plans[p].kl for front, p in zip(fronts, plans, strict=True)])
            shared = set.intersection(*(set(plan.groups) for plan in plans))
            cells = [
                f"{depth} | {count} | {' '.join(f'{kl:.4f}' for kl in held)}",
                f"{held.mean():.4f} | {held.max() - held.min():.4f}",
                f"{(seen - held).mean():+.4f} | {len(shared)} of {len(plans[0].groups)}",
            ]
            print(f"| {' | '.join(cells)} |")
            for number, plan in enumerate(plans, start=1):
                say(f"{depth} stages, {count} windows, text {number}: {plan.shorthand}")


if __name__ == "__main__":
    main()
