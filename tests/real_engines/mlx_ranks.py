"""mlx-lm with the model file of `convert --format mlx`, on one rank or several, without abreast.

mlx_ranks.py FOLDER QUESTIONS ANSWERS: as for stock_engine.py, but for "alone": the prompts that run
by themselves, while the others are batches of mlx-lm's. ANSWERS also says how many all_sums a
decoded token and a prompt took, and how many caches this rank has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load, sharded_load


def answers_of(model: Any, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    generator = BatchGenerator(model, max_tokens=tokens)
    made: dict[int, dict[str, Any]] = {}
    order = generator.insert(prompts)
    while responses := generator.next_generated():
        for response in responses:
            answer = made.setdefault(response.uid, {"ids": [], "logprobs": []})
            scores = response.logprobs.astype(mx.float32)
            best = mx.argsort(-scores)[:5].tolist()
            answer["ids"].append(response.token)
            answer["logprobs"].append({token: scores[token].item() for token in best})
    return [made[uid] for uid in order]


def sums_of(model: Any) -> dict[str, int]:
    """How many all_sums one forward of a prompt, and of one token after it, takes."""
    count, summed = [0], mx.distributed.all_sum

    def counting(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return summed(*args, **options)

    cache, counts = make_prompt_cache(model), {}
    mx.distributed.all_sum = counting
    for name, tokens in (("prompt", [3, 4, 5]), ("its end", [6]), ("token", [7])):
        count[0] = 0
        mx.eval(model(mx.array([tokens]), cache=cache))
        counts[name] = count[0]
    mx.distributed.all_sum = summed
    return counts | {"caches": len(cache)}


if __name__ == "__main__":
    folder, questions, answers = sys.argv[1:]
    group = mx.distributed.init()
    if group.size() > 1:
        model, _ = sharded_load(folder, tensor_group=group, trust_remote_code=True)
    else:
        model, _ = load(folder, trust_remote_code=True)
    questions_read = json.loads(Path(questions).read_text())
    made = answers_of(model, questions_read["prompts"], questions_read["tokens"])
    for index in questions_read["alone"]:
        made += answers_of(model, [questions_read["prompts"][index]], questions_read["tokens"])
    assert "abreast" not in sys.modules
    if group.rank() == 0:
        Path(answers).write_text(json.dumps({"answers": made, "sums": sums_of(model)}))
    else:
        sums_of(model)
