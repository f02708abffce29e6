"""vLLM's own latency benchmark as a subprocess, in any environment that has vLLM.

The command line of vLLM's CPU wheel fails on its package's name. With abreast installed beside such
a vLLM, `python -m abreast.engines.vllm.bench` replaces it and starts the same benchmark.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence

from abreast.checkpoint import scratch
from abreast.errors import AbreastError

ITERATIONS, WARMUP = 5, 2
_ERROR = r"\w(Error|Exception): |out of memory|^Value error, "  # the last is how pydantic goes on


class VllmFailure(AbreastError):
    """vLLM started and failed."""


def latency(
    command: Sequence[str],
    model: str,
    *,
    batch_size: int,
    input_tokens: int,
    output_tokens: int,
    ranks: int = 1,
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> float:
    """Median seconds of one batch from prompt to last token, by `vllm bench latency`.

    command: the words that start vLLM's command line. Start-up and warm-up are not included. Raises
    AbreastError when there is no such command, VllmFailure with vLLM's last error when it fails.
    """
    if not command or shutil.which(command[0]) is None:
        name = command[0] if command else ""
        raise AbreastError(
            f"there is no command '{name}' here; install vLLM in an environment of its own and "
            "name its command with --vllm"
        )
    with scratch("abreast-vllm-") as folder:
        out = folder / "latency.json"
        options = {
            "--model": model,
            "--input-len": input_tokens,
            "--output-len": output_tokens,
            "--batch-size": batch_size,
            "--num-iters-warmup": WARMUP,
            "--num-iters": ITERATIONS,
            "--tensor-parallel-size": ranks,
            "--max-model-len": input_tokens + output_tokens,
            "--dtype": dtype,
            "--seed": seed,
            "--output-json": str(out),
        }
        arguments = [str(word) for option in options.items() for word in option]
        if trust_remote_code:
            arguments.append("--trust-remote-code")
        process = subprocess.run(
            [*command, "bench", "latency", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if process.returncode or not out.is_file():
            reason = last_error(process.stderr)
            if "out of vocabulary" in reason:
                reason = "its benchmark draws token ids up to 10,000, more than the model knows"
            raise VllmFailure(f"vLLM failed on '{model}': {reason}")
        report = json.loads(out.read_text())
    times = report.get("latencies") or [report["avg_latency"]]
    return float(statistics.median(times))


def last_error(stderr: str) -> str:
    """The last error that is not just a report of another process's; out of memory comes first."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(_ERROR, line)]
    memory = [line for line in errors if "memory" in line.lower()]
    causes = [line for line in errors if "Engine core" not in line]
    return (memory[-1:] or causes[-1:] or lines[-1:] or ["it did not say why"])[0]


def _main() -> None:
    from vllm.benchmarks.latency import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    parser.add_argument("words", nargs=2, help="bench latency")
    add_cli_args(parser)
    main(parser.parse_args())


if __name__ == "__main__":
    _main()
