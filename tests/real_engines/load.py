"""Mixed traffic against vLLM's OpenAI-compatible server; `make MINUTES=20 load`.

The bundled model is converted (float32) and served on a CPU. Clients ask for completions and chats,
whole and streamed, leave in the middle of a stream, do not wait for an answer, send prompts longer
than the context, malformed JSON and nonsense. Every answer must be what transformers writes
greedily, or, where they part, the two best tokens must lie within NEAR. Every bad request must be
refused, the memory of the server's processes must not grow, and at the end nothing may still run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import torch
from agreement import command_in_docs, free_port

from abreast.convert import convert
from abreast.data import HELD_OUT, documents
from abreast.demo import model_folder
from abreast.model.grouping import load

PLAN = "2+3 8|9 10|11:1"
NEAR = 1e-4  # of a logit
MOST = 48  # new tokens of an answer
GROWTH = 0.02  # of the memory, between the second and the last quarter of the time
SECONDS = 300  # until the server answers
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}# "
KINDS = {
    "whole": 4,
    "stream": 4,
    "chat": 2,
    "left": 3,
    "not waited for": 1,
    "too long": 1,
    "bad": 2,
}
JSON = {"content-type": "application/json"}
BAD = (
    b"",
    b"[]",
    b"null",
    b"\xff\xfe{}",
    b'{"model": "OUT", "prompt": "x"',
    b'{"model": "OUT", "prompt": "x", "max_tokens": 4,}',
    *(
        json.dumps({"model": "OUT", "prompt": "x", "max_tokens": 4} | wrong).encode()
        for wrong in (
            {"max_tokens": "many"},
            {"max_tokens": -1},
            {"temperature": -3},
            {"prompt": {"text": "x"}},
            {"model": "other"},
            {"logprobs": 10**6},
            {"n": 0},
            {"stream": "perhaps"},
        )
    ),
)


@dataclass(frozen=True)
class Server:
    address: str
    process: psutil.Process

    def memory(self) -> float:
        """MiB that its processes hold, pages that they share counted in each."""
        size = 0
        for process in (self.process, *self.process.children(recursive=True)):
            try:
                size += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return size / 2**20

    def running(self) -> float:
        """How many requests it works on or keeps waiting."""
        lines = httpx.get(f"{self.address}/metrics", timeout=60).text.splitlines()
        names = "vllm:num_requests_running", "vllm:num_requests_waiting{"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


@contextmanager
def serve(folder: Path, ranks: int) -> Iterator[Server]:
    """The server of docs/serving.md for `folder`, which is called OUT, on so many ranks."""
    command = command_in_docs("python -m vllm.entrypoints.openai.api_server")
    assert command[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert command[-2:] == ["--tensor-parallel-size", "2"] and "OUT" in command
    port, cores = free_port(), range(ranks if (os.cpu_count() or 1) >= ranks else 1)
    with tempfile.TemporaryDirectory() as directory:
        template, log = Path(directory, "chat.jinja"), Path(directory, "log")
        template.write_text(TEMPLATE)
        here = ["--port", str(port), "--dtype", "float32", "--chat-template", str(template)]
        small = ["--enforce-eager", "--gpu-memory-utilization", "0.1", "--max-num-seqs", "8"]
        bound = "|".join(str(rank % len(cores)) for rank in range(ranks))
        env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": bound}
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with log.open("w") as out:
            server = subprocess.Popen(
                [sys.executable, *command[1:-1], str(ranks), *here, *small],
                cwd=folder.parent,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        started = Server(f"http://127.0.0.1:{port}", psutil.Process(server.pid))
        try:
            end = time.monotonic() + SECONDS
            while True:
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
                try:
                    httpx.get(f"{started.address}/health", timeout=60)
                    break
                except httpx.TransportError:
                    time.sleep(1)
            yield started
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


@dataclass
class Seen:
    """What clients met."""

    events: list[str] = field(default_factory=list)  # kinds of requests, and what came of them
    answers: list[tuple[str, int, list[int]]] = field(default_factory=list)  # prompt, length, ids
    faults: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


def traffic(server: Server, seconds: float, seed: int, clients: int = 12) -> Seen:
    """Let so many clients, more than the server runs at a time, send requests."""
    seen, end = Seen(), time.monotonic() + seconds
    texts = [text for _, text in documents(HELD_OUT) if len(text) > 2000][:40]
    chance = random.Random(seed)
    starts = [(text, chance.randrange(len(text) - 500)) for text in texts]
    prompts = [text[start : start + chance.randrange(1, 200)] for text, start in starts]

    def client(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        with httpx.Client(base_url=f"{server.address}/v1", timeout=120) as http:
            while time.monotonic() < end:
                (kind,) = chance.choices(list(KINDS), list(KINDS.values()))
                try:
                    fault = send(kind, http, chance, prompts, seen)
                except httpx.TransportError as error:  # there is nobody to ask any more
                    seen.faults.append(f"{kind}: {error!r}")
                    return
                except (httpx.HTTPError, LookupError, ValueError) as error:
                    fault = repr(error)
                seen.events.append(kind)
                if fault:
                    seen.faults.append(f"{kind}: {fault}")

    with ThreadPoolExecutor(clients) as pool:
        sent = [pool.submit(client, number) for number in range(clients)]
        while time.monotonic() < end:
            seen.memory.append(server.memory())
            time.sleep(min(2, seconds / 40))
        for one in sent:
            one.result()
    end = time.monotonic() + 20
    while (left := server.running()) and time.monotonic() < end:
        time.sleep(0.5)
    if left:
        seen.faults.append(f"{left:g} requests run on though nobody waits for them")
    return seen


def send(
    kind: str, http: httpx.Client, chance: random.Random, prompts: list[str], seen: Seen
) -> str | None:
    """One request; what is wrong with how it was taken."""
    prompt, count = chance.choice(prompts), chance.randrange(1, MOST + 1)
    if kind in ("bad", "too long"):
        long = {"model": "OUT", "prompt": prompt + "x = 1\n" * 300, "max_tokens": count}
        body = json.dumps(long).encode() if kind == "too long" else chance.choice(BAD)
        answer = http.post("completions", content=body, headers=JSON)
        refused = 400 <= answer.status_code < 500 and "error" in answer.json()
        return None if refused else f"{body[:80]!r}: {answer.status_code} {answer.text[:200]}"
    request: dict[str, Any] = {"model": "OUT", "temperature": 0, "return_token_ids": True}
    if kind == "chat":
        words = {"messages": [{"role": "user", "content": prompt}], "max_tokens": count}
        answer = http.post("chat/completions", json=request | words)
        ids = answer.raise_for_status().json()["choices"][0]["token_ids"]
        seen.answers.append((f"# user: {prompt}\n# ", count, ids))
        return None
    request |= {"prompt": prompt, "max_tokens": count}
    if kind == "whole":
        ids = http.post("completions", json=request).raise_for_status().json()
        seen.answers.append((prompt, count, ids["choices"][0]["token_ids"]))
        return None
    if kind == "not waited for":
        try:
            http.post("completions", json=request, timeout=httpx.Timeout(60, read=0.02))
        except httpx.ReadTimeout:
            seen.events.append("cancelled")
        return None
    ids, leave = [], chance.randrange(1, count + 1) if kind == "left" else MOST + 1
    with http.stream("POST", "completions", json=request | {"stream": True}) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                ids += json.loads(line[6:])["choices"][0].get("token_ids") or []
            if len(ids) >= leave:
                seen.events.append("cancelled")
                break
    # Of a stream that was left, what came until then counts.
    seen.answers.append((prompt, len(ids) if kind == "left" else count, ids))
    return None


class Offline:
    """What transformers writes, greedily, with the same checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load(folder, dtype="float32")
        self.known: dict[str, tuple[Any, list[int]]] = {}

    def difference(self, prompt: str, count: int, ids: list[int]) -> float:
        """0.0 for the same tokens, or how much better the best is where they part; inf where the
        answer has another length, or a token that is not among the two best."""
        ends = self.model.generation_config.eos_token_id
        if prompt not in self.known:
            prompt_ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                whole = self.model.generate(prompt_ids, max_new_tokens=MOST, do_sample=False)
            new = whole[0, prompt_ids.shape[1] :].tolist()
            self.known[prompt] = prompt_ids, [token for token in new if token != ends]
        prompt_ids, best = self.known[prompt]
        ids = [token for token in ids if token != ends]
        places = [at for at, (a, b) in enumerate(zip(ids, best, strict=False)) if a != b]
        if not places:
            return 0.0 if len(ids) == min(count, len(best)) else float("inf")
        text = torch.cat([prompt_ids, torch.tensor([best[: places[0]]], dtype=torch.long)], 1)
        with torch.inference_mode():
            scores = self.model(text).logits[0, -1]
        top = scores.topk(2)
        among = ids[places[0]] in top.indices.tolist()
        return float(top.values[0] - top.values[1]) if among else float("inf")


