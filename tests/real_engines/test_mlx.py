"""The format mlx in stock mlx-lm, on one rank and several, against transformers, in float32.

The same 64 greedy tokens, top-5 log probabilities within 1e-3, and as many exchanges as the wirings
promise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from agreement import MLX, answers_of_mlx, compare, free_port, in_mlx_ranks

import abreast
from abreast.convert import convert
from abreast.demo import model_folder
from abreast.model import load
from abreast.plan import Plan

# every wiring, groups of two and of three
PLAN = "1+2 3|4 5|6:1 7~8 9+10+11 12|13|14:1"
TINY = {"num_layers": 17, "tokenizer": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"biases": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 5},
    "qwen3": {"head_dim": 24, "tied": True},
    "gemma3_text": {
        "head_dim": 32,
        "tied": True,
        "sliding_window": 24,
        "query_pre_attn_scalar": 20,
    },
}
PROMPTS = [
    *([3, 4, 5, 6, 7, 8], [5, 99, 7, 30, 22, 1], [5, 99, 7], [47, 24, 12]),
    *([*range(100, 60, -1)], [*range(80, 120)], [17], [*range(20, 127)]),
]


def sums_of(out: Path, ranks: int, unpaired: str, tokens: int = 64) -> dict[str, int]:
    """Check that the ranks write what transformers does; how many exchanges they need."""
    # Three ranks and more wait for each other, on two cores.
    prompts, alone = (PROMPTS, [0, -1]) if ranks < 3 else (PROMPTS[4:6], [])
    answers, sums = answers_of_mlx(out, prompts, tokens, ranks, unpaired, alone)
    compare(out, [*prompts, *(prompts[index] for index in alone)], answers)
    return sums


def exchanges(plan: Plan, unpaired: str) -> int:
    """How many a decoded token takes."""
    count = 0
    for stage in plan.stages:
        group = plan.group_of(stage)
        shards = unpaired == "shard"
        if group is None:
            count += 2 * shards
        elif group.is_in_order:
            count += len(stage) * shards + 1
        else:
            count += 2 if group.ffn_band is None else 1
    return count


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_and_logprobs(tiny_checkpoint, tmp_path, family):
    source, out = tiny_checkpoint(family, **TINY, **FAMILIES[family]), tmp_path / "out"
    convert(source, PLAN, out, form="mlx")
    for ranks, unpaired in ((1, "shard"), (2, "shard"), (2, "replicate")):
        expected = exchanges(Plan.parse(PLAN, 17), unpaired) if ranks > 1 else 0
        assert sums_of(out, ranks, unpaired)["token"] == expected


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_the_bundled_model(tmp_path, ranks):
    several, out = ranks > 1, tmp_path / "out"
    plan = "2+3+4+5 6|7|8|9:2 10~11~12~13" if several else "2+3 4|5 6~7 9|10|11|12:3"
    convert(model_folder(), plan, out, form="mlx", dtype="float32")
    sums = sums_of(out, ranks, "replicate")
    assert sums["token"] == (2 + 1 + 1 if several else 0)
    assert (sums["caches"] < 16) == several


def test_more_ranks_than_members(tiny_checkpoint, tmp_path):
    """Every rank has some heads of every member: cqil then needs a second exchange."""
    source = tiny_checkpoint(num_key_value_heads=4, tokenizer=True)
    convert(source, "1+2 3|4:1", tmp_path / "out", form="mlx")
    assert sums_of(tmp_path / "out", 4, "shard")["token"] == 2 * 2 + 2 + 2


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_prompts_in_the_original_order(tiny_checkpoint, tmp_path, family):
    source, out = tiny_checkpoint(family, **TINY, **FAMILIES[family]), tmp_path / "out"
    convert(source, PLAN, out, form="mlx", prefill="sequential")
    for ranks, unpaired in ((1, "shard"), (2, "shard"), (2, "replicate")):
        sums = sums_of(out, ranks, unpaired, tokens=16)
        assert sums["prompt"] == sums["its end"]
        assert ranks == 1 or sums["prompt"] > sums["token"]


def test_what_ranks_refuse(tiny_checkpoint, tmp_path):
    source, out = tiny_checkpoint(num_key_value_heads=1, tokenizer=True), tmp_path / "out"
    convert(source, "1+2", out, form="mlx")
    script = Path(__file__).with_name("mlx_ranks.py")
    command = [MLX / "python", script, out, "none", "none"]
    for unpaired, ranks, reason in (
        ("shard", 2, "2 ranks cannot share 1 KV heads evenly; use ABREAST_UNPAIRED=replicate"),
        ("replicate", 3, "layers 1 to 2 are a group of 2, too few for 3 ranks"),
        ("halve", 2, "ABREAST_UNPAIRED is 'halve', not one of shard, replicate"),
    ):
        said = in_mlx_ranks(command, tmp_path, ranks, ABREAST_UNPAIRED=unpaired)
        assert [status for status, _ in said] == [2] * ranks
        assert said[0][1].splitlines()[-1].startswith(f"error: {reason}")


def test_ranks_with_different_checkpoints_are_refused(tiny_checkpoint, tmp_path):
    """Of one config, so that only the weights tell them apart."""
    for rank in range(2):
        source = tiny_checkpoint(tokenizer=True, seed=rank)
        convert(source, "1+2", tmp_path / f"out{rank}", form="mlx")
    script = Path(__file__).with_name("mlx_ranks.py")
    started = f'"{MLX}/python" "{script}" "{tmp_path}/out$MLX_RANK" none none'
    said = in_mlx_ranks(["sh", "-c", f"exec {started}"], tmp_path, 2)
    assert [status for status, _ in said] == [2, 2]
    assert re.fullmatch(
        r"error: rank 1 has another checkpoint than rank 0 \(hashes (\w{8}) and (?!\1)\w{8}\); "
        "copy the same one to every machine",
        said[0][1].splitlines()[-1],
    )
    unlike = '[ "$MLX_RANK" = 0 ] || export ABREAST_UNPAIRED=replicate; exec '
    said = in_mlx_ranks(["sh", "-c", unlike + started.replace("$MLX_RANK", "0")], tmp_path, 2)
    assert "error: rank 1 has another ABREAST_UNPAIRED than rank 0" in said[0][1]


DEAL = """
import json, sys
from mlx_model import deal

