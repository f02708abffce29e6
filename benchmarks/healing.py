"""Share of a plan's cost that healing wins back, on the bundled model at depth 12 and 10.

Targets, as the share of the loss increase that is gone on held-out text: refit 40 %, distil 75 %
within 30 CPU minutes, both 85 %. Every number is measured on the converted checkpoint as written,
on all held-out text there is; "first" is the same on its first 65,280 tokens, on which healing was
first measured. ``--out FOLDER`` keeps results and goes on with what is there; ``--steps`` shortens
the training; ``--only lp-12,cqil-10`` picks plans. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from abreast.checkpoint import write
from abreast.convert.rewrite import convert
from abreast.data import CALIBRATION, HELD_OUT, load_tokens
from abreast.demo import model_folder
from abreast.evaluate.text import Comparison, compare
from abreast.heal.healing import heal
from abreast.heal.recipe import Recipe
from abreast.model.grouping import load

PAIRS = {12: "2+3 4+5 6+7 10+11", 10: "1+2 3+4 5+6 7+8 9+10 11+12"}
PLANS = {
    **{f"lp-{depth}": plan for depth, plan in PAIRS.items()},
    **{f"cqil-{depth}": plan.replace("+", "|") for depth, plan in PAIRS.items()},
}
METHODS = ("none", "refit", "distill", "both")
TARGETS = {"refit": 0.40, "distill": 0.75, "both": 0.85}
FIRST = 255  # windows of 256 tokens


def share_removed(healed: np.ndarray, unhealed: np.ndarray) -> tuple[float, float]:
    """1 - sum(healed) / sum(unhealed) over windows, and its standard error (delta method)."""
    total, count = float(unhealed.sum()), len(unhealed)
    ratio = float(healed.sum()) / total
    rest = healed - ratio * unhealed
    return 1 - ratio, math.sqrt(count / (count - 1) * float(np.square(rest).sum())) / abs(total)


def as_row(comparison: Comparison, base: dict[str, Any] | None) -> dict[str, Any]:
    windows = {
        "increase": (comparison.windows["nll"] - comparison.windows["reference_nll"]).tolist(),
        "kl": comparison.windows["kl"].tolist(),
    }
    row: dict[str, Any] = {
        "perplexity": [comparison.model.perplexity, comparison.model.perplexity_stderr],
        "reference_perplexity": [
            comparison.reference.perplexity,
            comparison.reference.perplexity_stderr,
        ],
        "loss_increase": [comparison.nll_difference, comparison.nll_difference_stderr],
        "kl": [comparison.kl, comparison.kl_stderr],
        "top1_agreement": [comparison.top1_agreement, comparison.top1_agreement_stderr],
        "tokens": comparison.num_tokens,
        "windows": windows,
    }
    if base is not None:
        for key, name in (("increase", "removed"), ("kl", "kl_removed")):
            pair = (np.array(windows[key]), np.array(base["windows"][key]))
            row[name] = list(share_removed(*pair))
            row[f"{name}_first"] = list(share_removed(*(part[:FIRST] for part in pair)))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    parser.add_argument("--only", default=",".join(PLANS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=1400)  # takes about 26 CPU minutes
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-weight", type=float, default=50.0)
    parser.add_argument("--lm-weight", type=float, default=Recipe.lm_weight)
    parser.add_argument("--group-share", type=float, default=Recipe.group_share)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--train", default=Recipe.train)
    parser.add_argument("--eval-tokens", type=int, help="default: all")
    arguments = parser.parse_args()
    recipe = Recipe(
        train=arguments.train,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        hidden_weight=arguments.hidden_weight,
        lm_weight=arguments.lm_weight,
        optimizer=arguments.optimizer,
        group_share=arguments.group_share,
    )
    source = model_folder()
    original, tokenizer = load(source, dtype="float32")
    stream = load_tokens(tokenizer, HELD_OUT, max_tokens=arguments.eval_tokens)
    folder = Path(arguments.out or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in arguments.only.split(","):
        for method in arguments.methods.split(","):
            record = folder / f"{name}-{method}.json"
            if not record.is_file():
                out, work = folder / f"{name}-{method}", folder / f"{name}-{method}.work"
                started = time.process_time()
                if out.exists():  # written, but not yet evaluated
                    shutil.rmtree(out)
                if method == "none":
                    convert(source, PLANS[name], out)
                else:
                    heal(
                        source,
                        PLANS[name],
                        out,
                        data=CALIBRATION,
                        method=method,
                        recipe=recipe,
                        work=work,
                    )
                spent = time.process_time() - started
                model, _ = load(out, dtype="float32")
                comparison = compare(model, original, stream, window=256, stride=256, batch_size=8)
                base = folder / f"{name}-none.json"
                row = as_row(comparison, json.loads(base.read_text()) if base.is_file() else None)
                row |= {"plan": PLANS[name], "method": method, "cpu_seconds": spent}
                row |= {"steps": arguments.steps if method in ("distill", "both") else 0}
                write(record, json.dumps(row) + "\n")
                shutil.rmtree(out)
                shutil.rmtree(work, ignore_errors=True)
            row = json.loads(record.read_text())
            row.pop("windows")
            rows[f"{name} {method}"] = row
            rounded = {
                key: [float(f"{v:.4g}") for v in value] if isinstance(value, list) else value
                for key, value in row.items()
            }
            print(f"{name} {method}: {json.dumps(rounded)}", file=sys.stderr, flush=True)
    met = {
        key: row["removed"][0] >= TARGETS[row["method"]]
        for key, row in rows.items()
        if row["method"] in TARGETS and "removed" in row
    }
    if not arguments.out:
        shutil.rmtree(folder)
    print(json.dumps({"benchmark": "healing", "targets_met": met, "rows": rows}))


if __name__ == "__main__":
    main()
