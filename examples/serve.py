"""Serve a converted checkpoint with transformers' own server, ask it once, and stop it.

pip install "transformers[serving]"
python examples/serve.py [OUT] [--prompt "import os"]

Without OUT, the bundled model is converted first. The server speaks the OpenAI protocol.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import abreast
from abreast.demo import model_folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_up(url: str, server: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server stopped with status {server.returncode}")
        try:
            urlopen(f"{url}/health", timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(0.2)
    sys.exit(f"no answer from {url} in {seconds:.0f} s")


def complete(url: str, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="a converted checkpoint")
    parser.add_argument("--prompt", default="import os\n")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = str(Path(folder) / "OUT")
            abreast.convert(model_folder(), "5+6 7+8", checkpoint)
        port = free_port()
        # `transformers serve` with the classes of converted models
        command = [sys.executable, "-m", "abreast.engines.transformers", "serve", checkpoint]
        options = ["--port", str(port), "--device", "cpu"]
        server = subprocess.Popen([*command, *options], stdout=sys.stderr)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_up(url, server)
            print(arguments.prompt + complete(url, checkpoint, arguments.prompt))
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
