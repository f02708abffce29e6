"""Our plans beside what people would do instead, without healing and with the same refit.

All at shares of a model's layers: Layer Parallelism's best contiguous stretch, CQIL's grouping,
ShortGPT, angular distance, SLEB, ReplaceMe and random plans. Chosen on one part of a text, judged
on another. Our plans are found here, or named by --plan.
Everything measured is kept in OUT; an interrupted run goes on. Prints a table in Markdown.

    python benchmarks/rivals.py MODEL --data text.txt --plan "7|8:1" --plan "7|8:1 17|18:1"
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from abreast.data import load_tokens
from abreast.demo import model_folder
from abreast.model import geometry, load_tokenizer
from abreast.plan import Plan
from abreast.planner.calibration import calibrate
from abreast.planner.find import find_plan
from abreast.planner.front import Budget, kind_of
from abreast.planner.objective import KL
from abreast.planner.profiling import profile_here
from abreast.planner.settings import CalibrationSettings
from abreast.rivals import METHODS, caption, compare_rivals

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default=str(model_folder()))
parser.add_argument("--data", default="stdlib", help="text to choose on, and to judge on")
parser.add_argument("--judge-data", help="another text to judge on")
parser.add_argument("--shares", default="0.93,0.83,0.73,0.67", help="of the layers that are left")
parser.add_argument("--plan", action="append", default=[], help="ours, instead of a search")
parser.add_argument("--windows", type=int, default=16, help="of 256 tokens, to choose and fit on")
parser.add_argument("--judge-windows", type=int, default=32)
parser.add_argument(
    "--methods",
    default="planner,shortgpt,sleb,replaceme",
    help=f"of {','.join(METHODS)}, or all",
)
parser.add_argument("--wirings", default="lp,cqil-full,ff")
parser.add_argument("--max-group", type=int, default=4)
parser.add_argument("--no-refit", action="store_true")
parser.add_argument("--dtype", default="float32", help="to choose in; it is judged in float32")
parser.add_argument("--speed", action="store_true", help="profile decoding and compare by speed")
parser.add_argument("-o", "--out", help="folder; a later call goes on")


def step(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    options = parser.parse_args()
    out = Path(options.out or tempfile.mkdtemp(prefix="rivals-"))
    common = {
        "wirings": tuple(options.wirings.split(",")),
        "max_group": options.max_group,
        "window": 256,
        "batch_size": 4,
    }
    texts = []
    tokenizer = load_tokenizer(Path(options.model))
    before = 0  # tokens of the text that an earlier part has
    for name, count in (("calibration", options.windows), ("held-out", options.judge_windows)):
        source = (options.judge_data if name == "held-out" else None) or options.data
        before = before if source == options.data else 0
        stream = load_tokens(tokenizer, source, max_tokens=before + count * 256, seed=0)
        part = replace(stream, tokens=stream.tokens[before:])
        dtype = "float32" if name == "held-out" else options.dtype
        settings = CalibrationSettings(data=source, num_windows=count, dtype=dtype, **common)
        texts.append(calibrate(options.model, out / name, settings, stream=part))
        before = count * 256
    calibration, held_out = texts
    num_layers = calibration.num_layers
    depths = [round(float(share) * num_layers) for share in options.shares.split(",")]
    if options.plan:
        ours = {p.depth: p for p in (Plan.read(text, num_layers) for text in options.plan)}
        arrays = geometry(
            calibration.model, calibration.tokens, calibration.size, 1, calibration.prefix
        )
    else:
        planned = find_plan(calibration, out, Budget(depth=min(depths)), step=step)
        best, arrays = planned.front.best(), planned.front.stats.geometry
        ours = {depth: best[depth] for depth in depths}
    kinds = {kind_of(group) for group in calibration.candidates}
    profile = profile_here(calibration, kinds, out, step=step) if options.speed else None
    rows = compare_rivals(
        ours,
        arrays,
        *(calibration, held_out, out),
        profile=profile,
        methods=list(METHODS) if options.methods == "all" else options.methods.split(","),
        refit=not options.no_refit,
        step=step,
    )
    spent = json.loads((out / "baselines.json").read_text())["full_forwards"]
    print(f"{options.model}: {num_layers} layers, judged on {rows[0].cost.tokens:,} tokens\n")
    print("| left | method | KL | loss | same next token | KL, refit | loss, refit | choice |")
    print("|---|---|---|---|---|---|---|---|")
    again = {(row.method, row.depth): row for row in rows if row.refit}
    for row in sorted((r for r in rows if not r.refit), key=lambda r: (-r.depth, r.cost.kl)):
        healed = again.get((row.method, row.depth))
        cells = [
            *_cells(row),
            f"{row.agreement:.3f}",
            *(_cells(healed) if healed is not None else ("", "")),
            row.plan.replace("|", "&#124;"),
        ]
        print(f"| {row.depth} | {row.name} | {' | '.join(cells)} |")
    counts = ", ".join(f"{METHODS[name]} {count:.1f}" for name, count in spent.items())
    print(f"\nFull forward passes of the text to choose: {counts or 'none'}; the others take 1.")
    if profile is not None:
        print(f"\n{profile.about}: {caption(rows, KL)}")


def _cells(row) -> tuple[str, str]:
    cost = row.cost
    return (
        f"{cost.kl:.4f} ± {cost.kl_stderr:.4f}",
        f"{cost.loss_increase:+.4f} ± {cost.loss_stderr:.4f}",
    )


if __name__ == "__main__":
    main()