def judge(seen: Seen, folder: Path) -> None:
    """Compare all answers, and the memory in the second and in the last quarter of the time."""
    offline = Offline(folder)
    for prompt, count, ids in seen.answers:
        difference = offline.difference(prompt, count, ids)
        if 0 < difference <= NEAR:
            seen.events.append("near tie")
        elif difference:
            seen.faults.append(f"{prompt[-40:]!r}, {count} tokens: differs by {difference:.1g}")
    early, late = quarters(seen.memory)
    if late > early * (1 + GROWTH):
        seen.faults.append(f"memory grew from {early:.0f} to {late:.0f} MiB")


def quarters(samples: list[float]) -> tuple[float, float]:
    """The medians of the second and of the last quarter."""
    size = len(samples) // 4
    return median(samples[size : 2 * size + 1]), median(samples[-size - 1 :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="add the counts to the ledger")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory, "OUT")
        convert(model_folder(), PLAN, folder, dtype="float32")
        with serve(folder, options.ranks) as server:
            seen = traffic(server, 60 * options.minutes, options.seed)
        judge(seen, folder)
    early, late = quarters(seen.memory)
    print(f"memory: {early:.0f} MiB in the second quarter of the time, {late:.0f} in the last")
    for fault, times in Counter(seen.faults).most_common(20):
        print(f"{times} x {fault}")
    counts = dict(Counter(seen.events))
    print(f"seed {options.seed}: {len(seen.answers)} answers compared; {counts}")
    if options.record:
        sys.path.append(str(Path(__file__).parents[1] / "fuzz"))
        from ledger import add

        memory = {"early_mib": round(early), "late_mib": round(late)}
        add("load", options.seed, counts, len(seen.faults), memory=memory)
    return bool(seen.faults)


if __name__ == "__main__":
    sys.exit(main())
