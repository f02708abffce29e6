"""What refit takes, in forward passes of the original over the same text. Target: at most 20.

    python benchmarks/refit_time.py MODEL PLAN [--tokens 65536]

A pass before and one after it, logits included; the ratio to each. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from abreast.checkpoint import open_checkpoint, plan_for
from abreast.data import CALIBRATION, load_tokens
from abreast.errors import AbreastError
from abreast.heal.least_squares import refit
from abreast.model import inference, load
from abreast.runs import whole_windows

WINDOW, BATCH = 1024, 8


def forward_seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    with inference(model):
        for batch in ids.split(BATCH):
            model(input_ids=batch, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("plan")
    parser.add_argument("--tokens", type=int, default=65_536)
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype="float32")
    plan = plan_for(open_checkpoint(options.model), options.plan)
    stream = load_tokens(tokenizer, CALIBRATION, max_tokens=options.tokens)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    count = min(len(stream), options.tokens) // WINDOW
    tokens = whole_windows(stream, count, WINDOW, longest=None, vocabulary=vocabulary)
    ids = torch.from_numpy(tokens)
    before = forward_seconds(model, ids)
    start = time.perf_counter()
    done = refit(model, plan, tokens, prefix=len(stream.prefix))
    seconds = time.perf_counter() - start
    after = forward_seconds(model, ids)
    result = {
        "benchmark": "refit_time",
        "plan": plan.shorthand,
        "tokens": done.num_tokens,
        "refit_s": round(seconds, 1),
        "forward_s": [round(before, 1), round(after, 1)],
        "forward_passes": [round(seconds / before, 1), round(seconds / after, 1)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except AbreastError as error:
        sys.exit(f"refit_time: {error}")
