"""What exact prefill buys: prompts in the original order, decoding abreast.

Quality: held-out prompts of 192 tokens, the next 64 scored one at a time through the KV cache, for
plans of several depths, everything under the plan and with sequential prefill: loss increase and
KL divergence to the original, both with standard errors over prompts. Few-shot answers: prompts
with six worked examples of a copying task, answers generated greedily, share that is right.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import torch

from abreast.data import HELD_OUT, load_tokens
from abreast.demo import model_folder
from abreast.model import cache_name, cache_of, device_of
from abreast.model.grouping import grouped, load
from abreast.plan import Plan

PROMPT, SCORED = 192, 64
PLANS = (  # of the bundled model, by what single pairs cost on calibration text
    "2+3 4+5 6+7 10+11",
    "2+3 4+5 6+7 9+10 11+12",
    "1+2 3+4 5+6 7+8 9+10 11+12",
    "1+2 3+4 5+6 7+8 9+10 11+12 13+14",
)
WORDS = (
    *("name", "path", "data", "value", "index", "size", "text", "line"),
    *("node", "item", "count", "start", "limit", "offset", "buffer"),
)


def stepwise(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [batch, SCORED, vocab] of the tokens after the prompt, fed one by one."""
    prompt = ids.shape[1] - SCORED
    step = model(ids[:, :prompt], use_cache=True, logits_to_keep=1)
    logits = [step.logits[:, -1]]
    for position in range(prompt, prompt + SCORED - 1):
        step = model(
            ids[:, position : position + 1], **{cache_name(model): cache_of(step)}, use_cache=True
        )
        logits.append(step.logits[:, -1])
    return torch.stack(logits, 1).log_softmax(-1)


def quality(
    model: torch.nn.Module, ids: torch.Tensor, plans: dict[int, Plan]
) -> list[dict[str, object]]:
    targets = ids[:, -SCORED:, None]
    reference = stepwise(model, ids)
    rows = []
    for depth, plan in plans.items():
        for prefill in ("grouped", "sequential"):
            with grouped(model, plan, prefill=prefill):  # type: ignore[arg-type]
                logits = stepwise(model, ids)
            loss = (reference - logits).gather(-1, targets)[..., 0].mean(1)
            kl = (reference.exp() * (reference - logits)).sum(-1).mean(1)
            row: dict[str, object] = {"depth": depth, "prefill": prefill}
            for name, values in (("loss_increase", loss), ("kl", kl)):
                row[name] = round(float(values.mean()), 4)
                row[f"{name}_stderr"] = round(float(values.std() / len(values) ** 0.5), 4)
            rows.append(row)
    return rows


def few_shot(seed: int = 0, count: int = 150) -> list[tuple[str, str]]:
    """Prompts whose last line repeats a pattern shown six times, and the answers to them."""
    rng = np.random.default_rng(seed)
    tasks = []
    for _ in range(count):
        names = [f"{a}_{b}" for a, b in (rng.choice(WORDS, 2, replace=False) for _ in range(7))]
        shots = "".join(f"        self.{name} = {name}\n" for name in names[:-1])
        head = "class Reader:\n    def __init__(self, " + ", ".join(names) + "):\n"
        tasks.append((f"{head}{shots}        self.{names[-1]} =", f" {names[-1]}\n"))
    return tasks


def answered(model: torch.nn.Module, tokenizer: object, tasks: list[tuple[str, str]]) -> list[bool]:
    """Which of the tasks a model answers right, greedily."""
    right = []
    for prompt, answer in tasks:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])  # type: ignore[operator]
        ids = ids.to(device_of(model))
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        text = tokenizer.decode(out[0, ids.shape[1] :])  # type: ignore[attr-defined]
        right.append(text.startswith(answer))
    return right


def share(right: list[bool]) -> float:
    return round(sum(right) / len(right), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(model_folder()))
    parser.add_argument("--plan", action="append", help="instead of those of the bundled model")
    parser.add_argument("--data", default=HELD_OUT)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tasks", type=int, default=150)
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype="float32")
    count = model.config.get_text_config().num_hidden_layers
    plans = {p.depth: p for p in (Plan.read(text, count) for text in options.plan or PLANS)}
    stream = load_tokens(tokenizer, options.data, max_tokens=options.prompts * (PROMPT + SCORED))
    ids = torch.from_numpy(stream.tokens).view(-1, PROMPT + SCORED)
    prefix = torch.tensor([stream.prefix] * len(ids), dtype=torch.long).view(len(ids), -1)
    ids = torch.cat([prefix, ids], dim=1)
    tasks = few_shot(count=options.tasks)
    with torch.inference_mode():
        rows = quality(model, ids, plans)
        accuracy = {"original": share(answered(model, tokenizer, tasks))}
        for depth, plan in plans.items():
            for prefill in ("grouped", "sequential"):
                with grouped(model, plan, prefill=prefill):  # type: ignore[arg-type]
                    accuracy[f"{depth} {prefill}"] = share(answered(model, tokenizer, tasks))
    for row in rows:
        print(row, file=sys.stderr)
    print(accuracy, file=sys.stderr)
    print(json.dumps({"benchmark": "prefill", "quality": rows, "few_shot_accuracy": accuracy}))


if __name__ == "__main__":
    main()