for members, loads, costs in json.loads(sys.argv[1]):
    print(json.dumps([[len(own) for own in deal(members, loads, *costs)], loads]))
"""


def test_members_are_dealt_by_cost(tmp_path):
    """As torch_tp deals them (tests/engines/test_ranks.py)."""
    cases: list[tuple[int, list[int], list[int]]] = [
        (3, [0, 0], [1, 3]),
        (3, [8, 4], [1, 3]),  # what the first has left
        (3, [100, 0], [1, 3, 1]),
        (5, [0, 0, 0], [1, 3, 1]),
        (6, [9, 0], [1, 3, 3]),
    ]
    command = [MLX / "python", "-c", DEAL, json.dumps(cases)]
    shutil.copy(Path(abreast.__file__).parent / "convert" / "mlx_model.py", tmp_path)
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in made.stdout.splitlines()] == [
        [[2, 1], [8, 4]],
        [[1, 2], [12, 12]],
        [[2, 1], [108, 5]],  # all wait for the slowest of a group, so that one counts first
        [[2, 2, 1], [8, 9, 5]],
        [[3, 3], [21, 15]],
    ]


def test_groups_of_three_are_balanced(tiny_checkpoint, tmp_path):
    source, out = tiny_checkpoint(num_layers=8, tokenizer=True), tmp_path / "out"
    convert(source, "1+2+3 4|5|6", out, form="mlx")
    assert sums_of(out, 2, "replicate", tokens=8)["caches"] == 2 + 3


def test_four_bits(tmp_path):
    """Quantised by mlx-lm: nearly the same, and on two ranks the same as on one."""
    out, small = tmp_path / "out", tmp_path / "small"
    convert(model_folder(), "2+3 4|5:1 6~7", out, form="mlx")
    command = [MLX / "mlx_lm.convert", "--hf-path", out, "--mlx-path", small, "-q", "--q-bits", "4"]
    command += ["--q-group-size", "32", "--trust-remote-code"]
    ((status, output),) = in_mlx_ranks(command, tmp_path, 1)
    assert status == 0, output
    weights = {
        name: sum(f.stat().st_size for f in name.glob("*.safetensors")) for name in (out, small)
    }
    assert weights[small] < 0.35 * weights[out]
    prompts = [[3, 4, 5, 6, 7, 8], [*range(100, 60, -1)]]
    alone, *others = (
        answers_of_mlx(small, prompts, 8, ranks, unpaired)[0]
        for ranks, unpaired in ((1, "shard"), (2, "replicate"))
    )
    for answers in others:
        assert [a["ids"] for a in answers] == [a["ids"] for a in alone]


@pytest.mark.parametrize("ranks", [1, 2])
def test_server(tmp_path, ranks):
    """As docs/serving.md starts it: an OpenAI-compatible server, whose text is that of generate."""
    out, port = tmp_path / "MLX-4BIT", free_port()
    convert(model_folder(), "2+3 4|5:1 6~7", out, form="mlx", dtype="float32")
    serve = [str(MLX / "mlx_lm.server"), "--model", str(out), "--trust-remote-code"]
    launch = [str(MLX / "mlx.launch"), "-n", "2", "--starting-port", str(free_port())]
    launch += ["--env", "ABREAST_UNPAIRED=replicate", "--"]
    command = [*(launch if ranks > 1 else []), *serve, "--port", str(port)]
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    server = subprocess.Popen(
        command, cwd=tmp_path, env=own | {"OMP_NUM_THREADS": "1"}, start_new_session=True
    )
    try:
        question = {"prompt": "import os", "max_tokens": 16, "temperature": 0}
        text = answer(f"http://127.0.0.1:{port}/v1/completions", question)["choices"][0]["text"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    model, tokenizer = load(out)
    ids = tokenizer("import os", return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def answer(url: str, question: dict[str, Any], seconds: float = 120) -> dict[str, Any]:
    """What a server says as soon as it is up."""
    request = urllib.request.Request(url, json.dumps(question).encode())
    request.add_header("Content-Type", "application/json")
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as said:
                return json.load(said)
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
