"""Tensor parallelism: every rank holds a part of each wide layer, and the logits stay the same.

Two processes on the CPU talk over gloo. The worker is a program of its own, so that it can also run
where abreast is not importable and the checkpoint brings the code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from abreast.convert.rewrite import convert
from abreast.model.grouping import load

PLAN = "1+2 3+4"
MEMBERS = 2
WORLD = 2

WORKER = """
import json, sys
import torch
import torch.distributed as dist

job = json.loads(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo")
if job["remote"]:
    sys.modules["abreast"] = None  # an import of abreast fails, installed or not
else:
    import abreast.modeling
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(
    job["folder"], tp_plan="auto", dtype=torch.float32,
    trust_remote_code=job["remote"],
).eval()
assert type(model).__module__.startswith("transformers_modules") == job["remote"], type(model)
ids = torch.tensor(job["ids"])
shapes = {}
for name, parameter in model.named_parameters():
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    shapes[name] = list(local.shape)
with torch.inference_mode():
    logits = model(ids, use_cache=False).logits
    step = model(ids[:, :8], use_cache=True)
    pieces = [step.logits]
    for place in range(8, ids.shape[1]):
        step = model(
            ids[:, place:place + 1], past_key_values=step.past_key_values, use_cache=True
        )
        pieces.append(step.logits)
    text = model.generate(
        ids[:, :8], attention_mask=torch.ones_like(ids[:, :8]), max_new_tokens=8,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )
results = {"logits": logits, "cached": torch.cat(pieces, 1), "text": text, "shapes": shapes}
torch.save(results, job["results"] + "." + str(dist.get_rank()))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def in_parallel(tmp_path) -> Callable[..., list[dict[str, Any]]]:
    """Load a checkpoint on WORLD ranks and run `ids`; return every rank's results."""

    def run(folder: Path, ids: torch.Tensor, *, remote: bool) -> list[dict[str, Any]]:
        worker = tmp_path / "worker.py"
        worker.write_text(WORKER)
        job = {
            "folder": str(folder),
            "ids": ids.tolist(),
            "remote": remote,
            "results": str(tmp_path / "results"),
        }
        paths = [] if remote else [path for path in sys.path if path]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
        done = subprocess.run(
            [sys.executable, *launcher, str(worker), json.dumps(job)],
            env=env,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return [torch.load(f"{job['results']}.{rank}") for rank in range(WORLD)]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "remote"),
    [("llama", False), ("llama", True), ("qwen2", False)],
    ids=["llama-registered", "llama-remote", "qwen2-registered"],
)
def test_two_ranks_give_the_logits_of_one(tiny_checkpoint, tmp_path, in_parallel, family, remote):
    original = tiny_checkpoint(family, head_dim=24)
    convert(original, PLAN, tmp_path / "out")
    ids = torch.randint(3, 128, (2, 14), generator=torch.Generator().manual_seed(0))
    model = load(tmp_path / "out")[0]
    with torch.inference_mode():
        want = model(ids, use_cache=False).logits
        text = model.generate(
            ids[:, :8],
            attention_mask=torch.ones_like(ids[:, :8]),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    ranks = in_parallel(tmp_path / "out", ids, remote=remote)
    extent = want.max() - want.min()
    for rank in ranks:
        for name in ("logits", "cached"):
            assert (rank[name] - want).abs().max() <= 1e-5 * extent, name
        assert torch.equal(rank["text"], text)
        whole = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        for layer, width in enumerate((1, MEMBERS, MEMBERS, 1)):
            for part, side, size in (
                ("self_attn.q_proj", 0, 4 * 24),
                ("self_attn.k_proj", 0, 2 * 24),
                ("self_attn.o_proj", 1, 4 * 24),
                ("mlp.gate_proj", 0, 96),
                ("mlp.down_proj", 1, 96),
            ):
                name = f"model.layers.{layer}.{part}.weight"
                assert whole[name][side] == width * size
                assert rank["shapes"][name][side] == width * size // WORLD, name
