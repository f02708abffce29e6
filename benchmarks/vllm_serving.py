"""Serving curves: an original and its conversion behind vLLM's OpenAI server, at rising load.

Both servers stay up; at each number of concurrent clients they take turns, in an order that rotates
from round to round. A client sends its next request when its last one has ended. Reported are, as
medians and quartiles over rounds, a round's median time to first token (TTFT), its median gap
between streamed tokens (ITL), its throughput, and the ratios of all three within a round: above 1
where the conversion is faster.

Needs vLLM's environment, .venv-vllm (`make bench` does), and memory for both models. Numbers worth
reporting need a machine to themselves: one GPU or 8 cores, --clients 1,2,4,8,16,32, --requests 4,
--rounds 10, about an hour for a model of 1 B parameters. What runs by default only shows that it
runs. The figure needs altair (the extra `report`): --draw makes it elsewhere, from --out's file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

MEASURES = {"ttft": "time to first token, ms", "itl": "between tokens, ms", "rate": "tokens per s"}


@contextmanager
def server(folder: Path, port: int, options: list[str], log: Path) -> Iterator[str]:
    """The address of a server of this model, once it answers."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", str(port), "--served-model-name", "model", "--no-enable-prefix-caching"]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= os.environ
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"no server for '{folder}':\n{log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


async def load(address: str, clients: int, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Seconds to the first token and between tokens, and tokens per second, of all clients."""
    import openai

    api = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=None)
    first, gaps = list[float](), list[float]()
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(5, 1000) for _ in range(args.prompt)]
        for _ in range(clients * args.requests)
    ]

    async def client() -> None:
        while prompts:
            sent, last = time.perf_counter(), 0.0
            stream = await api.completions.create(
                model="model",
                prompt=prompts.pop(),
                max_tokens=args.tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                now = time.perf_counter()
                (gaps if last else first).append(now - (last or sent))
                last = now

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    await api.close()
    return {
        "ttft": statistics.median(first) * 1e3,
        "itl": statistics.median(gaps or [0.0]) * 1e3,
        "rate": clients * args.requests * args.tokens / seconds,
    }


def measure(models: dict[str, Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of clients and model."""
    names, times = list(models), dict[tuple[int, str], list[dict[str, float]]]()
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        addresses = {
            name: stack.enter_context(
                server(folder, args.port + index, args.server, Path(logs) / name)
            )
            for index, (name, folder) in enumerate(models.items())
        }
        for turn in range(args.rounds + 1):
            for clients in args.clients if turn else args.clients[-1:]:  # the first warms up
                for name in names[turn % 2 :] + names[: turn % 2]:
                    made = asyncio.run(load(addresses[name], clients, args, seed=turn))
                    if turn:
                        times.setdefault((clients, name), []).append(made)
    rows = []
    for clients, name in sorted(times, key=lambda key: (key[0], names.index(key[1]))):
        row: dict[str, Any] = {"clients": clients, "name": name}
        for key in MEASURES:
            mine = [made[key] for made in times[clients, name]]
            base = [made[key] for made in times[clients, names[0]]]
            pairs = zip(mine, base, strict=True)
            gains = [own / other if key == "rate" else other / own for own, other in pairs]
            row |= {key: quartiles(mine), f"{key}_gain": quartiles(gains)}
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> list[float]:
    """The lower one, the median and the upper one."""
    return [round(v, 4) for v in statistics.quantiles(values * 2, n=4, method="inclusive")]


def table(rows: list[dict[str, Any]]) -> str:
    titles = ("TTFT ms", "ITL ms", "tokens/s", *(f"gain in {k}" for k in ("TTFT", "ITL", "rate")))
    lines = ["| clients | model | " + " | ".join(titles) + " |", "|---" * 8 + "|"]
    for row in rows:
        spans = [
            f"{row[key][1]:.{digits}f} ({row[key][0]:.{digits}f}-{row[key][2]:.{digits}f})"
            for key, digits in (("ttft", 1), ("itl", 2), ("rate", 0))
        ]
        spans += ["{1:.2f} ({0:.2f}-{2:.2f})".format(*row[f"{key}_gain"]) for key in MEASURES]
        lines.append(f"| {row['clients']} | {row['name']} | " + " | ".join(spans) + " |")
    return "\n".join(lines) + "\n\nMedian (quartiles) over rounds."


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """All curves in one figure, SVG or PNG: medians, in bands between the quartiles."""
    import altair

    names = list(dict.fromkeys(row["name"] for row in rows))
    colour = altair.Color("name:N").title(None).scale(domain=names, range=["#6a737d", "#0b5cad"])
    ticks = altair.Axis(values=sorted({row["clients"] for row in rows}))
    x = altair.X("clients:Q", axis=ticks).title("concurrent requests").scale(type="log", base=2)
    parts = []
    for key, title in MEASURES.items():
        values = [
            {"clients": row["clients"], "name": row["name"]}
            | dict(zip(("low", "middle", "high"), row[key], strict=True))
            for row in rows
        ]
        chart = altair.Chart(altair.Data(values=values)).encode(x=x, color=colour)
        line = chart.mark_line(point=True).encode(y=altair.Y("middle:Q").title(title))
        band = chart.mark_area(opacity=0.2).encode(y="low:Q", y2="high:Q")
        parts.append(altair.layer(band, line).properties(width=240, height=220))
    altair.hconcat(*parts).save(file)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, help="default: the bundled model")
    parser.add_argument("--converted", type=Path, help="default: its conversion under --plan")
    parser.add_argument("--plan", default="3+4 6+7 9+10")
    parser.add_argument("--clients", type=numbers, default=[1, 4])
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=16, help="to generate")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument(
        "--server",
        type=shlex.split,
        default="--gpu-memory-utilization 0.4",
        help='options of both servers, as --server="--dtype float32 --enforce-eager"',
    )
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    parser.add_argument("--figure", type=Path, help="draw the curves, .svg or .png")
    parser.add_argument("--draw", type=Path, help="measure nothing, take the rows of this JSON")
    args = parser.parse_args()
    if args.draw:
        rows = json.loads(args.draw.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            from abreast.convert import convert
            from abreast.demo import model_folder

            original = args.original or model_folder()
            converted = args.converted or Path(folder) / "converted"
            if args.converted is None:
                convert(original, args.plan, converted)
            rows = measure({"original": original, "conversion": converted}, args)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
