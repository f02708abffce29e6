"""transformers' server on a converted checkpoint, started as docs/serving.md says."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import torch
from agreement import command_in_docs, free_port

from abreast.convert.rewrite import convert
from abreast.demo import model_folder
from abreast.model.grouping import load


@pytest.mark.parametrize("plan", ["2+3 8|9:1"])
def test_completion(tmp_path, plan):
    folder = tmp_path / "OUT"
    convert(model_folder(), plan, folder, dtype="float32")
    command = command_in_docs("python -m abreast.engines.transformers serve")
    assert command[-2] == "--port"
    port = free_port()
    arguments = [*command[1:-1], str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, *arguments, "--device", "cpu"], cwd=tmp_path, stdout=log, stderr=log
        )
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=120)
    prompt = "import os\nimport sys\n\ndef main("
    try:
        start = time.monotonic()
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-5000:]
            assert time.monotonic() - start < 200, (tmp_path / "log").read_text()[-5000:]
            try:
                request = {"model": "OUT", "prompt": prompt, "max_tokens": 12, "temperature": 0}
                answer = client.completions.create(**request)
                break
            except openai.APIConnectionError:
                time.sleep(1)
    finally:
        server.terminate()
        server.wait(30)
    model, tokenizer = load(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        want = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert answer.choices[0].text == tokenizer.decode(want, skip_special_tokens=True)


def test_example_serves():
    """What examples/serve.py prints is what the model writes."""
    script = Path(__file__).resolve().parents[2] / "examples" / "serve.py"
    done = subprocess.run(
        [sys.executable, script, "--prompt", "import os\n"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.startswith("import os\n") and len(done.stdout) > len("import os\n\n")
