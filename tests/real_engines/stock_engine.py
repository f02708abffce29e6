"""Greedy tokens and top-5 log probabilities from an engine that knows nothing of abreast.

stock_engine.py vllm|mlx FOLDER QUESTIONS ANSWERS: both files JSON, {"prompts": [[id]], "tokens": n}
in, [{"ids": [id], "logprobs": [{id: value}]}] out. Prompts run as one batch where the engine has
batches; in float32, with its KV cache.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def in_vllm(folder: str, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    os.environ.update(
        {
            "VLLM_PLUGINS": "",  # not ours either, where it is installed
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
    )
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=256 << 20,
        gpu_memory_utilization=0.1,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True)
    questions = [{"prompt_token_ids": ids} for ids in prompts]
    return [
        {
            "ids": list(answer.outputs[0].token_ids),
            "logprobs": [
                {token: entry.logprob for token, entry in step.items()}
                for step in answer.outputs[0].logprobs
            ],
        }
        for answer in llm.generate(questions, sampling, use_tqdm=False)
    ]


def in_mlx(folder: str, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache

    # transformers reads the tokenizer, and stops at a scaled RoPE in a configuration unknown to it;
    # docs/serving.md says so.
    scaled = bool(json.loads(Path(folder, "config.json").read_text()).get("rope_scaling"))
    model, _ = load(folder, tokenizer_config={"trust_remote_code": scaled})
    answers = []
    # Prompts of one length are a batch.
    for length in sorted({len(ids) for ids in prompts}):
        rows = [index for index, ids in enumerate(prompts) if len(ids) == length]
        cache, x = make_prompt_cache(model), mx.array([prompts[index] for index in rows])
        batch: list[Any] = [(index, {"ids": [], "logprobs": []}) for index in rows]
        for _ in range(tokens):
            logits = model(x, cache=cache)[:, -1].astype(mx.float32)
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            best = mx.argsort(-scores, axis=-1)[:, :5].tolist()
            for (_, answer), row, top in zip(batch, scores.tolist(), best, strict=True):
                answer["ids"].append(top[0])
                answer["logprobs"].append({token: row[token] for token in top})
            x = mx.array([[top[0]] for top in best])
        answers += batch
    return [answer for _, answer in sorted(answers, key=lambda item: item[0])]


if __name__ == "__main__":
    engine, folder, questions, answers = sys.argv[1:]
    run = {"vllm": in_vllm, "mlx": in_mlx}[engine]
    Path(answers).write_text(json.dumps(run(folder, **json.loads(Path(questions).read_text()))))
    assert "abreast" not in sys.modules
