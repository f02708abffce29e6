"""The six interventions of the LP paper on every stretch of the bundled model, in two processes.

Targets: 15 minutes on two cores, and at most 1/1.7 of the layer evaluations that it takes to run
every changed model from its first layer. ``--out FOLDER`` keeps the results (and goes on with what
is there, so the time then means nothing); ``--cqil`` adds the two wirings of CQIL.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from abreast.data import HELD_OUT
from abreast.demo import model_folder
from abreast.model.programs import name_of, programs_under
from abreast.report import draw_study
from abreast.runs.folder import JOURNAL
from abreast.study import Changes, Study, StudySettings, study, wins
from abreast.study.settings import PAPERS


def show(done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"{done} of {total}", file=sys.stderr)


def clear_wins(result: Study, folder: Path, first: str, second: str) -> tuple[int, int]:
    """Stretches of 3 layers or more where `first` loses less, or more, than `second` by over twice
    the standard error of their difference, paired over windows."""
    text = (folder / JOURNAL.format(0)).read_text(encoding="utf-8")
    lines = {(line["program"], line["batch"]): line for line in map(json.loads, text.splitlines())}
    batches = range(1 + max(batch for _, batch in lines))
    layers = result.num_layers

    def losses(intervention: str, start: int, end: int) -> np.ndarray:
        name = name_of(programs_under(intervention, start, end, layers)[0])
        return np.concatenate([lines[name, batch]["sums"] for batch in batches])[:, 0]

    less = more = 0
    for start in range(layers):
        for end in range(start + 2, layers):
            difference = losses(first, start, end) - losses(second, start, end)
            twice = 2 * difference.std(ddof=1) / math.sqrt(len(difference))
            less += bool(difference.mean() < -twice)
            more += bool(difference.mean() > twice)
    return less, more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    parser.add_argument("--cqil", action="store_true")
    arguments = parser.parse_args()
    interventions = PAPERS[:8] if arguments.cqil else PAPERS[:6]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(arguments.out or f"{folder}/study")
        start = time.perf_counter()
        result = study(
            model_folder(),
            out,
            Changes(interventions),
            StudySettings(HELD_OUT, dtype="float32", devices=("cpu", "cpu")),
            progress=show,
        )
        seconds = time.perf_counter() - start
        draw_study(result.rows, result.num_layers, out)
        clear = {
            other: clear_wins(result, out, "2-parallel", other)
            for other in ("prune", "merge", "parallel", "3-parallel")
        }
    counts = result.evaluations
    longer = [row for row in result.rows if row.end - row.start > 1]
    record = {
        "benchmark": "study",
        "seconds": round(seconds, 1),
        "rows": len(result.rows),
        "tokens": result.num_tokens,
        "loss": round(result.loss, 4),
        "layer_evaluations": counts.spent,
        "without_reuse": counts.without_reuse,
        "prefix_only": counts.prefix_only,
        "saved": round(counts.without_reuse / counts.spent, 3),
        "saved_by_prefix_only": round(counts.without_reuse / counts.prefix_only, 3),
        "2-parallel_loses_less_same_more_from_3_layers": {
            other: wins(longer, "2-parallel", other)
            for other in interventions
            if other != "2-parallel"
        },
        "by_over_two_standard_errors": clear,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
