"""Converted checkpoints against the original weights run ungrouped under the same plan.

float32: every family, tied and untied head, derived and explicit head_dim, with and without KV
cache; target: largest logit difference at most 1e-4 of the logit range. bf16: greedy tokens on the
bundled model, both sides in bf16; target: the same 64 tokens. bf16 rounds on either side, in the
weights here and in the activations there, so both are also compared with the float32 run: a sound
conversion is no further from it than the ungrouped weights are.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from abreast.convert.rewrite import convert
from abreast.convert.verification import verify
from abreast.data import HELD_OUT, load_tokens
from abreast.demo import model_folder
from abreast.model.grouping import grouped, load
from abreast.plan import Plan

PLAN = "1+2 3+4+5"
NEW_TOKENS = 64
PROMPTS = 16
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
}


def random_model(family: str, folder: Path, *, tied: bool, head_dim: int | None) -> None:
    torch.manual_seed(0)
    config = CONFIGS[family](
        vocab_size=512,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **({"head_dim": head_dim} if head_dim else {}),
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:
                parameter.mul_(4)  # sharper attention and larger logits than an untrained model's
    model.save_pretrained(folder)


def float32_parity() -> dict[str, float]:
    worst: dict[str, float] = {}
    for family, tied, head_dim in itertools.product(CONFIGS, (False, True), (None, 24)):
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder) / "source", Path(folder) / "out"
            random_model(family, source, tied=tied, head_dim=head_dim)
            convert(source, PLAN, out)
            verification = verify(out, source, new_tokens=NEW_TOKENS)
        for key, value in (("uncached", verification.uncached), ("cached", verification.cached)):
            name = f"{family} {key}"
            worst[name] = max(worst.get(name, 0.0), value)
        worst.setdefault(f"{family} greedy tokens that differ", 0)
        worst[f"{family} greedy tokens that differ"] += (
            verification.generated_tokens - verification.same_tokens
        )
    return worst


def bf16_tokens() -> dict[str, object]:
    """Greedy continuations of held-out text by both sides in bf16."""
    source = model_folder()
    plan = Plan.load(source / "plan.yaml")
    original, tokenizer = load(source, dtype="bfloat16")
    stream = load_tokens(tokenizer, HELD_OUT, max_tokens=PROMPTS * 64)
    prompts = torch.from_numpy(stream.tokens[: PROMPTS * 64]).view(PROMPTS, 1, 64)
    with tempfile.TemporaryDirectory() as folder:
        convert(source, plan, Path(folder) / "out")
        converted, _ = load(Path(folder) / "out", dtype="bfloat16")
    exact, _ = load(source, dtype="float32")
    same: dict[str, list[int]] = {"each other": [], "converted": [], "ungrouped": []}
    for prompt in prompts:
        got = continuation(converted, prompt)
        with grouped(original, plan), grouped(exact, plan):
            want, truth = continuation(original, prompt), continuation(exact, prompt)
        for name, pair in (
            ("each other", (got, want)),
            ("converted", (got, truth)),
            ("ungrouped", (want, truth)),
        ):
            agree = itertools.takewhile(lambda p: p[0] == p[1], zip(*pair, strict=True))
            same[name].append(sum(1 for _ in agree))
    whole = {name: sum(n == NEW_TOKENS for n in counts) for name, counts in same.items()}
    return {
        "prompts": PROMPTS,
        "tokens": NEW_TOKENS,
        "prompts_all_the_same": whole["each other"],
        "converted_as_in_float32": whole["converted"],
        "ungrouped_as_in_float32": whole["ungrouped"],
        "same": same,
    }


def continuation(model: transformers.PreTrainedModel, prompt: torch.Tensor) -> list[int]:
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


def main() -> None:
    float32 = {name: float(f"{value:.2e}") for name, value in float32_parity().items()}
    print(float32, file=sys.stderr)
    print(json.dumps({"benchmark": "parity", "float32": float32, "bf16": bf16_tokens()}))


if __name__ == "__main__":
    main()
