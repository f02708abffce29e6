"""The OpenAI-compatible server, started as docs/serving.md says and asked by the openai client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from agreement import DOCS
from load import KINDS, PLAN, judge, serve, traffic

from abreast.convert.rewrite import convert
from abreast.demo import model_folder
from abreast.model.grouping import load

PROMPT = "import os\nimport sys\n\ndef main("


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "OUT"
    convert(model_folder(), PLAN, out, dtype="float32")
    return out


@pytest.fixture(scope="module")
def server(folder) -> Any:
    """Two ranks, each a process of its own, as a user would run it."""
    with serve(folder, ranks=2) as started:
        yield started


@pytest.fixture(scope="module")
def client(server) -> Any:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=60)


@pytest.fixture(scope="module")
def greedy(folder) -> Any:
    model, tokenizer = load(folder, dtype="float32")

    def complete(prompt: str, new_tokens: int) -> tuple[str, torch.Tensor]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            for _ in range(new_tokens):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            scores = model(ids).logits[0].log_softmax(-1)
        return tokenizer.decode(ids[0, -new_tokens:]), scores[-new_tokens - 1 : -1]

    return complete


def ask(client: Any, **more: Any) -> Any:
    request = {"model": "OUT", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    return client.completions.create(**{**request, **more})


def test_completion_with_logprobs(client, greedy):
    text, scores = greedy(PROMPT, 24)
    answer = ask(client, logprobs=5).choices[0]
    assert answer.text == text
    for row, value, top in zip(
        scores, answer.logprobs.token_logprobs, answer.logprobs.top_logprobs, strict=True
    ):
        assert abs(row.max().item() - value) <= 1e-3
        assert sorted(top.values(), reverse=True)[:5] == pytest.approx(
            row.topk(5).values.tolist(), abs=1e-3
        )


def test_streaming(client, greedy):
    pieces = [chunk.choices[0].text for chunk in ask(client, stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == greedy(PROMPT, 24)[0]


def test_chat(client, greedy):
    request = {"model": "OUT", "max_tokens": 16, "temperature": 0, "logprobs": True}
    said = [{"role": "user", "content": "write a function"}]
    answer = client.chat.completions.create(messages=said, **request).choices[0]
    assert answer.message.content == greedy("# user: write a function\n# ", 16)[0]
    assert len(answer.logprobs.content) == 16
    parts = client.chat.completions.create(messages=said, stream=True, **request)
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == answer.message.content


def test_sixteen_clients_at_once(client, greedy):
    """More than the eight that the server runs at a time."""
    prompts = [f"class Number{n}:\n    def __init__(" for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: ask(client, prompt=prompt, max_tokens=16), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.choices[0].text == greedy(prompt, 16)[0]


def test_cancelled_request(client, greedy):
    stream = ask(client, stream=True, max_tokens=220, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert ask(client).choices[0].text == greedy(PROMPT, 24)[0]


def test_prompt_that_is_too_long(client, greedy):
    with pytest.raises(openai.BadRequestError, match="256"):
        ask(client, prompt="x = 1\n" * 300)
    assert ask(client, max_tokens=4).choices[0].text == greedy(PROMPT, 4)[0]


def test_mixed_traffic(server, folder):
    """Some seconds of what `make load` does for minutes, too short to judge the memory by."""
    seen = traffic(server, seconds=20, seed=1)
    seen.memory = [1.0] * 8
    judge(seen, folder)
    assert not seen.faults
    assert {*KINDS, "cancelled"} <= set(seen.events)


def test_python_of_the_docs(folder, run_apart):
    """As a user would type it, but not compiled, which takes a minute."""
    text = DOCS.read_text(encoding="utf-8")
    (code,) = [c for c in text.split("```") if c.startswith("python\nfrom vllm import LLM")]
    own = f"LLM({str(folder)!r}, enforce_eager=True)"
    done = run_apart(code.removeprefix("python\n").replace('LLM("OUT")', own))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()[-1]) > 0
