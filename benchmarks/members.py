"""Members of a cqil group as one batched product against a Python loop over them.

Decode (one token) and prefill (256 tokens), two and four members, several widths; interleaved, the
ratio loop / batched with its 95 % interval. Above 1: batched is faster.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from abreast.modeling_members import Apart
from abreast.speed.timing import time_in_turn, timings

ROUNDS, REPEATS = 30, 20


def compare(members: int, hidden: int, tokens: int) -> dict[str, object]:
    torch.manual_seed(0)
    holder = nn.Module()
    holder.wide = nn.Linear(hidden, members * 4 * hidden, bias=False).requires_grad_(False)
    batched = Apart(holder, "wide", members)
    weights = holder.wide.weight.view(members, 4 * hidden, hidden).unbind(0)
    x = torch.randn(1, tokens, members, hidden)

    def run_batched() -> int:
        for _ in range(REPEATS):
            batched(x)
        return tokens

    def run_loop() -> int:
        for _ in range(REPEATS):
            torch.stack([x[:, :, k] @ weight.T for k, weight in enumerate(weights)], -2)
        return tokens

    runs = {"loop": run_loop, "batched": run_batched}
    timing = timings(time_in_turn(runs, rounds=ROUNDS))["batched"]
    return {
        "members": members,
        "hidden": hidden,
        "tokens": tokens,
        "ratio": round(timing.ratio, 2),
        "low": round(timing.ratio_low, 2),
        "high": round(timing.ratio_high, 2),
    }


def main() -> None:
    with torch.inference_mode():
        rows = [
            compare(members, hidden, tokens)
            for members in (2, 4)
            for hidden in (192, 512, 1024)
            for tokens in (1, 256)
        ]
    for row in rows:
        print(row, file=sys.stderr)
    print(json.dumps({"benchmark": "members", "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
