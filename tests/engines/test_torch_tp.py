"""Converted checkpoints over several processes: the same logits, and as few collectives as due.

The processes talk over gloo. One torchrun loads all checkpoints of a test, for the time it takes.
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

from abreast.checkpoint.tensors import open_checkpoint
from abreast.convert.rewrite import convert
from abreast.engines.torch_tp import ParallelError, check_degree, load_parallel
from abreast.errors import AbreastError
from abreast.model.grouping import load

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
import abreast.modeling
from abreast.engines.torch_tp import load_parallel

job = json.loads(sys.argv[1])
torch.set_num_threads(1)
ids = torch.tensor(job["ids"])
sent = []
batch = dist.batch_isend_irecv
dist.batch_isend_irecv = lambda operations: (sent.extend(operations), batch(operations))[1]
results = {}
for folder in job["folders"]:
    model = load_parallel(folder, dtype="float32")
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits
        step = model(ids[:, :-1], use_cache=True)
        del sent[:]
        with CommDebugMode() as counter:
            last = model(ids[:, -1:], past_key_values=step.past_key_values, use_cache=True)
        counts = {str(k).split(".")[-1]: v for k, v in counter.get_comm_counts().items()}
        counts["p2p"] = len(sent)
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )
    results[folder] = {
        "logits": logits, "cached": last.logits, "text": text, "counts": counts,
        "numel": sum(
            (p.to_local() if hasattr(p, "to_local") else p).numel()
            for p in model.model.layers.parameters()
        ),
    }
torch.save(results, job["results"] + "." + str(dist.get_rank()))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def on_ranks(tmp_path) -> Callable[..., list[dict[str, Any]]]:
    """Load checkpoints on `world` ranks and run `ids`; every rank's results, by folder."""

    def run(folders: list[Path], ids: torch.Tensor, world: int) -> list[dict[str, Any]]:
        worker = tmp_path / "worker.py"
        worker.write_text(WORKER)
        job = {
            "folders": [str(folder) for folder in folders],
            "ids": ids.tolist(),
            "results": str(tmp_path / "results"),
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        done = subprocess.run(
            [sys.executable, *launcher, str(worker), json.dumps(job)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return [torch.load(f"{job['results']}.{rank}") for rank in range(world)]

    return run


def expected(folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model = load(folder, dtype="float32")[0]
    with torch.inference_mode():
        return {
            "logits": model(ids, use_cache=False).logits,
            "text": model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            ),
        }


def reductions(counts: dict[str, int]) -> int:
    return sum(
        count for name, count in counts.items() if "all_reduce" in name or "allreduce" in name
    )


def check(folders: list[Path], ranks: list[dict[str, Any]], ids: torch.Tensor) -> None:
    for folder in folders:
        want = expected(folder, ids)
        extent = want["logits"].max() - want["logits"].min()
        for rank in ranks:
            got = rank[str(folder)]
            assert (got["logits"] - want["logits"]).abs().max() <= 1e-5 * extent, folder
            assert (got["cached"] - want["logits"][:, -1:]).abs().max() <= 1e-5 * extent, folder
            assert torch.equal(got["text"], want["text"]), folder


IDS = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_two_ranks(tiny_checkpoint, tmp_path, on_ranks):
    original = tiny_checkpoint()
    biased = tiny_checkpoint(biases=True)
    headed = tiny_checkpoint("qwen3", head_dim=16)
    plans = {
        "lp": (original, "1+2 3+4"),
        "cqil": (original, "1|2 3|4"),
        "bypass": (original, "1|2:1 3|4"),
        "mixed": (biased, "1|2:1 3+4"),
        "qwen3": (headed, "1|2 3+4"),
        "granite": (tiny_checkpoint("granite"), "1|2 3|4"),
        "ff": (biased, "1~2 3|4"),
    }
    for name, (source, plan) in plans.items():
        convert(source, plan, tmp_path / name)
    folders = [original, *(tmp_path / name for name in plans)]
    ranks = on_ranks(folders, IDS, 2)
    check(folders, ranks, IDS)
    counts = [ranks[0][str(folder)]["counts"] for folder in folders]
    # A token costs two for every single layer and every lp group, one for a cqil group, and one for
    # the embedding, which is split by vocabulary.
    assert [reductions(found) for found in counts] == [
        6 * 2 + 1,  # so a sequential pair costs 4,
        2 * 2 + 2 * 2 + 1,  # an lp pair 2,
        2 * 2 + 2 * 1 + 1,  # a cqil pair 1.
        2 * 2 + 2 * 1 + 1,
        2 * 2 + 1 + 2 + 1,
        2 * 2 + 1 + 2 + 1,
        2 * 2 + 2 * 1 + 1,
        2 * 2 + 3 + 1 + 1,  # and an ff pair 3: each attention one, the FFNs together one
    ]
    assert [found["p2p"] for found in counts] == [0, 0, 0, 1, 1, 0, 0, 0]
    # Each holds half of the matrices, and the norms.
    for folder in folders:
        whole = sum(p.numel() for p in load(folder)[0].model.layers.parameters())
        for rank in ranks:
            assert 0.5 <= rank[str(folder)]["numel"] / whole < 0.53


@pytest.mark.slow
def test_four_ranks(tiny_checkpoint, tmp_path, on_ranks):
    """As many ranks as members, and twice as many, which share a member two by two."""
    original = tiny_checkpoint(num_attention_heads=8, num_key_value_heads=4, biases=True)
    plans = {"lp": "1+2+3+4", "four": "1|2|3|4:2", "pairs": "1|2 3|4", "bypass": "1|2:1 3|4:1"}
    for name, plan in plans.items():
        convert(original, plan, tmp_path / name)
    folders = [original, *(tmp_path / name for name in plans)]
    ranks = on_ranks(folders, IDS, 4)
    check(folders, ranks, IDS)
    counts = [ranks[1][str(folder)]["counts"] for folder in folders]
    assert [reductions(found) for found in counts] == [
        6 * 2 + 1,
        2 * 2 + 2 + 1,
        2 * 2 + 1 + 1,
        # Those that share a member reduce its attention among themselves: a second one, of two.
        2 * 2 + 2 * 2 + 1,
        2 * 2 + 2 * 2 + 1,
    ]
    # Rank 1 of "four" is member 1: sends to 2 and 3, hears from 0; of "bypass" a half of member 0.
    assert [found["p2p"] for found in counts] == [0, 0, 3, 0, 2]


@pytest.mark.parametrize(
    ("plan", "world", "message"),
    [
        ("1|2|3 4|5", 2, "a cqil group of 3 layers runs on 3 processes or a multiple"),
        ("1|2", 3, "runs on 2 processes or a multiple"),
        ("1+2", 3, "3 processes cannot share"),
        ("1+2", 8, "8 processes cannot share 2"),
    ],
)
def test_other_degrees_are_refused(tiny_checkpoint, tmp_path, plan, world, message):
    convert(tiny_checkpoint(), plan, tmp_path / "out", force=True)
    config = open_checkpoint(tmp_path / "out").config
    with pytest.raises(ParallelError, match=message):
        check_degree(config, world)
    check_degree(config, 1)


def test_groups_with_post_norms_and_sequential_prefill_are_refused(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint("olmo2"), "1+2", tmp_path / "out")
    config = open_checkpoint(tmp_path / "out").config
    with pytest.raises(ParallelError, match="norms after a branch"):
        check_degree(config, 2)
    plain = open_checkpoint(tiny_checkpoint()).config
    with pytest.raises(ParallelError, match="sequential prefill"):
        check_degree({**plain, "abreast_prefill": "sequential"}, 2)


def test_unknown_dtype_and_missing_gpu_are_one_line(tiny_checkpoint, monkeypatch):
    with pytest.raises(AbreastError, match="dtype 'int7' is not one of float32"):
        load_parallel(tiny_checkpoint(), dtype="int7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParallelError, match="no CUDA device here"):
        load_parallel(tiny_checkpoint(), device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ParallelError, match="hide the GPU"):
        load_parallel(tiny_checkpoint(), device="cpu")


def test_one_process_loads_the_whole_model(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    convert(tiny_checkpoint(), "1|2", tmp_path / "out")
    model = load_parallel(tmp_path / "out", dtype="float32")
    with torch.inference_mode():
        got = model(IDS, use_cache=False).logits
    assert torch.equal(got, expected(tmp_path / "out", IDS)["logits"])
