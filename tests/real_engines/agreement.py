"""What an engine wrote against what transformers would have written; commands of the docs."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from abreast.model.grouping import load

TOLERANCE = 1e-3
TIE = 1e-5  # nats: float32 sums in another order differ by as much
MLX = Path(__file__).resolve().parents[2] / ".venv-mlx" / "bin"
PAGES = Path(__file__).resolve().parents[2] / "docs"
DOCS = PAGES / "serving.md"


def command_in_docs(start: str) -> list[str]:
    """The one command in docs/serving.md that starts so, backslashes joined."""
    text = DOCS.read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return shlex.split(line, comments=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def compare(
    folder: Path,
    prompts: list[list[int]],
    answers: list[dict[str, Any]],
    tolerance: float = TOLERANCE,
    plan: str | None = None,
) -> None:
    """Greedy tokens equal but for ties in float32, top-5 log probabilities within tolerance.

    Fed what vLLM wrote, transformers must predict just that, token by token, with the prompt in the
    original order where the checkpoint asks for it. A looser tolerance is for arithmetic that
    differs: there a token may win that is behind by no more than that.
    """
    # Faster implementations leave out what some families cap.
    model, _ = load(folder, plan=plan, dtype="float32", attn_implementation="eager")
    sequential = getattr(model.config, "abreast_prefill", None) == "sequential"
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer["ids"]])
        apart = {"prompt_tokens": len(prompt)} if sequential else {}
        with torch.inference_mode():
            scores = model(ids, **apart).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        if tolerance == TOLERANCE:
            behind = scores.max(-1).values - scores[range(len(scores)), answer["ids"]]
            assert (behind <= TIE).all()
        for row, step, token in zip(scores, answer["logprobs"], answer["ids"], strict=True):
            assert row.max() - row[token] <= tolerance
            top = row.topk(5).values
            assert len(step) >= 5
            for other, value in step.items():
                assert abs(row[int(other)].item() - value) <= tolerance
            got = torch.tensor(sorted(step.values(), reverse=True)[:5])
            assert (got - top).abs().max() <= tolerance


def answers_of_stock(
    engine: str, folder: Path, prompts: list[list[int]], tokens: int
) -> list[dict[str, Any]]:
    """What stock_engine.py makes of prompts in the engine's own environment, without abreast."""
    root, script = Path(__file__).resolve().parents[2], Path(__file__).with_name("stock_engine.py")
    questions, answers = folder.parent / "questions.json", folder.parent / "answers.json"
    questions.write_text(json.dumps({"prompts": prompts, "tokens": tokens}))
    python = root / f".venv-{engine}" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [python, script, engine, folder, questions, answers],
        cwd=folder.parent,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=900,
    )
    made: list[dict[str, Any]] = json.loads(answers.read_text())
    return made


def in_mlx_ranks(command: list[Any], folder: Path, ranks: int, **environment: str) -> list[Any]:
    """Run a command of mlx's environment on so many ranks; (status, output) of each."""
    hosts = folder / f"hosts-{time.monotonic_ns()}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(ranks)]))
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    own |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    started = [
        subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=own | ({"MLX_RANK": str(r), "MLX_HOSTFILE": str(hosts)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(ranks)
    ]
    try:
        return [
            (process.returncode, out)
            for process in started
            for out in [process.communicate(timeout=600)[0]]
        ]
    finally:
        for process in started:
            process.kill()


def answers_of_mlx(
    folder: Path,
    prompts: list[list[int]],
    tokens: int,
    ranks: int = 1,
    unpaired: str = "shard",
    alone: Sequence[int] = (0, -1),
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What mlx_ranks.py makes of prompts together, then of some alone; its counts."""
    questions, answers = folder.parent / "questions.json", folder.parent / "answers.json"
    request = {"prompts": prompts, "tokens": tokens, "alone": [*alone]}
    questions.write_text(json.dumps(request))
    script = Path(__file__).with_name("mlx_ranks.py")
    command = [MLX / "python", script, folder, questions, answers]
    for status, output in in_mlx_ranks(command, folder.parent, ranks, ABREAST_UNPAIRED=unpaired):
        assert status == 0, output
    made = json.loads(answers.read_text())
    return made["answers"], made["sums"]
